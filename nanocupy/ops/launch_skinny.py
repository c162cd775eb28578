"""How the products of 3 to 64 tokens are launched: tiles, clusters, grid, shared memory, macros.

Pure Python, from shapes and what the card has; knows no arrays and no device. The numbers mirror
kernels_cu/skinny.cuh, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

FILE = "skinny.cu"
MAX_ROWS = 64  # tokens of the largest build
# Fewer go to gemv.cu. From 9.0 on, where launches overlap, a step of 8 tokens of Qwen3-0.6B took
# 0.94 ms here and 1.19 there; below, it was not measured.
MIN_ROWS = 3
MIN_ROWS_BELOW_9_0 = 9
TOKENS = (8, 16, 32, 64)  # a build's room; batches are rounded up
OUT_TILES = (32, 48, 64, 96, 112, 128)  # rows of weights of a tile
SPLITS = (1, 2, 4, 8)  # blocks of a cluster: up to 8 are placed together on every card
INBOX_HEAD = 128  # bytes; in skinny.cuh
_MAX_WARPS = 8

# Of an H100, roughly, as only their ratios matter. A block's share of memory bandwidth makes one
# byte of weights the unit; inputs come from L2, faster.
_INPUT_COST = 0.5
_NOMINAL_TOKENS = 32  # the plan does not depend on the batch, nor do a token's sums
_LEAST_RING_BYTES = 40 << 10  # that a norm folded in leaves: less, and memory waits
_MERGE_COST = 12 << 10  # a cluster's, beside a block alone
_MANY_TURNS = 3  # after which it does not matter where the last blocks end
# Where a multiprocessor has much to read, two blocks keep it busier than one that stays: gate and
# up of Llama-3.2-1B took 28.2 us by one for 8 tokens and 31.3 for 16, 25.9 and 26.4 by two.
_ALONE_READ, _ALONE_COST = 500 << 10, 1.08
# Clusters of 4 and more are spread less evenly: the down product of Llama-3.1-8B took 46.6 us by 4
# and 40.9 by 2.
_UNEVEN_READ, _UNEVEN_SPLITS, _UNEVEN_COST = 200 << 10, 4, 1.25


@dataclass(frozen=True)
class SkinnyTuning:
    """What a bench may vary; None leaves the choice to the plan.

    max_rows: tokens up to which these products are taken (below MIN_ROWS: never). out_tile,
    splits: rows of weights of a tile, blocks that share its inputs. warps_k: warps that share the
    inputs of a step. k_step: inputs of a step. ring_kb: of weights in a block's ring, at most.
    shared_kb: of a block, unless three steps need more: two such fit on a multiprocessor of an
    H100, so that the next kernel's weights come while one runs. inputs_stay: the inputs lie in
    shared memory whole. fold_norm: the norm is computed by the product where the inputs may so lie
    in shared_kb.
    """

    # Microseconds a layer of Qwen3-0.6B on an H100, against a norm and cuBLAS: 20.5 to 33.2 for 16
    # tokens, 26.3 to 33.5 for 32, but 43 to 34 for 64, where every block reads as many bytes of
    # inputs as of weights.
    max_rows: int = 32
    out_tile: int | None = None
    splits: int | None = None
    warps_k: int | None = None
    k_step: int | None = None
    ring_kb: int = 64
    shared_kb: int = 112
    inputs_stay: bool = False
    fold_norm: bool = True


DEFAULT_TUNING = SkinnyTuning()


@dataclass(frozen=True)
class SkinnyLaunch:
    """Everything of a launch but its arrays. `macros` come on top of SCALAR and RESIDUAL.

    folds_norm: the inputs are normalised by this launch; else they must have been."""

    macros: dict[str, int]
    grid: tuple[int, ...]
    block: int
    shared_bytes: int
    cluster: int
    folds_norm: bool


def uses_skinny(
    rows: int,
    num_inputs: int,
    weight_bytes: int,
    compute_capability: tuple[int, int],
    *,
    force_plain: bool = False,
    tuning: SkinnyTuning = DEFAULT_TUNING,
) -> bool:
    """Whether a product is for these kernels: 16-bit weights whose rows are whole 16 bytes."""
    least = MIN_ROWS if compute_capability >= (9, 0) else MIN_ROWS_BELOW_9_0
    return (
        least <= rows <= min(MAX_ROWS, tuning.max_rows)
        and weight_bytes == 2
        and num_inputs % 8 == 0
        and num_inputs > 0
        and compute_capability >= (8, 0)
        and not force_plain
    )


def plan_skinny(
    num_outputs: int,
    num_inputs: int,
    rows: int,
    num_multiprocessors: int,
    *,
    pairs: bool = False,
    norm: bool = False,
    clusters: bool = True,
    max_shared_bytes: int = 227 << 10,
    tuning: SkinnyTuning = DEFAULT_TUNING,
) -> SkinnyLaunch:
    """The launch of a product of `rows` tokens with weights [num_outputs, num_inputs].

    pairs: skinny_swiglu, whose weights have twice num_outputs rows; norm: the inputs are to be
    normalised, which is folded in where it can be; clusters: the card has them;
    max_shared_bytes: what a block can have. num_outputs 0 gives a grid of 0: nothing is to be
    launched. Raises ValueError for what the kernels do not take.
    """
    if not 1 <= rows <= MAX_ROWS or num_inputs < 1 or num_inputs % 8 or num_outputs < 0:
        raise ValueError(
            f"{rows} tokens, weights [{num_outputs}, {num_inputs}]: skinny kernels take 1 to "
            f"{MAX_ROWS} tokens and a multiple of 8 inputs"
        )
    tokens = next(n for n in TOKENS if n >= rows)
    weight_rows = num_outputs * (2 if pairs else 1)
    tile, splits = _tile(weight_rows, num_inputs, num_multiprocessors, clusters, tuning)
    k_step = tuning.k_step or _k_step(tile)
    num_steps = -(-num_inputs // k_step)
    splits = max(s for s in SPLITS if s <= min(splits, num_steps))
    num_tiles = -(-weight_rows // tile)
    warps_n, warps_k = _warps(tile, k_step, tuning)
    blocks = num_tiles * splits if splits > 1 else min(num_tiles, num_multiprocessors)
    steps = -(-num_steps // splits)  # of a block with most, in a tile
    all_steps = steps if splits > 1 else steps * -(-num_tiles // max(1, blocks))
    room = _Room(
        inbox=8 * tile * warps_k * splits * -(-tokens // 2 // splits), weights=2 * k_step * tile,
        inputs=2 * k_step * tokens, steps=steps, all_steps=all_steps,
    )  # fmt: skip
    most = min(max_shared_bytes, tuning.shared_kb << 10)
    # What the norm needs: its weights, and the squares of all tokens from all blocks.
    extra = 2 * k_step * steps + -(-(INBOX_HEAD + 4 * tokens * splits) // 128) * 128
    wanted = max(2, (tuning.ring_kb << 10) // room.weights)
    least = min(wanted, max(3, -(-_LEAST_RING_BYTES // room.weights)))
    fold = norm and tuning.fold_norm and room.bytes(least, True, extra) <= most
    stay = fold or tuning.inputs_stay
    extra = extra if fold else 0
    # As many stages as the ring is to have, fewer where two blocks would not fit, two at least.
    most = min(max_shared_bytes, max(most, room.bytes(3, stay, extra)))
    stages = next((n for n in range(wanted, 1, -1) if room.bytes(n, stay, extra) <= most), None)
    if stages is None:
        raise ValueError(f"{max_shared_bytes} bytes of shared memory hold no ring of two steps")
    shared_bytes = room.bytes(stages, stay, extra)
    macros = {
        "TOKENS": tokens, "OUT_TILE": tile, "WARPS_N": warps_n, "WARPS_K": warps_k,
        "K_STEP": k_step, "STAGES": stages, "INPUTS_STAY": int(stay), "NORM_INPUTS": int(fold),
    }  # fmt: skip
    return SkinnyLaunch(
        macros,
        (blocks,),
        32 * warps_n * warps_k,
        shared_bytes,
        splits,
        fold,
    )


@dataclass(frozen=True)
class _Room:
    """Bytes of shared memory: the inbox, and a step's weights and inputs; steps of a block in a
    tile, and in all."""

    inbox: int
    weights: int
    inputs: int
    steps: int
    all_steps: int

    def bytes(self, stages: int, stay: bool, extra: int = 0) -> int:
        """extra: beside weights and inputs."""
        in_ring = min(stages, self.all_steps)
        times = self.steps if stay else in_ring
        return INBOX_HEAD + self.inbox + in_ring * self.weights + times * self.inputs + extra


def _warps(tile: int, k_step: int, tuning: SkinnyTuning) -> tuple[int, int]:
    """Warps along the rows of weights and the inputs. The second, which sums depend on, does not
    depend on the batch."""
    warps_n, warps_k = tile // 16, tuning.warps_k or 1
    if tuning.warps_k is None:
        while warps_n * warps_k * 2 <= _MAX_WARPS and warps_k * 2 <= k_step // 16:
            warps_k *= 2
    return warps_n, warps_k


def _k_step(tile: int) -> int:
    """Longer rows where that leaves the ring four steps: fewer barriers."""
    return 128 if tile <= 64 else 64


def _tile(
    weight_rows: int,
    num_inputs: int,
    num_multiprocessors: int,
    clusters: bool,
    tuning: SkinnyTuning,
) -> tuple[int, int]:
    """(rows of weights of a tile, splits): those for which the block with most to read has least.

    A cluster has one tile. The number of tokens plays no part.
    """

    def cost(tile: int, splits: int) -> float:
        turns = -(-(-(-weight_rows // tile) * splits) // num_multiprocessors)
        k_step = tuning.k_step or _k_step(tile)
        num_inputs_each = -(-num_inputs // k_step // splits) * k_step
        read = 2 * num_inputs_each * (tile + _INPUT_COST * _NOMINAL_TOKENS)
        if splits == 1:
            return turns * read * (_ALONE_COST if turns * read > _ALONE_READ else 1.0)
        if splits >= _UNEVEN_SPLITS and read > _UNEVEN_READ:
            read *= _UNEVEN_COST
        return turns * (read + _MERGE_COST)

    tiles = (tuning.out_tile,) if tuning.out_tile else OUT_TILES
    parts = (tuning.splits,) if tuning.splits else SPLITS if clusters else (1,)

    def may_split(tile: int, splits: int) -> bool:
        """Clusters do not take turns: one block for each multiprocessor at most, two for nearly
        all, or many. Clusters of 8 are not placed together everywhere."""
        share = -(-weight_rows // tile) * splits / num_multiprocessors
        several = splits < SPLITS[-1] and (1.75 <= share <= 2 or share >= _MANY_TURNS)
        return splits == 1 or bool(tuning.splits) or share <= 1 or several

    choices = [(tile, splits) for tile in tiles for splits in parts if may_split(tile, splits)]
    return min(choices, key=lambda choice: (cost(*choice), choice))
