"""How products of up to 64 tokens with packed codes are launched on compute capability 9.0a: which,
tiles, clusters, rings, macros.

Pure Python, from shapes and what the card has; knows no arrays and no device. The numbers mirror
kernels_cu/quantized_wide_parts.cuh and skinny_parts.cuh, and a test holds them together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nanocupy.ops.launch_quantized import CHUNK, STRIP, PackedFormat
from nanocupy.ops.launch_skinny import INBOX_HEAD, SPLITS

FILE = "quantized_wide.cu"
TOKENS = (16, 32, 48, 64)  # a build's room; batches are rounded up
MAX_ROWS = TOKENS[-1]  # tokens; more take the matrix in 16 bits
LEAST_GROUP = 32  # inputs of a scale
MIN_INPUT_STAGES, MAX_INPUT_STAGES = 4, 7
# Tokens. A layer of Llama-3.1-8B took, in us beside the kernels for fewer, for 9 tokens 68 and 88
# with int4, 94 and 97 with int8; but of Llama-3.2-1B 31 and 38, 39.5 and 35.3.
_FASTER_FROM = {"int4": 9, "int8": 17, "fp8": 17}
OPERANDS = 3  # chunks of inputs that are not on their way
_MAX_WARPGROUPS = 4
_MOST_PARTS = 4  # strips of a warp
_STAGES = 2  # of codes: all that come at first delay the first inputs
_BOX_COLUMNS = 64  # rows of 128 bytes
ALIGNMENT = 1024  # of the rings; what comes before may end anywhere
# Of a thread, which the compiler gives a block at least, by its warpgroups that multiply: with four
# warps that fetch (for one warpgroup it gives more).
_REGISTERS = (168, 168, 128, 96)

# Of an H100, as in wide_cost: KB (1000 bytes) a microsecond and multiprocessor, from memory, from
# L2 while all read, and what one takes in alone.
_MEMORY_RATE, _L2_RATE, _INTAKE_RATE = 21.0, 43.0, 65.0
_LATENCY_US = 1.2  # of memory under load: what is on its way in it bounds the rate
_CLOCKS = 1700.0  # a microsecond
# A quarter of a multiprocessor takes so many clocks for a chunk of a strip, and more for each
# token: measured with int4 (264 with 32 tokens, 340 with 64). What 8 bits take beyond is counted.
# A warp takes the last at least for each of its strips, one after the other.
_STRIP_CLOCKS, _BYTE_CLOCKS, _TOKEN_CLOCKS, _STEP_CLOCKS = 185, 80, 2.5, 650
# The inputs of a chunk come on top of that: for each eight tokens of a warp that fetches, beside
# them, and until they are there.
_FETCH_CLOCKS, _FETCH_START, _FETCH_LATENCY = 100, 300, 1700
_KERNEL_US, _MERGE_US, _CLUSTER_RATE = 1.7, 0.7, 25.0
_TURN_US = 1.0  # of a block's start and end: another finds no room beside it
_NOMINAL_TOKENS = (32, 64)  # by which splits are chosen
_PLACED = {1: 1.0, 2: 1.0, 4: 0.91, 8: 0.85}  # of the multiprocessors, by the blocks of a cluster


@dataclass(frozen=True)
class WideCodesTuning:
    """What a bench may vary; None leaves the choice to the plan.

    min_rows: tokens from which these products are taken (above MAX_ROWS: never), None for what was
    measured. out_tile, splits: rows of weights of a block, blocks that share their inputs.
    warpgroups: that multiply. stages, input_stages: of the rings.
    """

    min_rows: int | None = None
    out_tile: int | None = None
    splits: int | None = None
    warpgroups: int | None = None
    stages: int | None = None
    input_stages: int | None = None


DEFAULT_TUNING = WideCodesTuning()
NEVER = WideCodesTuning(min_rows=MAX_ROWS + 1)


@dataclass(frozen=True)
class WideCodesLaunch:
    """Everything of a launch but its arrays. `macros` come on top of SCALAR and RESIDUAL. us: what
    it takes, guessed."""

    macros: dict[str, int]
    grid: tuple[int, ...]
    block: int
    shared_bytes: int
    cluster: int
    us: float

    @property
    def input_box(self) -> tuple[int, int]:
        """Of the map of x."""
        return self.macros["TOKENS"], _BOX_COLUMNS


def fetch_warps(tokens: int) -> int:
    """Of a block, by its room for tokens."""
    return 4 if tokens > 16 else 2


def uses_wide_codes(
    packed: PackedFormat,
    rows: int,
    dtype: str,
    *,
    wgmma: bool,
    tuning: WideCodesTuning = DEFAULT_TUNING,
) -> bool:
    """Whether a product of `rows` tokens, which multiplies codes, is for these kernels. dtype: the
    storage type; wgmma: the card has, and gets builds for, what 9.0a has."""
    can_be = wgmma and dtype == "bfloat16" and packed.group >= LEAST_GROUP
    least = _FASTER_FROM[packed.kind] if tuning.min_rows is None else tuning.min_rows
    return can_be and least <= rows <= MAX_ROWS


def plan_wide_codes(
    packed: PackedFormat,
    num_outputs: int,
    num_inputs: int,
    rows: int,
    num_multiprocessors: int,
    *,
    pairs: bool = False,
    max_shared_bytes: int = 227 << 10,
    tuning: WideCodesTuning = DEFAULT_TUNING,
) -> WideCodesLaunch:
    """The launch of a product of `rows` tokens, 1 to MAX_ROWS, with weights [num_outputs,
    num_inputs].

    pairs: quantized_wide_swiglu, whose weights have twice num_outputs rows; max_shared_bytes: what
    a block can have. num_outputs 0 gives a grid of 0: nothing is to be launched. Raises ValueError
    for what the kernels do not take, or have no room for.
    """
    if not 1 <= rows <= MAX_ROWS or num_inputs < 1 or num_inputs % 8 or num_outputs < 0:
        raise ValueError(
            f"{rows} tokens, weights [{num_outputs}, {num_inputs}]: quantized kernels take 1 to "
            f"{MAX_ROWS} tokens and a multiple of 8 inputs"
        )
    if packed.group < LEAST_GROUP:
        raise ValueError(f"groups of {packed.group} inputs: these kernels take {LEAST_GROUP} up")
    tokens = next(n for n in TOKENS if n >= rows)
    weight_rows = -(-num_outputs // 8) * 16 if pairs else num_outputs
    shape = _Shape(packed, weight_rows, num_inputs, num_multiprocessors)
    if tuning.splits is None:
        tuning = replace(tuning, splits=shape.best_splits(max_shared_bytes, tuning))
    part = shape.best(tokens, max_shared_bytes, tuning)
    macros = packed.macros | {
        "TOKENS": tokens, "OUT_TILE": part.tile, "WARPGROUPS": part.warpgroups,
        "STAGES": part.stages, "INPUT_STAGES": part.input_stages,
    }  # fmt: skip
    blocks = shape.num_tiles(part) * part.splits
    threads = 32 * (4 * part.warpgroups + part.fetch_warps)
    return WideCodesLaunch(
        macros, (blocks,), threads, part.bytes, part.splits, shape.us(part)
    )  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """What a block has of a matrix. parts: strips of a warp."""

    packed: PackedFormat
    num_inputs: int
    tokens: int
    splits: int
    warpgroups: int
    parts: int
    stages: int = 2
    input_stages: int = MIN_INPUT_STAGES

    @property
    def tile(self) -> int:
        return 64 * self.warpgroups * self.parts

    @property
    def fetch_warps(self) -> int:
        return fetch_warps(self.tokens)

    @property
    def chunks(self) -> int:
        """Of the block with most."""
        return -(-self.num_inputs // (CHUNK * self.splits))

    @property
    def stage_bytes(self) -> int:
        """Codes of a chunk."""
        return self.tile // STRIP * self.packed.chunk_bytes

    @property
    def input_bytes(self) -> int:
        """Inputs of a chunk."""
        return 2 * CHUNK * self.tokens

    @property
    def sum_bytes(self) -> int:
        """With int4, of inputs by group, beside those that are in their places."""
        groups = CHUNK // self.packed.group if self.packed.kind == "int4" else 0
        return OPERANDS * 4 * groups * self.tokens

    @property
    def inbox_bytes(self) -> int:
        return 8 * self.tile * self.splits * -(-self.tokens // 2 // self.splits)

    @property
    def bytes(self) -> int:
        """Shared memory of a block: rings, where sums meet afterwards."""
        rings = self.stages * self.stage_bytes + self.input_stages * self.input_bytes
        rings += self.sum_bytes
        return INBOX_HEAD + max(self.inbox_bytes, ALIGNMENT + rings)

    @property
    def registers(self) -> float:
        """Of a thread, without any spilled: sums of a group and those of each strip so far,
        operands, and what more each strip keeps. Found by building them all."""
        return (self.parts + 1) * self.tokens / 2 + 55 + 8.5 * self.parts


@dataclass(frozen=True)
class _Shape:
    """A matrix, and the multiprocessors that share it."""

    packed: PackedFormat
    weight_rows: int
    num_inputs: int
    num_multiprocessors: int

    def num_tiles(self, part: _Part) -> int:
        return -(-self.weight_rows // part.tile)

    def best_splits(self, max_shared_bytes: int, tuning: WideCodesTuning) -> int:
        """They change the order of sums, so they do not depend on the batch: those that are best
        for two batches."""

        def us(splits: int) -> float:
            chosen = replace(tuning, splits=splits)
            return sum(
                self.us(self.best(tokens, max_shared_bytes, chosen)) for tokens in _NOMINAL_TOKENS
            )

        return min(SPLITS, key=us)

    def best(self, tokens: int, max_shared_bytes: int, tuning: WideCodesTuning) -> _Part:
        found = list(self._parts(tokens, max_shared_bytes, tuning))
        if not found:
            raise ValueError(
                f"{max_shared_bytes} bytes of shared memory hold no rings for {tokens} tokens, or "
                f"not their sums"
            )
        # More warps hide more, where that is all the difference.
        return min(found, key=lambda p: (round(self.us(p), 3), -p.warpgroups, p.tile, p.splits))

    def _parts(
        self, tokens: int, max_shared_bytes: int, tuning: WideCodesTuning
    ) -> Iterator[_Part]:
        """All that have room."""
        chunks = -(-self.num_inputs // CHUNK)
        splits = [tuning.splits] if tuning.splits else SPLITS
        for split in sorted({max(s for s in SPLITS if s <= min(n, chunks)) for n in splits}):
            for warpgroups in range(1, _MAX_WARPGROUPS + 1):
                if tuning.warpgroups not in (None, warpgroups):
                    continue
                for parts in range(1, _MOST_PARTS + 1):
                    if tuning.out_tile not in (None, 64 * warpgroups * parts):
                        continue
                    part = _Part(self.packed, self.num_inputs, tokens, split, warpgroups, parts)
                    found = _with_rings(part, max_shared_bytes, tuning)
                    if found:
                        yield found

    def us(self, part: _Part) -> float:
        """Microseconds until the multiprocessor with most to do is done."""
        blocks = self.num_tiles(part) * part.splits
        share = blocks / (self.num_multiprocessors * _PLACED[part.splits])
        turns = max(1.0, -(-share // 1))
        strips = part.tile // STRIP
        codes = strips * part.chunks * self.packed.chunk_bytes / 1e3  # KB of a block
        inputs = part.chunks * part.input_bytes / 1e3
        from_memory = blocks * codes / self.num_multiprocessors / _MEMORY_RATE
        ahead = part.stages * part.stage_bytes / 1e3
        arriving = turns * codes * _LATENCY_US / ahead
        from_l2 = blocks * (codes + inputs) / self.num_multiprocessors / _L2_RATE
        intake = turns * (codes + inputs) / _INTAKE_RATE
        each = _STRIP_CLOCKS + _TOKEN_CLOCKS * part.tokens
        each += 12 * (CHUNK // self.packed.group - 1)
        each += 0 if self.packed.kind == "int4" else _BYTE_CLOCKS
        multiply = strips / 4 * each
        fetch = -(-part.tokens // (8 * part.fetch_warps)) * _FETCH_CLOCKS + _FETCH_START
        arrives = _FETCH_LATENCY / (part.input_stages - OPERANDS)
        step = max(multiply + fetch, part.parts * _STEP_CLOCKS, arrives)
        steps = turns * part.chunks * step / _CLOCKS
        sent = 4 * part.tile * part.tokens * (part.splits - 1) / part.splits / 1e3
        merge = sent / _CLUSTER_RATE + _MERGE_US if part.splits > 1 else 0.0
        works = from_memory, arriving, from_l2, intake, steps
        ends = turns * (merge + _TURN_US)
        return _KERNEL_US + max(works) + sum(works) / 50 + ends


def _with_rings(part: _Part, max_shared_bytes: int, tuning: WideCodesTuning) -> _Part | None:
    """With the stages that are wanted; None where there is no room for them, or for the sums."""
    if part.registers > _REGISTERS[part.warpgroups - 1]:
        return None
    room = max_shared_bytes - INBOX_HEAD - ALIGNMENT - part.sum_bytes
    wanted = tuning.input_stages or MAX_INPUT_STAGES
    input_stages = min(max(wanted, MIN_INPUT_STAGES), MAX_INPUT_STAGES)
    stages = (room - input_stages * part.input_bytes) // part.stage_bytes
    stages = min(stages, tuning.stages or _STAGES, max(2, part.chunks))
    found = replace(part, stages=stages, input_stages=input_stages)
    return found if stages >= 2 and found.bytes <= max_shared_bytes else None
