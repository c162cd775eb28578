"""Matrix products through cuBLAS, called below CuPy so that a capturing stream takes them too.

A handle belongs to one stream and has a workspace of its own, given from outside: cuBLAS allocates
nothing. Arrays are row-major; cuBLAS is column-major, hence computes the transposed product:
out = x @ w.T is out.T = w @ x.T, and a row-major matrix read column-major is its transpose already.

Enumerations are those of cublas_api.h and library_types.h; a test compares them.
"""

from __future__ import annotations

import ctypes
from typing import Any

from nanocupy.cuda.checks import LaunchLog, cuda_error
from nanocupy.cuda.libraries import load_library
from nanocupy.errors import CudaError

# cudaDataType_t, by the names of dtypes
DATA_TYPES = {
    "float32": 0, "float16": 2, "bfloat16": 14, "int8": 3, "int32": 10,
    "float8_e4m3fn": 28, "float8_e5m2": 29,
}  # fmt: skip
OP_N, OP_T = 0, 1
COMPUTE_32F = 68
GEMM_DEFAULT = -1
# Float32 products stay float32 (no TF32), and 16-bit ones are summed in float32 throughout.
MATH_MODE = 0 | 16  # CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
STATUS_NAMES = {
    1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH",
    11: "MAPPING_ERROR", 13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED",
    16: "LICENSE_ERROR",
}  # fmt: skip
INPUT_TYPES = frozenset({"float32", "float16", "bfloat16"})
WORKSPACE_ALIGNMENT_BYTES = 256
_INT32_MAX = 2**31 - 1


def workspace_bytes(compute_capability: tuple[int, int]) -> int:
    """What NVIDIA recommends a handle to have: 32 MiB from Hopper on, 4 MiB before."""
    return 32 << 20 if compute_capability >= (9, 0) else 4 << 20


class CublasStatusError(Exception):
    """A status of cuBLAS that is not success; `cuda_error` makes the line a person reads."""


def check(status: int, call: str, what: str, log: LaunchLog | None = None) -> None:
    """Raise CudaError with the names of call and status unless it is success."""
    if status:
        name = STATUS_NAMES.get(status, str(status))
        text = f"CUBLAS_STATUS_{name}" if status in STATUS_NAMES else f"cuBLAS status {status}"
        raise cuda_error(f"{call} of {what}", CublasStatusError(text), log) from None


