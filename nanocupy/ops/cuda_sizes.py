"""Sizes that the CUDA ops are made for, and the workspaces that follow from them. Pure Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanocupy.kv_types import FP8, is_quantized
from nanocupy.ops import launch_attention_decode as decode
from nanocupy.ops import launch_attention_fused as fused
from nanocupy.ops import launch_decode_step as whole
from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.launch_quantized import PackedFormat
from nanocupy.ops.launch_tall import MIN_ROWS as TALL_ROWS
from nanocupy.ops.launch_tall import uses_tall

TYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, FP8: 4}
ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class DeviceTraits:
    """What the ops must know of a card; bytes of shared memory are those a block can have.

    memory_bytes_per_cycle: what the memory gives in a cycle of the multiprocessors, both at their
    highest clocks; 0 where nobody knows."""

    compute_capability: tuple[int, int]
    num_multiprocessors: int
    max_shared_bytes: int
    force_plain: bool = False  # run the paths of cards below 8.0, for tests
    wgmma: bool = False  # has, and gets builds for, what only compute capability 9.0a has
    whole_steps: bool = True  # a decode step of few sequences may be one launch
    memory_bytes_per_cycle: float = 0.0


@dataclass(frozen=True)
class OpSizes:
    """The largest step: tokens, sequences, sampled rows, and the model's widths. Letters as in
    `ops.interface`; dtypes by name, those of embedding and LM head None where they are `dtype`."""

    max_tokens: int
    max_num_seqs: int
    max_rows: int
    max_context: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: str
    residual_dtype: str
    cache_dtype: str
    max_queries: int = 1  # of a sequence that decodes
    dequantized_size: int = 0  # weights of the largest quantised matrix to unpack; 0 = none is
    ordered_width: int = 0  # inputs of the widest one with an order of its own; 0 = none has
    embed_dtype: str | None = None  # of the embedding's table
    lm_head_dtype: str | None = None  # of the LM head's matrix and of the norm before it
    # What a whole step must know: whether all matrices of all layers are stored alike, their inputs
    # in the natural order; as which codes, if any; and whether the LM head is codes.
    layers_alike: bool = True
    layer_format: PackedFormat | None = None
    coded_head: bool = False
    has_mlp_bias: bool = True  # of gate and up


def workspace_plan(sizes: OpSizes, traits: DeviceTraits) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of every workspace the ops need; `counters`, `step_words` and
    `step_moments` must be zero at first."""
    rows = sizes.max_tokens
    if uses_tall(
        rows, sizes.intermediate_size, sizes.hidden_size, ITEMSIZES[sizes.dtype],
        bias=sizes.has_mlp_bias, wgmma=traits.wgmma and not traits.force_plain,
    ):  # fmt: skip
        rows = TALL_ROWS - 1  # from there on nobody needs what SwiGLU takes
    plan: dict[str, tuple[tuple[int, ...], str]] = {
        "normed": ((sizes.max_tokens * sizes.hidden_size,), sizes.dtype),
        "gate_up": ((rows * 2 * sizes.intermediate_size,), sizes.dtype),
        "product": ((sizes.max_tokens * sizes.hidden_size,), "float32"),
        "head_rows": ((sizes.max_rows * sizes.hidden_size,), sizes.lm_head_dtype or sizes.dtype),
    }
    if sizes.dequantized_size:
        plan["dequantized"] = (sizes.dequantized_size,), sizes.dtype
    if sizes.ordered_width:
        rows = max(sizes.max_tokens, sizes.max_rows)
        plan["ordered"] = (rows * sizes.ordered_width,), sizes.dtype
    keys = values = states = counters = 1
    batch = 1
    while True:
        batch = min(batch, sizes.max_num_seqs)
        parts = shapes.argmax_parts(batch, sizes.vocab_size, traits.num_multiprocessors)
        keys = max(keys, batch * parts)
        for queries in query_buckets(sizes.max_queries):
            launch = decode_launch(sizes, traits, batch, queries, None)
            values = max(values, math.prod(launch.partial_values_shape))
            states = max(states, math.prod(launch.partial_states_shape))
            counters = max(counters, math.prod(launch.counters_shape))
        if batch == sizes.max_num_seqs:
            break
        batch *= 2
    rows = max(sizes.max_rows, sizes.max_num_seqs)
    keys, counters = max(keys, rows), max(counters, rows)
    for num_seqs in range(1, min(whole.BEST_SEQUENCES, sizes.max_num_seqs) + 1):
        launch = step_launch(sizes, traits, num_seqs)
        if launch is not None:
            size = whole.num_words(step_shape(sizes), launch, num_seqs)
            size = max(size, *plan.get("step_words", ((0,), ""))[0])
            plan |= {"step_words": ((size,), "uint64"), "step_moments": ((2,), "uint32")}
    return plan | {
        "argmax_keys": ((keys,), "uint64"),
        "partial_values": ((values,), "float32"),
        "partial_states": ((states,), "float32"),
        "counters": ((counters,), "uint32"),
    }


