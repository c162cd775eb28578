"""How products of 9 to 64 tokens with packed codes are launched: tiles, clusters, rings, macros.

Pure Python, from shapes and what the card has; knows no arrays and no device. The numbers mirror
kernels_cu/quantized_stream_parts.cuh and skinny_parts.cuh, and a test holds them together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nanocupy.ops.launch_quantized import CHUNK, STRIP, PackedFormat
from nanocupy.ops.launch_skinny import INBOX_HEAD, SPLITS

FILE = "quantized_stream.cu"
MIN_ROWS = 9  # tokens; fewer are for quantized.cu
TOKENS = (16, 32, 64)  # a build's room; batches are rounded up
MAX_ROWS = TOKENS[-1]  # tokens of a launch
OUT_TILES = (32, 48, 64, 96, 112, 128, 192, 224, 256)  # rows of weights of a block
_TALLEST_OF_BYTES = 128  # rows: of 8-bit codes, more leave the ring too few stages
_ALONE_WARPS = 5  # along the rows, from which on a chunk of the inputs is a step
# Registers of a multiprocessor, and some that may be spilled; of a thread beside sums and inputs.
_MOST_REGISTERS, _OTHER_REGISTERS = 70_000, 40

# Of an H100, roughly, as only their ratios matter. launch_skinny.py says what they are and what was
# measured; of codes, nothing was.
_INPUT_COST = 0.5
_NOMINAL_TOKENS = 32  # the plan does not depend on the batch, nor do a token's sums
_MERGE_COST = 12 << 10  # of a cluster's sums, beside these themselves
_ALONE_READ, _ALONE_COST = 500 << 10, 1.08
_UNEVEN_READ, _UNEVEN_SPLITS, _UNEVEN_COST = 200 << 10, 4, 1.25
_MANY_TURNS = 3


@dataclass(frozen=True)
class StreamTuning:
    """What a bench may vary; None leaves the choice to the plan.

    min_rows: tokens from which these products are taken (above MAX_ROWS: never). out_tile, splits:
    rows of weights of a block, blocks that share their inputs. strips: of 16 rows, of a warp.
    stages: of the ring, at most. shared_kb: of a block where two are to fit on a multiprocessor of
    an H100, so that the next kernel's codes come while one runs.
    """

    min_rows: int = MIN_ROWS
    out_tile: int | None = None
    splits: int | None = None
    strips: int | None = None
    stages: int = 8
    shared_kb: int = 113


DEFAULT_TUNING = StreamTuning()


@dataclass(frozen=True)
class StreamLaunch:
    """Everything of a launch but its arrays. `macros` come on top of SCALAR and RESIDUAL."""

    macros: dict[str, int]
    grid: tuple[int, ...]
    block: int
    shared_bytes: int
    cluster: int


def uses_stream(rows: int, tuning: StreamTuning = DEFAULT_TUNING) -> bool:
    """Whether a product of `rows` tokens, which multiplies codes, is for these kernels."""
    return tuning.min_rows <= rows <= MAX_ROWS


def plan_stream(
    packed: PackedFormat,
    num_outputs: int,
    num_inputs: int,
    rows: int,
    num_multiprocessors: int,
    *,
    pairs: bool = False,
    clusters: bool = True,
    max_shared_bytes: int = 227 << 10,
    tuning: StreamTuning = DEFAULT_TUNING,
) -> StreamLaunch:
    """The launch of a product of `rows` tokens, 1 to MAX_ROWS, with weights [num_outputs,
    num_inputs].

    pairs: quantized_stream_swiglu, whose weights have twice num_outputs rows; clusters: the card
    has them; max_shared_bytes: what a block can have. num_outputs 0 gives a grid of 0: nothing is
    to be launched. Raises ValueError for what the kernels do not take.
    """
    if not 1 <= rows <= MAX_ROWS or num_inputs < 1 or num_inputs % 8 or num_outputs < 0:
        raise ValueError(
            f"{rows} tokens, weights [{num_outputs}, {num_inputs}]: quantized kernels take 1 to "
            f"{MAX_ROWS} tokens and a multiple of 8 inputs"
        )
    tokens = next(n for n in TOKENS if n >= rows)
    weight_rows = -(-num_outputs // 8) * 16 if pairs else num_outputs
    shape = _Shape(packed, weight_rows, num_inputs, num_multiprocessors)
    part = shape.best_part(clusters, max_shared_bytes, tuning)
    tile, splits = part.tile, part.splits
    num_tiles = -(-weight_rows // tile)
    strips = _strips(tile, tuning)
    warps_n = tile // STRIP // strips
    block = 32 * warps_n * part.warps_k
    # Of a lane: a group's sums and those so far, half a register a token each, and inputs.
    registers = strips * tokens + min(tokens, 32) // 2 + _OTHER_REGISTERS
    alone = 2 * block * registers > _MOST_REGISTERS
    most = max_shared_bytes if alone else min(max_shared_bytes, tuning.shared_kb << 10)
    most = max(most, part.bytes(2, tokens))
    wanted = max(2, min(tuning.stages, part.steps))
    stages = next(n for n in range(wanted, 1, -1) if n == 2 or part.bytes(n, tokens) <= most)
    macros = packed.macros | {
        "TOKENS": tokens, "OUT_TILE": tile, "WARPS_N": warps_n, "WARPS_K": part.warps_k,
        "STAGES": stages, "MIN_BLOCKS": 1 if alone else 2,
    }  # fmt: skip
    return StreamLaunch(macros, (num_tiles * splits,), block, part.bytes(stages, tokens), splits)


def _strips(tile: int, tuning: StreamTuning) -> int:
    """Of 16 rows, of a warp: two where that leaves warps enough."""
    strips = tile // STRIP
    if tuning.strips and strips % tuning.strips == 0:
        return tuning.strips
    return 2 if strips % 2 == 0 and strips > 8 else 1


@dataclass(frozen=True)
class _Part:
    """What a block has of a matrix. warps_k: warps that share a step's inputs, 128 each, which does
    not depend on the batch, as sums depend on it."""

    packed: PackedFormat
    num_inputs: int
    tile: int
    splits: int

    @property
    def warps_k(self) -> int:
        return 1 if self.tile // STRIP >= _ALONE_WARPS else 2

    @property
    def steps(self) -> int:
        """Of the block with most."""
        return -(-self.all_steps // self.splits)

    @property
    def all_steps(self) -> int:
        return -(-self.num_inputs // (CHUNK * self.warps_k))

    @property
    def read(self) -> float:
        """The cost of what a block reads, in bytes of codes."""
        codes = self.tile * self.packed.chunk_bytes / (STRIP * CHUNK)
        inputs = self.steps * CHUNK * self.warps_k
        return inputs * (codes + _INPUT_COST * 2 * _NOMINAL_TOKENS)

    def bytes(self, stages: int, tokens: int) -> int:
        """Shared memory of a block: the ring, where sums meet afterwards."""
        lead = 1 if self.packed.kind == "int4" else 0
        group_sums = lead * 2 * self.warps_k * (CHUNK // self.packed.group) * tokens * 4
        inputs = (stages + lead) * 2 * CHUNK * self.warps_k * tokens
        codes = stages * self.tile // STRIP * self.warps_k * self.packed.chunk_bytes
        slots = -(-tokens // 2 // self.splits)
        inbox = 8 * self.tile * self.warps_k * self.splits * slots
        return INBOX_HEAD + max(inbox, group_sums + inputs + codes)


@dataclass(frozen=True)
class _Shape:
    """A matrix, and the multiprocessors that share it."""

    packed: PackedFormat
    weight_rows: int
    num_inputs: int
    num_multiprocessors: int

    def best_part(self, clusters: bool, max_shared_bytes: int, tuning: StreamTuning) -> _Part:
        """The parts for which the multiprocessor with most to read has least; the number of tokens
        plays no part."""
        found = [
            part
            for part in self._parts(clusters, tuning)
            if part.bytes(2, MAX_ROWS) <= max_shared_bytes
        ]
        if not found:
            raise ValueError(f"{max_shared_bytes} bytes of shared memory hold no ring of two steps")
        return min(found, key=lambda part: (self._cost(part), part.tile, part.splits))

    def _parts(self, clusters: bool, tuning: StreamTuning) -> Iterator[_Part]:
        few_bits = self.packed.kind == "int4"
        tiles = [tile for tile in OUT_TILES if few_bits or tile <= _TALLEST_OF_BYTES]
        for tile in [tuning.out_tile] if tuning.out_tile else tiles:
            for splits in [tuning.splits] if tuning.splits else SPLITS if clusters else (1,):
                part = _Part(self.packed, self.num_inputs, tile, splits)
                if splits > part.all_steps:  # a block without a step
                    part = replace(part, splits=max(s for s in SPLITS if s <= part.all_steps))
                if tuning.splits or self._may_split(part):
                    yield part

    def _blocks(self, part: _Part) -> int:
        return -(-self.weight_rows // part.tile) * part.splits

    def _may_split(self, part: _Part) -> bool:
        """As in launch_skinny.py: clusters do not take turns."""
        share = self._blocks(part) / self.num_multiprocessors
        several = part.splits < SPLITS[-1] and (1.75 <= share <= 2 or share >= _MANY_TURNS)
        return part.splits == 1 or share <= 1 or several

    def _cost(self, part: _Part) -> float:
        turns = -(-self._blocks(part) // self.num_multiprocessors)
        read = part.read
        if part.splits == 1:  # those that take turns are two at a time
            return turns * read * (_ALONE_COST if turns == 1 and read > _ALONE_READ else 1.0)
        if part.splits >= _UNEVEN_SPLITS and read > _UNEVEN_READ:
            read *= _UNEVEN_COST
        sums = 4 * _NOMINAL_TOKENS * part.tile * part.warps_k
        return turns * (read + _INPUT_COST * sums + _MERGE_COST)
