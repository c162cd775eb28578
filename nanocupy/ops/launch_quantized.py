"""How products with packed codes are launched: the packed form's sizes, tiles, rings, macros.

Pure Python, from shapes and what the card has; knows no arrays and no device. The numbers mirror
kernels_cu/quantized_format.cuh, quantized_input.cuh and quantized.cuh, and a test holds them
together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FILE = "quantized.cu"
PACK_FILE = "quantized_pack.cu"
KIND_CODES = {"int8": 0, "int4": 1, "fp8": 2}
TOKENS = (8, 16, 32)  # a build's room; batches are rounded up
MAX_TOKENS = TOKENS[-1]  # of a launch
STRIP, CHUNK, SPAN, WARPS = 16, 128, 256, 8
SEGMENT = WARPS * CHUNK
INPUT_PAD = 32
LEAST_GROUP = 16
_ROOM_OF_MOST = 160 << 10  # shared memory with which MAX_TOKENS fit


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
    take the matrix in 16 bits. strips: of 16 rows that a warp works on at once.
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
    block_strips = -(-strips // max(1, blocks))
    few = tokens == TOKENS[0]
    most = min(max_shared_bytes, tuning.shared_kb << 10) if few else max_shared_bytes
    fold = norm and tuning.fold_norm and few
    # int4 codes take half the time of a byte's, and their sums meet as often for twice the rows.
    at_once = tuning.strips or (2 if packed.kind == "int4" else 1)

    def layout(at_once: int, room: int, fold: bool, least: int) -> _Layout | None:
        sizes = _Sizes(packed, num_inputs, rows, tokens, at_once, block_strips, pairs)
        wanted = max(2 * at_once, (tuning.ring_kb << 10) // (WARPS * packed.chunk_bytes))
        least = min(wanted, least)
        # Few lengths, as each is a build of its own.
        stages = sorted({wanted, max(least, wanted * 3 // 4), least}, reverse=True)
        return sizes.layout(room, stages, fold, tuning)

    # Two chunks a warp more than are in use keep memory busy; rather that than the norm folded in,
    # than room for another block, and than two strips at once.
    ring = 2 * at_once + (1 if few or at_once == 1 else 0)
    chosen = layout(at_once, most, True, ring) if fold else None
    fold = chosen is not None
    chosen = chosen or layout(at_once, most, False, ring)
    if chosen is None:
        chosen = layout(at_once, max_shared_bytes, False, 2 * at_once)
    if chosen is None and tuning.strips is None:
        chosen = layout(1, max_shared_bytes, False, 2)
    if chosen is None:
        raise ValueError(f"{max_shared_bytes} bytes of shared memory hold no tile of inputs")
    macros = packed.macros | {
        "TOKENS": tokens, "STRIPS": chosen.at_once, "STAGES": chosen.stages,
        "NORM_INPUTS": int(fold), "MIN_BLOCKS": tuning.resident_blocks if few else 1,
        "WHOLE": int(chosen.tile_segments * SEGMENT >= num_inputs),
    }  # fmt: skip
    return QuantizedLaunch(
        macros, (blocks,), 32 * WARPS, chosen.shared_bytes, chosen.tile_segments,
        chosen.passes * chosen.at_once, fold,
    )  # fmt: skip


def launch_tokens(max_shared_bytes: int) -> int:
    """The most tokens of a launch on a card whose blocks can have so much shared memory."""
    return MAX_TOKENS if max_shared_bytes >= _ROOM_OF_MOST else TOKENS[1]


@dataclass(frozen=True)
class _Layout:
    """passes: of a round, of at_once strips each."""

    at_once: int
    stages: int
    tile_segments: int
    passes: int
    shared_bytes: int


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

    def layout(
        self, room: int, stages: Sequence[int], whole_only: bool, tuning: QuantizedTuning
    ) -> _Layout | None:
        """The best that fits; whole_only: with all inputs at once, normalised.

        Rather all inputs at once with a shorter ring; in tiles, all of a block's strips in a round,
        so that each tile comes once, or as many as there is room for.
        """
        whole = -(-self.num_inputs // SEGMENT)
        all_passes = max(1, -(-self.block_strips // self.at_once))
        tiles = [whole, *(n for n in (8, 4, 2, 1) if n < whole)]
        if tuning.tile_segments and not whole_only:
            tiles = [min(tuning.tile_segments, whole)]
        if whole_only and self.norm_bytes > 4 * self.sum_floats:
            return None
        best: _Layout | None = None
        for tile in tiles[:1] if whole_only else tiles:
            wanted = 1 if tile == whole else all_passes
            for count in stages:
                if tile == whole:  # chunks of all strips at once come together
                    count -= count % self.at_once
                fixed = self.bytes(count, tile)
                each = self.pass_bytes if tile < whole else 0
                passes = wanted if not each else min(wanted, (room - fixed) // each)
                if fixed > room or passes < 1:
                    continue
                shared = fixed + passes * each
                found = _Layout(self.at_once, count, tile, passes, shared)
                if passes == wanted:
                    return found
                if best is None or passes > best.passes:
                    best = found
        return best

    @property
    def pass_bytes(self) -> int:
        """Of the sums so far, of a pass."""
        values = 2 if self.pairs else 1
        items = -(-self.tokens * self.at_once * STRIP // values // 256) * 256
        return 4 * items * values

    def bytes(self, stages: int, tile_segments: int) -> int:
        """Without the sums so far."""
        ring = WARPS * stages * self.packed.chunk_bytes
        chunks = min(tile_segments * WARPS, -(-self.num_inputs // CHUNK))
        inputs = self.rows * (-(-chunks * CHUNK // SPAN) * SPAN + INPUT_PAD) * 2
        groups = chunks * CHUNK // self.packed.group if self.packed.kind == "int4" else 0
        return ring + inputs + 4 * (groups * self.tokens + self.sum_floats)

    @property
    def sum_floats(self) -> int:
        """Room for a pass's sums of all warps."""
        buffers = 2 if self.tokens <= 16 else 1
        return buffers * WARPS * self.tokens * (self.at_once * STRIP + 4)

    @property
    def norm_bytes(self) -> int:
        """What a norm needs, in the room of the sums."""
        return 2 * self.num_inputs + 4 * self.rows * -(-self.num_inputs // SPAN)