def step_shape(sizes: OpSizes) -> whole.DecodeStepShape:
    return whole.DecodeStepShape(
        sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size, sizes.num_heads,
        sizes.num_kv_heads, sizes.head_size,
    )  # fmt: skip


def step_launch(
    sizes: OpSizes, traits: DeviceTraits, num_seqs: int
) -> whole.DecodeStepLaunch | None:
    """The launch that does a whole decode step; None where the ops go one by one."""
    types = {sizes.dtype, sizes.residual_dtype, sizes.cache_dtype}
    if traits.compute_capability < (9, 0) or traits.force_plain or not traits.whole_steps:
        return None
    if len(types) > 1 or ITEMSIZES[sizes.dtype] != 2 or num_seqs > whole.BEST_SEQUENCES:
        return None
    if not sizes.layers_alike:
        return None
    return whole.decode_step_launch(
        step_shape(sizes), num_seqs, num_multiprocessors=traits.num_multiprocessors,
        max_shared_bytes=traits.max_shared_bytes, weights=sizes.layer_format,
        has_head=step_has_head(sizes),
        pace=whole.pace_cycles(traits.num_multiprocessors, traits.memory_bytes_per_cycle),
    )  # fmt: skip


def step_has_head(sizes: OpSizes) -> bool:
    """Whether a whole step's launch goes on to the logits: all weights are of its one type."""
    head_dtype = sizes.lm_head_dtype or sizes.dtype
    return sizes.layer_format is None and not sizes.coded_head and head_dtype == sizes.dtype


def query_buckets(max_queries: int) -> list[int]:
    """Queries a sequence that the decode kernel is built for: powers of two."""
    return [n for n in (1, 2, 4, 8) if n < 2 * max_queries]


def decode_launch(
    sizes: OpSizes, traits: DeviceTraits, num_seqs: int, queries: int, num_items: int | None
) -> decode.DecodeLaunch:
    return decode.launch_attention_decode(
        num_seqs, sizes.num_heads, sizes.num_kv_heads, sizes.head_size, queries=queries,
        max_context=sizes.max_context, scalar=TYPE_CODES[sizes.dtype],
        cache=TYPE_CODES[sizes.cache_dtype], compute_capability=traits.compute_capability,
        num_multiprocessors=traits.num_multiprocessors, max_shared_bytes=traits.max_shared_bytes,
        force_plain=traits.force_plain,
        tuning=None if num_items is None else decode.DecodeTuning(num_items=num_items),
    )  # fmt: skip


def fused_bounds(
    sizes: OpSizes, traits: DeviceTraits, num_seqs: int, queries: int = 1
) -> tuple[int, ...]:
    """The contexts up to which the one launch of `attend` differs, for sequences of so many queries
    at most, one of `query_buckets`, rising: none where it is two kernels, and two kernels beyond
    the last."""
    if queries > 1 and is_quantized(sizes.cache_dtype):
        return ()
    if not fused.can_fuse(
        sizes.num_heads, sizes.num_kv_heads, sizes.head_size, TYPE_CODES[sizes.dtype],
        TYPE_CODES[sizes.cache_dtype], traits.compute_capability, traits.force_plain,
    ):  # fmt: skip
        return ()
    return fused.fused_contexts(
        num_seqs, sizes.num_heads, sizes.num_kv_heads, sizes.head_size, traits.num_multiprocessors,
        queries=queries,
    )  # fmt: skip


def kv_len_bound(sizes: OpSizes, traits: DeviceTraits, num_seqs: int, max_kv_len: int) -> int:
    """The bound on contexts to capture a decode step with, where none is longer than max_kv_len
    now: steps of equal bounds have equal launches, so it belongs in a graph's key."""
    bounds = fused_bounds(sizes, traits, num_seqs)
    beyond = max((sizes.max_context, *(n + 1 for n in bounds)))
    return next((n for n in bounds if n >= max_kv_len), beyond)


def fused_launch(
    sizes: OpSizes, traits: DeviceTraits, num_seqs: int, max_kv_len: int, queries: int = 1
) -> fused.FusedLaunch | None:
    """The one launch of `attend`; None where two kernels are better. max_kv_len: a bound on the
    contexts, 0 where there is none; queries: as `fused_bounds`."""
    if not 0 < max_kv_len <= max(fused_bounds(sizes, traits, num_seqs, queries), default=0):
        return None
    return fused.launch_attention_fused(
        num_seqs, sizes.num_heads, sizes.num_kv_heads, sizes.head_size, max_kv_len=max_kv_len,
        num_multiprocessors=traits.num_multiprocessors, max_shared_bytes=traits.max_shared_bytes,
        quantized=is_quantized(sizes.cache_dtype), queries=queries,
    )  # fmt: skip
