"""How the small-batch products are launched: grid, block, shared memory, splits, macros.

Pure Python, from shapes and the number of multiprocessors; knows no arrays and no device. The
numbers mirror kernels_cu/gemv.cuh, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROWS = 8  # tokens; more go to skinny.cu or cuBLAS
TILE_STEP = 256  # inputs; TILE_STEP in gemv_input.cuh
ROW_PAD = 32  # inputs; ROW_PAD in gemv_input.cuh
MAX_UNIT_ROWS = 8  # rows of weights; in gemv_input.cuh
TENSOR_UNIT_ROWS = 8

# The most shared memory of a block, on cards that have more too: two fit on a multiprocessor of an
# H100, so that the weights of the next kernel come while one runs.
MAX_SHARED_BYTES = 112 << 10
# What the driver takes of a multiprocessor's shared memory for each block.
_RESERVED_BYTES = 1 << 10
# Room for inputs that the ring leaves in a block's share of a multiprocessor.
_INPUT_BYTES = 8 << 10
# Of an H100 or H200, roughly, as only their ratios matter: what a warp's vector of 512 bytes takes
# of a multiprocessor's share of memory; how often a warp with a full ring gets one, however few
# others read; what using one takes a warp; the end of a pass; a merge between warps.
_READ_NS = 22.0
_ALONE_NS = 62.0
_USE_NS = 30.0
_PASS_NS = 50.0
_MERGE_NS = 100.0


@dataclass(frozen=True)
class GemvTuning:
    """The macros of gemv.cuh, and how many blocks a multiprocessor is given.

    ring_kb: of weights on their way, a block, for one token or two; three and four have 3/4 of it,
    more have half, as their inputs need the room. unroll: vectors of a thread that come together,
    if the ring holds three times as many, else two. tensor: whether 16-bit products run on the
    tensor cores. l2_ahead_kb: a block, asked for in L2 beyond the ring, before the kernel before
    has ended (on an H100 it took 1 to 3 µs a layer more than it gave). resident_blocks: blocks of
    any kernels that a multiprocessor's registers must hold.
    """

    warps: int = 8
    rows_per_warp: int = 2
    unroll: int = 4
    ring_kb: int = 64
    tensor: bool = True
    l2_ahead_kb: int = 0
    blocks_per_multiprocessor: int = 1
    resident_blocks: int = 3

    def _ring(self, rows: int) -> tuple[int, int]:
        """(vectors of 16 bytes a thread in the ring, how many come together): RING, UNROLL."""
        quarters = 4 if rows <= 2 else 3 if rows <= 4 else 2
        vectors = self.ring_kb * 1024 * quarters // 4 // (512 * self.warps)
        unroll = self.unroll if vectors >= 3 * self.unroll else min(self.unroll, 2)
        together = max(unroll, self.rows_per_warp, 2)
        return max(together, vectors // together * together), unroll

    def ring_vectors(self, rows: int) -> int:
        return self._ring(rows)[0]

    def ring_bytes(self, rows: int) -> int:
        return self.ring_vectors(rows) * 512 * self.warps

    def macros(self, rows: int) -> dict[str, int]:
        """Beside SCALAR and RESIDUAL, for a batch of `rows` tokens."""
        return {
            "ROWS": rows,
            "WARPS": self.warps,
            "ROWS_PER_WARP": self.rows_per_warp,
            "UNROLL": self._ring(rows)[1],
            "RING": self._ring(rows)[0],
            "TENSOR": int(self.tensor),
            "PREFETCH": self.l2_ahead_kb,
            "MIN_BLOCKS": self.resident_blocks,
        }


DEFAULT_TUNING = GemvTuning()


def default_tuning(
    compute_capability: tuple[int, int], max_shared_bytes: int, *, tensor: bool = True
) -> GemvTuning:
    """For a card; max_shared_bytes: the most that a block can have there.

    From 9.0 on, launches overlap: one block a multiprocessor, small enough for those of three
    kernels. Below, nothing comes before a kernel's start, and two blocks fill each other's gaps.
    """
    overlaps = compute_capability >= (9, 0)
    together = 3 if overlaps else 2
    share = (max_shared_bytes + _RESERVED_BYTES) // together - _RESERVED_BYTES
    ring_kb = min(64 if overlaps else 32, max(8, (share - _INPUT_BYTES) >> 10))
    return GemvTuning(
        ring_kb=ring_kb,
        tensor=tensor and compute_capability >= (8, 0),
        l2_ahead_kb=DEFAULT_TUNING.l2_ahead_kb if overlaps else 0,
        blocks_per_multiprocessor=1 if overlaps else 2,
        resident_blocks=together,
    )


@dataclass(frozen=True)
class GemvLaunch:
    """Everything of a launch but its arrays; `k_tile` and `k_splits` are kernel arguments."""

    grid: tuple[int, ...]
    block: int
    shared_bytes: int
    k_tile: int
    k_splits: int


def plan_gemv(
    num_outputs: int,
    num_inputs: int,
    rows: int,
    num_multiprocessors: int,
    *,
    weight_bytes: int,
    norm: bool = True,
    pairs: bool = False,
    tuning: GemvTuning = DEFAULT_TUNING,
    max_shared_bytes: int = MAX_SHARED_BYTES,
    k_splits: int | None = None,
) -> GemvLaunch:
    """The launch of a product of `rows` tokens with weights [num_outputs, num_inputs].

    weight_bytes: of one weight, and of an input in shared memory; norm: whether the inputs are
    normalised (all but linear_add_rows); pairs: norm_swiglu_rows, whose weights have twice
    num_outputs rows; max_shared_bytes: what a block can have on the card; k_splits: forced, else
    chosen. num_outputs 0 gives a grid of 0: nothing is to be launched. Raises ValueError for
    numbers outside what the kernels take.
    """
    if not 1 <= rows <= MAX_ROWS or num_inputs < 1 or num_outputs < 0 or num_multiprocessors < 1:
        raise ValueError(
            f"{rows} tokens, weights [{num_outputs}, {num_inputs}], {num_multiprocessors} "
            f"multiprocessors: gemv kernels take 1 to {MAX_ROWS} tokens and sizes from 1 on"
        )
    row_bytes = (rows + norm) * weight_bytes  # of all rows, an input
    fixed = tuning.ring_bytes(rows) + (rows * 4 * -(-num_inputs // TILE_STEP) if norm else 0)
    room = min(max_shared_bytes, MAX_SHARED_BYTES) - fixed - scratch_bytes(rows, tuning)
    k_tile = _tile(num_inputs, row_bytes, room)
    stride = min(k_tile, _padded(num_inputs)) + ROW_PAD
    unit_outputs, chunk = _unit(weight_bytes, pairs, tuning)
    units = -(-num_outputs // unit_outputs)
    # Rather a few blocks without work than a multiprocessor without a block: the next kernel's come
    # while these are there, and two of them would share an empty one.
    num_blocks = num_multiprocessors * tuning.blocks_per_multiprocessor
    num_blocks = num_blocks if 2 * units > num_blocks else units
    if k_splits is None:
        k_splits = _splits(units, num_blocks, num_inputs, chunk, tuning)
    elif k_splits & (k_splits - 1) or not 1 <= k_splits <= tuning.warps:
        raise ValueError(f"k_splits is {k_splits}, no power of two up to {tuning.warps} warps")
    return GemvLaunch(
        (num_blocks,), 32 * tuning.warps, fixed + stride * row_bytes, k_tile, k_splits
    )


def scratch_bytes(rows: int, tuning: GemvTuning) -> int:
    """Shared memory of a block beside what its launch asks for: GemvScratch of gemv_input.cuh."""
    return merge_passes(rows) * tuning.warps * MAX_UNIT_ROWS * rows * 4


def merge_passes(rows: int) -> int:
    """MERGE_PASSES of gemv_input.cuh."""
    return 4 if rows <= 4 else 2


def _padded(num_inputs: int) -> int:
    return -(-num_inputs // TILE_STEP) * TILE_STEP


def _tile(num_inputs: int, bytes_per_input: int, room: int) -> int:
    """Inputs of a tile: all of them where they fit, else equal tiles of the fewest that do."""
    most = (room // bytes_per_input - ROW_PAD) // TILE_STEP * TILE_STEP
    if most < TILE_STEP:
        raise ValueError(f"{room} bytes of shared memory beside the ring hold no tile of inputs")
    num_tiles = -(-num_inputs // most)
    return _padded(-(-num_inputs // num_tiles))


def _unit(weight_bytes: int, pairs: bool, tuning: GemvTuning) -> tuple[int, int]:
    """(outputs a unit, inputs a chunk) of the method that aligned weights are given to."""
    if tuning.tensor and weight_bytes == 2:
        unit_rows, lanes = TENSOR_UNIT_ROWS, 4
    else:
        unit_rows, lanes = tuning.rows_per_warp, 32
        if pairs:
            unit_rows = max(unit_rows, 2)
    return unit_rows // (2 if pairs else 1), lanes * 16 // weight_bytes


def _splits(units: int, num_blocks: int, num_inputs: int, chunk: int, tuning: GemvTuning) -> int:
    """Warps that share a unit: the number for which the block with most units ends first.

    A pass takes what its bytes need, but no less than one warp needs for its own; and what the
    busiest warp does with weights that are there already is added, as it is all that is left of a
    small matrix once the kernel before has ended. Splits share out what passes leave over, at a
    merge every few passes. The number of tokens plays no part.
    """
    if units == 0:
        return 1
    in_block = -(-units // num_blocks)
    num_chunks = -(-num_inputs // chunk)
    chunk_vectors = tuning.rows_per_warp if chunk >= 128 else 1

    def cost(splits: int) -> float:
        slots = tuning.warps // splits
        vectors = -(-num_chunks // splits) * chunk_vectors  # of a warp in a pass
        passes, last = divmod(in_block, slots)
        total = passes * vectors * max(tuning.warps * _READ_NS, _ALONE_NS)
        if last:
            total += vectors * max(last * splits * _READ_NS, _ALONE_NS)
            passes += 1
        merges = -(-passes // merge_passes(1)) if splits > 1 else 0
        return total + passes * (vectors * _USE_NS + _PASS_NS) + merges * _MERGE_NS

    powers = [1 << i for i in range(tuning.warps.bit_length())]
    choices = [s for s in powers if s <= min(tuning.warps, num_chunks)]
    return min(choices, key=lambda s: (cost(s), s))
