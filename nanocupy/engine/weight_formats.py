"""Which of a model's matrices stay quantised on a device, and in what form.

Decided before anything is loaded, from what a checkpoint has and the setting `weight_format`. It
knows no arrays of a device.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from nanocupy.checkpoint.base import Checkpoint, dequantized
from nanocupy.errors import CheckpointError
from nanocupy.model.quantize import group_size_for, is_layer_matrix
from nanocupy.model.weights import Weight, weight_layout
from nanocupy.ops.launch_quantized import PackedFormat, packed_format
from nanocupy.quantized import KINDS, QuantizedMatrix, quantize, stacked

LM_HEAD = "lm_head.weight"
_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class StoredWeight:
    """A matrix [R, K] that stays quantised, its fused parts stacked.

    is_made       quantised at load, whatever the checkpoint has
    has_order     its columns have an order of their own
    is_unpacked   larger batches need room to unpack it: all but an LM head, of which few rows are
                  asked for, where the card can multiply codes
    """

    kind: str
    group_size: int
    is_made: bool = False
    has_order: bool = False
    is_unpacked: bool = True

    def packed(self, num_inputs: int) -> PackedFormat:
        form = packed_format(self.kind, num_inputs, self.group_size)
        assert form is not None
        return form

    def num_bytes(self, shape: tuple[int, int]) -> int:
        """Of codes, scales and offsets as QuantizedMatrix has them: what goes to the device."""
        num_rows, num_inputs = shape
        group_bytes = 8 if self.kind == "int4" else 4
        codes = num_inputs // 2 if self.kind == "int4" else num_inputs
        return num_rows * (codes + num_inputs // self.group_size * group_bytes)


def is_pairs(name: str) -> bool:
    """Whether a weight is [gate | up], whose rows are packed in turns."""
    return name.split(".")[-2] == "gate_up"


def plan_weight_formats(
    checkpoint: Checkpoint, weight_format: str, *, multiplies_codes: bool = True
) -> tuple[Mapping[str, StoredWeight], list[str]]:
    """(weights that stay quantised, by their names in `weight_layout`; notes for the user).

    weight_format: as the setting; multiplies_codes: whether the card's kernels can.
    """
    found: dict[str, StoredWeight] = {}
    given_up: dict[str, str] = {}
    if weight_format == "float":
        return found, []
    # Layers whose tensors have the same names of types and shapes are stored alike: one of them is
    # read, as unpacking a tensor may take long.
    alike: dict[Hashable, tuple[StoredWeight | None, str]] = {}
    for weight in weight_layout(checkpoint.config):
        if not is_layer_matrix(weight.name) and weight.name != LM_HEAD:
            continue
        infos = [checkpoint.tensors[source] for source in weight.sources]
        key = weight.name.split(".")[-2], *((info.dtype, info.shape) for info in infos)
        if key not in alike:
            alike[key] = _stored(checkpoint, weight, weight_format)
        stored, why = alike[key]
        if why:
            given_up[weight.name] = why
        if stored is not None:
            is_head = weight.name == LM_HEAD
            found[weight.name] = replace(stored, is_unpacked=not (is_head and multiplies_codes))
    if not given_up:
        return found, []
    name, why = next(iter(given_up.items()))
    others = f" and {len(given_up) - 1} more" if len(given_up) > 1 else ""
    return found, [f"{name}{others}: loaded in 16 bits, as {why}"]


def read_stored(checkpoint: Checkpoint, weight: Weight, stored: StoredWeight) -> QuantizedMatrix:
    """The matrix as `plan_weight_formats` said that it would be kept. Raises CheckpointError."""
    parts = []
    for source in weight.sources:
        part = None if stored.is_made else _read_quantized(checkpoint, source)
        if stored.is_made:
            floats = np.asarray(dequantized(checkpoint.read(source)), np.float32)
            part = quantize(floats, stored.kind, stored.group_size)
        if part is not None:
            parts.append(part)
    whole = None
    if len(parts) == len(weight.sources):
        whole = stacked(parts) if len(parts) > 1 else parts[0]
    if whole is not None and stored.has_order and whole.input_order is None:
        whole = replace(whole, input_order=np.arange(weight.shape[1], dtype=np.int32))
    if whole is None or (whole.kind, whole.group_size, whole.input_order is not None) != (
        stored.kind, stored.group_size, stored.has_order,
    ):  # fmt: skip
        raise CheckpointError(
            f"{checkpoint.path}: {weight.name} is not quantised as the same weight of other layers "
            "is; weight_format float loads such a model"
        )
    return whole


def _stored(
    checkpoint: Checkpoint, weight: Weight, weight_format: str
) -> tuple[StoredWeight | None, str]:
    """How a weight is kept, None in floats, and why not otherwise where one could expect that."""
    num_inputs = weight.shape[1]
    parts = [_read_quantized(checkpoint, source) for source in weight.sources]
    wanted = weight_format if weight_format in KINDS and weight.name != LM_HEAD else ""
    first = parts[0]
    if wanted and not all(part is not None and part.kind == wanted for part in parts):
        group_size = group_size_for(wanted, num_inputs)
        if group_size is None or packed_format(wanted, num_inputs, group_size) is None:
            return None, f"rows of {num_inputs} inputs do not divide into groups"
        return StoredWeight(wanted, group_size, is_made=True), ""
    if first is None or any(part is None for part in parts):
        is_mixed = any(part is not None for part in parts)
        return None, "its parts are not all quantised" if is_mixed else ""
    if len(parts) > 1 and stacked([part.rows(slice(0, 1)) for part in parts]) is None:
        return None, "its parts are quantised in different ways"
    if packed_format(first.kind, num_inputs, first.group_size) is None:
        return None, f"no kernel takes groups of {first.group_size} of {num_inputs} inputs"
    has_order = first.input_order is not None
    return StoredWeight(first.kind, first.group_size, has_order=has_order), ""


def _read_quantized(checkpoint: Checkpoint, name: str) -> QuantizedMatrix | None:
    """Tensors of floats are not asked for: that could read them."""
    if checkpoint.tensors[name].dtype in _FLOATS:
        return None
    return checkpoint.read_quantized(name)
