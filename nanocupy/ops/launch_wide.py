"""How the products of up to 256 tokens are launched on compute capability 9.0a: which, tiles,
clusters, rings, boxes of the copy engine, macros.

Pure Python, from shapes and what the card has; knows no arrays and no device. What a launch costs
is guessed in `wide_cost`. The numbers mirror kernels_cu/wide.cuh, and a test holds the two
together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanocupy.ops.wide_cost import WideShape, warpgroups

FILE = "wide.cu"
MAX_ROWS = 256  # tokens; more go to cuBLAS
TOKENS = (64, 128, 192, 256)  # a build's room; batches are rounded up
OUT_TILES = (64, 128, 192, 256)  # rows of weights of a block
SPLITS = (1, 2, 4, 8)  # blocks of a cluster: up to 8 are placed together on every card
SHARERS = (1, 2, 4)
_MOST_SHARERS = 2  # that a plan takes by itself: four have not been measured
K_STEP = 64
MOST_STAGES = 16
HEAD_BYTES = 1024
_ALIGNMENT = 1024  # of the rings; what comes before may begin anywhere
_MOST_WARPGROUPS = 4
_TWO_BLOCKS = 2  # warpgroups up to which registers hold two blocks on a multiprocessor
# Shared memory of a block of which two fit, so that the next kernel's weights come while one runs,
# and of one alone.
_TWO_KB, _ALONE_KB = 112, 224
# Clusters of 4 and more are spread less evenly where two of their blocks fit on a multiprocessor,
# as was seen in skinny.cu: those with much to read, in bytes of weights, get one each.
_UNEVEN_READ, _UNEVEN_SPLITS = 200 << 10, 4
# So does, where there is one for each multiprocessor at most, a block with more bytes of weights
# than a ring beside another would hold: query, key and value of Qwen3-0.6B took 9.1 us and so 8.4.
_LONG_READ = 64 << 10
# Splits do not depend on the batch, nor do a token's sums: they are those that are best for both.
_NOMINAL_TOKENS = (64, 128)


@dataclass(frozen=True)
class WideRange:
    """Products that are taken: of weights of least_mb to most_mb (10^6 bytes) and min_rows to
    max_rows tokens."""

    least_mb: float = 0.0
    most_mb: float = math.inf
    min_rows: int = 1
    max_rows: int = MAX_ROWS


# Where they were the faster way on an H100, in microseconds of a layer's products and norms, beside
# the faster of skinny.cu and cuBLAS: Qwen3-0.6B 24.4 to 31.4 for 32 tokens and 26.6 to 31.2 for 64,
# Llama-3.2-1B 53.6 to 61.2 and 57.3 to 64.4, Llama-3.1-8B 164 to 174 and 168 to 177. For 128 tokens
# gate and up (67 MB of Llama-3.2-1B 30.0 to 34.5, 235 MB of Llama-3.1-8B 91.5 to 97.1) and LM heads
# (386 to 415), but other matrices took up to 5 us longer; more tokens were not measured since.
FASTER = (
    WideRange(min_rows=17, max_rows=64),
    WideRange(60, 100, 65, 128),
    WideRange(200, math.inf, 65, 128),
)


@dataclass(frozen=True)
class WideTuning:
    """What a bench may vary; None leaves the choice to the plan.

    ranges: what is taken, if it can be. out_tile, splits: rows of weights of a block, blocks that
    share its inputs. shared_kb: of a block, unless two steps or the sums need more. input_stages:
    steps of inputs in their ring. sharers: blocks, 1, 2 or 4, that get the same inputs by one copy,
    where a cluster has room for it.
    """

    ranges: tuple[WideRange, ...] = FASTER
    out_tile: int | None = None
    splits: int | None = None
    shared_kb: int | None = None
    input_stages: int | None = None
    sharers: int | None = None


DEFAULT_TUNING = WideTuning()
ALWAYS = WideTuning(ranges=(WideRange(),))  # whatever can be
NEVER = WideTuning(ranges=())


@dataclass(frozen=True)
class WideLaunch:
    """Everything of a launch but its arrays. `macros` come on top of SCALAR and RESIDUAL.

    splits: blocks of a tile; a cluster has those of the tiles that share inputs. input_box,
    weight_box: what one copy brings of x [T, K] and of the weights, rows and inputs. weight_stages,
    input_stages: steps in the rings.
    """

    macros: dict[str, int]
    grid: tuple[int, ...]
    block: int
    shared_bytes: int
    cluster: int
    splits: int
    input_box: tuple[int, int]
    weight_box: tuple[int, int]
    weight_stages: int
    input_stages: int


def uses_wide(
    rows: int,
    num_outputs: int,
    num_inputs: int,
    weight_bytes: int,
    *,
    pairs: bool = False,
    wgmma: bool,
    tuning: WideTuning = DEFAULT_TUNING,
) -> bool:
    """Whether a product is for these kernels: in the tuning's ranges, 16-bit weights, and numbers
    of inputs and outputs that are multiples of 8. pairs: as in plan_wide; wgmma: the card has, and
    gets builds for, what 9.0a has."""
    megabytes = num_outputs * (2 if pairs else 1) * num_inputs * weight_bytes / 1e6
    return (
        wgmma
        and 1 <= rows <= MAX_ROWS
        and weight_bytes == 2
        and num_inputs > 0
        and num_inputs % 8 == 0
        and num_outputs % 8 == 0
        and any(
            taken.least_mb <= megabytes <= taken.most_mb
            and taken.min_rows <= rows <= taken.max_rows
            for taken in tuning.ranges
        )
    )


def plan_wide(
    num_outputs: int,
    num_inputs: int,
    rows: int,
    num_multiprocessors: int,
    *,
    pairs: bool = False,
    max_shared_bytes: int = 227 << 10,
    tuning: WideTuning = DEFAULT_TUNING,
) -> WideLaunch:
    """The launch of a product of `rows` tokens with weights [num_outputs, num_inputs].

    pairs: wide_swiglu, whose weights have twice num_outputs rows; max_shared_bytes: what a block
    can have. num_outputs 0 gives a grid of 0: nothing is to be launched. Raises ValueError for what
    the kernels do not take.
    """
    if not 1 <= rows <= MAX_ROWS or num_inputs < 1 or num_inputs % 8 or num_outputs % 8:
        raise ValueError(
            f"{rows} tokens, weights [{num_outputs}, {num_inputs}]: wide kernels take 1 to "
            f"{MAX_ROWS} tokens and multiples of 8 inputs and outputs"
        )
    tokens = next(n for n in TOKENS if n >= rows)
    shape = WideShape(num_outputs * (2 if pairs else 1), num_inputs, num_multiprocessors)
    choice = _Choice(shape, max_shared_bytes, tuning)
    splits = choice.splits()
    tile, sharers = choice.best(tokens, splits)[1:]
    weights, inputs = 2 * K_STEP * tile, 2 * K_STEP * tokens
    steps = -(-shape.num_steps // splits)  # of a block with most
    blocks = -(-shape.num_tiles(tile) // sharers) * sharers * splits
    sums = _sums_bytes(tile, tokens, splits)
    alone = (
        warpgroups(tile, tokens) > _TWO_BLOCKS
        or (splits >= _UNEVEN_SPLITS and steps * weights > _UNEVEN_READ)
        or (blocks <= num_multiprocessors and steps * weights > _LONG_READ)
        or sums + HEAD_BYTES + _ALIGNMENT > _TWO_KB << 10
    )
    kb = tuning.shared_kb or (_ALONE_KB if alone else _TWO_KB)
    room = min(kb << 10, max_shared_bytes) - HEAD_BYTES - _ALIGNMENT
    stages = _stages(room, weights, inputs, steps, tuning.input_stages)
    used = max(stages[0] * weights + stages[1] * inputs, sums)
    if used + HEAD_BYTES + _ALIGNMENT > max_shared_bytes:
        raise ValueError(
            f"{max_shared_bytes} bytes of shared memory hold no ring of two steps of {tile} rows "
            f"of weights and {tokens} tokens, or not their sums"
        )
    return WideLaunch(
        macros={"TOKENS": tokens, "OUT_TILE": tile, "SHARERS": sharers},
        grid=(blocks,),
        block=128 * warpgroups(tile, tokens) + 64,
        shared_bytes=used + HEAD_BYTES + _ALIGNMENT,
        cluster=splits * sharers,
        splits=splits,
        input_box=(tokens // sharers, K_STEP),
        weight_box=(tile // 2 if pairs else tile, K_STEP),
        weight_stages=stages[0],
        input_stages=stages[1],
    )


def _sums_bytes(tile: int, tokens: int, splits: int) -> int:
    """Of a block's own sums, and what the other splits send it."""
    return 4 * tile * tokens * (2 * splits - 1) // splits


