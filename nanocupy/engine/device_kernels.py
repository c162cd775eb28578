"""Which kernel modules the steps of a model need on a card, found without the card and its memory.

So that they can be compiled all at once and beforehand, instead of one by one as steps meet them.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from nanocupy.config import ModelConfig
from nanocupy.engine.binding import bind_calls, run_calls, step_dims
from nanocupy.engine.device_plan import (
    PENALTY_RECORD_WORDS,
    DeviceSettings,
    check_model,
    decode_bucket,
    forward_calls,
    op_sizes,
    table_width,
)
from nanocupy.engine.device_weights import placed_weight
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.step_inputs import bucket, coarse_bucket
from nanocupy.model.weights import weight_layout
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sampling import DecodePlaces
from nanocupy.ops.cuda_sizes import DeviceTraits, fused_bounds, query_buckets, workspace_plan
from nanocupy.ops.kernel_variants import Variant, VariantCollector
from nanocupy.ops.launch_decode_step import table_words
from nanocupy.ops.launch_tall import MIN_ROWS
from nanocupy.ops.launch_wide import TOKENS
from nanocupy.ops.packed_matrix import PackedMatrix


def kernel_variants(
    config: ModelConfig,
    settings: DeviceSettings,
    limits: RunnerLimits,
    traits: DeviceTraits,
    *,
    every_size: bool = False,
) -> list[Variant]:
    """The modules that steps of every kind need, within `limits`, on a card of these traits.

    With `every_size` also those of a short prompt, or end of one: a few more, for which a start
    need not wait. Raises ConfigError for a model that the kernels are not made for.
    """
    check_model(config)
    sizes = op_sizes(config, settings, limits)
    collector = VariantCollector()
    workspaces = {
        name: Outline(*shape) for name, (shape, _) in workspace_plan(sizes, traits).items()
    }
    ops = CudaOps(collector, lambda *args: None, workspaces, sizes, traits)
    weights = {
        weight.name: placed_weight(weight, settings, lambda name, shape: Outline(*shape))
        for weight in weight_layout(config)
    }
    # Layers are alike, but for the form that their weights are stored in.
    kinds: dict[Any, int] = {}
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        forms = (
            (name.removeprefix(prefix), stored)
            for name, stored in settings.quantized.items() if name.startswith(prefix)
        )  # fmt: skip
        kinds.setdefault(frozenset(forms), layer)
    seen = {None, *kinds.values()}
    calls = [call for call in forward_calls(config, settings.cache_dtype) if call.layer in seen]
    for weight in weights.values():
        if isinstance(weight, PackedMatrix):
            codes, scales = Outline(16, weight.shape[1]), Outline(16, 1)
            ops.pack_quantized(codes, scales, scales, 1, weight.format, 1.0, weight.packed)
    fixed = {"N": limits.num_blocks, "P": limits.block_size, "M": table_width(limits)}

    def forward(*counts: int) -> None:
        dims = fixed | step_dims(*counts)
        run_calls(bind_calls(calls, ops, lambda name, shape: Outline(*shape), weights, dims))

    def run_head(count: int) -> None:
        dims = fixed | step_dims(count, count, count, 1)
        run_calls(bind_calls(calls[-1:], ops, lambda name, shape: Outline(*shape), weights, dims))

    most, most_seqs = limits.max_step_tokens, min(limits.max_num_seqs, limits.max_step_tokens)
    counts = {1, min(64, most), *(n for n in (*TOKENS, MIN_ROWS - 1) if n < most), most}
    if every_size:
        counts |= {bucket(n, most) for n in range(1, min(256, most))}
    for num_tokens in sorted(counts):
        forward(num_tokens, 1, 1, num_tokens)
    # Beside prompts few rows or many are sampled, by ops, even where decodes alone are one launch.
    for num in sorted({coarse_bucket(n, most_seqs) for n in range(1, most_seqs + 1)}):
        forward(most, num, num, most)
    # Drafts: several queries a sequence, and every token is a row.
    for queries in query_buckets(sizes.max_queries)[1:]:
        for num in sorted({coarse_bucket(n, most_seqs) for n in range(1, most_seqs + 1)}):
            num_tokens = bucket(min(num * queries, most), most)
            forward(num_tokens, num, min(num_tokens, limits.max_rows), queries)
        for num in sorted({decode_bucket(n, most_seqs) for n in range(1, most_seqs + 1)}):
            num_tokens = bucket(min(num * queries, most), most)
            for bound in fused_bounds(sizes, traits, num, queries):
                forward(num_tokens, num, min(num_tokens, limits.max_rows), queries, bound)
    if limits.max_draft_rows:  # it checks drafts; a draft model only catches up on its own
        row = Outline(1)
        places = DecodePlaces(Outline(1, 1), row, row, row, row, row, Outline(1, 2), 1)
        ops.accept_drafts(row, row, Outline(2), places)
    logits, row = Outline(1, config.vocab_size), Outline(1)
    counts = {*range(1, min(65, most_seqs)), *(n for n in TOKENS if n < most_seqs), most_seqs}
    for num in sorted({decode_bucket(n, most_seqs) for n in counts}):
        if ops.can_step(num):
            # One launch; the first ops of it have been seen above.
            rows, vector = Outline(num, 1), Outline(num)
            batch = {"angles": rows, "slots": vector, "kv_lens": vector, "block_tables": rows}
            buffers = {"x": rows, "logits": rows, "key_cache": Outline(1, 1, 1)}
            ops.decode_step(
                Outline(1, table_words(sizes.layer_format)), row, row, batch, buffers, 0.0, 0.0
            )
            if not ops.step_has_head:
                run_head(num)
            continue
        for bound in (*fused_bounds(sizes, traits, num), limits.max_context + 1):
            forward(num, num, num, 1, bound)
    ops.argmax(logits, row)
    ops.sample(logits, row, row, row, row, row, Outline(1, 2), row)
    ops.penalize_slots(
        logits, row, Outline(2, PENALTY_RECORD_WORDS), Outline(2, -(-config.vocab_size // 8) * 8)
    )
    ops.resolve_tokens(row, row)
    return collector.variants


class Outline:
    """An array's shape, and nothing in it: all that an op looks at before it launches."""

    dtype = strides = None
    data = SimpleNamespace(ptr=0)

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> Outline:
        return Outline(len(range(*part.indices(len(self)))), *self.shape[1:])

    def reshape(self, *shape: Any) -> Outline:
        new = shape[0] if isinstance(shape[0], tuple) else shape
        assert math.prod(new) == math.prod(self.shape)
        return Outline(*new)

    def transpose(self, *axes: int) -> Outline:
        return Outline(*(self.shape[axis] for axis in axes))
