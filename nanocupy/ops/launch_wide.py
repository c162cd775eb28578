"""How the products of 33 to 256 tokens are launched on compute capability 9.0a: tiles, clusters,
rings, boxes of the copy engine, macros.

Pure Python, from shapes and what the card has; knows no arrays and no device. The numbers mirror
kernels_cu/wide.cuh, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

FILE = "wide.cu"
MIN_ROWS = 33  # tokens; fewer go to skinny.cu
MAX_ROWS = 256  # more go to cuBLAS
TOKENS = (64, 128, 192, 256)  # a build's room; batches are rounded up
OUT_TILES = (64, 128, 192, 256)  # rows of weights of a block
SPLITS = (1, 2, 4, 8)  # blocks of a cluster: up to 8 are placed together on every card
K_STEP = 64
MOST_STAGES = 16
HEAD_BYTES = 1024
_ALIGNMENT = 1024  # of the rings; what comes before may begin anywhere
_PAIR_PADDING = 4  # pairs of tokens lie this many rows further apart than a tile has
_MOST_WARPGROUPS = 4
_TWO_BLOCKS = 2  # warpgroups up to which registers hold two blocks on a multiprocessor
# Shared memory of a block of which two fit, so that the next kernel's weights come while one runs,
# and of one alone.
_TWO_KB, _ALONE_KB = 112, 224
# Clusters of 4 and more are spread less evenly where two of their blocks fit on a multiprocessor,
# as was seen in skinny.cu: those with much to read, in bytes of weights, get one each.
_UNEVEN_READ, _UNEVEN_SPLITS = 200 << 10, 4

# Of an H100, roughly, in bytes a cycle of a multiprocessor: from memory while all read, from L2
# (weights that came from memory pass through it too), between blocks of a cluster. Tensor cores
# multiply 2048 pairs a cycle.
_MEMORY_RATE, _L2_RATE, _CLUSTER_RATE, _PRODUCTS = 13.0, 28.0, 14.5, 2048.0
_BLOCK_CYCLES = 2500.0  # of a block beside its copies: its start, the first copy, the last store
_MERGE_CYCLES = 500.0  # of a cluster's barrier and the last sums on their way
_NOMINAL_TOKENS = 128  # splits do not depend on the batch, nor do a token's sums
_MANY_TURNS = 3  # after which it does not matter where the last blocks end


@dataclass(frozen=True)
class WideTuning:
    """What a bench may vary; None leaves the choice to the plan.

    max_rows: tokens up to which these products are taken (below MIN_ROWS: never). out_tile, splits:
    rows of weights of a block, blocks that share its inputs. shared_kb: of a block, unless two
    steps need more. input_stages: steps of inputs in their ring.
    sharers: blocks, 1 or 2, that get the same inputs by one copy, where a cluster has room for it.
    """

    max_rows: int = MAX_ROWS
    out_tile: int | None = None
    splits: int | None = None
    shared_kb: int | None = None
    input_stages: int | None = None
    sharers: int | None = None


DEFAULT_TUNING = WideTuning()


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
    wgmma: bool,
    tuning: WideTuning = DEFAULT_TUNING,
) -> bool:
    """Whether a product is for these kernels: 16-bit weights whose rows are whole 16 bytes, and an
    even number of outputs. wgmma: the card has, and gets builds for, what 9.0a has."""
    return (
        wgmma
        and MIN_ROWS <= rows <= min(MAX_ROWS, tuning.max_rows)
        and weight_bytes == 2
        and num_inputs > 0
        and num_inputs % 8 == 0
        and num_outputs % 2 == 0
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
    if not 1 <= rows <= MAX_ROWS or num_inputs < 1 or num_inputs % 8 or num_outputs % 2:
        raise ValueError(
            f"{rows} tokens, weights [{num_outputs}, {num_inputs}]: wide kernels take 1 to "
            f"{MAX_ROWS} tokens, a multiple of 8 inputs and an even number of outputs"
        )
    tokens = next(n for n in TOKENS if n >= rows)
    shape = _Shape(num_outputs * (2 if pairs else 1), num_inputs, num_multiprocessors)
    splits = tuning.splits or shape.best(_NOMINAL_TOKENS, tuning.out_tile, None)[1]
    splits = max(s for s in SPLITS if s <= min(splits, shape.num_steps))
    tile, _ = shape.best(tokens, tuning.out_tile, splits)
    # Above 128 tokens a block reads twice as many bytes of inputs as of weights.
    sharers = tuning.sharers or (2 if tokens > 128 else 1)
    if sharers * splits > SPLITS[-1] or shape.num_tiles(tile) == 1:
        sharers = 1
    warpgroups = _warpgroups(tile, tokens)
    weights, inputs = 2 * K_STEP * tile, 2 * K_STEP * tokens
    steps = -(-shape.num_steps // splits)  # of a block with most
    spread = splits >= _UNEVEN_SPLITS and steps * weights > _UNEVEN_READ
    kb = tuning.shared_kb or (_ALONE_KB if warpgroups > _TWO_BLOCKS or spread else _TWO_KB)
    room = min(kb << 10, max_shared_bytes) - HEAD_BYTES - _ALIGNMENT
    stages = _stages(room, weights, inputs, steps, tuning.input_stages)
    sums = 4 * tokens * (tile + _PAIR_PADDING)
    used = max(stages[0] * weights + stages[1] * inputs, sums)
    if used + HEAD_BYTES + _ALIGNMENT > max_shared_bytes:
        raise ValueError(
            f"{max_shared_bytes} bytes of shared memory hold no ring of two steps of {tile} rows "
            f"of weights and {tokens} tokens"
        )
    return WideLaunch(
        macros={"TOKENS": tokens, "OUT_TILE": tile, "SHARERS": sharers},
        grid=(-(-shape.num_tiles(tile) // sharers) * sharers * splits,),
        block=128 * warpgroups + 64,
        shared_bytes=used + HEAD_BYTES + _ALIGNMENT,
        cluster=splits * sharers,
        splits=splits,
        input_box=(tokens // sharers, K_STEP),
        weight_box=(tile // 2 if pairs else tile, K_STEP),
        weight_stages=stages[0],
        input_stages=stages[1],
    )


def _warpgroups(tile: int, tokens: int) -> int:
    return tile // 64 * (2 if tokens > 128 else 1)


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
class _Shape:
    """Weights [rows, inputs] on a card, and what tiles and splits of them cost."""

    weight_rows: int
    num_inputs: int
    num_multiprocessors: int

    @property
    def num_steps(self) -> int:
        return -(-self.num_inputs // K_STEP)

    def num_tiles(self, tile: int) -> int:
        return -(-self.weight_rows // tile)

    def cost(self, tokens: int, tile: int, splits: int) -> float:
        """Cycles, roughly: of the multiprocessor with most to do, or of the memory."""
        share = self.num_tiles(tile) * splits / self.num_multiprocessors
        turns = share if share > _MANY_TURNS else -(-share // 1)
        inputs = -(-self.num_steps // splits) * K_STEP  # of a block
        copied = 2 * inputs * (tile + tokens)
        busy = turns * max(copied / _L2_RATE, inputs * tile * tokens / _PRODUCTS)
        memory = 2 * self.weight_rows * self.num_inputs / self.num_multiprocessors / _MEMORY_RATE
        merged = 4 * tile * tokens * (splits - 1) / splits
        merge = merged / _CLUSTER_RATE + _MERGE_CYCLES if splits > 1 else 0.0
        # Two blocks on a multiprocessor: one copies while the other ends, but for the last.
        ends = turns if _warpgroups(tile, tokens) > _TWO_BLOCKS else 1
        # What comes from L2 costs a little where it is not what all wait for.
        return max(busy, memory) + busy / 30 + turns * merge + ends * _BLOCK_CYCLES

    def best(self, tokens: int, out_tile: int | None, splits: int | None) -> tuple[int, int]:
        """(rows of weights of a tile, splits) of least cost."""
        tiles = [
            tile
            for tile in ((out_tile,) if out_tile else OUT_TILES)
            if _warpgroups(tile, tokens) <= _MOST_WARPGROUPS
        ] or [_MOST_WARPGROUPS // 2 * 64]  # the tallest above 128 tokens
        parts = [splits] if splits else [s for s in SPLITS if s <= self.num_steps]
        choices = [
            (tile, s) for tile in tiles for s in parts
            if splits or s == 1 or self._may_split(tile, s)
        ]  # fmt: skip
        return min(choices, key=lambda choice: (self.cost(tokens, *choice), choice))

    def _may_split(self, tile: int, splits: int) -> bool:
        """Clusters do not take turns well, and those of 8 are not placed together everywhere."""
        share = self.num_tiles(tile) * splits / self.num_multiprocessors
        return share <= 1 or (splits < SPLITS[-1] and share >= _MANY_TURNS)
