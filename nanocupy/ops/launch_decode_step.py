"""How decode_step is launched: a whole step of few sequences by blocks that stay for all of it.

Pure arithmetic, from the model's widths and what the card has. The numbers mirror
kernels_cu/decode_step*.cuh, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanocupy.ops.launch_quantized import CHUNK, STRIP, PackedFormat

FILE = "decode_step.cu"
ENTRY = "decode_step"
LAYER_POINTERS = (
    "attn_norm.weight", "qkv.weight", "qkv.bias", "q_norm.weight", "k_norm.weight", "key_cache",
    "value_cache", "o.weight", "o.bias", "ffn_norm.weight", "gate_up.weight", "gate_up.bias",
    "down.weight", "down.bias",
)  # fmt: skip

MAX_SEQUENCES = 4
# Up to which the kernel is the fastest way: what blocks hand to each other grows with their number.
BEST_SEQUENCES = 2
MAX_PARTS = 16  # of a context
BLOCK_THREADS = 384
STAGE_INPUTS = 1024
_UNIT_ROWS = 8  # of 16 bits; of codes a unit is a strip
_USER_WARPS = 8
# Of 16 KB, about: of half the size there are twice as many.
_MAX_STAGES = 10
_GOOD_STAGES, _MIN_STAGES = 6, 4  # with fewer, reading stops where blocks wait
# Cycles from 16 KB of a block's weights to the next: the kernel's own, PACE of
# decode_step_weights.cuh; and with int4 at most, where 8 layers of Llama-3.1-8B took 0.866 ms a
# step at 850, 0.872 at 1000 and 0.873 at 1200 on an H100.
_PACE, _MOST_INT4_PACE = 1200, 850
# What a pace is of the cycles in which the memory gives every multiprocessor 16 KB, both at their
# highest clocks, by these cycles: of an H200 and an H100, and in proportion between them. On an
# H200 Llama-3.1-8B took 5.21 ms a step at 1200, 4.23 at 900, 3.83 at 750 and 3.91 at 600.
_PACE_SHARES = (889, 0.843), (1277, 0.94)
_PACE_STEP = 150  # few builds for all cards
_MAX_HEADS_PER_GROUP = 8
_STATIC_BYTES = 1 << 11  # of shared memory: the kernel's own, and what the driver takes


@dataclass(frozen=True)
class DecodeStepTuning:
    """What a bench may vary; None leaves the choice to the rules below.

    ring_stages   stages of weights on their way: 16 KB, of int4 8 KB, and their scales
    attend_stages steps of 16 positions that a warp has under way
    part_tokens   positions that a part of a context has at least
    max_parts     most parts of a context
    """

    ring_stages: int | None = None
    attend_stages: int = 1
    part_tokens: int | None = None
    max_parts: int | None = None


@dataclass(frozen=True)
class DecodeStepShape:
    """The widths of a model: all of them are numbers of elements."""

    hidden_size: int
    ffn_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_size


@dataclass(frozen=True)
class DecodeStepLaunch:
    """One launch; `macros` come on top of SCALAR and HEAD_SIZE."""

    macros: dict[str, int]
    grid: tuple[int]
    block: int
    shared_bytes: int
    tile_inputs: int
    max_parts: int
    part_tokens: int


def pace_cycles(num_multiprocessors: int, memory_bytes_per_cycle: float) -> int:
    """The pace for a card whose memory gives so many bytes in a cycle of its multiprocessors, 0
    where nobody knows. No card gets a slower one than the H100, for which it was found."""
    if memory_bytes_per_cycle <= 0:
        return _PACE
    cycles = num_multiprocessors * (16 << 10) / memory_bytes_per_cycle
    (low, low_share), (high, high_share) = _PACE_SHARES
    part = min(1.0, max(0.0, (cycles - low) / (high - low)))
    pace = cycles * (low_share + part * (high_share - low_share))
    return min(_PACE, _PACE_STEP * max(2, round(pace / _PACE_STEP)))


def decode_step_launch(
    shape: DecodeStepShape,
    num_sequences: int,
    *,
    num_multiprocessors: int,
    max_shared_bytes: int,
    weights: PackedFormat | None = None,
    has_head: bool = True,
    pace: int = _PACE,
    tuning: DecodeStepTuning | None = None,
) -> DecodeStepLaunch | None:
    """The launch for `num_sequences` sequences of one token each, None where the kernel cannot do
    the model. max_shared_bytes: what a block can have; weights: the form of every layer's
    matrices, None where they are of 16 bits; has_head: the launch goes on to the logits, as only
    one of 16 bits can, with a head of 16 bits; pace: `pace_cycles` of the card.

    Types and compute capability are the caller's to look at: 16 bits all of them, and 9.0.
    """
    tuning = tuning or DecodeStepTuning()
    if not 1 <= num_sequences <= MAX_SEQUENCES:
        return None
    widths = (shape.hidden_size, shape.ffn_size, shape.q_size)
    heads_per_group = shape.num_heads // shape.num_kv_heads
    if any(n % 32 for n in widths) or shape.head_size % 16 or shape.head_size > 256:
        return None
    if heads_per_group > _MAX_HEADS_PER_GROUP:
        return None
    # A block keeps the sums, and the residual stream, of all its outputs of that width.
    unit_rows = STRIP if weights else _UNIT_ROWS
    units = -(-shape.hidden_size // unit_rows)
    if -(-units // num_multiprocessors) * unit_rows > group_rows(num_sequences, weights):
        return None
    # All inputs in one tile where the ring has room for enough stages beside it, else in several.
    fixed = memory_bytes(shape, num_sequences, 0, tuning.attend_stages, weights)
    scale = max(1, round((16 << 10) / stage_bytes(weights)))
    best: tuple[int, int] | None = None
    for tile in range(_whole(max(widths)), _whole(shape.hidden_size) - 1, -STAGE_INPUTS):
        inputs = input_bytes(num_sequences, min(tile, max(widths)), weights)
        room = max_shared_bytes - _STATIC_BYTES - fixed - inputs
        stages = min(room // (stage_bytes(weights) + 16), tuning.ring_stages or scale * _MAX_STAGES)
        stages -= stages % 2  # a place in the ring is always the same group's of warps
        if best is None or stages > best[1]:
            best = tile, stages
        if stages >= scale * _GOOD_STAGES:
            break
    if best is None or best[1] < (tuning.ring_stages or scale * _MIN_STAGES):
        return None
    tile_inputs, stages = best
    if weights and weights.kind == "int4":
        pace = min(pace, _MOST_INT4_PACE)
    items = num_sequences * shape.num_kv_heads
    max_parts = tuning.max_parts or max(1, min(MAX_PARTS, num_multiprocessors // items))
    return DecodeStepLaunch(
        macros={
            "SEQUENCES": num_sequences,
            "RING_STAGES": stages,
            "STAGES": tuning.attend_stages,
            "MAX_NORM_INPUTS": shape.hidden_size,
            **(weights.macros if weights else {} if has_head else {"HAS_HEAD": 0}),
            **({"PACE": pace} if pace != _PACE else {}),
        },
        grid=(num_multiprocessors,),
        block=BLOCK_THREADS,
        shared_bytes=memory_bytes(shape, num_sequences, stages, tuning.attend_stages, weights)
        + input_bytes(num_sequences, min(tile_inputs, max(widths)), weights),
        tile_inputs=tile_inputs,
        max_parts=max_parts,
        part_tokens=tuning.part_tokens or 128,
    )


def group_rows(num_sequences: int, weights: PackedFormat | None = None) -> int:
    """GROUP_ROWS of decode_step_memory.cuh."""
    if weights is not None and num_sequences == 1:
        return 256
    return 128 if num_sequences <= 2 else 64


def stage_bytes(weights: PackedFormat | None) -> int:
    """STAGE_BYTES of decode_step_pipeline.cuh."""
    if weights is None:
        return _UNIT_ROWS * (2 * STAGE_INPUTS + 64)
    return STAGE_INPUTS // CHUNK * weights.chunk_bytes


def table_words(weights: PackedFormat | None) -> int:
    """uint64 words of a row of the table of layers: StepLayer of decode_step_memory.cuh."""
    return len(LAYER_POINTERS) + (2 if weights else 0)


def memory_bytes(
    shape: DecodeStepShape,
    num_sequences: int,
    ring_stages: int,
    attend_stages: int,
    weights: PackedFormat | None = None,
) -> int:
    """StepMemory of decode_step_memory.cuh."""
    chunks = shape.head_size // 8  # of 16 bytes; a row that is not swizzled has an odd number
    row_bytes = 16 * (chunks if chunks % 8 == 0 else chunks | 1)
    size = ring_stages * (stage_bytes(weights) + 16)
    rows = group_rows(num_sequences, weights)
    size += (1 if rows == 256 else 2) * 4 * rows * _USER_WARPS * num_sequences
    size += 2 * shape.hidden_size
    size += _USER_WARPS * attend_stages * 2 * 16 * row_bytes + 16 * row_bytes
    size += (2 + 2) * 2 * shape.head_size + num_sequences * 4 * shape.head_size
    size += 2 * 8 * table_words(weights) + _USER_WARPS * 8 * 2 * 4 + 40 + 48 + 5 * 8 + 2 * 16
    return -(-size // 128) * 128


def input_bytes(num_sequences: int, num_inputs: int, weights: PackedFormat | None = None) -> int:
    """The rows of inputs behind it, TileRows of decode_step_inputs.cuh, and with int4 the sums of
    their groups."""
    size = num_sequences * 2 * (-(-num_inputs // 64) * 64 + 32)
    if weights is not None and weights.kind == "int4":
        groups = -(-num_inputs // CHUNK) * CHUNK // weights.group
        size += 4 * groups * (num_sequences if num_sequences <= 2 else 4)
    return size


def _whole(num_inputs: int) -> int:
    return -(-num_inputs // STAGE_INPUTS) * STAGE_INPUTS


def num_words(shape: DecodeStepShape, launch: DecodeStepLaunch, num_sequences: int) -> int:
    """Size of the kernel's `words`, uint64."""
    kv_size = shape.num_kv_heads * shape.head_size
    pairs = shape.hidden_size + 2 * shape.q_size + 2 * kv_size + shape.ffn_size
    parts = shape.num_heads * launch.max_parts * (shape.head_size + 2)
    return num_sequences * (pairs // 2 + parts)
