"""cuBLAS and cublasLt on a GPU: eager, captured and replayed, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nanocupy.errors import CudaError

pytestmark = pytest.mark.gpu

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
SHAPES = [(1, 1, 1), (1, 576, 576), (3, 5, 7), (7, 130, 66), (64, 1024, 512), (300, 257, 1000)]


@pytest.fixture
def handle(stream: Any) -> Any:
    import cupy

    from nanocupy.cuda.cublas import Cublas, workspace_bytes

    with stream:
        workspace = cupy.zeros(workspace_bytes((9, 0)), np.uint8)
    stream.synchronize()
    made = Cublas(stream, workspace)
    yield made
    stream.synchronize()
    made.close()


@pytest.fixture
def lt(stream: Any) -> Any:
    import cupy

    from nanocupy.cuda.cublaslt import CublasLt

    with stream:
        workspace = cupy.zeros(32 << 20, np.uint8)
    stream.synchronize()
    made = CublasLt(workspace)
    yield made
    stream.synchronize()
    made.close()


def error_of(out: np.ndarray, wanted: np.ndarray) -> float:
    """The worst |error| as a part of |wanted| + the row's root mean square."""
    out, wanted = out.astype(np.float64), wanted.astype(np.float64)
    rms = np.sqrt(np.mean(wanted**2, axis=-1, keepdims=True))
    error = np.abs(out - wanted) / (np.abs(wanted) + rms + 1e-30)
    assert not np.isnan(error).any(), "NaN, or never written"
    return float(error.max(initial=0.0))


def operands(shape: tuple[int, int, int], dtype: str, seed: int) -> tuple[np.ndarray, ...]:
    """x [M, K], w [N, K] and something of out's shape [M, N] that was there before."""
    m, n, k = shape
    rng = np.random.default_rng(seed)
    sizes = ((m, k), (n, k), (m, n))
    return tuple(rng.standard_normal(size).astype(DTYPES[dtype]) for size in sizes)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES)
def test_products(
    handle: Any, stream: Any, record_error: Any, shape: Any, dtype: str, beta: float
) -> None:
    import cupy

    x, w, before = operands(shape, dtype, 1)
    with stream:
        device = [cupy.asarray(array) for array in (x, w, before)]
        if beta == 0:
            device[2].view(np.uint8)[...] = 0xFF  # NaN: what is there must not be read
        handle.matmul(*device, beta)
    stream.synchronize()
    wanted = x.astype(np.float64) @ w.astype(np.float64).T + beta * before.astype(np.float64)
    error = error_of(cupy.asnumpy(device[2]), wanted)
    record_error("matmul", dtype, error)
    assert error <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_float32_out_of_rows_with_gaps(
    handle: Any, stream: Any, record_error: Any, dtype: str
) -> None:
    import cupy

    x, w, _ = operands((37, 75, 203), dtype, 2)
    with stream:
        wide_x = cupy.asarray(np.pad(x, ((0, 0), (8, 89))))
        wide_out = cupy.full((37, 100), 5, np.float32)
        handle.matmul(wide_x[:, 8:211], cupy.asarray(w), wide_out[:, 4:79])
    stream.synchronize()
    got = cupy.asnumpy(wide_out)
    error = error_of(got[:, 4:79], x.astype(np.float64) @ w.astype(np.float64).T)
    record_error("matmul", f"{dtype} to float32", error)
    assert error <= 1e-5
    assert (got[:, :4] == 5).all()
    assert (got[:, 79:] == 5).all()


