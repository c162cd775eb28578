"""Matrix products through cublasLt: with a bias folded in, on an algorithm chosen beforehand.

Choosing an algorithm (the heuristics) must not happen while a graph is captured, so a product is
planned first and then run as often as one likes. Arrays are row-major, as in `cublas`.

Layouts and enumerations are those of cublasLt.h; a test compares them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from nanocupy.cuda.checks import LaunchLog
from nanocupy.cuda.cublas import COMPUTE_32F, DATA_TYPES, OP_T, check, leading, matmul_shape
from nanocupy.cuda.libraries import load_library
from nanocupy.errors import CudaError

# cublasLtMatmulDescAttributes_t, cublasLtMatmulPreferenceAttributes_t, cublasLtEpilogue_t
DESC_TRANSA, DESC_EPILOGUE, DESC_BIAS_POINTER, DESC_BIAS_DATA_TYPE = 3, 7, 8, 26
PREF_MAX_WORKSPACE_BYTES, PREF_REDUCTION_SCHEME_MASK = 1, 3
PREF_MIN_ALIGNMENT = (5, 6, 7, 8)  # of A, B, C and D in bytes
EPILOGUE_BIAS = 4
# Partial sums are added in float32; the other schemes add them rounded to out's type.
REDUCTION_SCHEME_COMPUTE_TYPE = 2
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = (("data", ctypes.c_uint64 * 8),)


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves_count", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class MatmulPlan:
    """A product of fixed shapes and types, and the algorithm chosen for it.

    `key` is what the arrays of a run must share with those it was planned for.
    """

    key: tuple[Any, ...]
    desc: Any
    layouts: tuple[Any, ...]  # of A = w, B = x and C = D = out; none where out is empty
    algorithm: Algorithm
    workspace_bytes: int


class CublasLt:
    """A cublasLt handle and one workspace, for products on one stream at a time."""

    def __init__(self, workspace: Any, *, library: Any = None, log: LaunchLog | None = None):
        """workspace: uint8 [n] on the device, aligned to 256 bytes."""
        self._library = load_library("cublasLt") if library is None else library
        self._log = log
        self.workspace = workspace
        handle = ctypes.POINTER(_POINTER)
        self._declare("cublasLtCreate", handle)
        self._declare("cublasLtDestroy", _POINTER)
        self._declare("cublasLtMatmulDescCreate", handle, _INT, _INT)
        self._declare("cublasLtMatmulDescDestroy", _POINTER)
        self._declare("cublasLtMatmulDescSetAttribute", _POINTER, _INT, _POINTER, ctypes.c_size_t)
        self._declare(
            "cublasLtMatrixLayoutCreate",
            *(handle, _INT, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
        )
        self._declare("cublasLtMatrixLayoutDestroy", _POINTER)
        self._declare("cublasLtMatmulPreferenceCreate", handle)
        self._declare("cublasLtMatmulPreferenceDestroy", _POINTER)
        self._declare(
            "cublasLtMatmulPreferenceSetAttribute", _POINTER, _INT, _POINTER, ctypes.c_size_t
        )
        self._declare(
            "cublasLtMatmulAlgoGetHeuristic",
            *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
            *(_INT, ctypes.POINTER(HeuristicResult), ctypes.POINTER(_INT)),
        )
        self._matmul = self._declare(
            "cublasLtMatmul",
            *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
            *(_POINTER, _POINTER, _POINTER, _POINTER, ctypes.POINTER(Algorithm)),
            *(_POINTER, ctypes.c_size_t, _POINTER),
        )
        self._handle = _POINTER()
        self._call("cublasLtCreate", "the handle", ctypes.byref(self._handle))
        self._plans: dict[tuple[Any, ...], MatmulPlan] = {}

    def plan(self, x: Any, w: Any, out: Any, bias: Any = None) -> MatmulPlan:
        """Choose the algorithm for out[M, N] = x[M, K] @ w[N, K].T + bias[N], or recall it.

        Types as in `Cublas.matmul`; bias of out's type. Not while capturing. Raises CudaError.
        """
        key = _plan_key(x, w, out, bias)
        if key not in self._plans:
            self._plans[key] = self._new_plan(key, x, w, out, bias)
        return self._plans[key]

    def run(
        self, plan: MatmulPlan, x: Any, w: Any, out: Any, bias: Any = None, *, stream: Any,
        beta: float = 0.0,
    ) -> None:  # fmt: skip
        """out = x @ w.T + bias + beta * out, as `plan` says. May be captured."""
        if _plan_key(x, w, out, bias) != plan.key:
            raise CudaError("cublasLtMatmul: the arrays differ from those the plan was made for")
        if out.size == 0:
            return
        what = f"{list(x.shape)} @ {list(w.shape)}.T {x.dtype}"
        if bias is not None:
            self._set(plan.desc, DESC_BIAS_POINTER, ctypes.c_void_p(bias.data.ptr), what)
        alpha, beta_value = ctypes.c_float(1.0), ctypes.c_float(beta)
        a, b, d = plan.layouts
        status = self._matmul(
            *(self._handle, plan.desc, ctypes.addressof(alpha), w.data.ptr, a, x.data.ptr, b),
            *(ctypes.addressof(beta_value), out.data.ptr, d, out.data.ptr, d),
            ctypes.byref(plan.algorithm),
            *(self.workspace.data.ptr if self.workspace.nbytes else None, self.workspace.nbytes),
            stream.ptr,
        )
        if self._log is not None:
            self._log.note("cublasLtMatmul")
        check(status, "cublasLtMatmul", what, self._log)

    def close(self) -> None:
        """Give everything back; nothing may run on it any more."""
        for plan in self._plans.values():
            if plan.desc is not None:
                self._call("cublasLtMatmulDescDestroy", "a plan", plan.desc)
            for layout in plan.layouts:
                self._call("cublasLtMatrixLayoutDestroy", "a plan", layout)
        self._plans.clear()
        if self._handle:
            handle, self._handle = self._handle, _POINTER()
            self._call("cublasLtDestroy", "the handle", handle)

    def _new_plan(self, key: tuple[Any, ...], x: Any, w: Any, out: Any, bias: Any) -> MatmulPlan:
        m, n, k = matmul_shape(x, w, out)
        if m == 0 or n == 0:
            return MatmulPlan(key, None, (), Algorithm(), 0)
        what = f"[{m}, {k}] @ [{n}, {k}].T {x.dtype}"
        desc = self._create("cublasLtMatmulDescCreate", what, COMPUTE_32F, DATA_TYPES["float32"])
        self._set(desc, DESC_TRANSA, _INT(OP_T), what)
        if bias is not None:
            self._set(desc, DESC_EPILOGUE, _INT(EPILOGUE_BIAS), what)
            self._set(desc, DESC_BIAS_DATA_TYPE, _INT(DATA_TYPES[bias.dtype.name]), what)
            self._set(desc, DESC_BIAS_POINTER, ctypes.c_void_p(bias.data.ptr), what)
        layouts = tuple(
            self._create(
                "cublasLtMatrixLayoutCreate", what, DATA_TYPES[array.dtype.name], width, rows,
                leading(array),
            )
            for array, width, rows in ((w, k, n), (x, k, m), (out, n, m))
        )  # fmt: skip
        preference = self._create("cublasLtMatmulPreferenceCreate", what)
        self._prefer(preference, PREF_MAX_WORKSPACE_BYTES, self.workspace.nbytes, 8, what)
        reduction = REDUCTION_SCHEME_COMPUTE_TYPE
        self._prefer(preference, PREF_REDUCTION_SCHEME_MASK, reduction, 4, what)
        for attribute, array in zip(PREF_MIN_ALIGNMENT, (w, x, out, out), strict=True):
            self._prefer(preference, attribute, _alignment(array), 4, what)
        result, count = HeuristicResult(), _INT(0)
        a, b, d = layouts
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            *(self._handle, desc, a, b, d, d, preference, 1),
            *(ctypes.byref(result), ctypes.byref(count)),
        )
        self._call("cublasLtMatmulPreferenceDestroy", what, preference)
        check(status, "cublasLtMatmulAlgoGetHeuristic", what)
        if count.value < 1 or result.state:
            raise CudaError(f"cublasLt has no algorithm for {what}")
        return MatmulPlan(key, desc, layouts, result.algorithm, result.workspace_bytes)

    def _create(self, call: str, what: str, *args: Any) -> Any:
        made = _POINTER()
        self._call(call, what, ctypes.byref(made), *args)
        return made

    def _set(self, desc: Any, attribute: int, value: Any, what: str) -> None:
        self._call(
            "cublasLtMatmulDescSetAttribute",
            *(what, desc, attribute, ctypes.byref(value), ctypes.sizeof(value)),
        )

    def _prefer(self, preference: Any, attribute: int, value: int, size: int, what: str) -> None:
        number = (ctypes.c_uint64 if size == 8 else ctypes.c_uint32)(value)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute",
            *(what, preference, attribute, ctypes.byref(number), size),
        )

    def _declare(self, name: str, *argument_types: Any) -> Any:
        function = getattr(self._library, name)
        function.argtypes, function.restype = argument_types, ctypes.c_int
        return function

    def _call(self, name: str, what: str, *args: Any) -> None:
        check(getattr(self._library, name)(*args), name, what, self._log)


def _alignment(array: Any) -> int:
    """By how many bytes, up to 256, the array's start and rows are aligned."""
    number = array.data.ptr | (leading(array) * array.itemsize) | 256
    return number & -number


def _plan_key(x: Any, w: Any, out: Any, bias: Any) -> tuple[Any, ...]:
    """All that a choice of algorithm depends on."""
    if bias is not None and (
        bias.shape != (w.shape[0],) or bias.dtype != out.dtype or not bias.flags.c_contiguous
    ):
        raise CudaError(
            f"matmul: bias is {bias.dtype}{list(bias.shape)}, not {out.dtype}[{w.shape[0]}] "
            "without gaps"
        )
    arrays = [(a.shape, a.dtype.name, leading(a), _alignment(a)) for a in (x, w, out)]
    return (*arrays, bias is not None)
