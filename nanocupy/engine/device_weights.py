"""A checkpoint's tensors into their places on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanocupy.checkpoint.base import Checkpoint, dequantized
from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.config import ModelConfig
from nanocupy.cuda.device import Device
from nanocupy.model.weights import weight_layout
from nanocupy.ops.cuda_ops import CudaOps


def upload_weights(
    config: ModelConfig,
    checkpoint: Checkpoint,
    weights: Mapping[str, Any],
    device: Device,
    ops: CudaOps,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill `weights`, arrays of the device by the names of `weight_layout`; random ones are made
    there, which is quicker by far than on the host. progress: called with bytes done and in all.

    Raises CheckpointError, CudaError.
    """
    layout = list(weight_layout(config))
    total_bytes = sum(weights[weight.name].nbytes for weight in layout)
    with device.uploader(total_bytes, progress) as uploader:
        for weight in layout:
            row = 0
            for source in weight.sources:
                num_rows = checkpoint.tensors[source].shape[0]
                part = weights[weight.name][row : row + num_rows]
                row += num_rows
                deviation = None
                if isinstance(checkpoint, RandomCheckpoint):
                    deviation = checkpoint.deviation(source)
                if deviation is None:
                    uploader.upload(source, dequantized(checkpoint.read(source)), part)
                else:
                    ops.fill_normal(part, deviation, checkpoint.seed_of(source))
    device.synchronize("loading the weights")
