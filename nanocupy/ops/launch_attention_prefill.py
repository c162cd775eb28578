"""How the prefill attention kernels are launched: entry, macros, grid, shared memory, arguments.

Owns the shapes of tiles by head size and what follows from them. Pure arithmetic: it knows no
arrays and no device, and needs nothing but counts known on the host, so that a launch can be
captured for the most tokens and sequences of a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

FILE = "attention_prefill.cu"
PLAIN_FILE = "attention_prefill_plain.cu"
WGMMA_FILE = "attention_prefill_hopper.cu"
WGMMA_ENTRY = "attention_prefill_wgmma"
PLAIN_THREADS = 128
PLAIN_ROWS = 32

QUANTIZED_CODES = (3, 4)  # the caches' type codes, as the kernels' macros have them: int8, e4m3

# Most dynamic shared memory a block can have, in bytes, by compute capability.
_SHARED_BYTES = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
_LEAST_SHARED_BYTES = 99 << 10  # 8.6, 8.9, 12.0


@dataclass(frozen=True)
class PrefillTile:
    """Shape of `attention_prefill`: what a block holds.

    warps        warps of a block
    warp_rows    rows (query, head) of each warp: 16 or 32
    keys         keys and values of a step; a multiple of 16, not more than threads
    stages       steps of keys and values in shared memory: one at work, the others on their way
    min_blocks   blocks that a multiprocessor shall hold, which bounds the registers
    queries_stay whether query fragments stay in registers
    """

    warps: int
    warp_rows: int
    keys: int
    stages: int = 2
    min_blocks: int = 2
    queries_stay: bool = False

    @property
    def rows(self) -> int:
        return self.warps * self.warp_rows

    @property
    def threads(self) -> int:
        return self.warps * 32

    def shared_bytes(self, head_size: int, quantized: bool = False) -> int:
        """Dynamic shared memory of a block: queries, and `stages` of keys and values. Where the
        cache is quantised, the stages hold codes, and one more step what they stand for."""
        pieces = head_size // 8  # of 16 bytes; a row of an odd number of eighths is padded
        row_bytes = 16 * (pieces if pieces % 8 == 0 else pieces | 1)
        if quantized:
            codes = 2 * self.stages * self.keys * head_size
            return row_bytes * (self.rows + 2 * self.keys) + codes
        return row_bytes * (self.rows + 2 * self.stages * self.keys)

    def macros(self) -> dict[str, int]:
        return {
            "TILE_WARPS": self.warps,
            "WARP_ROWS": self.warp_rows,
            "KEY_TILE": self.keys,
            "STAGES": self.stages,
            "MIN_BLOCKS": self.min_blocks,
            "QUERIES_STAY": int(self.queries_stay),
        }


@dataclass(frozen=True)
class WgmmaTile:
    """Shape of `attention_prefill_wgmma`.

    warpgroups   warpgroups that compute, of 64 rows each
    keys         keys and values of a step: 64 or 128
    stages       steps of keys and of values in shared memory
    l2_bytes     keys and values that blocks at work together may cover
    """

    warpgroups: int = 2
    keys: int = 128
    stages: int = 2
    l2_bytes: int = 32 << 20

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    def rows(self, group: int) -> int:
        """Rows of a tile: whole queries of `group` heads."""
        return self.warpgroups * 64 // group * group

    def shared_bytes(self, head_size: int) -> int:
        """Dynamic shared memory of a block, with what places it on 1024 bytes."""
        rows = 2 * self.warpgroups * 64 + 2 * self.stages * self.keys
        return 1024 + 2 * head_size * rows

    def macros(self) -> dict[str, int]:
        return {
            "WARPGROUPS": self.warpgroups,
            "KEY_TILE": self.keys,
            "STAGES": self.stages,
            "L2_BYTES": self.l2_bytes,
        }

    def query_box(self, group: int) -> tuple[int, ...]:
        """What one copy brings of q [T, H, d], seen as [d / 64, T, H, 64]."""
        return 1, self.rows(group) // group, group, 64

    def cache_box(self, head_size: int, block_size: int) -> tuple[int, ...]:
        """What one copy brings of a cache [N, G, P, d], seen as [N * G, P / 8, d / 64, 8, 64]."""
        return 1, min(block_size, self.keys) // 8, head_size // 64, 8, 64


@dataclass(frozen=True)
class PrefillLaunch:
    """One launch. `macros` come on top of SCALAR, CACHE and HEAD_SIZE."""

    file: str
    entry: str
    macros: dict[str, int]
    grid: tuple[int]
    block: int
    shared_bytes: int


def default_tile(head_size: int) -> PrefillTile:
    """The tile of a head size (a multiple of 16): fits the 99 KB of every card from 8.0."""
    if head_size <= 64:
        return PrefillTile(4, 32, 64, queries_stay=True)
    if head_size <= 128:
        return PrefillTile(4, 32, 64)
    return PrefillTile(4, 16, 32)


def max_shared_bytes(compute_capability: tuple[int, int]) -> int:
    """What a block of a card from 8.0 can have."""
    return _SHARED_BYTES.get(compute_capability, _LEAST_SHARED_BYTES)


def uses_tensor_cores(
    head_size: int,
    scalar: int,
    cache: int,
    compute_capability: tuple[int, int],
    force_plain: bool = False,
) -> bool:
    """Whether `attention_prefill` runs, or else `attention_prefill_plain`.

    scalar, cache: type codes as the kernels' macros have them (0 float32, 1 float16, 2 bfloat16,
    3 int8, 4 e4m3). The tensor-core path of decode attention takes the same.
    """
    return (
        not force_plain
        and compute_capability >= (8, 0)
        and scalar != 0
        and (cache == scalar or cache in QUANTIZED_CODES)
        and head_size % 16 == 0
    )


def wgmma_tile(
    head_size: int, group: int, block_size: int, scalar: int, cache: int
) -> WgmmaTile | None:
    """The tile of `attention_prefill_wgmma`, or None where it does not run. group: heads that
    share keys; block_size: positions of a block of the cache."""
    tile = WgmmaTile(warpgroups=3, stages=3) if head_size == 64 else WgmmaTile()
    fits = block_size % 8 == 0 and (tile.keys % block_size == 0 or block_size % tile.keys == 0)
    if head_size not in (64, 128) or scalar == 0 or cache != scalar or not fits:
        return None
    return tile if group <= tile.warpgroups * 64 else None


def launch_attention_prefill_wgmma(
    num_tokens: int,
    num_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    tile: WgmmaTile,
    num_multiprocessors: int,
) -> PrefillLaunch:
    """As `launch_attention_prefill`. Arguments, in order: tensor maps of q, key_cache and
    value_cache (`query_box`, `cache_box`), query_starts, kv_lens, block_tables, out, counter
    (uint32 [1], 0 before and after), scale (float32), then int32 as there.
    """
    group = num_heads // num_kv_heads
    slots = 0
    if num_tokens and num_sequences:
        slots = num_tokens * group // tile.rows(group) + num_sequences
    grid = (min(slots * num_kv_heads, num_multiprocessors),)
    shared_bytes = tile.shared_bytes(head_size)
    return PrefillLaunch(
        WGMMA_FILE, WGMMA_ENTRY, tile.macros(), grid, tile.threads, shared_bytes
    )  # fmt: skip


def launch_attention_prefill(
    num_tokens: int,
    num_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    tile: PrefillTile | None,
    cache: int = 0,
) -> PrefillLaunch:
    """The launch for at most `num_tokens` tokens of at most `num_sequences` sequences.

    cache: the type code of the cache, which matters where it is quantised. tile: that of
    `attention_prefill`; None launches `attention_prefill_plain`. The grid is 0 where there is
    nothing to do; it must not be launched then. Arguments of both entries, in order: q, key_cache,
    value_cache, key_scales, value_scales (null where the cache is not quantised), query_starts,
    kv_lens, block_tables, out, scale (float32), then int32: num_sequences, num_heads, num_kv_heads,
    block_size, num_columns of block_tables.
    """
    rows = PLAIN_ROWS if tile is None else tile.rows
    packed_rows = num_tokens * (num_heads // num_kv_heads)
    # Sequence b owns the slots from (its first packed row) // rows + b on.
    slots = packed_rows // rows + num_sequences if num_tokens and num_sequences else 0
    grid = (slots * num_kv_heads,)
    if tile is None:
        return PrefillLaunch(PLAIN_FILE, "attention_prefill_plain", {}, grid, PLAIN_THREADS, 0)
    shared_bytes = tile.shared_bytes(head_size, cache in QUANTIZED_CODES)
    return PrefillLaunch(FILE, "attention_prefill", tile.macros(), grid, tile.threads, shared_bytes)
