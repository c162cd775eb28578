"""Runs products with quantised weights: packing, launch, arguments, and what must come out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nanocupy.ops.launch_quantized import (
    FILE,
    PACK_FILE,
    QuantizedTuning,
    packed_format,
    plan_quantized,
)
from nanocupy.ops.launch_shapes import LaunchShape
from nanocupy.ops.numpy_ops import NumpyOps
from nanocupy.ops.packed_matrix import packed_row_order, scale_unit
from nanocupy.quantized import QuantizedMatrix, quantize
from tests.kernels.backends import CODES, TOLERANCES, assert_close
from tests.kernels.gemv_runs import Run
from tests.kernels.gemv_runs import make_call as make_float_call
from tests.ops.cases import Call

ENTRIES = {
    "norm_linear": "quantized_linear",
    "linear_add": "quantized_linear_add",
    "norm_swiglu": "quantized_swiglu",
    "lm_head": "quantized_logits",
}
# Few multiprocessors, so that blocks have several strips, and rings that go round.
NUM_MULTIPROCESSORS = 3
SMALL = QuantizedTuning(ring_kb=1)


@dataclass(frozen=True)
class Storage:
    """How the weights of a call are kept; group_size None: a scale for a whole row."""

    kind: str
    group_size: int | None
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.kind}-g{self.group_size or 'row'}-{self.dtype}"


def make_call(
    op: str, storage: np.dtype, kind: str, group_size: int | None, *shape: int, **how: Any
) -> Call:
    """As gemv_runs.make_call, with a QuantizedMatrix for its weight."""
    call = make_float_call(op, storage, *shape, **how)
    weight = quantize(call.arguments["weight"].astype(np.float32), kind, group_size)
    if kind == "int4":  # what comes from a file need not put zero on a code
        rng = np.random.default_rng(len(weight.codes))
        shift = rng.uniform(-1, 1, weight.scales.shape).astype(np.float32) * weight.scales
        weight = as_stored(replace(weight, offsets=weight.offsets + shift))
    return Call({**call.arguments, "weight": weight}, call.written)


def as_stored(weight: QuantizedMatrix) -> QuantizedMatrix:
    """An int4 matrix with its scales and offsets rounded as a device keeps them."""
    unit = np.float32(scale_unit(weight))
    scales, offsets = (
        (part / unit).astype(np.float16).astype(np.float32) * unit
        for part in (weight.scales, weight.offsets)
    )
    return replace(weight, scales=scales, offsets=offsets)


def pack(run: Run, weight: QuantizedMatrix, pairs: bool, dtype: str) -> tuple[np.ndarray, float]:
    """The packed form of a matrix, and the unit of its scales."""
    num_rows, num_inputs = weight.shape
    packed = packed_format(weight.kind, num_inputs, weight.group_size)
    assert packed is not None
    order = packed_row_order(num_rows) if pairs else slice(None)
    rows = weight.rows(order)
    unit = scale_unit(weight)
    out = np.full(packed.packed_shape(num_rows, num_inputs, pairs), 0xFF, np.uint8)
    warps = len(out) * (out.shape[1] // packed.chunk_bytes)
    run(
        PACK_FILE, "pack_quantized", LaunchShape((-(-warps // 2),), 64),
        [rows.codes.view(np.uint8), rows.scales, rows.offsets, out, np.float32(1 / unit),
         np.int32(rows.shape[0]), np.int32(num_inputs), np.int32(weight.group_size)],
        (3,), SCALAR=CODES[dtype], **packed.macros,
    )  # fmt: skip
    return out, unit


def launch_op(
    run: Run,
    op: str,
    arguments: dict[str, Any],
    dtype: str,
    *,
    tuning: QuantizedTuning = SMALL,
    num_multiprocessors: int = NUM_MULTIPROCESSORS,
    max_shared_bytes: int = 227 << 10,
    packed: tuple[np.ndarray, float] | None = None,
    **macros: int,
) -> bool:
    """Run the kernel of `op`; `macros` go to the build. Returns whether it was the one for inputs
    that lie in shared memory whole."""
    weight = arguments["weight"]
    pairs = op == "norm_swiglu"
    target = arguments["residual" if op == "linear_add" else "out"]
    rows, num_outputs = target.shape
    num_inputs = weight.shape[1]
    form = packed_format(weight.kind, num_inputs, weight.group_size)
    plan = plan_quantized(
        form, num_outputs, num_inputs, rows, num_multiprocessors, pairs=pairs,
        norm=op != "linear_add", max_shared_bytes=max_shared_bytes, tuning=tuning,
    )  # fmt: skip
    codes, unit = packed or pack(run, weight, pairs, dtype)
    storage = arguments["norm_weight"].dtype if op != "linear_add" else arguments["x"].dtype
    x, chosen = arguments["x"], arguments.get("rows")
    residual = (target if op == "linear_add" else x).dtype
    if op != "linear_add" and not plan.folds_norm:
        x = x if chosen is None else x[chosen]
        reference = NumpyOps(np.float64)
        x = reference._rms_norm(x, arguments["norm_weight"], arguments["eps"]).astype(storage)
        chosen = None
    args = [x]
    if op == "lm_head":
        args.append(chosen)
    if op != "linear_add":
        args += [arguments["norm_weight"], np.float32(arguments["eps"])]
    args += [codes, np.float32(unit)]
    args += [] if op == "lm_head" else [arguments["bias"]]
    args += [target]
    written = len(args) - 1
    sizes = (rows, num_outputs, num_inputs, plan.tile_segments, plan.round_strips)
    args += map(np.int32, sizes)
    built = {"SCALAR": CODES[storage.name], **plan.macros, **macros}
    if residual != storage and (plan.folds_norm or op == "linear_add"):
        built["RESIDUAL"] = CODES[residual.name]
    run(FILE, ENTRIES[op], LaunchShape(plan.grid, plan.block, plan.shared_bytes), args, (written,),
        **built)  # fmt: skip
    return bool(plan.macros["WHOLE"])


def check_op(run: Run, op: str, call: Call, dtype: str, **how: Any) -> np.ndarray:
    """Launch and compare with the reference in float64; returns what the kernel gave."""
    (name,) = call.written
    before = call.arguments[name]
    got = {**call.arguments, name: before.copy()}
    exact = op in ("linear_add", "lm_head")  # the output's dtype rounds nothing inside
    wanted = {**call.arguments, name: before.astype(np.float64) if exact else before.copy()}
    launch_op(run, op, got, dtype, **how)
    getattr(NumpyOps(np.float64), op)(**wanted)
    limit = TOLERANCES[dtype] if op == "lm_head" else None
    assert_close(got[name], wanted[name], op, tolerance=limit)
    return got[name]
