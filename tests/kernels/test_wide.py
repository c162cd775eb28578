"""The products of up to 256 tokens against the NumPy ops in float64, and against themselves.

On the shim with twins of the copy engine and of warpgroup products, on a device of compute
capability 9.0 with the real ones. Each build meets every op at sizes that leave a rest everywhere:
outputs in a tile, inputs in a step, steps in a ring and in a cluster, tokens in a build's room.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from nanocupy.ops import launch_wide
from nanocupy.ops.launch_wide import (
    ALWAYS,
    DEFAULT_TUNING,
    MAX_ROWS,
    NEVER,
    OUT_TILES,
    TOKENS,
    WideRange,
    WideTuning,
    plan_wide,
    uses_wide,
)
from tests.kernels.wide_runs import ENTRIES, SMALL, check_op, launch_op, make_call
from tests.ops.cases import DTYPES

OPS = tuple(ENTRIES)


@pytest.fixture
def run(backend) -> Any:
    if not backend.has_wgmma:
        pytest.skip("warpgroup products need compute capability 9.0")
    return backend.run


@dataclass(frozen=True)
class Variant:
    """A build, and whether the residual stream is float32."""

    dtype: str
    rows: int
    tile: int
    splits: int = 1
    wide: bool = False
    sharers: int = 1

    def __str__(self) -> str:
        wide = "-wide" if self.wide else ""
        shared = "-shared" if self.sharers > 1 else ""
        return f"{self.dtype}-m{self.rows}-tile{self.tile}-split{self.splits}{shared}{wide}"

    @property
    def tuning(self) -> WideTuning:
        return replace(SMALL, out_tile=self.tile, splits=self.splits, sharers=self.sharers)


VARIANTS = [
    Variant("bfloat16", 33, 64),
    Variant("bfloat16", 64, 64, 8),
    Variant("bfloat16", 40, 256, 2),
    Variant("bfloat16", 65, 64, 2),
    Variant("bfloat16", 100, 128, wide=True),
    Variant("float16", 128, 128, 4),
    Variant("bfloat16", 128, 192, 4),
    Variant("bfloat16", 127, 256),
    Variant("bfloat16", 129, 128),
    Variant("float16", 192, 64, 2, wide=True),
    Variant("bfloat16", 200, 128, 8),
    Variant("bfloat16", 256, 64, 4),
    Variant("float16", 255, 128),
    Variant("bfloat16", 255, 64, 1, sharers=2),
    Variant("bfloat16", 256, 128, 4, sharers=2),
    Variant("bfloat16", 180, 64, 2, sharers=2),
    Variant("bfloat16", 47, 64, 1, sharers=2),
    Variant("bfloat16", 101, 64, 4, wide=True, sharers=2),
    Variant("bfloat16", 128, 64, 1, sharers=4),
    Variant("float16", 60, 64, 2, sharers=4),
    Variant("bfloat16", 9, 64, 8),
    Variant("bfloat16", 17, 128, 2, wide=True),
]
# outputs, inputs, bias
SIZES = [(8, 8, True), (40, 264, True), (136, 72, False), (200, 1032, True), (264, 640, False)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_variant(run, op: str, variant: Variant) -> None:
    storage = DTYPES[variant.dtype]
    residual = DTYPES["float32"] if variant.wide and op == "linear_add" else storage
    for outputs, inputs, bias in SIZES:
        call = make_call(op, storage, variant.rows, outputs, inputs, bias=bias, residual=residual)
        check_op(run, op, call, tuning=variant.tuning)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [33, 100, 128, 200, 256])
@pytest.mark.parametrize("op", OPS)
def test_as_launched_on_a_device(run, backend, op: str, rows: int) -> None:
    if backend.name != "gpu":
        pytest.skip("the sizes of a model")
    for outputs, inputs in (
        (1024, 2048), (4096, 1024), (3072, 1032), (1536, 4096), (9016, 520),
    ):  # fmt: skip
        call = make_call(op, DTYPES["bfloat16"], rows, outputs, inputs, bias=op != "lm_head")
        check_op(run, op, call, tuning=DEFAULT_TUNING)


# ----------------------------------------------------------------------------- what may not matter


@pytest.mark.parametrize("op", ["norm_linear", "norm_swiglu"])
def test_tiles_and_rings_do_not_change_a_bit(run, op: str) -> None:
    results = []
    for tuning in (
        replace(SMALL, splits=2),
        replace(SMALL, splits=2, out_tile=128, input_stages=3),
        replace(SMALL, splits=2, out_tile=256),
        replace(SMALL, splits=2, shared_kb=112),
        replace(SMALL, splits=2, sharers=2),
        replace(SMALL, splits=2, sharers=4),
    ):
        call = make_call(op, DTYPES["bfloat16"], 70, 152, 1288, bias=True)
        results.append(check_op(run, op, call, tuning=tuning))
    assert all(result.tobytes() == results[0].tobytes() for result in results)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("op", ["norm_linear", "norm_swiglu"])
def test_a_token_does_not_depend_on_the_batch(run, op: str, splits: int) -> None:
    """Nor on the room of the build that the batch takes."""
    tuning = replace(SMALL, splits=splits)
    call = make_call(op, DTYPES["bfloat16"], 256, 40, 1032, bias=True)
    whole = {**call.arguments, "out": call.arguments["out"].copy()}
    launch_op(run, op, whole, tuning=tuning)
    for few in (33, 64, 65, 128, 150, 255):
        out = call.arguments["out"][:few].copy()
        part = {**call.arguments, "x": call.arguments["x"][:few], "out": out}
        launch_op(run, op, part, tuning=tuning)
        assert whole["out"][:few].tobytes() == out.tobytes(), few


def test_infinity_and_nan_stay_in_their_token(run) -> None:
    call = make_call("linear_add", DTYPES["bfloat16"], 90, 40, 264)
    call.arguments["x"][3, 263] = np.inf
    call.arguments["x"][3, 100] = np.nan
    after = {**call.arguments, "residual": call.arguments["residual"].copy()}
    launch_op(run, "linear_add", after, tuning=replace(SMALL, splits=2))
    finite = np.isfinite(after["residual"].astype(np.float32))
    assert not finite[3].any()
    assert np.delete(finite, 3, axis=0).all()


# ------------------------------------------------------------------------------ the plan

# outputs, inputs, whether of gate and up: of Qwen3-0.6B, Llama-3.2-1B, Llama-3.1-8B
SHAPES = [
    (4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False),
    (151936, 1024, False), (3072, 2048, False), (2048, 2048, False), (8192, 2048, True),
    (2048, 8192, False), (128256, 2048, False), (6144, 4096, False), (4096, 4096, False),
    (14336, 4096, True), (4096, 14336, False), (128256, 4096, False),
]  # fmt: skip


def plan(outputs: int, inputs: int, rows: int = 128, **more: Any):
    return plan_wide(outputs, inputs, rows, 132, **more)


@pytest.mark.parametrize(("outputs", "inputs", "pairs"), SHAPES)
def test_plans_of_real_shapes(outputs: int, inputs: int, pairs: bool) -> None:
    first = plan(outputs, inputs, 17, pairs=pairs)
    for rows in (17, 64, 65, 128, 129, 192, 193, 256):
        launch = plan(outputs, inputs, rows, pairs=pairs)
        tile, tokens = launch.macros["OUT_TILE"], launch.macros["TOKENS"]
        sharers = launch.macros["SHARERS"]
        assert tokens >= rows
        num_tiles = -(-outputs * (2 if pairs else 1) // tile)
        assert launch.grid[0] == -(-num_tiles // sharers) * launch.cluster
        assert launch.grid[0] >= 48
        assert launch.splits == first.splits, "sums would depend on the batch"
        assert launch.cluster == launch.splits * sharers <= 8
        steps = -(-inputs // 64)
        assert launch.splits <= steps
        threads = 128 * (tile // 64) * (2 if tokens > 128 else 1) + 64
        assert launch.block == threads <= 576
        used = 128 * (launch.weight_stages * tile + launch.input_stages * tokens)
        used = max(used, 4 * tokens * tile * (2 * launch.splits - 1) // launch.splits)
        assert launch.shared_bytes == 2048 + used <= 227 << 10
        if launch.grid[0] > 132 and launch.splits == 1 and threads <= 2 * 128 + 64:
            assert launch.shared_bytes <= 113 << 10, "two on a multiprocessor"
        assert launch.input_box == (tokens // sharers, 64)
        assert launch.weight_box == (tile // 2 if pairs else tile, 64)
        for stages in (launch.weight_stages, launch.input_stages):
            assert min(2, -(-steps // launch.splits)) <= stages <= launch_wide.MOST_STAGES


def test_every_plan_can_be_launched() -> None:
    for tile in OUT_TILES:
        for tokens in TOKENS:
            for inputs in (8, 64, 72, 136, 4096):
                for splits in (None, 1, 2, 8):
                    tuning = WideTuning(out_tile=tile, splits=splits)
                    launch = plan(304, inputs, tokens, pairs=True, tuning=tuning)
                    assert launch.block <= 576
                    assert launch.shared_bytes <= 227 << 10
                    steps = -(-inputs // 64)
                    assert launch.splits <= steps
                    least = min(2, -(-steps // launch.splits))
                    assert launch.weight_stages >= least
                    assert launch.input_stages >= least


def test_what_is_taken_and_what_is_refused() -> None:
    for rows, outputs, inputs, weight_bytes, wgmma, wanted in (
        (1, 64, 1024, 2, True, True),
        (0, 64, 1024, 2, True, False),
        (MAX_ROWS, 64, 1024, 2, True, True),
        (MAX_ROWS + 1, 64, 1024, 2, True, False),
        (64, 64, 1024, 2, False, False),
        (64, 60, 1024, 2, True, False),
        (64, 64, 1020, 2, True, False),
        (64, 64, 1024, 4, True, False),
        (64, 64, 0, 2, True, False),
    ):
        found = uses_wide(rows, outputs, inputs, weight_bytes, wgmma=wgmma, tuning=ALWAYS)
        assert wanted == found
    assert not any(uses_wide(n, 64, 1024, 2, wgmma=True, tuning=NEVER) for n in range(1, 300))
    assert plan(0, 64).grid == (0,)
    for outputs, inputs, rows in ((8, 8, 0), (8, 8, 257), (8, 12, 64), (8, 0, 64), (4, 8, 64)):
        with pytest.raises(ValueError, match="wide"):
            plan(outputs, inputs, rows)
    with pytest.raises(ValueError, match="shared memory"):
        plan(64, 1024, 64, max_shared_bytes=16 << 10)


def test_products_are_taken_by_size_and_tokens() -> None:
    small, large = WideRange(1, 2, 20, 40), WideRange(2.5, 4, 30, 70)
    tuning = WideTuning(ranges=(small, large))
    for outputs, rows, wanted in (
        (992, 20, True), (992, 40, True), (992, 19, False), (992, 41, False), (496, 30, False),
        (504, 30, True), (1000, 30, False), (1240, 30, False), (1248, 30, True),
        (1984, 70, True), (1984, 71, False), (1992, 50, False),
    ):  # fmt: skip
        # Two bytes each; with pairs twice as many rows of weights.
        assert uses_wide(rows, outputs, 504, 2, wgmma=True, tuning=tuning, pairs=True) == wanted
        assert uses_wide(rows, outputs, 1008, 2, wgmma=True, tuning=tuning) == wanted


def test_the_plan_knows_the_kernels_constants() -> None:
    from tests.shim.build import KERNELS

    text = (KERNELS / "wide.cuh").read_text() + (KERNELS / "wide_merge.cuh").read_text()
    for name in ("K_STEP", "MOST_STAGES", "HEAD_BYTES"):
        found = re.search(rf"constexpr int {name} = (\d+);", text)
        assert found is not None
        assert int(found[1]) == getattr(launch_wide, name)
    assert "SUMS_BYTES = OUT_TILE * TOKENS * 4;" in text
    assert "constexpr int ATOM = 1024;" in text
    assert set(plan(64, 1024).macros) == {"TOKENS", "OUT_TILE", "SHARERS"}


# ------------------------------------------------------------------------------ the compiler


@pytest.mark.parametrize("tokens", TOKENS)
def test_nothing_spills(tokens: int) -> None:
    """And products run on while the next are started."""
    pytest.importorskip("cupy")
    from nanocupy.cuda.compiler import Compiler
    from nanocupy.errors import NanocupyError

    try:
        compiler = Compiler(cache=None, options=("--ptxas-options=-v",))
    except NanocupyError as exc:
        pytest.skip(f"no NVRTC: {exc}")
    tile = 256 if tokens <= 128 else 128
    macros = {"SCALAR": 2, "TOKENS": tokens, "OUT_TILE": tile, "SHARERS": 1 + tokens // 192}
    log = compiler.compile("wide.cu", macros, arch="90a").log
    assert log.count(" 0 bytes spill stores, 0 bytes spill loads") == 4, log
    assert "C75" not in log, "the compiler serialised the products"
