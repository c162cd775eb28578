"""The product of gate and up with SwiGLU for prompts against float64, and against itself.

On the shim with twins of the copy engine and of warpgroup products, on a device of compute
capability 9.0 with the real ones. Sizes leave a rest everywhere: tokens in a tile and in a
cluster's, outputs in a tile, inputs in a step, steps in the ring, tiles among blocks, tiles of rows
in a group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from nanocupy.ops import launch_tall
from nanocupy.ops.launch_tall import DEFAULT_TUNING, NEVER, TallTuning, plan_tall, uses_tall
from tests.kernels.tall_runs import SMALL, check, launch, make_product, reference
from tests.ops.cases import DTYPES

BFLOAT16 = DTYPES["bfloat16"]


@pytest.fixture
def run(backend) -> Any:
    if not backend.has_wgmma:
        pytest.skip("warpgroup products need compute capability 9.0")
    return backend.run


@dataclass(frozen=True)
class Variant:
    """A build, and a card of few multiprocessors."""

    dtype: str
    sharers: int
    stages: int
    group_rows: int = 512
    multiprocessors: int = 4

    def __str__(self) -> str:
        return f"{self.dtype}-share{self.sharers}-stages{self.stages}-sms{self.multiprocessors}"

    @property
    def tuning(self) -> TallTuning:
        return TallTuning(0, self.sharers, self.stages, self.group_rows)


VARIANTS = [
    Variant("bfloat16", 1, 4, 256),
    Variant("float16", 1, 2, multiprocessors=1),
    Variant("bfloat16", 2, 4),
    Variant("float16", 2, 3, multiprocessors=2),
    Variant("bfloat16", 4, 4, 1024, 8),
    Variant("bfloat16", 4, 3),
]
# tokens, outputs, inputs
SIZES = [(1, 8, 456), (70, 264, 520), (128, 128, 512), (300, 136, 584), (523, 392, 704)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant(run, variant: Variant) -> None:
    for rows, outputs, inputs in SIZES:
        check(
            run, DTYPES[variant.dtype], rows, outputs, inputs, tuning=variant.tuning,
            num_multiprocessors=variant.multiprocessors,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("sharers", launch_tall.SHARERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_as_launched_on_a_device(run, backend, dtype: str, sharers: int) -> None:
    if backend.name != "gpu":
        pytest.skip("the sizes of a model")
    tuning = replace(DEFAULT_TUNING, sharers=sharers)
    for rows, outputs, inputs in (
        (1024, 3072, 1024), (1153, 1432, 1032), (2048, 8192, 2048), (1500, 4096, 4096),
        (6001, 1024, 456),
    ):  # fmt: skip
        check(run, DTYPES[dtype], rows, outputs, inputs, tuning=tuning, num_multiprocessors=132)


# ----------------------------------------------------------------------------- what may not matter


def test_tiles_and_rings_do_not_change_a_bit(run) -> None:
    x, weight = make_product(BFLOAT16, 400, 264, 712)
    results = [
        launch(run, x, weight, tuning=tuning, num_multiprocessors=multiprocessors)
        for tuning, multiprocessors in (
            (SMALL, 1),
            (SMALL, 100),
            (replace(SMALL, stages=4, group_rows=1024), 3),
            (replace(SMALL, sharers=2), 2),
            (replace(SMALL, sharers=4), 4),
            (replace(SMALL, staggered=False), 3),
        )
    ]
    assert all(result.tobytes() == results[0].tobytes() for result in results)


def test_a_token_does_not_depend_on_the_batch(run) -> None:
    x, weight = make_product(BFLOAT16, 400, 136, 520)
    whole = launch(run, x, weight)
    for first, end in ((0, 1), (5, 133), (200, 399)):
        part = launch(run, np.ascontiguousarray(x[first:end]), weight)
        assert whole[first:end].tobytes() == part.tobytes()


def test_infinity_and_nan_stay_in_their_token(run) -> None:
    x, weight = make_product(BFLOAT16, 260, 136, 520)
    x[3, 519] = np.inf
    x[200, 100] = np.nan
    finite = np.isfinite(launch(run, x, weight).astype(np.float32))
    bad = np.zeros(260, bool)
    bad[[3, 200]] = True
    assert finite[~bad].all()
    assert not finite[200].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_far_gates(run, dtype: str) -> None:
    """Where the exponential is infinite, or nothing."""
    x, weight = make_product(DTYPES[dtype], 8, 8, 456)
    x[:, 0] = np.array([-200, -100, -88, -20, 20, 88, 100, 200])
    weight[:8] = 0
    weight[:8, 0] = 1
    got = launch(run, x, weight).astype(np.float64)
    wanted = reference(x, weight)
    assert np.abs(got - wanted).max() <= np.abs(wanted).max() * 0.01
    up = (x.astype(np.float64) @ weight[8:].astype(np.float64).T)[4:]
    assert np.allclose(got[4:] / x[4:, :1].astype(np.float64), up, rtol=0.02, atol=0.02)
    assert np.abs(got[:3]).max() < 1e-6


# ------------------------------------------------------------------------------ the plan

# outputs, inputs: of Qwen3-0.6B, Llama-3.2-1B, Llama-3.1-8B
SHAPES = [(3072, 1024), (8192, 2048), (14336, 4096)]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rows", [1024, 1025, 2048, 32768])
def test_plans_of_real_shapes(outputs: int, inputs: int, rows: int) -> None:
    assert uses_tall(rows, outputs, inputs, 2, bias=False, wgmma=True)
    plan = plan_tall(outputs, inputs, rows, 132)
    sharers, stages = plan.macros["SHARERS"], plan.macros["STAGES"]
    assert plan.cluster == sharers
    assert plan.grid == (132,)
    assert plan.shared_bytes == 2048 + stages * 49152 <= 227 << 10
    assert plan.input_box == (128, 64)
    assert plan.weight_box == (128, 64)
    assert plan.group * sharers * 128 == DEFAULT_TUNING.group_rows
    assert plan == plan_tall(outputs, inputs, rows, 133), "clusters are whole"


def test_no_more_blocks_than_tiles() -> None:
    for rows, outputs, sharers, wanted in (
        (1, 8, 1, 1), (128, 128, 2, 2), (129, 136, 1, 4), (257, 8, 2, 4), (513, 136, 4, 16),
    ):  # fmt: skip
        tuning = TallTuning(sharers=sharers)
        assert plan_tall(outputs, 456, rows, 132, tuning=tuning).grid == (wanted,)
    assert plan_tall(8, 456, 5000, 1, tuning=TallTuning(sharers=2)).grid == (2,)


def test_what_is_taken_and_what_is_refused() -> None:
    usual: dict[str, Any] = {"bias": False, "wgmma": True}
    rows = launch_tall.MIN_ROWS
    for taken, arguments, how in (
        (True, (rows, 64, 1024, 2), {}),
        (False, (rows - 1, 64, 1024, 2), {}),
        (True, (40, 64, 1024, 2), {"tuning": TallTuning(min_rows=40)}),
        (False, (rows, 64, 1024, 2), {"bias": True}),
        (False, (rows, 64, 1024, 2), {"wgmma": False}),
        (False, (rows, 64, 1024, 4), {}),
        (False, (rows, 60, 1024, 2), {}),
        (False, (rows, 0, 1024, 2), {}),
        (False, (rows, 64, 1020, 2), {}),
        (False, (rows, 64, 448, 2), {}),
        (True, (rows, 64, 456, 2), {}),
        (False, (0, 64, 1024, 2), {"tuning": TallTuning(min_rows=0)}),
        (False, (1 << 20, 64, 1024, 2), {"tuning": NEVER}),
        (False, (1 << 30, 1 << 20, 1024, 2), {}),
    ):  # fmt: skip
        assert uses_tall(*arguments, **(usual | how)) == taken, arguments
    for outputs, inputs, num in ((60, 1024, 64), (64, 448, 64), (64, 1020, 64), (64, 1024, 0)):
        with pytest.raises(ValueError, match="tall"):
            plan_tall(outputs, inputs, num, 132)
    for tuning in (TallTuning(sharers=3), TallTuning(stages=1), TallTuning(stages=5)):
        with pytest.raises(ValueError, match="ring"):
            plan_tall(64, 1024, 64, 132, tuning=tuning)
    with pytest.raises(ValueError, match="ring"):
        plan_tall(64, 1024, 64, 132, max_shared_bytes=99 << 10)


def test_the_plan_knows_the_kernels_constants() -> None:
    from tests.shim.build import KERNELS

    text = (KERNELS / "tall.cuh").read_text()
    for name in ("K_STEP", "OUT_TILE", "UNITS", "HEAD_BYTES"):
        found = re.search(rf"constexpr int {name} = (\d+);", text)
        assert found is not None
        mine = "_HEAD_BYTES" if name == "HEAD_BYTES" else name
        assert int(found[1]) == getattr(launch_tall, mine)
    assert "WARPGROUPS = 2;" in text
    assert "ROW_TILE = 64 * WARPGROUPS;" in text
    assert launch_tall.ROW_TILE == 128
    assert "BLOCK_THREADS = (WARPGROUPS + 1) * 128;" in text
    assert launch_tall.THREADS == 384
    assert "constexpr int ATOM = 1024;" in text
    assert set(plan_tall(64, 1024, 64, 132).macros) == {"SHARERS", "STAGES", "STAGGERED"}


# ------------------------------------------------------------------------------ the compiler


@pytest.mark.parametrize("scalar", [1, 2])
@pytest.mark.parametrize("sharers", launch_tall.SHARERS)
def test_nothing_spills(scalar: int, sharers: int) -> None:
    """And products run on while the next are started."""
    pytest.importorskip("cupy")
    from nanocupy.cuda.compiler import Compiler
    from nanocupy.errors import NanocupyError

    try:
        compiler = Compiler(cache=None, options=("--ptxas-options=-v",))
    except NanocupyError as exc:
        pytest.skip(f"no NVRTC: {exc}")
    log = compiler.compile("tall.cu", {"SCALAR": scalar, "SHARERS": sharers}, arch="90a").log
    assert log.count(" 0 bytes spill stores, 0 bytes spill loads") == 1, log
    assert "C75" not in log, "the compiler serialised the products"
