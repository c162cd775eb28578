"""A checkpoint's tensors into their places on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from nanocupy.checkpoint.base import Checkpoint, dequantized
from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.config import ModelConfig
from nanocupy.cuda.device import Device
from nanocupy.engine.device_plan import DeviceSettings, order_name
from nanocupy.engine.weight_formats import StoredWeight, is_pairs, read_stored
from nanocupy.model.weights import Weight, weight_layout
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.launch_quantized import STRIP
from nanocupy.ops.packed_matrix import (
    PackedMatrix,
    packed_row_order,
    random_scales,
    scale_unit,
    unit_of_largest,
)
from nanocupy.quantized import QuantizedMatrix

NONE_STORED: Mapping[str, StoredWeight] = MappingProxyType({})
_ALIGNMENT = 256  # bytes


def placed_weight(weight: Weight, settings: DeviceSettings, view: Callable[..., Any]) -> Any:
    """What ops are given for a weight: its array, or a PackedMatrix. view: (buffer, shape) -> the
    buffer's memory, of a plan."""
    name, stored = f"weight.{weight.name}", settings.quantized.get(weight.name)
    if stored is None:
        return view(name, weight.shape)
    num_rows, num_inputs = weight.shape
    form, pairs = stored.packed(num_inputs), is_pairs(weight.name)
    return PackedMatrix(
        view(name, form.packed_shape(num_rows, num_inputs, pairs)), 1.0, form,
        (num_rows, num_inputs), pairs,
        view(order_name(name), (num_inputs,)) if stored.has_order else None,
    )  # fmt: skip


def upload_weights(
    config: ModelConfig,
    checkpoint: Checkpoint,
    weights: MutableMapping[str, Any],
    device: Device,
    ops: CudaOps,
    progress: Callable[[int, int], None] | None = None,
    *,
    stored: Mapping[str, StoredWeight] = NONE_STORED,
    staging: Any = None,
) -> None:
    """Fill `weights`, by the names of `weight_layout`, as `placed_weight` gives them; random ones
    are made there, which is quicker by far than on the host. progress: called with bytes done and
    in all.

    stored: the weights that are quantised, whose entries change with what is loaded; staging:
    uint8 of the device, through which they come, undefined after.
    Raises CheckpointError, CudaError.
    """
    layout = list(weight_layout(config))
    total_bytes = sum(
        stored[w.name].num_bytes(w.shape, is_pairs(w.name))
        if w.name in stored
        else weights[w.name].nbytes
        for w in layout
    )
    is_random = isinstance(checkpoint, RandomCheckpoint)
    with device.uploader(total_bytes, progress) as uploader:
        for weight in layout:
            if weight.name in stored:
                place = weights[weight.name]
                if is_random:
                    weights[weight.name] = _fill(weight, place, checkpoint, ops)
                    continue
                matrix = read_stored(checkpoint, weight, stored[weight.name])
                weights[weight.name] = _send(
                    weight.name, matrix, place, uploader, device, ops, staging
                )
                continue
            row = 0
            for source in weight.sources:
                num_rows = checkpoint.tensors[source].shape[0]
                part = weights[weight.name][row : row + num_rows]
                row += num_rows
                deviation = checkpoint.deviation(source) if is_random else None
                if deviation is None:
                    uploader.upload(source, dequantized(checkpoint.read(source)), part)
                else:
                    ops.fill_normal(part, deviation, checkpoint.seed_of(source))
    device.synchronize("loading the weights")


def _fill(
    weight: Weight, place: PackedMatrix, checkpoint: RandomCheckpoint, ops: CudaOps
) -> PackedMatrix:
    """Random codes of the standard deviation that the checkpoint's values have."""
    deviation = checkpoint.deviation(weight.sources[0])
    assert deviation is not None
    scale, offset = random_scales(place.format.kind, deviation)
    if place.format.kind == "int4":
        place = replace(place, unit=unit_of_largest(max(abs(scale), abs(offset))))
    if place.input_order is not None:
        raise AssertionError("random weights have no order of inputs")
    ops.fill_quantized(place, scale, offset, checkpoint.seed_of(weight.sources[0]))
    return place


def _send(
    name: str,
    matrix: QuantizedMatrix,
    place: PackedMatrix,
    uploader: Any,
    device: Device,
    ops: CudaOps,
    staging: Any,
) -> PackedMatrix:
    """Codes, scales and offsets to the device, some strips at a time, and packed there."""
    place = replace(place, unit=scale_unit(matrix))
    order = packed_row_order(matrix.shape[0]) if place.pairs else None
    num_rows = matrix.shape[0] if order is None else len(order)
    row_bytes = matrix.codes[:1].nbytes + matrix.scales[:1].nbytes * (
        1 if matrix.offsets is None else 2
    )
    most = (staging.nbytes - 3 * _ALIGNMENT) // row_bytes // STRIP * STRIP
    assert most > 0, "the staging memory holds no strip"
    for first in range(0, num_rows, most):
        chosen = slice(first, min(first + most, num_rows))
        part = matrix.rows(chosen if order is None else order[chosen])
        used, sent = 0, []
        for array in (part.codes.view(np.uint8), part.scales, part.offsets):
            if array is None:
                sent.append(None)
                continue
            target = staging[used : used + array.nbytes].view(array.dtype).reshape(array.shape)
            uploader.upload(name, array, target)
            used += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
            sent.append(target)
        uploader.finish()  # the copies are on a stream of their own
        strips = place.packed[first // STRIP : -(-chosen.stop // STRIP)]
        ops.pack_quantized(*sent, matrix.group_size, place.format, place.unit, strips)
        device.synchronize("packing quantised weights")  # before the staging memory is used again
    if matrix.input_order is not None:
        uploader.upload(name, matrix.input_order.astype(np.int32, copy=False), place.input_order)
    return place
