"""The products of 3 to 64 tokens against the NumPy ops in float64, and against themselves.

Each variant of the macros meets every op at sizes that leave a rest everywhere: outputs in a tile,
tiles in the grid, inputs in a step, steps in a ring and in a cluster, tokens in a build's room.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from nanocupy.ops import launch_skinny
from nanocupy.ops.launch_skinny import (
    DEFAULT_TUNING,
    MAX_ROWS,
    MIN_ROWS,
    MIN_ROWS_BELOW_9_0,
    OUT_TILES,
    SkinnyTuning,
    plan_skinny,
    uses_skinny,
)
from tests.kernels.skinny_runs import ENTRIES, SMALL, check_op, launch_op, make_call
from tests.ops.cases import DTYPES

OPS = tuple(ENTRIES)


@dataclass(frozen=True)
class Variant:
    """A build, and whether the residual stream is float32."""

    dtype: str
    rows: int
    wide: bool = False
    tuning: SkinnyTuning = SMALL

    def __str__(self) -> str:
        named = {k: v for k, v in vars(self.tuning).items() if v != getattr(SMALL, k)}
        extra = "".join(f"-{name}{int(value)}" for name, value in named.items())
        return f"{self.dtype}-m{self.rows}{'-wide' if self.wide else ''}{extra}"


VARIANTS = [
    Variant("bfloat16", 8),
    Variant("bfloat16", 3, wide=True, tuning=replace(SMALL, splits=8)),
    Variant("float16", 5, tuning=replace(SMALL, out_tile=64, splits=4, inputs_stay=True)),
    Variant("bfloat16", 7, tuning=replace(SMALL, fold_norm=True, splits=2)),
    Variant("float16", 8, tuning=replace(SMALL, warps_k=4, k_step=64)),
    Variant("bfloat16", 9),
    Variant("bfloat16", 16, tuning=replace(SMALL, splits=8)),
    Variant("bfloat16", 17, wide=True),
    Variant("bfloat16", 31, tuning=replace(SMALL, out_tile=64, splits=2)),
    Variant("bfloat16", 32, tuning=replace(SMALL, out_tile=64, splits=2, inputs_stay=True)),
    Variant("bfloat16", 33, tuning=replace(SMALL, out_tile=48, splits=4, k_step=64)),
    Variant("bfloat16", 64, tuning=replace(SMALL, inputs_stay=True)),
    Variant("bfloat16", 50, tuning=replace(SMALL, out_tile=128)),
    Variant("bfloat16", 64, tuning=replace(SMALL, out_tile=96, splits=2)),
    Variant("bfloat16", 16, tuning=replace(SMALL, fold_norm=True)),
    Variant("bfloat16", 31, tuning=replace(SMALL, fold_norm=True, splits=4, out_tile=64)),
    Variant("float16", 64, tuning=replace(SMALL, fold_norm=True, splits=2, out_tile=48)),
    Variant("float16", 9, wide=True, tuning=replace(SMALL, splits=4, inputs_stay=True)),
    Variant("float16", 32, tuning=replace(SMALL, out_tile=64, warps_k=1)),
    Variant("float16", 64, tuning=replace(SMALL, out_tile=112, splits=2)),
]
# outputs, inputs, bias
SIZES = [(1, 8, True), (3, 72, False), (37, 264, True), (200, 1032, True), (129, 640, False)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_variant(backend, op: str, variant: Variant) -> None:
    storage = DTYPES[variant.dtype]
    residual = DTYPES["float32"] if variant.wide and op == "linear_add" else storage
    for outputs, inputs, bias in SIZES:
        call = make_call(op, storage, variant.rows, outputs, inputs, bias=bias, residual=residual)
        check_op(backend.run, op, call, tuning=variant.tuning)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 8, 9, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("op", OPS)
def test_as_launched_on_a_device(backend, op: str, rows: int) -> None:
    if backend.name != "gpu":
        pytest.skip("the sizes of a model")
    for outputs, inputs, dtype in (
        (1024, 2048, "bfloat16"), (4096, 1024, "float16"), (3072, 1024, "bfloat16"),
        (1024, 3080, "float16"), (1536, 4096, "bfloat16"), (9003, 520, "bfloat16"),
    ):  # fmt: skip
        call = make_call(op, DTYPES[dtype], rows, outputs, inputs, bias=op != "lm_head")
        check_op(backend.run, op, call, tuning=DEFAULT_TUNING, num_multiprocessors=132)


# ----------------------------------------------------------------------------- what may not matter


def test_the_grid_does_not_change_a_bit(backend) -> None:
    for op in OPS:
        results = []
        for how in (
            {"num_multiprocessors": 1},
            {"num_multiprocessors": 50},
            {"tuning": replace(SMALL, inputs_stay=True)},
            {"tuning": replace(SMALL, ring_kb=64)},
        ):
            call = make_call(op, DTYPES["bfloat16"], 17, 150, 1288, bias=True)
            results.append(check_op(backend.run, op, call, **how))
        assert all(result.tobytes() == results[0].tobytes() for result in results)


@pytest.mark.parametrize("splits", [1, 4])
def test_a_token_does_not_depend_on_the_batch(backend, splits: int) -> None:
    tuning = replace(SMALL, splits=splits)
    for op in ("norm_linear", "norm_swiglu"):
        call = make_call(op, DTYPES["bfloat16"], 33, 37, 1032, bias=True)
        whole = {**call.arguments, "out": call.arguments["out"].copy()}
        launch_op(backend.run, op, whole, tuning=tuning)
        for few in (3, 8, 9, 20):
            out = call.arguments["out"][:few].copy()
            part = {**call.arguments, "x": call.arguments["x"][:few], "out": out}
            launch_op(backend.run, op, part, tuning=tuning)
            assert whole["out"][:few].tobytes() == out.tobytes(), op


def test_infinity_and_nan_stay_in_their_token(backend) -> None:
    call = make_call("linear_add", DTYPES["bfloat16"], 17, 37, 264)
    call.arguments["x"][3, 263] = np.inf
    call.arguments["x"][3, 100] = np.nan
    after = {**call.arguments, "residual": call.arguments["residual"].copy()}
    launch_op(backend.run, "linear_add", after, tuning=SMALL)
    finite = np.isfinite(after["residual"].astype(np.float32))
    assert not finite[3].any()
    assert np.delete(finite, 3, axis=0).all()


# ------------------------------------------------------------------------------ the plan

# outputs, inputs, whether of gate and up: of Qwen3-0.6B, Llama-3.2-1B, Llama-3.1-8B
SHAPES = [
    (4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False),
    (151936, 1024, False), (3072, 2048, False), (2048, 2048, False), (8192, 2048, True),
    (2048, 8192, False), (128256, 2048, False), (6144, 4096, False), (4096, 4096, False),
    (14336, 4096, True), (4096, 14336, False),
]  # fmt: skip


def plan(outputs: int, inputs: int, rows: int = 32, **more: Any):
    return plan_skinny(outputs, inputs, rows, 132, **more)


@pytest.mark.parametrize(("outputs", "inputs", "pairs"), SHAPES)
def test_plans_of_real_shapes_fill_the_device(outputs: int, inputs: int, pairs: bool) -> None:
    for rows in (8, 9, 16, 32, 64):
        launch = plan(outputs, inputs, rows, pairs=pairs)
        assert launch.grid[0] >= 124
        # Clusters do not take turns: one block for each multiprocessor, nearly two, or many.
        assert launch.grid[0] <= 132 or 231 <= launch.grid[0] <= 264 or launch.grid[0] >= 3 * 132
        assert launch.grid[0] % launch.cluster == 0
        assert launch.shared_bytes <= 227 << 10
        if rows <= 32:
            assert launch.shared_bytes <= DEFAULT_TUNING.shared_kb << 10
        # No multiprocessor reads more than an eighth above its share.
        tile = launch.macros["OUT_TILE"]
        tiles = -(-outputs * (2 if pairs else 1) // tile)
        most = -(-tiles * launch.cluster // launch.grid[0]) * tile / launch.cluster
        if launch.grid[0] <= 132:
            assert most * 132 <= 1.13 * outputs * (2 if pairs else 1)
        # The batch changes nothing that sums depend on.
        first = plan(outputs, inputs, 9, pairs=pairs)
        for name in ("OUT_TILE", "WARPS_K", "K_STEP"):
            assert launch.macros[name] == first.macros[name]
        assert launch.cluster == first.cluster


def test_the_norm_is_folded_in_where_the_inputs_have_room() -> None:
    for outputs, inputs, pairs, rows, folds in (
        (4096, 1024, False, 32, True),
        (3072, 1024, True, 32, True),
        (3072, 2048, False, 32, True),
        (8192, 2048, True, 32, False),
        (8192, 2048, True, 9, True),
        (6144, 4096, False, 16, False),
    ):
        launch = plan(outputs, inputs, rows, pairs=pairs, norm=True)
        assert launch.folds_norm == folds
        assert launch.macros["NORM_INPUTS"] == folds
        assert launch.shared_bytes <= DEFAULT_TUNING.shared_kb << 10
        assert not plan(outputs, inputs, rows, pairs=pairs).folds_norm
        never = replace(DEFAULT_TUNING, fold_norm=False)
        assert not plan(outputs, inputs, rows, pairs=pairs, norm=True, tuning=never).folds_norm


@pytest.mark.parametrize(
    ("clusters", "shared_kb"), [(False, 163), (False, 99), (True, 227), (True, 99)]
)
def test_every_card_has_room_for_every_batch(clusters: bool, shared_kb: int) -> None:
    for outputs, inputs, pairs in SHAPES:
        for rows in (8, 9, 32, 64):
            launch = plan(
                outputs, inputs, rows, pairs=pairs, clusters=clusters,
                max_shared_bytes=shared_kb << 10,
            )  # fmt: skip
            assert launch.shared_bytes <= shared_kb << 10
            assert clusters or launch.cluster == 1


def test_what_is_taken_and_what_is_refused() -> None:
    for rows, inputs, weight_bytes, capability, plain, wanted in (
        (MIN_ROWS, 1024, 2, (9, 0), False, True),
        (MIN_ROWS - 1, 1024, 2, (9, 0), False, False),
        (MIN_ROWS_BELOW_9_0 - 1, 1024, 2, (8, 9), False, False),
        (MIN_ROWS_BELOW_9_0, 1024, 2, (8, 9), False, True),
        (DEFAULT_TUNING.max_rows, 1024, 2, (8, 0), False, True),
        (DEFAULT_TUNING.max_rows + 1, 1024, 2, (8, 0), False, False),
        (32, 1020, 2, (9, 0), False, False),
        (32, 1024, 4, (9, 0), False, False),
        (32, 1024, 2, (7, 5), False, False),
        (32, 1024, 2, (9, 0), True, False),
    ):
        assert wanted == uses_skinny(rows, inputs, weight_bytes, capability, force_plain=plain)
    never = SkinnyTuning(max_rows=0)
    assert not any(uses_skinny(n, 1024, 2, (9, 0), tuning=never) for n in range(1, 200))
    assert plan(0, 64).grid == (0,)
    for outputs, inputs, rows in ((8, 8, 0), (8, 8, MAX_ROWS + 1), (8, 12, 16), (8, 0, 16)):
        with pytest.raises(ValueError, match="skinny"):
            plan(outputs, inputs, rows)
    with pytest.raises(ValueError, match="shared memory"):
        plan(64, 1024, 64, max_shared_bytes=16 << 10)


def test_the_plan_knows_the_kernels_constants() -> None:
    from tests.shim.build import KERNELS

    text = (KERNELS / "skinny_parts.cuh").read_text()
    found = re.search(r"constexpr int INBOX_HEAD = (\d+);", text)
    assert found is not None
    assert int(found[1]) == launch_skinny.INBOX_HEAD
    defaults = dict(re.findall(r"#define (\w+) (\d+)\n#endif", text))
    assert set(plan(64, 1024).macros) == {"TOKENS", *defaults}


# ------------------------------------------------------------------------------ the compiler


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_little_spills_on_hopper(rows: int) -> None:
    """Some bytes at most, with registers for two blocks on a multiprocessor."""
    pytest.importorskip("cupy")
    from nanocupy.cuda.compiler import Compiler

    compiler = Compiler(cache=None, options=("--ptxas-options=-v",))
    for tile in OUT_TILES:
        tuning = replace(DEFAULT_TUNING, out_tile=tile, splits=1)
        macros = plan(4096, 1024, rows, tuning=tuning, norm=tile == 96).macros
        log = compiler.compile("skinny.cu", {"SCALAR": 2, **macros}, arch="90a").log
        found = re.findall(
            r"properties for skinny\w+\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", log
        )
        assert len(found) == 4, log
        assert all(int(count) <= 32 for pair in found for count in pair), log
