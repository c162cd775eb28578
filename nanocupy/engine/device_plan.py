"""What a GPU must hold for a model: the table of all buffers, and how large the cache can be.

Pure planning: nothing is allocated here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from nanocupy.config import EMBEDDING, HEAD_NORM, LM_HEAD, ModelConfig
from nanocupy.cuda.arena import ArenaPlan, BufferSpec
from nanocupy.cuda.device import Device
from nanocupy.engine.binding import step_dims
from nanocupy.engine.decode_state import DecodeState
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.step_inputs import StepShape, query_bucket
from nanocupy.engine.weight_formats import StoredWeight, is_pairs
from nanocupy.errors import CapacityError, ConfigError
from nanocupy.kv_types import SCALE_DTYPE, is_quantized
from nanocupy.model.forward import Buffer, OpCall, decoder_forward
from nanocupy.model.quantize import is_layer_matrix
from nanocupy.model.rope import rope_parameters
from nanocupy.model.weights import Weight, weight_layout
from nanocupy.ops.cuda_sizes import DeviceTraits, OpSizes, step_launch, workspace_plan
from nanocupy.ops.launch_decode_step import table_words
from nanocupy.progress import human_bytes

HEAD_SIZES = (64, 80, 96, 128, 256)
_MAX_CACHE_ROWS = (1 << 32) - 1  # of a layer: the kernels count them in 32 bits
SECOND_LANE = "second."  # before the names of what the second stream has for itself
MAX_UPDATES = 1 << 14  # words of the decode state sent at once
MAX_PENALTY_ENTRIES = 512  # biases and banned ids of a request whose penalties are on the device
PENALTY_RECORD_WORDS = 8 + 2 * MAX_PENALTY_ENTRIES
# Penalties come behind the other inputs of a step, through memory of twice this size: enough for
# the penalised entries of any one sequence.
MIN_INPUT_BYTES = 8 << 20
MIN_STAGING_SIZE = 1 << 20  # 16-bit numbers: room for some rows of codes of any matrix
_INPUTS = (
    "token_ids", "positions", "slots", "rope_lens", "query_starts", "kv_lens", "block_tables",
    "sample_rows",
)  # fmt: skip


@dataclass(frozen=True)
class DeviceSettings:
    """Storage types by name: of weights and activations, of the residual stream, of the cache (a
    quantised one as `kv_types` names it);
    gpu_memory_utilization: the share of the card's free memory to take, weights included;
    two_streams: prompts beside decodes, on a stream and in workspaces of their own; quantized: the
    weights that stay so, by name, as `plan_weight_formats` gives them; embed_dtype, lm_head_dtype:
    of these weights, where it is not dtype. Both are one where the model is tied."""

    dtype: str = "bfloat16"
    residual_dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    gpu_memory_utilization: float = 0.9
    two_streams: bool = False
    quantized: Mapping[str, StoredWeight] = field(default_factory=dict)
    embed_dtype: str | None = None
    lm_head_dtype: str | None = None

    def weight_dtype(self, name: str) -> str:
        """The storage type of a weight of `weight_layout` that is not quantised."""
        own = None
        if name == EMBEDDING:
            own = self.embed_dtype
        elif name in (LM_HEAD, HEAD_NORM):
            own = self.lm_head_dtype
        return own or self.dtype


def check_model(config: ModelConfig) -> None:
    """Raises ConfigError for a model that the kernels are not made for."""
    if config.head_size not in HEAD_SIZES:
        raise ConfigError(
            f"head size {config.head_size}: the kernels are made for "
            f"{', '.join(map(str, HEAD_SIZES))}; run this model with --device cpu"
        )


def plan_limits(
    config: ModelConfig,
    device: Device,
    settings: DeviceSettings,
    *,
    max_context: int,
    max_num_seqs: int,
    max_step_tokens: int,
    block_size: int = 16,
    max_drafts: int = 0,
    max_draft_rows: int = 0,
    draft: tuple[ModelConfig, DeviceSettings] | None = None,
) -> RunnerLimits:
    """Limits whose cache takes what weights and workspaces leave; at most what can be used.

    draft: a draft model that is to have room beside it, and a cache of as many blocks, or of those
    that its context can use. Raises CapacityError where not even one short sequence fits,
    ConfigError for a model that the kernels are not made for.
    """
    check_model(config)
    wanted = 1 + max_num_seqs * -(-max_context // block_size)
    small = RunnerLimits(2, block_size, max_context, max_step_tokens, max_num_seqs)
    block_bytes = config.kv_bytes_per_token(settings.cache_dtype) * block_size
    num_kv_heads = config.num_kv_heads
    of_draft = draft_wanted = draft_block_bytes = 0
    if draft is not None:
        check_model(draft[0])
        own = draft_limits(replace(small, num_blocks=wanted), draft[0])
        draft_wanted = own.num_blocks
        specs = buffer_specs(draft[0], device, draft[1], replace(own, num_blocks=2))
        of_draft = ArenaPlan(specs).total_bytes
        draft_block_bytes = draft[0].kv_bytes_per_token(draft[1].cache_dtype) * block_size
        num_kv_heads = max(num_kv_heads, draft[0].num_kv_heads)
    small = replace(small, max_drafts=max_drafts, max_draft_rows=max_draft_rows)
    fixed = of_draft + ArenaPlan(buffer_specs(config, device, settings, small)).total_bytes
    budget = int(device.free_bytes() * settings.gpu_memory_utilization)
    # Two blocks of each are in `fixed`. The draft model has no use for more than `draft_wanted`.
    num_blocks = 2 + (budget - fixed) // (block_bytes + draft_block_bytes)
    if num_blocks > draft_wanted > 0:
        rest = budget - fixed - (draft_wanted - 2) * draft_block_bytes
        num_blocks = 2 + rest // block_bytes
    num_blocks = min(wanted, num_blocks, _MAX_CACHE_ROWS // (num_kv_heads * block_size))
    if num_blocks < 2:
        share = f", of which {human_bytes(of_draft)} for the draft model" if of_draft else ""
        raise CapacityError(
            f"{device.name}: weights and workspaces need {human_bytes(fixed)}{share}, "
            f"{human_bytes(budget)} may be used; take a smaller model or dtype, lower "
            "max_num_seqs, or raise gpu_memory_utilization"
        )
    return replace(small, num_blocks=num_blocks)


def draft_limits(limits: RunnerLimits, draft: ModelConfig) -> RunnerLimits:
    """Those of the runner of `draft`, a draft model, beside one of `limits`. Of a context shorter
    than the model's, the sequences that outgrow it get no more guesses. Where all of its guesses
    were right it lacks two tokens of a sequence, which are to be no prompt."""
    context = min(limits.max_context, draft.max_context)
    wanted = 1 + limits.max_num_seqs * -(-context // limits.block_size)
    return replace(
        limits, num_blocks=min(wanted, limits.num_blocks), max_context=context, num_host_blocks=0,
        max_drafts=1, max_draft_rows=0,
    )  # fmt: skip


def buffer_specs(
    config: ModelConfig, device: Device, settings: DeviceSettings, limits: RunnerLimits
) -> list[BufferSpec]:
    """The table of everything on the device, by owner."""
    sizes = op_sizes(config, settings, limits)
    width = table_width(limits)
    table = [spec for w in weight_layout(config) for spec in _weight_buffers(w, settings)]
    largest = step_dims(limits.max_step_tokens, limits.max_num_seqs, sizes.max_rows, 1)
    largest |= {"N": limits.num_blocks, "P": limits.block_size, "M": width}
    types = {
        "activation": settings.dtype,
        "residual": settings.residual_dtype,
        "cache": settings.cache_dtype,
        "cache scales": SCALE_DTYPE,
    }
    seen = set(_INPUTS)
    for call in forward_calls(config, settings.cache_dtype):
        for buffer in call.arguments.values():
            if isinstance(buffer, Buffer) and buffer.name not in seen:
                seen.add(buffer.name)
                shape = tuple(largest.get(n, n) for n in buffer.shape)
                owner = "kv cache" if buffer.is_cache else "activations"
                table.append(
                    BufferSpec(buffer.name, shape, types.get(buffer.dtype, buffer.dtype), owner)
                )
    for name, (shape, dtype) in workspace_plan(sizes, device.traits).items():
        table.append(BufferSpec(name, shape, dtype, "workspaces"))
    state = DecodeState(limits.max_num_seqs, width, limits.block_size)
    inputs = StepShape(
        limits.max_step_tokens,
        limits.max_num_seqs,
        width,
        limits.max_rows,
        1,
    )
    table += [
        BufferSpec("decode_state", (state.num_words,), "int32", "batch"),
        BufferSpec("updates", (MAX_UPDATES, 2), "int32", "batch"),
        BufferSpec("sampled", (2 * limits.max_rows,), "int32", "batch"),  # of either lane
        BufferSpec("place_numbers", (limits.max_num_seqs + 1,), "int32", "batch"),
        BufferSpec("inputs", (inputs.num_bytes + 2 * MIN_INPUT_BYTES,), "uint8", "batch"),
    ]
    # Of each request that penalises, and of nobody: see kernels_cu/penalties.cu.
    num_slots, counts_width = 1 + limits.max_num_seqs, -(-config.vocab_size // 8) * 8
    table += [
        BufferSpec("penalty_records", (num_slots, PENALTY_RECORD_WORDS), "int32", "penalties"),
        BufferSpec("penalty_counts", (num_slots, counts_width), "uint16", "penalties"),
    ]
    if step_launch(sizes, device.traits, 1) is not None:
        shape = (config.num_layers, table_words(sizes.layer_format))
        table.append(BufferSpec("step_layers", shape, "uint64", "batch"))
    if settings.two_streams:
        own = lane_buffers(config, sizes, device.traits)
        table += [replace(s, name=SECOND_LANE + s.name) for s in table if s.name in own]
    return table


def _weight_buffers(weight: Weight, settings: DeviceSettings) -> Iterator[BufferSpec]:
    """What a weight takes: itself, or its packed codes and the order of its inputs."""
    name, stored = f"weight.{weight.name}", settings.quantized.get(weight.name)
    if stored is None:
        yield BufferSpec(name, weight.shape, settings.weight_dtype(weight.name), "weights")
        return
    num_rows, num_inputs = weight.shape
    shape = stored.packed(num_inputs).packed_shape(num_rows, num_inputs, is_pairs(weight.name))
    yield BufferSpec(name, shape, "uint8", "weights")
    if stored.has_order:
        yield BufferSpec(order_name(name), (num_inputs,), "int32", "weights")


def order_name(buffer: str) -> str:
    """The buffer beside a weight's that has the order of its inputs."""
    return f"{buffer}.order"


