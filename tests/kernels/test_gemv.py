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

from nanocupy.ops.launch_gemv import DEFAULT_TUNING, MAX_SHARED_BYTES, GemvTuning, plan_gemv
from tests.kernels.gemv_runs import OPS, SMALL, check_op, launch_op, make_call, residual_of
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
    Variant("float32", 8, tuning=replace(SMALL, warps=2, prefetch=0)),
    Variant("float16", 1, tuning=replace(SMALL, tensor=True, prefetch=3)),
    Variant("float16", 4),
    Variant("float16", 5, macros=PLAIN),
    Variant("bfloat16", 1),
    Variant("bfloat16", 2, tuning=replace(SMALL, rows_per_warp=1, warps=8)),
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


def shared_bytes_for(tiles: int, inputs: int, rows: int, itemsize: int) -> int:
    """So much shared memory that the inputs need about `tiles` tiles."""
    if tiles == 1:
        return MAX_SHARED_BYTES
    return rows * itemsize * (32 + max(256, inputs // tiles // 256 * 256))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_variant(backend, op: str, variant: Variant) -> None:
    storage = DTYPES[variant.dtype]
    residual = residual_of(storage, variant.wide)
    for outputs, inputs, bias, splits, tiles in SIZES:
        call = make_call(op, storage, variant.rows, outputs, inputs, bias=bias, residual=residual)
        itemsize = (residual if op == "lm_head" else storage).itemsize
        most = shared_bytes_for(tiles, inputs, variant.rows, itemsize)
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
        for macros in ({}, PLAIN):
            call = make_call(op, storage, rows, outputs, inputs, bias=op != "lm_head")
            how = {"tuning": DEFAULT_TUNING, "num_multiprocessors": 132}
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
        ("bfloat16", 1, 6, ({}, {"tensor": False})),
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
            assert launch.grid[0] >= 120
            assert 1 <= launch.k_splits <= DEFAULT_TUNING.warps
    # Of 4 MB, all warps of the device have a part at once.
    assert plan(1024, 2048).k_splits >= 4
    assert plan(128256, 2048).k_splits == 1


def test_inputs_are_tiled_where_they_do_not_fit() -> None:
    launch = plan(4096, 14336, 8)
    assert launch.k_tile < 14336
    assert launch.shared_bytes == 8 * (launch.k_tile + 32) * 2 <= MAX_SHARED_BYTES
    assert plan(4096, 14336, 1).k_tile == 14336
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
    for name in ("TILE_STEP", "ROW_PAD"):
        assert int(re.search(rf"constexpr int {name} = (\d+);", text)[1]) == getattr(
            launch_gemv, name
        )


# ------------------------------------------------------------------------------ the compiler


@pytest.mark.parametrize(
    ("macros", "most"),
    [
        ({"SCALAR": 2, "ROWS": 1}, 0),
        ({"SCALAR": 2, "ROWS": 8}, 0),
        # A few bytes while the inputs are put in place, not where the weights are read.
        ({"SCALAR": 1, "ROWS": 8, "RESIDUAL": 0}, 32),
    ],
    ids=str,
)
def test_nothing_spills_on_hopper(macros: dict[str, int], most: int) -> None:
    pytest.importorskip("cupy")
    from nanocupy.cuda.compiler import Compiler

    compiler = Compiler(cache=None, options=("--ptxas-options=-v",))
    log = compiler.compile("gemv.cu", macros, arch="90a").log
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    assert len(found) == 4, log
    assert all(int(count) <= most for pair in found for count in pair), log