def test_float32_is_not_tf32(handle: Any, stream: Any) -> None:
    """TF32 keeps 10 bits: it would be off by some 1e-4 here."""
    import cupy

    x, w, out = operands((256, 512, 2048), "float32", 3)
    with stream:
        device = [cupy.asarray(array) for array in (x, w, out)]
        handle.matmul(*device)
    stream.synchronize()
    wanted = x.astype(np.float64) @ w.astype(np.float64).T
    assert error_of(cupy.asnumpy(device[2]), wanted) < 1e-5


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_captured_and_replayed_on_other_values(handle: Any, stream: Any, dtype: str) -> None:
    import cupy

    from nanocupy.cuda.arena import device_allocations
    from nanocupy.cuda.graphs import GraphCache

    shape = (33, 128, 256)
    with stream:
        x, w, out = (cupy.asarray(array) for array in operands(shape, dtype, 4))
        other = cupy.zeros((33, 33), DTYPES[dtype])
        second_w = w.reshape(-1)[: 33 * 128].reshape(33, 128)
    stream.synchronize()
    graphs = GraphCache(stream)

    def body() -> None:
        handle.matmul(x, w, out)
        handle.matmul(out, second_w, other)

    graphs.run("products", body)
    stream.synchronize()
    for seed in (5, 6, 7):
        new_x, _, _ = operands(shape, dtype, seed)
        with stream:
            x.set(new_x, stream=stream)
            out.view(np.uint8).fill(0)
        stream.synchronize()
        with device_allocations() as count:
            graphs.run("products", body)
            stream.synchronize()
        if seed > 5:  # the capture itself may make the driver grow
            assert count.nothing, count
        host_w = cupy.asnumpy(w)
        wanted = new_x.astype(np.float64) @ host_w.astype(np.float64).T
        got = cupy.asnumpy(out)
        assert error_of(got, wanted) <= TOLERANCES[dtype]
        second = host_w.reshape(-1)[: 33 * 128].reshape(33, 128).astype(np.float64)
        wanted = got.astype(np.float64) @ second.T
        assert error_of(cupy.asnumpy(other), wanted) <= TOLERANCES[dtype]
    assert graphs.counters.summary() == ("captured 1, replayed 3, eager 1 (first of its shape 1)")


def test_two_runs_are_bitwise_equal(handle: Any, stream: Any) -> None:
    import cupy

    for dtype in DTYPES:
        x, w, out = operands((5, 64, 8192), dtype, 8)  # long and thin: a split sum
        with stream:
            device = [cupy.asarray(array) for array in (x, w, out)]
            results = []
            for _ in range(3):
                handle.matmul(*device)
                results.append(cupy.asnumpy(device[2]).tobytes())
        assert len(set(results)) == 1


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(1, 8, 8), (64, 1024, 512), (40, 264, 1000)])
def test_lt_products(
    lt: Any, stream: Any, record_error: Any, shape: Any, dtype: str, with_bias: bool
) -> None:
    import cupy

    from nanocupy.cuda.graphs import GraphCache

    x, w, out = operands(shape, dtype, 9)
    bias = np.random.default_rng(10).standard_normal(shape[1]).astype(DTYPES[dtype])
    with stream:
        device = [cupy.asarray(array) for array in (x, w, out)]
        device_bias = cupy.asarray(bias) if with_bias else None
    stream.synchronize()
    plan = lt.plan(*device, device_bias)
    assert lt.plan(*device, device_bias) is plan
    wanted = x.astype(np.float64) @ w.astype(np.float64).T
    wanted = wanted + bias.astype(np.float64) if with_bias else wanted
    graphs = GraphCache(stream)
    for _ in range(3):  # eager, captured, replayed
        device[2].view(np.uint8).fill(0)
        cupy.cuda.Device().synchronize()
        graphs.run("product", lambda: lt.run(plan, *device, device_bias, stream=stream))
        stream.synchronize()
        error = error_of(cupy.asnumpy(device[2]), wanted)
        record_error("matmul with bias", dtype, error)
        assert error <= TOLERANCES[dtype]
    assert graphs.counters.replayed == 2


def test_lt_refuses_arrays_that_were_not_planned(lt: Any, stream: Any) -> None:
    import cupy

    with stream:
        x, w, out = (cupy.zeros(s, np.float16) for s in ((8, 16), (32, 16), (8, 32)))
    plan = lt.plan(x, w, out)
    with pytest.raises(CudaError, match="the arrays differ from those the plan was made for"):
        lt.run(plan, x[:4], w, out[:4], stream=stream)
    with pytest.raises(CudaError, match=r"bias is float16\[8\], not float16\[32\]"):
        lt.plan(x, w, out, cupy.zeros(8, np.float16))
    empty = lt.plan(x[:0], w, out[:0])
    lt.run(empty, x[:0], w, out[:0], stream=stream)