def lane_buffers(config: ModelConfig, sizes: OpSizes, traits: DeviceTraits) -> frozenset[str]:
    """Buffers of which each stream that computes has its own."""
    written = {
        buffer.name
        for call in forward_calls(config, sizes.cache_dtype)
        for buffer in call.arguments.values()
        if isinstance(buffer, Buffer) and not buffer.is_cache
    }
    return frozenset(written - {"inv_freq"}) | workspace_plan(sizes, traits).keys() | {"inputs"}


def forward_calls(config: ModelConfig, cache_dtype: str) -> list[OpCall]:
    """The model's forward over a cache of this dtype."""
    return decoder_forward(
        config, rope_parameters(config), quantized_cache=is_quantized(cache_dtype)
    )


def op_sizes(config: ModelConfig, settings: DeviceSettings, limits: RunnerLimits) -> OpSizes:
    head_dtype = settings.weight_dtype(LM_HEAD)
    assert not config.tied_lm_head or head_dtype == settings.weight_dtype(EMBEDDING), "one matrix"
    shapes = {w.name: w.shape for w in weight_layout(config) if w.name in settings.quantized}
    unpacked = [math.prod(shapes[n]) for n, s in settings.quantized.items() if s.is_unpacked]
    ordered = [shapes[n][1] for n, s in settings.quantized.items() if s.has_order]
    layers = [w for w in weight_layout(config) if is_layer_matrix(w.name)]
    stored = [settings.quantized.get(w.name) for w in layers]
    forms = {
        None if s is None else s.packed(w.shape[1]) for w, s in zip(layers, stored, strict=True)
    }
    return OpSizes(
        max_tokens=limits.max_step_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_rows=limits.max_rows,
        max_context=limits.max_context,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        dtype=settings.dtype,
        residual_dtype=settings.residual_dtype,
        cache_dtype=settings.cache_dtype,
        max_queries=query_bucket(1 + limits.max_drafts),
        # Codes come to the card through the same memory, as many at a time as it holds.
        dequantized_size=max([MIN_STAGING_SIZE, *unpacked]) if shapes else 0,
        ordered_width=max(ordered, default=0),
        embed_dtype=settings.weight_dtype(EMBEDDING),
        lm_head_dtype=head_dtype,
        layers_alike=len(forms) == 1 and not any(s is not None and s.has_order for s in stored),
        layer_format=next(iter(forms)) if len(forms) == 1 else None,
        coded_head=LM_HEAD in settings.quantized,
        has_mlp_bias=config.has_mlp_bias,
    )


def table_width(limits: RunnerLimits) -> int:
    return -(-limits.max_context // limits.block_size)


def decode_bucket(num_seqs: int, max_num_seqs: int) -> int:
    """The size of the graph that `num_seqs` decode in: 1, 2, 4, 8, then multiples of 8, of 16
    from 64 on."""
    if num_seqs <= 8:
        size = 1 << (num_seqs - 1).bit_length()
    else:
        step = 8 if num_seqs <= 64 else 16
        size = -(-num_seqs // step) * step
    return min(size, max_num_seqs)
