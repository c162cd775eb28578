"""How the small-batch products are launched: grid, block, shared memory, splits, macros.

Pure Python, from shapes and the number of multiprocessors; knows no arrays and no device. The
numbers mirror kernels_cu/gemv.cuh, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROWS = 8  # tokens; more go to cuBLAS
TILE_STEP = 256  # inputs; TILE_STEP in gemv_input.cuh
ROW_PAD = 32  # inputs; ROW_PAD in gemv_input.cuh
TENSOR_UNIT_ROWS = 8

# A block may ask for this much shared memory on every card from compute capability 8.0 on, with two
# blocks a multiprocessor on the large ones. 7.5 gives 64 KB.
MAX_SHARED_BYTES = 96 << 10
# Of an H100 or H200: what one multiprocessor reads in a nanosecond when all of them read, and how
# long a load takes. Only their ratio matters here, and roughly.
_BYTES_PER_NS = 28.0
_LATENCY_NS = 800.0
_BARRIER_NS = 60.0


@dataclass(frozen=True)
class GemvTuning:
    """The macros of gemv.cuh, and how many blocks a multiprocessor is given.

    tensor: whether 16-bit products run on the tensor cores; None: from 3 tokens on.
    """

    warps: int = 8
    rows_per_warp: int = 2
    unroll: int = 4
    tensor: bool | None = None
    prefetch: int = 1
    blocks_per_multiprocessor: int = 2

    def uses_tensor(self, rows: int) -> bool:
        return rows >= 3 if self.tensor is None else self.tensor

    def macros(self, rows: int) -> dict[str, int]:
        """Beside SCALAR and RESIDUAL, for a batch of `rows` tokens."""
        return {
            "ROWS": rows,
            "WARPS": self.warps,
            "ROWS_PER_WARP": self.rows_per_warp,
            "UNROLL": self.unroll,
            "TENSOR": int(self.uses_tensor(rows)),
            "PREFETCH": self.prefetch,
            "MIN_BLOCKS": self.blocks_per_multiprocessor,
        }


DEFAULT_TUNING = GemvTuning()


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
    input_bytes: int | None = None,
    pairs: bool = False,
    tuning: GemvTuning = DEFAULT_TUNING,
    max_shared_bytes: int = MAX_SHARED_BYTES,
    k_splits: int | None = None,
) -> GemvLaunch:
    """The launch of a product of `rows` tokens with weights [num_outputs, num_inputs].

    weight_bytes: of one weight; input_bytes: of one value in shared memory (a weight's, and the
    residual's in lm_head_rows); pairs: norm_swiglu_rows, whose weights have twice num_outputs rows;
    k_splits: forced, else chosen. num_outputs 0 gives a grid of 0: nothing is to be launched.
    Raises ValueError for numbers outside what the kernels take.
    """
    if not 1 <= rows <= MAX_ROWS or num_inputs < 1 or num_outputs < 0 or num_multiprocessors < 1:
        raise ValueError(
            f"{rows} tokens, weights [{num_outputs}, {num_inputs}], {num_multiprocessors} "
            f"multiprocessors: gemv kernels take 1 to {MAX_ROWS} tokens and sizes from 1 on"
        )
    input_bytes = weight_bytes if input_bytes is None else input_bytes
    k_tile = _tile(num_inputs, rows * input_bytes, max_shared_bytes)
    stride = min(k_tile, _padded(num_inputs)) + ROW_PAD
    unit_outputs, chunk = _unit(rows, weight_bytes, input_bytes, pairs, tuning)
    units = -(-num_outputs // unit_outputs)
    num_blocks = min(units, num_multiprocessors * tuning.blocks_per_multiprocessor)
    if k_splits is None:
        k_splits = _splits(units, num_blocks, num_inputs, chunk, weight_bytes, unit_outputs, tuning)
    elif k_splits & (k_splits - 1) or not 1 <= k_splits <= tuning.warps:
        raise ValueError(f"k_splits is {k_splits}, no power of two up to {tuning.warps} warps")
    return GemvLaunch(
        (num_blocks,), 32 * tuning.warps, rows * stride * input_bytes, k_tile, k_splits
    )


def _padded(num_inputs: int) -> int:
    return -(-num_inputs // TILE_STEP) * TILE_STEP


def _tile(num_inputs: int, bytes_per_input: int, max_shared_bytes: int) -> int:
    """Inputs of a tile: all of them where they fit, else equal tiles of the fewest that do."""
    most = (max_shared_bytes // bytes_per_input - ROW_PAD) // TILE_STEP * TILE_STEP
    if most < TILE_STEP:
        raise ValueError(f"{max_shared_bytes} bytes of shared memory hold no tile of inputs")
    num_tiles = -(-num_inputs // most)
    return _padded(-(-num_inputs // num_tiles))


def _unit(
    rows: int, weight_bytes: int, input_bytes: int, pairs: bool, tuning: GemvTuning
) -> tuple[int, int]:
    """(outputs a unit, inputs a chunk) of the method that aligned weights are given to."""
    if tuning.uses_tensor(rows) and weight_bytes == 2 and input_bytes == 2:
        unit_rows, lanes = TENSOR_UNIT_ROWS, 4
    else:
        unit_rows, lanes = tuning.rows_per_warp, 32
        if pairs:
            unit_rows = max(unit_rows, 2)
    return unit_rows // (2 if pairs else 1), lanes * 16 // weight_bytes


def _splits(
    units: int,
    num_blocks: int,
    num_inputs: int,
    chunk: int,
    weight_bytes: int,
    unit_outputs: int,
    tuning: GemvTuning,
) -> int:
    """Warps that share a unit: the number for which the block with most units ends first.

    A pass takes what its bytes need at the multiprocessor's rate, but no less than its loads' way
    to memory and back, once for each batch of them. Splits shorten the last pass, which few warps
    run, at a barrier each pass. Of equals the one with most warps at work. The number of tokens
    plays no part beyond the method it selects.
    """
    if units == 0:
        return 1
    in_block = -(-units // num_blocks)
    num_chunks = -(-num_inputs // chunk)
    unit_bytes = unit_outputs * num_inputs * weight_bytes
    rate = _BYTES_PER_NS / tuning.blocks_per_multiprocessor
    batch = tuning.unroll * (2 if chunk < 32 * 16 // weight_bytes else 1)

    def cost(splits: int) -> float:
        slots = tuning.warps // splits
        chunks = -(-num_chunks // splits)
        batches = -(-chunks // batch)
        total, left = 0.0, in_block
        full, last = divmod(left, slots)
        total += full * max(slots * unit_bytes / rate, batches * _LATENCY_NS)
        if last:
            total += max(last * unit_bytes / rate, batches * _LATENCY_NS)
        passes = full + (last > 0)
        return total + (passes * _BARRIER_NS if splits > 1 else 0)

    powers = [1 << i for i in range(tuning.warps.bit_length())]
    choices = [s for s in powers if s <= min(tuning.warps, num_chunks)]
    return min(choices, key=lambda s: (cost(s), -s * min(in_block, tuning.warps // s)))
