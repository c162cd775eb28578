"""How products with packed codes are launched: the packed form's sizes, tiles, rings, macros.

Pure Python, from shapes and what the card has; knows no arrays and no device. The numbers mirror
kernels_cu/quantized_format.cuh, quantized_input.cuh and quantized.cuh, and a test holds them
together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FILE = "quantized.cu"
PACK_FILE = "quantized_pack.cu"
KIND_CODES = {"int8": 0, "int4": 1, "fp8": 2}
TOKENS = (8, 16, 32)  # a build's room; batches are rounded up
MAX_TOKENS = TOKENS[-1]  # of a launch
STRIP, CHUNK, SPAN, WARPS = 16, 128, 256, 8
SEGMENT = WARPS * CHUNK
INPUT_PAD = 32
MAX_NORM_INPUTS = 40960
LEAST_GROUP = 16


@dataclass(frozen=True)
class PackedFormat:
    """How a matrix lies on the device: WEIGHT_KIND and GROUP of quantized_format.cuh."""

    kind: str
    group: int

    @property
    def code_bytes(self) -> int:
        """Of a chunk: 16 rows of 128 inputs."""
        return STRIP * CHUNK // (2 if self.kind == "int4" else 1)

    @property
    def chunk_bytes(self) -> int:
        return self.code_bytes + CHUNK // self.group * STRIP * 4

    @property
    def macros(self) -> dict[str, int]:
        return {"WEIGHT_KIND": KIND_CODES[self.kind], "GROUP": self.group}

    def packed_shape(self, num_rows: int, num_inputs: int, pairs: bool) -> tuple[int, int]:
        """(strips, bytes of each) of a matrix; pairs: of gate, then up."""
        strips = -(-num_rows // 2 // 8) if pairs else -(-num_rows // STRIP)
        return strips, -(-num_inputs // CHUNK) * self.chunk_bytes


def packed_format(kind: str, num_inputs: int, group_size: int) -> PackedFormat | None:
    """The form for groups of `group_size` inputs; None where the kernels have none for them."""
    group = CHUNK if group_size == num_inputs else math.gcd(group_size, CHUNK)
    fits = num_inputs % 8 == 0 and num_inputs > 0 and group >= LEAST_GROUP
    return PackedFormat(kind, group) if fits else None


@dataclass(frozen=True)
class QuantizedTuning:
    """What a bench may vary; None leaves the choice to the plan.

    max_rows: tokens up to which codes are multiplied as they are, MAX_TOKENS in a launch; more
    take the matrix in 16 bits and cuBLAS. strips: of 16 rows that a warp works on at once.
    ring_kb: of codes on their way, a block, at most. shared_kb: of a block of up to 8 tokens: two
    such fit on a multiprocessor of an H100, so that the next kernel's codes come while one runs.
    resident_blocks: whose registers a multiprocessor must hold. fold_norm: the norm of up to 8
    tokens is computed by the product where its inputs fit in shared_kb.
    """

    max_rows: int = 64
    strips: int | None = None
    ring_kb: int = 68
    shared_kb: int = 112
    resident_blocks: int = 2
    fold_norm: bool = True
    tile_segments: int | None = None


DEFAULT_TUNING = QuantizedTuning()


@dataclass(frozen=True)
class QuantizedLaunch:
    """Everything of a launch but its arrays. `macros` come on top of SCALAR and RESIDUAL.

    folds_norm: the inputs are normalised by this launch; else they must have been."""

    macros: dict[str, int]
    grid: tuple[int, ...]
    block: int
    shared_bytes: int
    tile_segments: int
    round_strips: int
    folds_norm: bool


def uses_codes(
    rows: int,
    weight_bytes: int,
    compute_capability: tuple[int, int],
    *,
    force_plain: bool = False,
    tuning: QuantizedTuning = DEFAULT_TUNING,
) -> bool:
    """Whether a product of `rows` tokens multiplies codes; weight_bytes: of the storage type."""
    on_card = compute_capability >= (8, 0) and not force_plain and weight_bytes == 2
    return on_card and rows <= tuning.max_rows


def plan_quantized(
    packed: PackedFormat,
    num_outputs: int,
    num_inputs: int,
    rows: int,
    num_multiprocessors: int,
    *,
    pairs: bool = False,
    norm: bool = False,
    max_shared_bytes: int = 227 << 10,
    tuning: QuantizedTuning = DEFAULT_TUNING,
) -> QuantizedLaunch:
    """The launch of a product of `rows` tokens, 1 to MAX_TOKENS, with weights [num_outputs,
    num_inputs].

    pairs: quantized_swiglu, whose weights have twice num_outputs rows; norm: the inputs are to be
    normalised, which is folded in where it can be; max_shared_bytes: what a block can have.
    num_outputs 0 gives a grid of 0: nothing is to be launched. Raises ValueError for what the
    kernels do not take.
    """
    if not 1 <= rows <= MAX_TOKENS or num_inputs < 1 or num_inputs % 8 or num_outputs < 0:
        raise ValueError(
            f"{rows} tokens, weights [{num_outputs}, {num_inputs}]: quantized kernels take 1 to "
            f"{MAX_TOKENS} tokens and a multiple of 8 inputs"
        )
    tokens = next(n for n in TOKENS if n >= rows)
    strips = -(-num_outputs // (STRIP // 2 if pairs else STRIP))
    blocks = min(strips, num_multiprocessors)
    # int4 codes take half the time of a byte's, and their sums meet as often for twice the rows.
    at_once = tuning.strips or (2 if packed.kind == "int4" else 1)
    sizes = _Sizes(packed, num_inputs, rows, tokens, at_once, -(-strips // max(1, blocks)), pairs)
    most = min(max_shared_bytes, (tuning.shared_kb << 10) if tokens == 8 else max_shared_bytes)
    wanted = max(2 * at_once, (tuning.ring_kb << 10) // (WARPS * packed.chunk_bytes))
    least = min(wanted, 2 * at_once if tokens > 8 else 2 * at_once + 1)
    fold = norm and tuning.fold_norm and tokens == 8 and num_inputs <= MAX_NORM_INPUTS
    fold = fold and sizes.bytes(least, sizes.num_segments) <= most

    def layouts(room: int, least: int):
        """(stages, segments of a tile) that fit, the best first: rather all inputs at once with a
        shorter ring, as long as that holds what memory needs."""
        whole = sizes.num_segments
        fewer = [] if fold else [n for n in (8, 4, 2, 1) if n < whole]
        segments = [tuning.tile_segments] if tuning.tile_segments and not fold else [whole, *fewer]
        for tile in segments:
            for stages in range(wanted, least - 1, -1):
                if sizes.bytes(stages, min(tile, whole)) <= room:
                    yield stages, min(tile, whole)

    chosen = next(layouts(most, least), None) or next(layouts(max_shared_bytes, 2 * at_once), None)
    if chosen is None:
        raise ValueError(f"{max_shared_bytes} bytes of shared memory hold no tile of inputs")
    stages, tile_segments = chosen
    shared_bytes = sizes.bytes(stages, tile_segments)
    macros = packed.macros | {
        "TOKENS": tokens, "STRIPS": at_once, "STAGES": stages, "NORM_INPUTS": int(fold),
        "MIN_BLOCKS": tuning.resident_blocks if tokens == 8 else 1,
    }  # fmt: skip
    return QuantizedLaunch(
        macros, (blocks,), 32 * WARPS, shared_bytes, tile_segments,
        sizes.round_strips(tile_segments), fold,
    )  # fmt: skip


@dataclass(frozen=True)
class _Sizes:
    """What a block's shared memory depends on; block_strips: of the block with most."""

    packed: PackedFormat
    num_inputs: int
    rows: int
    tokens: int
    at_once: int
    block_strips: int
    pairs: bool

    @property
    def num_segments(self) -> int:
        return -(-self.num_inputs // SEGMENT)

    def round_strips(self, tile_segments: int) -> int:
        """All of a block's where inputs come by tiles, so that each comes once."""
        if tile_segments >= self.num_segments:
            return self.at_once
        return -(-self.block_strips // self.at_once) * self.at_once

    def bytes(self, stages: int, tile_segments: int) -> int:
        ring = WARPS * stages * self.packed.chunk_bytes
        chunks = min(tile_segments * WARPS, -(-self.num_inputs // CHUNK))
        inputs = self.rows * (-(-chunks * CHUNK // SPAN) * SPAN + INPUT_PAD) * 2
        groups = chunks * CHUNK // self.packed.group if self.packed.kind == "int4" else 0
        sums = WARPS * self.tokens * (self.at_once * STRIP + 4) * (2 if self.tokens <= 16 else 1)
        so_far = 0
        if self.num_segments > 1:
            values = 2 if self.pairs else 1
            items = -(-self.tokens * self.at_once * STRIP // values // 256) * 256 * values
            so_far = items * self.round_strips(tile_segments) // self.at_once
        return ring + inputs + 4 * (groups * self.tokens + sums + so_far)
