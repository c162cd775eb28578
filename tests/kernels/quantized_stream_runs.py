"""Runs products of 9 to 32 tokens with packed codes."""

from __future__ import annotations

from nanocupy.ops.launch_quantized_stream import FILE, StreamTuning, plan_stream
from tests.kernels.quantized_batch_runs import BatchKernels
from tests.kernels.quantized_runs import Storage, make_call, pack

ENTRIES = {
    "norm_linear": "quantized_stream_linear",
    "linear_add": "quantized_stream_linear_add",
    "norm_swiglu": "quantized_stream_swiglu",
    "lm_head": "quantized_stream_logits",
}
# Tiles of few rows, so that there are several, and a ring that goes round.
SMALL = StreamTuning(out_tile=96, splits=1, warps_k=1, strips=2, warp_strips=2, stages=2)
KERNELS = BatchKernels(FILE, ENTRIES, plan_stream, SMALL)
launch_op, check_op = KERNELS.launch_op, KERNELS.check_op

__all__ = ["ENTRIES", "SMALL", "Storage", "check_op", "launch_op", "make_call", "pack"]
