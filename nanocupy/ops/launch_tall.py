"""How the product of gate and up with SwiGLU is launched for prompts on compute capability 9.0a:
which, clusters, the ring, boxes of the copy engine, macros.

Pure Python, from shapes and what the card has; knows no arrays and no device. The numbers mirror
kernels_cu/tall.cuh, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

FILE = "tall.cu"
ENTRY = "tall_swiglu"
MIN_ROWS = 1024  # tokens from which it is taken; fewer go to others
ROW_TILE = 128  # tokens of a block
OUT_TILE = 128  # outputs of a block, of gate and of up
K_STEP = 64
UNITS = 8  # steps that a tile has at least: those of the results of the tile before
SHARERS = (1, 2, 4)
THREADS = 384
_HEAD_BYTES = 1024
_ALIGNMENT = 1024  # of the ring; what comes before may begin anywhere
_STAGE_BYTES = 2 * K_STEP * (ROW_TILE + 2 * OUT_TILE)
_MOST_TILES = 2**31 - 2**16  # what an int holds, and a grid's step


@dataclass(frozen=True)
class TallTuning:
    """What a bench may vary.

    min_rows: tokens from which the kernel is taken, if it can be. sharers: blocks, 1, 2 or 4, that
    get the same weights by one copy. stages: steps in the ring. group_rows: tokens whose tiles are
    all taken before the next ones, so that their rows stay in L2. staggered: one warpgroup of a
    block begins a step behind the other.
    """

    min_rows: int = MIN_ROWS
    sharers: int = 2
    stages: int = 4
    group_rows: int = 2048
    staggered: bool = True


DEFAULT_TUNING = TallTuning()
NEVER = TallTuning(min_rows=2**31)


@dataclass(frozen=True)
class TallLaunch:
    """Everything of a launch but its arrays. `macros` come on top of SCALAR.

    input_box, weight_box: what one copy brings of x [T, K] and of the weights, rows and inputs.
    group: tiles of rows of a cluster that are taken before the next ones.
    """

    macros: dict[str, int]
    grid: tuple[int, ...]
    block: int
    shared_bytes: int
    cluster: int
    input_box: tuple[int, int]
    weight_box: tuple[int, int]
    group: int


def _num_tiles(rows: int, num_outputs: int, sharers: int) -> int:
    """Of a cluster."""
    return -(-rows // (ROW_TILE * sharers)) * -(-num_outputs // OUT_TILE)


def uses_tall(
    rows: int,
    num_outputs: int,
    num_inputs: int,
    weight_bytes: int,
    *,
    bias: bool,
    wgmma: bool,
    tuning: TallTuning = DEFAULT_TUNING,
) -> bool:
    """Whether gate and up [2 * num_outputs, num_inputs] of `rows` tokens are for this kernel:
    enough tokens, 16-bit weights, no bias, numbers of inputs and outputs that are multiples of 8,
    and UNITS steps of inputs. wgmma: the card has, and gets builds for, what 9.0a has."""
    return (
        wgmma
        and not bias
        and rows >= max(tuning.min_rows, 1)
        and weight_bytes == 2
        and num_outputs > 0
        and num_inputs % 8 == 0
        and num_outputs % 8 == 0
        and num_inputs > K_STEP * (UNITS - 1)
        and _num_tiles(rows, num_outputs, tuning.sharers) <= _MOST_TILES
    )


def plan_tall(
    num_outputs: int,
    num_inputs: int,
    rows: int,
    num_multiprocessors: int,
    *,
    max_shared_bytes: int = 227 << 10,
    tuning: TallTuning = DEFAULT_TUNING,
) -> TallLaunch:
    """The launch for `rows` tokens and weights [2 * num_outputs, num_inputs].

    max_shared_bytes: what a block can have. Raises ValueError for what the kernel does not take.
    """
    if not uses_tall(
        rows, num_outputs, num_inputs, 2, bias=False, wgmma=True,
        tuning=TallTuning(0, tuning.sharers),
    ):  # fmt: skip
        raise ValueError(
            f"{rows} tokens, weights [2 * {num_outputs}, {num_inputs}]: tall kernels take "
            f"multiples of 8 inputs and outputs, and more than {K_STEP * (UNITS - 1)} inputs"
        )
    shared_bytes = tuning.stages * _STAGE_BYTES + _HEAD_BYTES + _ALIGNMENT
    if tuning.sharers not in SHARERS or tuning.stages < 2 or shared_bytes > max_shared_bytes:
        raise ValueError(
            f"{tuning.sharers} blocks that share weights and a ring of {tuning.stages} steps: tall "
            f"kernels take {SHARERS} and from 2 on what {max_shared_bytes} bytes hold"
        )
    clusters = min(
        _num_tiles(rows, num_outputs, tuning.sharers),
        max(num_multiprocessors // tuning.sharers, 1),
    )
    return TallLaunch(
        macros={
            "SHARERS": tuning.sharers,
            "STAGES": tuning.stages,
            "STAGGERED": int(tuning.staggered),
        },
        grid=(clusters * tuning.sharers,),
        block=THREADS,
        shared_bytes=shared_bytes,
        cluster=tuning.sharers,
        input_box=(ROW_TILE, K_STEP),
        weight_box=(min(OUT_TILE, 2 * OUT_TILE // tuning.sharers), K_STEP),
        group=max(tuning.group_rows // (ROW_TILE * tuning.sharers), 1),
    )
