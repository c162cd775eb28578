"""Runs the product of gate and up with SwiGLU for prompts: launch, arguments, what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np

from nanocupy.ops.launch_tall import ENTRY, FILE, TallTuning, plan_tall
from tests.kernels.backends import CODES, Mapped, assert_close
from tests.kernels.gemv_runs import Run

# A ring that goes round in every step but one, and groups of one tile of rows.
SMALL = TallTuning(sharers=1, stages=3, group_rows=128)
FEW = 2  # multiprocessors, so that a block has several tiles


def make_product(
    storage: np.dtype, rows: int, outputs: int, inputs: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """x [rows, inputs], as a norm gives it, and weights [2 * outputs, inputs] of gate and up."""
    rng = np.random.default_rng([seed, rows, outputs, inputs])
    x = rng.standard_normal((rows, inputs)).astype(storage)
    weight = rng.standard_normal((2 * outputs, inputs)) * inputs**-0.5
    return x, weight.astype(storage)


def reference(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """In float64, gate and up rounded as the op rounds them."""
    sums = x.astype(np.float64) @ weight.astype(np.float64).T
    gate, up = np.split(sums.astype(weight.dtype).astype(np.float64), 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def launch(
    run: Run,
    x: np.ndarray,
    weight: np.ndarray,
    *,
    tuning: TallTuning = SMALL,
    num_multiprocessors: int = FEW,
    **macros: int,
) -> np.ndarray:
    """out [rows, outputs] of the kernel; `macros` go to the build."""
    (rows, inputs), outputs = x.shape, len(weight) // 2
    plan = plan_tall(outputs, inputs, rows, num_multiprocessors, tuning=tuning)
    out = np.full((rows, outputs), np.nan).astype(weight.dtype)
    args: list[Any] = [Mapped(x, plan.input_box), Mapped(weight, plan.weight_box), out]
    args += [np.int32(n) for n in (rows, outputs, inputs, plan.group)]
    built = {"SCALAR": CODES[weight.dtype.name], **plan.macros, **macros}
    run(FILE, ENTRY, plan, args, (2,), **built)
    return out


def check(
    run: Run, storage: np.dtype, rows: int, outputs: int, inputs: int, **how: Any
) -> np.ndarray:
    """Launch and compare with the reference; returns what the kernel gave."""
    x, weight = make_product(storage, rows, outputs, inputs)
    got = launch(run, x, weight, **how)
    assert_close(got, reference(x, weight), ENTRY)
    return got