def _stages(
    room: int, weights: int, inputs: int, steps: int, input_stages: int | None
) -> tuple[int, int]:
    """(steps of weights, of inputs) in the rings of `room` bytes. Weights come from memory, which
    takes about twice as long as L2: half as many steps of inputs, but three of both where they fit.
    A step's place is free when the next step has been started, so there are two at least where
    there are two steps."""
    most, least = min(steps, MOST_STAGES), min(steps, 2)
    wanted = max(round(room / (weights + inputs / 2) / 2), 3)
    if wanted == 3 and 3 * (weights + inputs) > room:
        wanted = 2
    of_inputs = min(max(input_stages or wanted, least), most)
    of_weights = min(max((room - of_inputs * inputs) // weights, least), most)
    if input_stages is None:  # what is left
        of_inputs = min(max((room - of_weights * weights) // inputs, of_inputs), most)
    return of_weights, of_inputs


@dataclass(frozen=True)
class _Choice:
    """Of tile, splits and sharers: of least cost, of those that can be and that a tuning allows."""

    shape: WideShape
    max_shared_bytes: int
    tuning: WideTuning

    def splits(self) -> int:
        most = self.shape.num_steps
        if self.tuning.splits:
            return max(s for s in SPLITS if s <= min(self.tuning.splits, most))
        return min(
            (s for s in SPLITS if s <= most),
            key=lambda s: sum(self.best(tokens, s)[0] for tokens in _NOMINAL_TOKENS),
        )

    def best(self, tokens: int, splits: int) -> tuple[float, int, int]:
        """(cost, rows of weights of a tile, sharers)"""
        return min(
            (self.shape.cost(tokens, tile, splits, sharers), tile, sharers)
            for tile in self._tiles(tokens, splits) for sharers in self._sharers(tile, splits)
        )  # fmt: skip

    def _tiles(self, tokens: int, splits: int) -> list[int]:
        room = self.max_shared_bytes - HEAD_BYTES - _ALIGNMENT
        found = [
            tile for tile in OUT_TILES
            if tile <= (self.tuning.out_tile or OUT_TILES[-1])
            and warpgroups(tile, tokens) <= _MOST_WARPGROUPS
            and _sums_bytes(tile, tokens, splits) <= room
        ] or [OUT_TILES[0]]  # fmt: skip
        return found[-1:] if self.tuning.out_tile else found

    def _sharers(self, tile: int, splits: int) -> list[int]:
        wanted = self.tuning.sharers
        return [
            n for n in SHARERS
            if n == 1 or (n * splits <= SPLITS[-1] and n <= self.shape.num_tiles(tile))
            if n <= (wanted or _MOST_SHARERS)
        ][-1 if wanted else 0 :]  # fmt: skip
