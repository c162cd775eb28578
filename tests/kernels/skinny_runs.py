"""Runs the products of 3 to 64 tokens: launch, macros, arguments and what must come out."""

from __future__ import annotations

from typing import Any

import numpy as np

from nanocupy.ops.launch_skinny import FILE, SkinnyTuning, plan_skinny
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.backends import CODES, TOLERANCES, assert_close
from tests.kernels.gemv_runs import Run, make_call, reference_of
from tests.ops.cases import Call

ENTRIES = {
    "norm_linear": "skinny_linear",
    "linear_add": "skinny_linear_add",
    "norm_swiglu": "skinny_swiglu",
    "lm_head": "skinny_logits",
}
# Few multiprocessors, so that blocks have several tiles, and a ring that goes round.
NUM_MULTIPROCESSORS = 3
SMALL = SkinnyTuning(max_rows=64, out_tile=32, splits=1, ring_kb=24, fold_norm=False)


def normed_input(arguments: dict[str, Any]) -> np.ndarray:
    """What the norm's kernel hands to the product."""
    weight, x = arguments["weight"], arguments["x"]
    if "norm_weight" not in arguments:
        return x
    reference = NumpyOps(np.float64)
    x = x[arguments["rows"]] if "rows" in arguments else x
    return reference._rms_norm(x, arguments["norm_weight"], arguments["eps"]).astype(weight.dtype)


def launch_op(
    run: Run,
    op: str,
    arguments: dict[str, Any],
    *,
    tuning: SkinnyTuning = SMALL,
    num_multiprocessors: int = NUM_MULTIPROCESSORS,
    **macros: int,
) -> None:
    """Run the kernel of `op`; `macros` go to the build."""
    weight = arguments["weight"]
    target = arguments["residual" if op == "linear_add" else "out"]
    rows, num_outputs = target.shape
    plan = plan_skinny(
        num_outputs, weight.shape[1], rows, num_multiprocessors, pairs=op == "norm_swiglu",
        norm=op.startswith("norm") and arguments["x"].dtype == weight.dtype, tuning=tuning,
    )  # fmt: skip
    args = [arguments["x"] if plan.folds_norm else normed_input(arguments)]
    if op.startswith("norm"):
        args += [arguments["norm_weight"], np.float32(arguments["eps"])]
    args += [weight] if op == "lm_head" else [weight, arguments["bias"]]
    args += [target, *map(np.int32, (rows, num_outputs, weight.shape[1]))]
    built = {"SCALAR": CODES[weight.dtype.name], **plan.macros, **macros}
    if op == "linear_add" and target.dtype != weight.dtype:
        built["RESIDUAL"] = CODES[target.dtype.name]
    run(FILE, ENTRIES[op], plan, args, (len(args) - 4,), **built)


def check_op(run: Run, op: str, call: Call, **how: Any) -> np.ndarray:
    """Launch and compare with the reference in float64; returns what the kernel gave."""
    (name,) = call.written
    got = {**call.arguments, name: call.arguments[name].copy()}
    launch_op(run, op, got, **how)
    storage = call.arguments["weight"].dtype
    limit = TOLERANCES[storage.name] if op == "lm_head" else None
    assert_close(got[name], reference_of(op, call), op, tolerance=limit)
    return got[name]


__all__ = ["ENTRIES", "NUM_MULTIPROCESSORS", "SMALL", "check_op", "launch_op", "make_call"]
