"""Runs products of up to 64 tokens with packed codes by warpgroups."""

from __future__ import annotations

from nanocupy.ops.launch_quantized_wide import FILE, WideCodesTuning, plan_wide_codes
from tests.kernels.quantized_batch_runs import BatchKernels
from tests.kernels.quantized_runs import Storage, make_call, pack

ENTRIES = {
    "norm_linear": "quantized_wide_linear",
    "linear_add": "quantized_wide_linear_add",
    "norm_swiglu": "quantized_wide_swiglu",
    "lm_head": "quantized_wide_logits",
}
# Tiles of few rows, so that there are several, and rings that go round.
SMALL = WideCodesTuning(out_tile=64, splits=1, warpgroups=1, stages=2, input_stages=4)
KERNELS = BatchKernels(FILE, ENTRIES, plan_wide_codes, SMALL, maps_inputs=True)
launch_op, check_op = KERNELS.launch_op, KERNELS.check_op

__all__ = ["ENTRIES", "SMALL", "Storage", "check_op", "launch_op", "make_call", "pack"]
