"""How products are handed to cuBLAS, on a library that computes in NumPy what it is told to."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanocupy.cuda.cublas import Cublas, matmul_shape, workspace_bytes
from nanocupy.cuda.graphs import GraphCounters
from nanocupy.cuda.timing import num_rotating, summarize
from nanocupy.errors import CudaError

pytest.importorskip("cupy")
DTYPES = {0: np.float32, 2: np.float16}


class FakeCublas:
    """cublasGemmEx by its documentation: column-major, C = alpha op(A) op(B) + beta C."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self.failing = failing
        for name in ("cublasCreate_v2", "cublasDestroy_v2", "cublasSetStream_v2",
                     "cublasSetWorkspace_v2", "cublasSetMathMode", "cublasGemmEx"):  # fmt: skip
            setattr(self, name, self._function(name))

    def _function(self, name: str) -> Any:
        def function(*args: Any) -> int:
            self.calls.append(name)
            if name == self.failing:
                return 15
            if name == "cublasCreate_v2":
                args[0]._obj.value = 5
            if name == "cublasGemmEx":
                self._gemm(*args)
            return 0

        return function

    def _gemm(
        self, handle: Any, op_a: int, op_b: int, m: int, n: int, k: int, alpha: int,
        a: int, a_type: int, lda: int, b: int, b_type: int, ldb: int, beta: int,
        c: int, c_type: int, ldc: int, compute: int, algorithm: int,
    ) -> None:  # fmt: skip
        def matrix(address: int, kind: int, ld: int, rows: int, cols: int) -> np.ndarray:
            dtype = np.dtype(DTYPES[kind])
            count = ld * (cols - 1) + rows
            memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
            flat = np.frombuffer(memory, dtype)
            strides = (dtype.itemsize, ld * dtype.itemsize)
            return np.lib.stride_tricks.as_strided(flat, (rows, cols), strides)

        assert (compute, algorithm) == (68, -1)
        left = matrix(a, a_type, lda, *((k, m) if op_a else (m, k))).astype(np.float64)
        right = matrix(b, b_type, ldb, *((n, k) if op_b else (k, n))).astype(np.float64)
        left, right = (left.T if op_a else left), (right.T if op_b else right)
        factor, keep = (ctypes.c_float.from_address(p).value for p in (alpha, beta))
        out = matrix(c, c_type, ldc, m, n)
        out[...] = factor * (left @ right) + (keep * out if keep else 0)


def numpy_view(array: Any) -> np.ndarray:
    """The host memory under a fake device array."""
    size = (
        sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)) + array.itemsize
    )
    memory = (ctypes.c_uint8 * size).from_address(array.data.ptr)
    flat = np.frombuffer(memory, np.uint8, count=size)
    return np.ndarray(array.shape, array.dtype, flat.data, strides=array.strides)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("out_dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (1, 8, 4), (6, 1, 2), (0, 3, 2), (2, 0, 5)]
)
def test_row_major_products(host_array: Any, shape: Any, out_dtype: Any, beta: float) -> None:
    m, n, k = shape
    rng = np.random.default_rng(3)
    whole = [host_array((m, k + 3), np.float16), host_array((n, k), np.float16),
             host_array((m, n + 2), out_dtype)]  # fmt: skip
    x, w, out = whole[0][:, :k], whole[1], whole[2][:, :n]  # x and out: rows with gaps between
    for array in (x, w, out):
        if array.size:
            numpy_view(array)[...] = rng.integers(-4, 5, array.shape)
    fake = FakeCublas()
    handle = Cublas(SimpleNamespace(ptr=77), host_array((1024,), np.uint8), library=fake)
    if out.size:
        before = numpy_view(out).astype(np.float64)
        wanted = numpy_view(x).astype(np.float64) @ numpy_view(w).astype(np.float64).T
        handle.matmul(x, w, out, beta)
        assert np.array_equal(numpy_view(out), wanted + beta * before)
    else:
        handle.matmul(x, w, out, beta)
        assert "cublasGemmEx" not in fake.calls


