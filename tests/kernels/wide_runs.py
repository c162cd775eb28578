"""Runs the products of up to 256 tokens: launch, macros, arguments and what must come out."""

from __future__ import annotations

from typing import Any

import numpy as np

from nanocupy.ops.launch_wide import FILE, WideTuning, plan_wide
from tests.kernels.backends import CODES, TOLERANCES, Mapped, assert_close
from tests.kernels.gemv_runs import Run, make_call, reference_of
from tests.kernels.skinny_runs import normed_input
from tests.ops.cases import Call

ENTRIES = {
    "norm_linear": "wide_linear",
    "linear_add": "wide_linear_add",
    "norm_swiglu": "wide_swiglu",
    "lm_head": "wide_logits",
}
# Rings that go round.
SMALL = WideTuning(out_tile=64, splits=1, shared_kb=72)


def launch_op(
    run: Run,
    op: str,
    arguments: dict[str, Any],
    *,
    tuning: WideTuning = SMALL,
    num_multiprocessors: int = 132,
    **macros: int,
) -> None:
    """Run the kernel of `op`; `macros` go to the build."""
    weight = arguments["weight"]
    target = arguments["residual" if op == "linear_add" else "out"]
    rows, num_outputs = target.shape
    plan = plan_wide(
        num_outputs, weight.shape[1], rows, num_multiprocessors, pairs=op == "norm_swiglu",
        tuning=tuning,
    )  # fmt: skip
    x = normed_input(arguments)
    args: list[Any] = [Mapped(x, plan.input_box), Mapped(weight, plan.weight_box)]
    args += [] if op == "lm_head" else [arguments["bias"]]
    args += [target, *map(np.int32, (rows, num_outputs, weight.shape[1]))]
    args += [np.int32(plan.weight_stages), np.int32(plan.input_stages)]
    built = {"SCALAR": CODES[weight.dtype.name], **plan.macros, **macros}
    if op == "linear_add" and target.dtype != weight.dtype:
        built["RESIDUAL"] = CODES[target.dtype.name]
    run(FILE, ENTRIES[op], plan, args, (len(args) - 6,), **built)


def check_op(run: Run, op: str, call: Call, **how: Any) -> np.ndarray:
    """Launch and compare with the reference in float64; returns what the kernel gave."""
    (name,) = call.written
    got = {**call.arguments, name: call.arguments[name].copy()}
    launch_op(run, op, got, **how)
    storage = call.arguments["weight"].dtype
    limit = TOLERANCES[storage.name] if op == "lm_head" else None
    assert_close(got[name], reference_of(op, call), op, tolerance=limit)
    return got[name]


__all__ = ["ENTRIES", "SMALL", "check_op", "launch_op", "make_call"]
