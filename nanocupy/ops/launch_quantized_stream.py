"""How products of 9 to 32 tokens with packed codes are launched: tiles, clusters, rings, macros.

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
# Of codes of a byte, where it is the faster one up to 16: a layer of Llama-3.1-8B with int8 took
# 97 us on an H100, and so 110.
_MIN_BYTE_ROWS = 17
TOKENS = (16, 32)  # a build's room; batches are rounded up
MAX_ROWS = TOKENS[-1]  # tokens of a launch
MAX_BATCH = 64  # tokens, in several launches
_MAX_WARPS = 16
_WARPS_K = (1, 2, 4, 8)
_MOST_STRIPS = 4  # of a warp
_MOST_STAGES = 8
_REGISTERS = 512  # of a lane of a multiprocessor's quarter, which has every fourth warp
# Of a thread, beside sums, operands and inputs: without some that may be spilled, and with them.
_OTHER_REGISTERS, _SPARED_REGISTERS = 24, 16

# Clocks of an H100, guessed, as only their ratios matter. They are too low, most of all for
# clusters of 4 and 8: a layer of Llama-3.1-8B in int4 takes 123 us for 32 tokens, they say 65.
_READ_RATE = 13  # bytes of a multiprocessor's share of memory, a clock
_READ_LATENCY = 1200
_INPUT_RATE = 40  # bytes a clock from L2; some of them come while products are under way
_CHUNK_START, _CHUNK_STRIP = 400, 300  # what a chunk takes a warp alone, and with each strip
_HIDDEN = 0.7  # how much of that other warps hide
_TURN = 1500  # of a launch, and until the first inputs come
_MERGE, _MERGE_RATE = 1000, 14.5  # of a cluster's sums; bytes a clock to other blocks
_EIGHT = 1.06  # clusters of 8 are not placed together everywhere
_ALONE_RATE = 64


@dataclass(frozen=True)
class StreamTuning:
    """What a bench may vary; None leaves the choice to the plan.

    min_rows: tokens from which these products are taken (above MAX_BATCH: never), whatever the
    codes. out_tile, splits: rows of weights of a block, blocks that share their inputs. warps_k:
    warps of a block that do. strips: of 16 rows, that a warp works on at once; warp_strips: in all.
    warps: of a block, at most. stages: of the ring, at most. shared_kb: of a block where two are to
    fit on a multiprocessor of an H100, so that the next kernel's codes come while one runs.
    """

    min_rows: int | None = None
    out_tile: int | None = None
    splits: int | None = None
    warps_k: int | None = None
    strips: int | None = None
    warp_strips: int | None = None
    warps: int = _MAX_WARPS
    stages: int = _MOST_STAGES
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


def uses_stream(rows: int, kind: str, tuning: StreamTuning = DEFAULT_TUNING) -> bool:
    """Whether a product of `rows` tokens, which multiplies codes of this kind, is for these
    kernels, where they have room for a launch (`stream_rows`)."""
    least = tuning.min_rows
    if least is None:
        least = MIN_ROWS if kind == "int4" else _MIN_BYTE_ROWS
    return least <= rows <= MAX_BATCH


def stream_rows(
    packed: PackedFormat,
    num_inputs: int,
    *,
    clusters: bool = True,
    max_shared_bytes: int = 227 << 10,
    tuning: StreamTuning = DEFAULT_TUNING,
) -> int:
    """The most tokens of a launch for which a block of a card has room; 0: not even the fewest."""
    shape = _Shape(packed, 8 * STRIP, num_inputs, 1)
    for tokens in reversed(TOKENS):
        if any(shape.parts(tokens, clusters, max_shared_bytes, tuning)):
            return tokens
    return 0


def part_rows(rows: int, most: int) -> int:
    """Tokens of each launch of a batch of `rows` but the last, which may have fewer: as few
    launches of up to `most` as can be, of one length. The plan for so many is for all of them."""
    return -(-rows // -(-rows // most))


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
    to be launched. Raises ValueError for what the kernels do not take, or have no room for.
    """
    if not 1 <= rows <= MAX_ROWS or num_inputs < 1 or num_inputs % 8 or num_outputs < 0:
        raise ValueError(
            f"{rows} tokens, weights [{num_outputs}, {num_inputs}]: quantized kernels take 1 to "
            f"{MAX_ROWS} tokens and a multiple of 8 inputs"
        )
    tokens = next(n for n in TOKENS if n >= rows)
    weight_rows = -(-num_outputs // 8) * 16 if pairs else num_outputs
    shape = _Shape(packed, weight_rows, num_inputs, num_multiprocessors)
    parts = list(shape.parts(tokens, clusters, max_shared_bytes, tuning))
    if not parts:
        raise ValueError(
            f"{max_shared_bytes} bytes of shared memory hold no part of {num_inputs} inputs of "
            f"{rows} tokens"
        )
    part = min(parts, key=lambda part: (shape.clocks(part), part.tile, part.splits, part.warps))
    macros = packed.macros | {
        "TOKENS": tokens, "OUT_TILE": part.tile, "WARPS_N": part.warps_n, "WARPS_K": part.warps_k,
        "STRIPS": part.strips, "STAGES": part.stages, "MIN_BLOCKS": part.resident,
    }  # fmt: skip
    blocks = shape.num_tiles(part) * part.splits
    return StreamLaunch(macros, (blocks,), 32 * part.warps, part.bytes, part.splits)


@dataclass(frozen=True)
class _Part:
    """What a block has of a matrix. passes: of a warp along its inputs, of `strips` strips each;
    stages: of the ring; resident: such blocks of a multiprocessor."""

    packed: PackedFormat
    num_inputs: int
    tokens: int
    splits: int
    warps_n: int
    warps_k: int
    strips: int
    passes: int
    stages: int = 2
    resident: int = 1

    @property
    def tile(self) -> int:
        return STRIP * self.warps_n * self.strips * self.passes

    @property
    def warps(self) -> int:
        return self.warps_n * self.warps_k

    @property
    def chunks(self) -> int:
        """Of the block with most."""
        return -(-self.num_inputs // (CHUNK * self.splits))

    @property
    def visits(self) -> int:
        """Of the warp with most: chunks of STRIPS strips."""
        return -(-self.chunks // self.warps_k) * self.passes

    @property
    def slot_bytes(self) -> int:
        """Of a stage of all rings."""
        return self.warps * self.strips * self.packed.chunk_bytes

    @property
    def input_bytes(self) -> int:
        return self.chunks * 2 * CHUNK * self.tokens

    @property
    def fixed_bytes(self) -> int:
        """Of inputs and, with int4, their sums."""
        groups = CHUNK // self.packed.group if self.packed.kind == "int4" else 0
        return self.input_bytes + self.chunks * groups * self.tokens * 4

    @property
    def inbox_bytes(self) -> int:
        slots = -(-self.tokens // 2 // self.splits)
        return 8 * self.tile * self.warps_k * self.splits * slots

    @property
    def bytes(self) -> int:
        """Shared memory of a block: inputs and rings, where sums meet afterwards."""
        rings = self.fixed_bytes + self.stages * self.slot_bytes
        return INBOX_HEAD + max(self.inbox_bytes, rings)

    @property
    def registers(self) -> int:
        """Of a thread, about: sums of a group and those so far, operands of codes, inputs, and what
        more of it short groups of int4 keep."""
        sums = (self.passes + 1) * self.strips * self.tokens // 2
        of_groups = 8 if self.packed.kind == "int4" and self.packed.group < CHUNK else 0
        return sums + 12 * self.strips + self.tokens // 2 + of_groups + _OTHER_REGISTERS


@dataclass(frozen=True)
class _Shape:
    """A matrix, and the multiprocessors that share it."""

    packed: PackedFormat
    weight_rows: int
    num_inputs: int
    num_multiprocessors: int

    def num_tiles(self, part: _Part) -> int:
        return -(-self.weight_rows // part.tile)

    def parts(
        self, tokens: int, clusters: bool, max_shared_bytes: int, tuning: StreamTuning
    ) -> Iterator[_Part]:
        """All that have room."""
        all_chunks = -(-self.num_inputs // CHUNK)
        splits = [tuning.splits] if tuning.splits else SPLITS if clusters else (1,)
        for split in sorted({max(s for s in SPLITS if s <= min(n, all_chunks)) for n in splits}):
            for warps_k in [tuning.warps_k] if tuning.warps_k else _WARPS_K:
                if warps_k > 1 and not tuning.warps_k and warps_k * split > all_chunks:
                    continue
                for strips, passes, warps_n in self._warps(warps_k, tuning):
                    part = _Part(
                        self.packed, self.num_inputs, tokens, split, warps_n, warps_k, strips,
                        passes,
                    )  # fmt: skip
                    found = _with_ring(part, max_shared_bytes, tuning)
                    if found:
                        yield found

    def _warps(self, warps_k: int, tuning: StreamTuning) -> Iterator[tuple[int, int, int]]:
        """(strips at once, passes, warps along the rows)."""
        for strips in [tuning.strips] if tuning.strips else (1, 2):
            for passes in range(1, _MOST_STRIPS // strips + 1):
                if tuning.warp_strips and strips * passes != tuning.warp_strips:
                    continue
                for warps_n in range(1, tuning.warps // warps_k + 1):
                    tile = STRIP * warps_n * strips * passes
                    if tuning.out_tile in (None, tile):
                        yield strips, passes, warps_n

    def clocks(self, part: _Part) -> float:
        """Until the multiprocessor with most to do is done."""
        blocks = self.num_tiles(part) * part.splits
        places = self.num_multiprocessors
        if part.splits > 2:  # such clusters do not find all multiprocessors free
            places = max(part.splits, places // 16 * 16)
        if part.splits == 2:
            places = max(2, places // 2 * 2)
        at_once = max(1, min(part.resident, -(-blocks // places)))
        turns = -(-blocks // (places * at_once))
        codes = at_once * part.tile // STRIP * part.chunks * self.packed.chunk_bytes
        ahead = at_once * (part.stages - 0.5) * part.slot_bytes
        read = codes / min(_READ_RATE, ahead / _READ_LATENCY)
        # Instructions for a chunk of a strip; and for inputs, which strips at once share.
        few_bits = self.packed.kind == "int4"
        groups = CHUNK // self.packed.group
        of_sums = groups * part.tokens // (1 if few_bits else 2)
        each = part.tokens + of_sums + (75 if few_bits else 130)
        visit = part.strips * each + part.tokens * 6 // 10 + 15
        issue = -(-at_once * part.warps // 4) * part.visits * visit
        latency = part.visits * (_CHUNK_START + _CHUNK_STRIP * part.strips)
        work = max(read, 1.3 * issue, latency) + (1 - _HIDDEN) * latency
        inputs = at_once * part.input_bytes / _INPUT_RATE
        sums = at_once * 4 * part.tokens * part.tile * part.warps_k
        merge = _MERGE + sums / _MERGE_RATE if part.splits > 1 else sums / _ALONE_RATE
        return turns * (work + inputs + merge + _TURN) * (_EIGHT if part.splits == 8 else 1.0)


def _with_ring(part: _Part, max_shared_bytes: int, tuning: StreamTuning) -> _Part | None:
    """With as many stages as there is room for, and place for a second block where that leaves
    three; None where there is no room for two."""
    if -(-part.warps // 4) * part.registers > _REGISTERS:
        return None
    wanted = max(2, min(tuning.stages, part.visits))
    of_two = min(max_shared_bytes, tuning.shared_kb << 10)
    for resident, most in ((2, of_two), (1, max_shared_bytes)):
        registers = part.registers + _SPARED_REGISTERS
        if resident == 2 and -(-2 * part.warps // 4) * registers > _REGISTERS:
            continue
        room = most - INBOX_HEAD - part.fixed_bytes
        stages = min(wanted, room // part.slot_bytes)
        found = replace(part, stages=stages, resident=resident)
        if stages >= min(wanted, 3 if resident == 2 else 2) and found.bytes <= most:
            return found
    return None
