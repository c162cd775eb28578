"""The small-batch products against the NumPy ops in float64, and against themselves.

Each variant of the macros meets every op at sizes that leave a rest everywhere: outputs in a unit,
units in a pass and in the grid, inputs in a load, a chunk, a batch and a tile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from nanocupy.ops.launch_gemv import (
    DEFAULT_TUNING,
    MAX_SHARED_BYTES,
    GemvTuning,
    default_tuning,
    plan_gemv,
    scratch_bytes,
)
from tests.kernels.gemv_runs import (
    OPS,
    SMALL,
    check_op,
    launch_op,
    make_call,
    reference_of,
    residual_of,
)
from tests.ops.cases import CASES, DTYPES

PLAIN = {"FORCE_PLAIN": 1}


@dataclass(frozen=True)
class Variant:
    """A build: storage, tokens, tuning, and whether the residual stream is float32."""

    dtype: str
    rows: int
    wide: bool = False
    tuning: GemvTuning = SMALL
    macros: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        named = {k: v for k, v in vars(self.tuning).items() if v != getattr(SMALL, k)} | self.macros
        extra = "".join(f"-{name}{int(value)}" for name, value in named.items())
        return f"{self.dtype}-m{self.rows}{'-wide' if self.wide else ''}{extra}"


VARIANTS = [
    Variant("float32", 1),
    Variant("float32", 2, tuning=replace(SMALL, rows_per_warp=4, unroll=2)),
    Variant("float32", 8, tuning=replace(SMALL, warps=2, l2_ahead_kb=0)),
    Variant("float16", 1, tuning=replace(SMALL, tensor=False, l2_ahead_kb=16)),
    Variant("float16", 4),
    Variant("float16", 5, macros=PLAIN),
    Variant("bfloat16", 1),
    Variant("bfloat16", 2, tuning=replace(SMALL, rows_per_warp=1, warps=8, tensor=False)),
    Variant("bfloat16", 3, wide=True),
    Variant("bfloat16", 6, tuning=replace(SMALL, tensor=False)),
    Variant("bfloat16", 7, tuning=replace(SMALL, warps=1)),
    Variant("bfloat16", 8),
]
# outputs, inputs, bias, warps that share a unit (None: as planned), tiles of inputs
SIZES = [
    (1, 1, True, None, 1),
    (3, 7, False, 1, 1),
    (37, 33, True, 2, 1),
    (19, 264, True, None, 1),
    (70, 1040, True, 1, 1),
    (50, 1032, False, 4, 1),
    (21, 1288, True, 2, 2),
    (9, 777, True, 1, 3),
    (33, 2056, False, 4, 3),
]


def shared_bytes_for(
    tiles: int, inputs: int, rows: int, itemsize: int, tuning: GemvTuning = SMALL
) -> int:
    """So much shared memory that the inputs need about `tiles` tiles, or a few more."""
    if tiles == 1:
        return MAX_SHARED_BYTES
    fixed = tuning.ring_bytes(rows) + scratch_bytes(rows, tuning) + rows * 4 * -(-inputs // 256)
    return fixed + (rows + 1) * itemsize * (32 + max(256, inputs // tiles // 256 * 256))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_variant(backend, op: str, variant: Variant) -> None:
    storage = DTYPES[variant.dtype]
    residual = residual_of(storage, variant.wide)
    for outputs, inputs, bias, splits, tiles in SIZES:
        call = make_call(op, storage, variant.rows, outputs, inputs, bias=bias, residual=residual)
        most = shared_bytes_for(tiles, inputs, variant.rows, storage.itemsize, variant.tuning)
        splits = None if splits is None else min(splits, variant.tuning.warps)
        how = {"tuning": variant.tuning, "k_splits": splits, "max_shared_bytes": most}
        check_op(backend.run, op, call, **how, **variant.macros)


SHARED = [case for case in CASES if case.op in OPS]


@pytest.mark.parametrize("op", OPS)
def test_shared_cases(backend, storage: np.dtype, op: str) -> None:
    for case in SHARED:
        call = case.build(storage)
        tokens = len(call.arguments[call.written[0]])
        if case.op == op and tokens <= 8 and (tokens != 4 or storage.name == "bfloat16"):
            check_op(backend.run, op, call)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("op", OPS)
def test_as_launched_on_a_device(backend, storage: np.dtype, op: str, rows: int) -> None:
    if backend.name != "gpu":
        pytest.skip("the sizes of a model")
    for outputs, inputs in ((1024, 2048), (6000, 1024), (2048, 8192), (4099, 1001)):
        call = make_call(op, storage, rows, outputs, inputs, bias=op != "lm_head")
        wanted = reference_of(op, call)
        for macros in ({}, {"TENSOR": 0}, PLAIN):
            how = {"tuning": DEFAULT_TUNING, "num_multiprocessors": 132, "wanted": wanted}
            check_op(backend.run, op, call, **how, **macros)


# ----------------------------------------------------------------------------- what may not matter


def test_the_grid_and_the_tiles_do_not_change_a_bit(backend) -> None:
    for op in OPS:
        results = []
        for how in (
            {"num_multiprocessors": 1},
            {"num_multiprocessors": 50},
            {"max_shared_bytes": shared_bytes_for(2, 1288, 8, 2)},
        ):
            call = make_call(op, DTYPES["bfloat16"], 8, 50, 1288, bias=True)
            results.append(check_op(backend.run, op, call, k_splits=1, **how))
        assert all(result.tobytes() == results[0].tobytes() for result in results)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "few", "many", "tunings"),
    [
        ("bfloat16", 3, 8, ({}, {})),
        ("bfloat16", 1, 8, ({}, {})),
        ("float32", 1, 2, ({}, {"rows_per_warp": 4, "unroll": 2})),
    ],
)
def test_a_token_does_not_depend_on_the_batch(backend, dtype, few, many, tunings, splits) -> None:
    """Nor on what else the method reads side by side."""
    wide = (dtype, few) == ("bfloat16", 3)  # the builds of VARIANTS
    residual = residual_of(DTYPES[dtype], wide)
    for op in ("norm_linear", "norm_swiglu"):
        call = make_call(op, DTYPES[dtype], many, 37, 1032, bias=True)
        a = {**call.arguments, "out": call.arguments["out"].copy()}
        launch_op(backend.run, op, a, tuning=replace(SMALL, **tunings[1]), k_splits=splits)
        out = call.arguments["out"][:few].copy()
        b = {**call.arguments, "x": call.arguments["x"][:few].astype(residual), "out": out}
        launch_op(backend.run, op, b, tuning=replace(SMALL, **tunings[0]), k_splits=splits)
        assert a["out"][:few].tobytes() == out.tobytes(), op


def test_infinity_and_nan_stay_in_their_token(backend) -> None:
    storage = DTYPES["float32"]
    call = make_call("linear_add", storage, 2, 21, 264)
    call.arguments["x"][0, 263] = np.inf
    call.arguments["x"][0, 100] = np.nan
    after = {**call.arguments, "residual": call.arguments["residual"].copy()}
    tuning = replace(SMALL, rows_per_warp=4, unroll=2)
    launch_op(backend.run, "linear_add", after, tuning=tuning)
    assert np.isnan(after["residual"][0]).all()
    assert np.isfinite(after["residual"][1]).all()


# ------------------------------------------------------------------------------ the plan


def plan(outputs: int, inputs: int, rows: int = 1, **more: Any):
    return plan_gemv(outputs, inputs, rows, 132, **{"weight_bytes": 2, **more})


def test_plans_of_real_shapes_fill_the_device() -> None:
    for outputs, inputs in ((4096, 1024), (1024, 2048), (6144, 4096), (2048, 8192), (128256, 2048)):
        for rows in (1, 8):
            launch = plan(outputs, inputs, rows)
            assert launch.block == 32 * DEFAULT_TUNING.warps
            assert launch.shared_bytes <= MAX_SHARED_BYTES
            assert launch.k_tile % 256 == 0
            assert launch.grid[0] == 132
            assert 1 <= launch.k_splits <= DEFAULT_TUNING.warps
    # Of 4 MB, all warps of the device have a part at once.
    assert plan(1024, 2048).k_splits == 8
    assert plan(128256, 2048).k_splits <= 2


def test_blocks_of_the_next_kernels_fit_beside_one() -> None:
    """Of one token: three blocks on a multiprocessor of an H100; of eight, two."""
    for outputs, inputs, norm in ((4096, 1024, True), (1024, 3072, False), (3072, 2048, True)):
        for rows, blocks in ((1, 3), (8, 2)):
            shared = plan(outputs, inputs, rows, norm=norm).shared_bytes
            whole = shared + scratch_bytes(rows, DEFAULT_TUNING) + 1024
            assert blocks * whole <= 228 << 10


@pytest.mark.parametrize(
    ("capability", "shared_kb"),
    [((7, 5), 64), ((8, 0), 163), ((8, 6), 99), ((9, 0), 227), ((12, 0), 99)],
    ids=str,
)
def test_every_card_has_room_for_every_batch(capability: tuple[int, int], shared_kb: int) -> None:
    tuning = default_tuning(capability, shared_kb << 10)
    assert tuning.tensor == (capability >= (8, 0))
    for rows in range(1, 9):
        macros = tuning.macros(rows)
        assert macros["RING"] % macros["UNROLL"] == 0
        for weight_bytes in (2, 4):
            launch = plan(
                4096, 14336, rows, tuning=tuning, weight_bytes=weight_bytes,
                max_shared_bytes=shared_kb << 10,
            )  # fmt: skip
            assert launch.shared_bytes + scratch_bytes(rows, tuning) <= shared_kb << 10
            assert launch.shared_bytes >= tuning.ring_bytes(rows) + rows * weight_bytes * 256


def test_inputs_are_tiled_where_they_do_not_fit() -> None:
    launch = plan(4096, 14336, 8, norm=False)
    assert launch.k_tile < 14336
    inputs_bytes = launch.shared_bytes - DEFAULT_TUNING.ring_bytes(8)
    assert inputs_bytes == 8 * (launch.k_tile + 32) * 2
    assert launch.shared_bytes <= MAX_SHARED_BYTES
    assert plan(4096, 14336, 1, norm=False).k_tile == 14336
    assert plan(4096, 5, 1).k_tile == 256
    assert plan(64, 16384, 8, weight_bytes=4, max_shared_bytes=64 << 10).k_tile % 256 == 0


def test_bad_plans_are_refused() -> None:
    assert plan(0, 64).grid == (0,)
    for outputs, inputs, rows, more in (
        (8, 8, 0, {}),
        (8, 8, 9, {}),
        (8, 0, 1, {}),
        (8, 8, 1, {"k_splits": 3}),
        (8, 8, 1, {"k_splits": 16}),
        (8, 8, 8, {"max_shared_bytes": 2048}),
    ):
        with pytest.raises(ValueError, match=r"gemv|k_splits|shared memory"):
            plan(outputs, inputs, rows, **more)


def test_the_plan_knows_the_kernels_constants() -> None:
    from nanocupy.ops import launch_gemv
    from tests.shim.build import KERNELS

    text = (KERNELS / "gemv_input.cuh").read_text()
    for name in ("TILE_STEP", "ROW_PAD", "MAX_UNIT_ROWS"):
        assert int(re.search(rf"constexpr int {name} = (\d+);", text)[1]) == getattr(
            launch_gemv, name
        )
    limit, few, many = re.search(r"MERGE_PASSES = ROWS <= (\d) \? (\d) : (\d);", text).groups()
    for rows in range(1, 9):
        assert launch_gemv.merge_passes(rows) == int(few if rows <= int(limit) else many)


# ------------------------------------------------------------------------------ the compiler


@pytest.mark.parametrize(
    ("types", "rows", "most"),
    [
        ({"SCALAR": 2}, 1, 0),
        ({"SCALAR": 2}, 4, 16),
        ({"SCALAR": 2}, 8, 0),
        # A few bytes before the weights are used, not where they are.
        ({"SCALAR": 1, "RESIDUAL": 0}, 8, 32),
    ],
    ids=str,
)
def test_nothing_spills_on_hopper(types: dict[str, int], rows: int, most: int) -> None:
    """With registers for the blocks of three kernels. Unaligned weights, a function of their own,
    may."""
    pytest.importorskip("cupy")
    from nanocupy.cuda.compiler import Compiler

    compiler = Compiler(cache=None, options=("--ptxas-options=-v",))
    macros = types | DEFAULT_TUNING.macros(rows)
    log = compiler.compile("gemv.cu", macros, arch="90a").log
    found = re.findall(
        r"properties for \w+_rows\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    assert len(found) == 4, log
    assert all(int(count) <= most for pair in found for count in pair), log
    counts = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    blocks = DEFAULT_TUNING.resident_blocks
    assert max(counts) * DEFAULT_TUNING.warps * 32 * blocks <= 64 << 10
