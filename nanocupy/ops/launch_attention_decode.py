"""How the decode attention kernels are launched: entry, macros, grid, shared memory, workspace.

Pure arithmetic on capacities: the most sequences of a bucket, the longest context, and what the
card has. No length of a running sequence comes in, so a captured launch stays right while they
grow: the kernels cut the contexts themselves, from lengths on the device. Knows no arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanocupy.ops.launch_attention_prefill import QUANTIZED_CODES, uses_tensor_cores

FILE = "attention_decode.cu"
MERGE_ENTRY = "attention_decode_merge"
PART_TOKENS = 64  # as in the kernels: parts of a context begin at multiples of it
MAX_QUERIES = 8
SCALES_BYTES = 64  # of the 16 positions of a stage, keys' and values'

_RESERVED_SHARED_BYTES = 1 << 10  # what a block costs a multiprocessor beside its own
_MOST_GRID_Y = 65535


@dataclass(frozen=True)
class DecodeTuning:
    """What a bench may vary; None leaves the choice to the rules below.

    warps, stages  of attention_decode_mma: warps of a block, and steps of 16 positions that each
                   has in shared memory, one at work and the others on their way
    waves          how often the parts of a large batch fill the card: more balance better, fewer
                   cost less to merge
    least_part_tokens  a context is not cut into parts shorter than this; a multiple of PART_TOKENS
    least_mma_rows     rows (query, head) of a key/value head from which tensor cores are used
    num_items      parts of all sequences together; overrides waves
    merge_kernel   merge by a kernel of its own, not by the block of a sequence that comes last
    """

    warps: int | None = None
    stages: int | None = None
    waves: int = 4
    least_part_tokens: int = 256
    least_mma_rows: int = 1
    num_items: int | None = None
    merge_kernel: bool | None = None


@dataclass(frozen=True)
class DecodeLaunch:
    """One launch. `macros` come on top of SCALAR, CACHE and HEAD_SIZE.

    merge is the launch of MERGE_ENTRY, same module and arguments, that must follow; None where
    the blocks merge themselves, with counters. Workspace: two float32 arrays, and `counters_shape`
    uint32, zero once before the first launch (pass null for them where merge is not None).
    """

    entry: str
    macros: dict[str, int]
    grid: tuple[int, int]
    block: int
    shared_bytes: int
    num_items: int
    least_part: int
    num_row_tiles: int
    partial_values_shape: tuple[int, int, int, int]
    partial_states_shape: tuple[int, int, int, int]
    counters_shape: tuple[int, int]
    merge: MergeLaunch | None


@dataclass(frozen=True)
class MergeLaunch:
    """The second launch of an attention call, of the entry MERGE_ENTRY."""

    grid: tuple[int, int]
    block: int
    shared_bytes: int


def launch_attention_decode(
    num_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    queries: int = 1,
    max_context: int,
    scalar: int,
    cache: int,
    compute_capability: tuple[int, int],
    num_multiprocessors: int,
    max_shared_bytes: int,
    force_plain: bool = False,
    tuning: DecodeTuning | None = None,
) -> DecodeLaunch:
    """The launch for at most `num_sequences` sequences of at most `queries` queries each.

    scalar, cache: type codes of the kernels' macros. max_shared_bytes: what a block can have. The
    grid has a zero where there are no sequences; it must not be launched then. Arguments of all
    entries, in order: q, key_cache, value_cache, key_scales, value_scales (null where the cache is
    not quantised), query_starts, kv_lens, block_tables, scale (float32), out, partial_values,
    partial_states, counters, then int32: num_sequences, num_kv_heads, heads of each of them,
    block_size, columns of block_tables, num_items, least_part, num_row_tiles.
    """
    tuning = tuning or DecodeTuning()
    heads_per_group = num_heads // num_kv_heads
    rows = heads_per_group * queries
    use_mma = rows >= tuning.least_mma_rows and uses_tensor_cores(
        head_size, scalar, cache, compute_capability, force_plain
    )
    if use_mma:
        entry = "attention_decode_mma"
        tile_rows, warps, blocks, shared_bytes, macros = _mma_block(
            rows, head_size, max_shared_bytes, tuning, cache in QUANTIZED_CODES
        )
    else:
        entry = "attention_decode"
        tile_rows = 4 if rows > 2 else rows
        warps, blocks, macros = 4, 2 if tile_rows > 2 else 3, {"TILE_ROWS": tile_rows}
        shared_bytes = warps * tile_rows * head_size * 4
    num_row_tiles = -(-rows // tile_rows)
    columns = num_kv_heads * num_row_tiles
    least_part = max(1, tuning.least_part_tokens // PART_TOKENS)
    items = tuning.num_items or _num_items(
        num_sequences, columns, num_multiprocessors * blocks, max_context, least_part, tuning.waves
    )
    items = min(max(items, num_sequences, 1), _MOST_GRID_Y)
    merge_kernel = tuning.merge_kernel
    if merge_kernel is None:
        # One block takes long over very many parts; a kernel of its own takes a block a row.
        merge_kernel = items > 64 * max(1, num_sequences)
    merge = None
    if merge_kernel:
        merge = MergeLaunch((num_kv_heads * rows, num_sequences), 128, 4 * head_size * 4)
    return DecodeLaunch(
        entry=entry,
        macros={"QUERIES": queries, **macros},
        grid=(columns, items if num_sequences else 0),
        block=warps * 32,
        shared_bytes=shared_bytes,
        num_items=items,
        least_part=least_part,
        num_row_tiles=num_row_tiles,
        partial_values_shape=(items, num_kv_heads, rows, head_size),
        partial_states_shape=(items, num_kv_heads, rows, 2),
        counters_shape=(num_sequences, columns),
        merge=merge,
    )


def mma_shared_bytes(
    head_size: int, warps: int, stages: int, row_tiles: int, quantized: bool = False
) -> int:
    """Dynamic shared memory of attention_decode_mma: queries, and each warp's keys and values; of a
    quantised cache also their scales, and room for at least a warp's results."""

    def row_bytes(pieces: int) -> int:
        # Pieces are 16 bytes; a row that is not swizzled has an odd number of them.
        return 16 * (pieces if pieces % 8 == 0 else pieces | 1)

    tile = 16 * row_bytes(head_size // 8)
    if not quantized:
        return (warps * 2 * stages + row_tiles) * tile
    ring = stages * (2 * 16 * row_bytes(head_size // 16) + SCALES_BYTES)
    results = 16 * row_tiles * (head_size + 8) * 4
    return warps * max(ring, results) + row_tiles * tile


def _mma_block(
    rows: int, head_size: int, max_shared_bytes: int, tuning: DecodeTuning, quantized: bool
) -> tuple[int, int, int, int, dict[str, int]]:
    """Rows, warps, blocks of a multiprocessor, shared bytes and macros of attention_decode_mma."""
    shapes = [(4, 3), (3, 3), (2, 3), (2, 2), (1, 2)]
    if quantized:  # a stage has half the bytes; scales need three of them
        shapes = [(4, 4), (4, 3), (3, 3), (2, 3), (1, 3)]
        if head_size > 128:  # so that two blocks have room
            shapes.pop(0)
    if tuning.warps is not None or tuning.stages is not None:
        warps, stages = tuning.warps or shapes[0][0], tuning.stages or shapes[0][1]
        shapes.insert(0, (warps, max(stages, 3) if quantized else stages))
    for warps, stages in shapes:
        # Two row tiles share each read, where their sums fit in the registers.
        row_tiles = 2 if rows > 16 and head_size <= 128 and stages > 2 else 1
        shared_bytes = mma_shared_bytes(head_size, warps, stages, row_tiles, quantized)
        if shared_bytes <= max_shared_bytes:
            break
    room = max_shared_bytes + _RESERVED_SHARED_BYTES
    by_shared = room // (shared_bytes + _RESERVED_SHARED_BYTES)
    by_registers = 65536 // (warps * 32 * (168 if row_tiles * head_size <= 128 else 248))
    blocks = max(1, min(by_shared, by_registers))
    macros = {"ROW_TILES": row_tiles, "STAGES": stages}
    return 16 * row_tiles, warps, blocks, shared_bytes, macros


def _num_items(
    num_sequences: int, columns: int, slots: int, max_context: int, least_part: int, waves: int
) -> int:
    """How many parts all sequences have together, at most.

    slots: blocks that the card holds at once; columns: blocks of a part.
    """
    one_wave = max(1, slots // columns)
    # Few sequences: one wave, every part is merged in one go. Many: a few waves, so that ragged
    # lengths balance, and always so many that no part is much longer than the mean sequence.
    items = max(one_wave, waves * min(one_wave, num_sequences), 2 * num_sequences)
    longest = -(-max_context // (least_part * PART_TOKENS))
    return min(items, num_sequences * max(1, longest))