def matmul_shape(x: Any, w: Any, out: Any) -> tuple[int, int, int]:
    """(M, N, K) of out[M, N] = x[M, K] @ w[N, K].T. Raises CudaError where they do not fit.

    Rows may have gaps between them; the elements of a row must not.
    """
    what = " and ".join(f"{a.dtype}{list(a.shape)}" for a in (x, w, out))
    if not x.ndim == w.ndim == out.ndim == 2:
        raise CudaError(f"matmul takes matrices, not {what}")
    (m, k), n = x.shape, w.shape[0]
    if w.shape[1] != k or out.shape != (m, n):
        raise CudaError(f"matmul: x, w and out are {what}, not [M, K], [N, K] and [M, N]")
    if k == 0 and m and n:
        raise CudaError(f"matmul: x and w have no columns ({what})")
    for name, array in (("x", x), ("w", w), ("out", out)):
        if array.size == 0:
            continue
        row = array.strides[0] if array.shape[0] > 1 else array.shape[1] * array.itemsize
        if array.shape[1] > 1 and array.strides[1] != array.itemsize:
            raise CudaError(f"matmul: the rows of {name} have gaps (strides {array.strides})")
        if row % array.itemsize or row < array.shape[1] * array.itemsize:
            raise CudaError(f"matmul: the rows of {name} overlap (strides {array.strides})")
        if max(row // array.itemsize, *array.shape) > _INT32_MAX:
            raise CudaError(f"matmul: {name} {list(array.shape)} is too large for cuBLAS")
    types = x.dtype.name, w.dtype.name, out.dtype.name
    if types[0] != types[1] or types[0] not in INPUT_TYPES or types[2] not in {types[0], "float32"}:
        raise CudaError(
            f"matmul of {what}: x and w must be of one type of {sorted(INPUT_TYPES)}, out of the "
            "same or float32"
        )
    return m, n, k


def leading(array: Any) -> int:
    """Elements from one row to the next, which BLAS calls the leading dimension."""
    return array.strides[0] // array.itemsize if array.shape[0] > 1 else max(array.shape[1], 1)


class Cublas:
    """A cuBLAS handle on one stream, with one workspace. Two streams need two of these."""

    def __init__(
        self,
        stream: Any,
        workspace: Any,
        *,
        library: Any = None,
        log: LaunchLog | None = None,
    ) -> None:
        """stream: a cupy.cuda.Stream, not the null stream. workspace: uint8 [n] on the device,
        used by this handle alone. library: another libcublas than CuPy's, for tests."""
        if workspace.size and workspace.data.ptr % WORKSPACE_ALIGNMENT_BYTES:
            raise CudaError(
                f"cuBLAS' workspace must be aligned to {WORKSPACE_ALIGNMENT_BYTES} bytes"
            )
        self._library = load_library("cublas") if library is None else library
        self._log = log
        self.workspace = workspace
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self._declare("cublasCreate_v2", ctypes.POINTER(pointer))
        self._declare("cublasDestroy_v2", pointer)
        self._declare("cublasSetStream_v2", pointer, pointer)
        self._declare("cublasSetWorkspace_v2", pointer, pointer, ctypes.c_size_t)
        self._declare("cublasSetMathMode", pointer, integer)
        self._gemm = self._declare(
            "cublasGemmEx",
            *(pointer, integer, integer, integer, integer, integer, pointer),  # … alpha
            *(pointer, integer, integer),  # A, its type, its leading dimension
            *(pointer, integer, integer, pointer),  # B …, beta
            *(pointer, integer, integer, integer, integer),  # C …, compute type, algorithm
        )
        self._handle = pointer()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetMathMode", self._handle, MATH_MODE)
        self.set_stream(stream)
        self._one = ctypes.c_float(1.0)
        self._one_pointer = ctypes.addressof(self._one)

    def set_stream(self, stream: Any) -> None:
        """Compute on `stream` from now on. cuBLAS forgets its workspace with every new stream."""
        self.stream = stream
        self._call("cublasSetStream_v2", self._handle, stream.ptr)
        size = int(self.workspace.nbytes)
        pointer = self.workspace.data.ptr if size else None
        self._call("cublasSetWorkspace_v2", self._handle, pointer, size)

    def matmul(self, x: Any, w: Any, out: Any, beta: float = 0.0) -> None:
        """out = x @ w.T + beta * out, summed in float32 (true float32: TF32 is off).

        x [M, K] and w [N, K] of one type, float32, float16 or bfloat16; out [M, N] of the same or
        float32. Allocates nothing and may be captured. Raises CudaError.
        """
        m, n, k = matmul_shape(x, w, out)
        if m == 0 or n == 0:
            return
        types = DATA_TYPES
        in_type, out_type = types[x.dtype.name], types[out.dtype.name]
        beta_value = ctypes.c_float(beta)  # read during the call, also while capturing
        status = self._gemm(
            *(self._handle, OP_T, OP_N, n, m, k, self._one_pointer),
            *(w.data.ptr, in_type, leading(w)),
            *(x.data.ptr, in_type, leading(x), ctypes.addressof(beta_value)),
            *(out.data.ptr, out_type, leading(out), COMPUTE_32F, GEMM_DEFAULT),
        )
        if self._log is not None:
            self._log.note("cublasGemmEx")
        if status:
            check(status, "cublasGemmEx", f"[{m}, {k}] @ [{n}, {k}].T {x.dtype}", self._log)

    def close(self) -> None:
        """Give the handle back; nothing may run on it any more."""
        if self._handle:
            handle, self._handle = self._handle, ctypes.c_void_p()
            self._call("cublasDestroy_v2", handle)

    def _declare(self, name: str, *argument_types: Any) -> Any:
        function = getattr(self._library, name)
        function.argtypes, function.restype = argument_types, ctypes.c_int
        return function

    def _call(self, name: str, *args: Any) -> None:
        check(getattr(self._library, name)(*args), name, "the handle", self._log)
