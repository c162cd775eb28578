"""The small kernels against the NumPy ops in float64, over the cases that all backends share."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.ops import launch_shapes
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.backends import assert_close
from tests.kernels.small_ops import F32, I32, RUNNERS, check_case, codes, run_norm, sized
from tests.ops.cases import CASES, DTYPES, Case

BLOCKS = (None, 32, 96, 256, 1024)  # None: what launch_shapes gives
SMALL_CASES = [case for case in CASES if case.op in RUNNERS]
STORED = [case for case in SMALL_CASES if case.op not in ("rope_table", "penalize", "sample")]
FLOAT_ONLY = [case for case in SMALL_CASES if case not in STORED]


def test_every_op_but_attention_has_kernels_here() -> None:
    assert {case.op for case in CASES} - set(RUNNERS) == {"attention", "attend"}


@pytest.mark.parametrize("case", STORED, ids=str)
def test_shared_cases(backend, storage: np.dtype, case: Case) -> None:
    check_case(backend, case, storage)


@pytest.mark.parametrize("case", FLOAT_ONLY, ids=str)
def test_shared_cases_of_float_ops(backend, case: Case) -> None:
    check_case(backend, case, DTYPES["float32"])


@pytest.mark.parametrize("block", [b for b in BLOCKS if b])
def test_every_block_size(backend, block: int) -> None:
    """Every op's cases in bfloat16, with blocks that do not suit them."""
    for case in SMALL_CASES:
        if case.op != "rope_write_kv" or case.name in ("h8-g2-d128-norms", "padding"):
            check_case(backend, case, DTYPES["bfloat16"], block)


# ------------------------------------------------------------------------------ wide rows


@pytest.mark.parametrize("width", [8, 64, 576, 2048, 2056, 2050])
@pytest.mark.parametrize("block", BLOCKS)
def test_norm_and_swiglu_of_wide_rows(backend, storage, width: int, block: int | None) -> None:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((5, width)).astype(storage)
    weight = rng.uniform(0.5, 1.5, width).astype(storage)
    rows = np.array([4, 0, 4], np.int32)
    oracle = NumpyOps(np.float64)
    for chosen in (None, rows):
        got = run_norm(backend, storage, block, x, chosen, weight, 1e-5, storage)
        source = x if chosen is None else x[chosen]
        assert_close(got, oracle._rms_norm(source, weight, 1e-5))
    wide = run_norm(backend, storage, block, x.astype(F32), None, weight, 1e-5, storage)
    assert_close(wide, oracle._rms_norm(x, weight, 1e-5))

    gate_up = rng.standard_normal((3, 2 * width)).astype(storage)
    gate_up[0, :3] = 80, -80, 0
    out = np.full((3, width), np.nan).astype(storage)
    shape = sized(launch_shapes.swiglu_rows(3, width), block)
    args = (gate_up, None, out, I32(width))
    backend.run("activation.cu", "swiglu_rows", shape, args, (2,), **codes(storage))
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    assert_close(out, gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_fill_bias_rows(backend, storage, width: int) -> None:
    bias = np.random.default_rng(width).standard_normal(width).astype(storage)
    out = np.full((3, width), np.nan).astype(storage)
    shape = launch_shapes.add_rows(3, width)
    args = (bias, out, I32(width))
    backend.run("activation.cu", "fill_bias_rows", shape, args, (1,), **codes(storage))
    assert (out == bias).all()