def test_the_workspace_is_set_after_every_stream(host_array: Any) -> None:
    fake = FakeCublas()
    handle = Cublas(SimpleNamespace(ptr=1), host_array((1024,), np.uint8), library=fake)
    handle.set_stream(SimpleNamespace(ptr=2))
    handle.close()
    handle.close()
    assert fake.calls == [
        "cublasCreate_v2", "cublasSetMathMode", "cublasSetStream_v2", "cublasSetWorkspace_v2",
        "cublasSetStream_v2", "cublasSetWorkspace_v2", "cublasDestroy_v2",
    ]  # fmt: skip
    with pytest.raises(CudaError, match="workspace must be aligned to 256 bytes"):
        Cublas(SimpleNamespace(ptr=1), host_array((1024,), np.uint8, 16), library=fake)


def test_a_status_names_call_and_product(host_array: Any) -> None:
    work = host_array((0,), np.uint8)
    with pytest.raises(
        CudaError, match="cublasCreate_v2 of the handle failed: CUBLAS_STATUS_NOT_S"
    ):
        Cublas(SimpleNamespace(ptr=1), work, library=FakeCublas("cublasCreate_v2"))
    handle = Cublas(SimpleNamespace(ptr=1), work, library=FakeCublas("cublasGemmEx"))
    arrays = [host_array(shape, np.float32) for shape in ((2, 3), (4, 3), (2, 4))]
    with pytest.raises(CudaError, match=r"cublasGemmEx of \[2, 3\] @ \[4, 3\]\.T float32 failed: "):
        handle.matmul(*arrays)


@pytest.mark.parametrize(
    ("x", "w", "out", "dtypes", "says"),
    [
        ((2, 3), (4, 5), (2, 4), "fff", "not .M, K., .N, K. and"),
        ((2, 3), (4, 3), (4, 2), "fff", "not .M, K., .N, K. and"),
        ((6,), (4, 3), (2, 4), "fff", "takes matrices"),
        ((2, 3), (4, 3), (2, 4), "efe", "must be of one type"),
        ((2, 3), (4, 3), (2, 4), "ffe", "must be of one type"),
        ((2, 3), (4, 3), (2, 4), "ddd", "must be of one type"),
        ((2, 0), (4, 0), (2, 4), "fff", "have no columns"),
    ],
)
def test_products_that_do_not_fit(
    host_array: Any, x: Any, w: Any, out: Any, dtypes: str, says: str
) -> None:
    with pytest.raises(CudaError, match=says):
        matmul_shape(
            *(host_array(s, np.dtype(d)) for s, d in zip((x, w, out), dtypes, strict=True))
        )


def test_rows_with_gaps_inside_are_refused(host_array: Any) -> None:
    good = host_array((4, 4))
    with pytest.raises(CudaError, match="the rows of x have gaps"):
        matmul_shape(good.T, good, good)
    with pytest.raises(CudaError, match="the rows of w have gaps"):
        matmul_shape(host_array((4, 2)), good[:, ::2], good)


def test_small_things() -> None:
    assert workspace_bytes((9, 0)) == 32 << 20
    assert workspace_bytes((8, 9)) == 4 << 20
    counters = GraphCounters(captured=3, replayed=120)
    counters.eager.update({"first of its shape": 3, "too large": 1})
    assert counters.summary() == (
        "captured 3, replayed 120, eager 4 (first of its shape 3, too large 1)"
    )
    timing = summarize([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (timing.median_ms, timing.num_runs) == (3.0, 5)
    assert timing.gigabytes_per_second(6e9) == pytest.approx(2000)
    assert timing.teraflops(3e12) == pytest.approx(1000)
    assert num_rotating(100 << 20) * (100 << 20) > 256 << 20
    assert num_rotating(10**12) == 2
