"""Runs the small-batch products as ops: launch, macros, arguments and what must come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nanocupy.ops.launch_gemv import GemvTuning, plan_gemv
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.backends import CODES, TOLERANCES, assert_close
from tests.ops.cases import DTYPES, Call

OPS = ("norm_linear", "linear_add", "norm_swiglu", "lm_head")
Run = Callable[..., None]  # as Backend.run

# Few multiprocessors and warps, so that small matrices have several passes in a block, and a ring
# of few batches, so that it goes round.
SMALL = GemvTuning(warps=4, ring_kb=24, l2_ahead_kb=4)
NUM_MULTIPROCESSORS = 3


def make_call(
    op: str,
    storage: np.dtype,
    rows: int,
    num_outputs: int,
    num_inputs: int,
    *,
    bias: bool = False,
    residual: np.dtype | None = None,
    seed: int = 0,
) -> Call:
    """A call of one op on `rows` tokens. residual: the type of the residual stream."""
    rng = np.random.default_rng([seed, rows, num_outputs, num_inputs])
    residual = residual or storage

    def normal(shape: tuple[int, ...], dtype: np.dtype, std: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * std).astype(dtype)

    weight_rows = 2 * num_outputs if op == "norm_swiglu" else num_outputs
    weight = normal((weight_rows, num_inputs), storage, num_inputs**-0.5)
    bias_array = normal((weight_rows,), storage) if bias else None
    norm = {
        "norm_weight": rng.uniform(0.5, 1.5, num_inputs).astype(storage),
        "eps": 1e-5,
        "weight": weight,
    }
    if op == "linear_add":
        x = normal((rows, num_inputs), storage)
        target = normal((rows, num_outputs), residual)
        return Call(
            {"x": x, "weight": weight, "bias": bias_array, "residual": target}, ("residual",)
        )
    if op == "lm_head":
        x = normal((rows + 3, num_inputs), residual)
        chosen = rng.permutation(rows + 3)[:rows].astype(np.int32)
        x[np.setdiff1d(np.arange(rows + 3), chosen)] = np.nan
        out = np.full((rows, num_outputs), np.nan, np.float32)
        return Call({"x": x, "rows": chosen, **norm, "out": out}, ("out",))
    out = np.full((rows, num_outputs), np.nan).astype(storage)
    x = normal((rows, num_inputs), residual)
    return Call({"x": x, **norm, "bias": bias_array, "out": out}, ("out",))


def launch_op(
    run: Run,
    op: str,
    arguments: dict[str, Any],
    *,
    tuning: GemvTuning = SMALL,
    num_multiprocessors: int = NUM_MULTIPROCESSORS,
    **plan: Any,
) -> None:
    """Run the kernel of `op`; `plan` goes to plan_gemv, and with it macros in capitals to the
    build."""
    macros = {name: plan.pop(name) for name in list(plan) if name.isupper()}
    weight = arguments["weight"]
    storage = weight.dtype
    target = arguments["residual" if op == "linear_add" else "out"]
    residual = arguments["residual" if op == "linear_add" else "x"].dtype
    rows, num_outputs = target.shape
    if rows == 0:
        return
    shape = plan_gemv(
        num_outputs,
        weight.shape[1],
        rows,
        num_multiprocessors,
        weight_bytes=storage.itemsize,
        norm=op != "linear_add",
        pairs=op == "norm_swiglu",
        tuning=tuning,
        **plan,
    )
    args = list(arguments.values())
    args = [np.float32(arg) if isinstance(arg, float) else arg for arg in args]
    if op != "linear_add":  # the interface's order is that of the kernels
        args = [arguments["x"]] + ([arguments["rows"]] if op == "lm_head" else [])
        args += [arguments["norm_weight"], np.float32(arguments["eps"]), weight]
        args += [] if op == "lm_head" else [arguments["bias"]]
        args += [target]
    written = len(args) - 1
    sizes = (num_outputs, weight.shape[1], shape.k_tile, shape.k_splits)
    args += [np.int32(size) for size in sizes]
    macros = {"SCALAR": CODES[storage.name], **tuning.macros(rows), **macros}
    if residual != storage:
        macros["RESIDUAL"] = CODES[residual.name]
    run("gemv.cu", f"{op}_rows", shape, args, (written,), **macros)


def reference_of(op: str, call: Call) -> np.ndarray:
    """What the op gives in float64."""
    (name,) = call.written
    before = call.arguments[name]
    # What the op rounds inside has its output's dtype; elsewhere the reference stays exact.
    exact = op in ("linear_add", "lm_head")
    wanted = {**call.arguments, name: before.astype(np.float64) if exact else before.copy()}
    getattr(NumpyOps(np.float64), op)(**wanted)
    return wanted[name]


def check_op(
    run: Run, op: str, call: Call, *, wanted: np.ndarray | None = None, **how: Any
) -> np.ndarray:
    """Launch and compare with `wanted`, or the reference in float64; returns what the kernel
    gave."""
    (name,) = call.written
    storage = call.arguments["weight"].dtype
    got = {**call.arguments, name: call.arguments[name].copy()}
    launch_op(run, op, got, **how)
    wanted = reference_of(op, call) if wanted is None else wanted
    limit = TOLERANCES[storage.name] if op == "lm_head" else None
    assert_close(got[name], wanted, op, tolerance=limit)
    return got[name]


def residual_of(storage: np.dtype, wide: bool) -> np.dtype:
    return DTYPES["float32"] if wide else storage
