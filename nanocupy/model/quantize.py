"""Quantising a model at load: which of its matrices, and in what groups.

The setting `weight_format` names the kind; embedding, norms, biases and the LM head stay as they
are.
"""

from __future__ import annotations

from nanocupy.model.weights import FUSED

_PARTS = frozenset((*FUSED, *(part for parts in FUSED.values() for part in parts), "o", "down"))
_LARGEST_GROUP, _LEAST_GROUP = 128, 16


def is_layer_matrix(name: str) -> bool:
    """Whether a tensor of a checkpoint, or a weight of `weight_layout`, is a matrix of a layer."""
    parts = name.split(".")
    return parts[0] == "layers" and parts[-1] == "weight" and parts[-2] in _PARTS


def group_size_for(kind: str, num_inputs: int) -> int | None:
    """Inputs that share a scale: a row of fp8, else 128, or the largest power of two below that
    divides the row; None where that is too small."""
    if kind == "fp8":
        return num_inputs
    size = min(_LARGEST_GROUP, num_inputs & -num_inputs)
    return size if size >= _LEAST_GROUP else None
