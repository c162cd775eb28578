"""Which of a model's matrices stay quantised on a device, and in what form.

Decided before anything is loaded, from what a checkpoint has and the setting `weight_format`. It
knows no arrays of a device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanocupy.checkpoint.base import Checkpoint, dequantized
from nanocupy.config import LM_HEAD
from nanocupy.errors import CheckpointError
from nanocupy.model.quantize import group_size_for, is_layer_matrix
from nanocupy.model.weights import Weight, weight_layout
from nanocupy.ops.launch_quantized import PackedFormat, packed_format
from nanocupy.quantized import KINDS, QuantizedMatrix, quantize, stacked

_FLOATS = ("float32", "float16", "bfloat16")
_EACH_KIND = "int8, int4 or fp8"
_NO_CODES = "codes are multiplied in 16 bits alone, on compute capability 8.0 and above"


@dataclass(frozen=True)
class StoredWeight:
    """A matrix [R, K] that stays quantised, its fused parts stacked.

    is_made       quantised at load, but for parts that the checkpoint has just so
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

    def num_bytes(self, shape: tuple[int, int], pairs: bool) -> int:
        """Of codes, scales and offsets as QuantizedMatrix has them, and the order: what goes to the
        device. pairs: of [gate | up], whose halves are filled up to 8 rows."""
        num_rows, num_inputs = shape
        if pairs:
            num_rows = 2 * -(-(num_rows // 2) // 8) * 8
        group_bytes = 8 if self.kind == "int4" else 4
        codes = num_inputs // 2 if self.kind == "int4" else num_inputs
        order_bytes = 4 * num_inputs if self.has_order else 0
        return num_rows * (codes + num_inputs // self.group_size * group_bytes) + order_bytes


def is_pairs(name: str) -> bool:
    """Whether a weight is [gate | up], whose rows are packed in turns."""
    return name.split(".")[-2] == "gate_up"


def plan_weight_formats(
    checkpoint: Checkpoint, weight_format: str, *, multiplies_codes: bool = True
) -> tuple[Mapping[str, StoredWeight], list[str]]:
    """(weights that stay quantised, by their names in `weight_layout`; notes for the user).

    weight_format: as the setting; multiplies_codes: whether the card's kernels can. Where they
    cannot, every product would unpack its matrix first, so codes stay only where they were asked
    for, to save memory.
    """
    found: dict[str, StoredWeight] = {}
    if weight_format == "float":
        return found, []
    layout = [
        weight
        for weight in weight_layout(checkpoint.config)
        if is_layer_matrix(weight.name) or weight.name == LM_HEAD
    ]
    notes = []
    if not multiplies_codes:
        if weight_format == "auto":
            is_coded = any(not _is_float(checkpoint, name) for w in layout for name in w.sources)
            note = f"dequantised at load, as {_NO_CODES}; weight_format {_EACH_KIND} keeps codes"
            return found, [note] if is_coded else []
        notes.append(f"weight_format {weight_format}: every product unpacks codes, as {_NO_CODES}")
    # Layers whose tensors have the same names of types and shapes are stored alike: one of them is
    # read, as unpacking a tensor may take long.
    alike: dict[Hashable, tuple[StoredWeight | None, str]] = {}
    noted: dict[str, list[str]] = {}
    for weight in layout:
        infos = [checkpoint.tensors[source] for source in weight.sources]
        key = weight.name.split(".")[-2], *((info.dtype, info.shape) for info in infos)
        if key not in alike:
            alike[key] = _stored(checkpoint, weight, weight_format)
        stored, note = alike[key]
        if note:
            noted.setdefault(note, []).append(weight.name)
        if stored is not None:
            is_head = weight.name == LM_HEAD
            found[weight.name] = replace(stored, is_unpacked=not (is_head and multiplies_codes))
    for note, names in noted.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notes.append(f"{names[0]}{others}: {note}")
    return found, notes


def read_stored(checkpoint: Checkpoint, weight: Weight, stored: StoredWeight) -> QuantizedMatrix:
    """The matrix as `plan_weight_formats` said that it would be kept. Raises CheckpointError."""
    parts = [_read_part(checkpoint, source, stored) for source in weight.sources]
    known = [part for part in parts if part is not None]
    whole = None
    if len(known) == len(parts):
        whole = stacked(known) if len(known) > 1 else known[0]
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


def quantized_reader(
    checkpoint: Checkpoint, weight_format: str
) -> tuple[Callable[[Weight], QuantizedMatrix | None] | None, list[str]]:
    """(what `load_numpy_weights` takes; notes): where `weight_format` names a kind, the codes that
    a card would multiply, so that quality can be told without one. Other formats ask for none."""
    if weight_format not in KINDS:
        return None, []
    formats, notes = plan_weight_formats(checkpoint, weight_format)

    def read(weight: Weight) -> QuantizedMatrix | None:
        stored = formats.get(weight.name)
        return None if stored is None else read_stored(checkpoint, weight, stored)

    return read, notes


def _read_part(checkpoint: Checkpoint, name: str, stored: StoredWeight) -> QuantizedMatrix | None:
    """A tensor as it is stored, or rounded to what it shall be: never again where it is that."""
    part = _read_quantized(checkpoint, name)
    if not stored.is_made:
        return part
    if part is not None and (part.kind, part.group_size, part.input_order is not None) == (
        stored.kind, stored.group_size, stored.has_order,
    ):  # fmt: skip
        return part
    floats = np.asarray(dequantized(checkpoint.read(name)), np.float32)
    return quantize(floats, stored.kind, stored.group_size)


def _stored(
    checkpoint: Checkpoint, weight: Weight, weight_format: str
) -> tuple[StoredWeight | None, str]:
    """How a weight is kept, None in floats, and a note where one could expect it otherwise."""
    num_inputs = weight.shape[1]
    parts = [_read_quantized(checkpoint, source) for source in weight.sources]
    kept, why = _as_stored(weight, parts)
    wanted = weight_format if weight_format in KINDS and weight.name != LM_HEAD else ""
    if not wanted or (kept is not None and kept.kind == wanted):
        return kept, why and f"loaded in floating point, as {why}"
    group_size = group_size_for(wanted, num_inputs)
    if group_size is None or packed_format(wanted, num_inputs, group_size) is None:
        why = f"rows of {num_inputs} inputs do not divide into groups"
        return None, f"loaded in floating point, as {why}"
    # The same number of bits was asked for, so nobody expects that they lose anything.
    is_again = all(part is not None and part.kind == wanted for part in parts)
    note = f"rounded to {wanted} once more, as {why}" if is_again else ""
    return StoredWeight(wanted, group_size, is_made=True), note


def _as_stored(
    weight: Weight, parts: Sequence[QuantizedMatrix | None]
) -> tuple[StoredWeight | None, str]:
    """How a weight of these parts is kept with no rounding, and why not where some have codes."""
    num_inputs = weight.shape[1]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None, "its parts are not all quantised" if known else ""
    first = known[0]
    if len(known) > 1 and stacked([part.rows(slice(0, 1)) for part in known]) is None:
        return None, "its parts are quantised in different ways"
    if packed_format(first.kind, num_inputs, first.group_size) is None:
        return None, f"no kernel takes groups of {first.group_size} of {num_inputs} inputs"
    has_order = first.input_order is not None
    return StoredWeight(first.kind, first.group_size, has_order=has_order), ""


def _is_float(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.tensors[name].dtype in _FLOATS


def _read_quantized(checkpoint: Checkpoint, name: str) -> QuantizedMatrix | None:
    """Tensors of floats are not asked for: that could read them."""
    return None if _is_float(checkpoint, name) else checkpoint.read_quantized(name)
