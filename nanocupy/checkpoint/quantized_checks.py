"""Whether codes, scales, offsets and orders of inputs that a file holds are numbers to run on.

Shared by the readers of all formats, and by the writer of ours. Knows no format.
"""

from __future__ import annotations

import numpy as np

from nanocupy.errors import CheckpointError
from nanocupy.quantized import LARGEST_CODES

_CHUNK = 1 << 22  # codes, or scales, looked at in one piece
_DAMAGED = "the file is damaged, fetch or make it again"


def scale_problem(
    kind: str, scales: np.ndarray, offsets: np.ndarray | None = None, *, zeros: bool = True
) -> str | None:
    """What is wrong with scales and offsets of any shape, or None.

    They must be finite, and so must be whatever a code can make of them: |scale| times the largest
    code there is, plus |offset|. zeros: whether a scale may be 0.
    """
    flat = scales.reshape(-1)
    flat_offsets = None if offsets is None else offsets.reshape(-1)
    per_row = scales.shape[1] if scales.ndim == 2 else 0

    def place(index: int) -> str:
        return f"row {index // per_row}, group {index % per_row}" if per_row else f"group {index}"

    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if not np.isfinite(part).all():
            return "holds NaN or infinite scales"
        if not zeros and not part.all():
            return f"holds a scale of 0 ({place(start + int(np.argmax(part == 0)))})"
        with np.errstate(over="ignore"):
            bound = np.abs(part) * np.float32(LARGEST_CODES[kind])
            if flat_offsets is not None:
                moved = flat_offsets[start : start + _CHUNK]
                if not np.isfinite(moved).all():
                    return "holds NaN or infinite offsets"
                bound += np.abs(moved)
        if not np.isfinite(bound).all():
            index = int(np.argmin(np.isfinite(bound)))
            return (
                f"holds a scale of {part[index]:g} ({place(start + index)}), with which values go "
                "beyond float32"
            )
    return None


def check_numbers(
    kind: str,
    codes: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray | None,
    input_order: np.ndarray | None,
    where: str,
    *,
    zero_scales: bool = False,
) -> None:
    """Raise CheckpointError unless scales are finite and (but for zero_scales) not 0, offsets and
    all values finite, float8 codes numbers, and `input_order` a permutation. The arrays are those
    of `QuantizedMatrix`; `where` names file and tensor."""
    problem = scale_problem(kind, scales, offsets, zeros=zero_scales)
    if problem is not None:
        raise CheckpointError(f"{where} {problem}; {_DAMAGED}")
    if kind == "fp8":
        flat = codes.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            # All ones behind the sign is e4m3's NaN; it has no infinity.
            if (flat[start : start + _CHUNK] & 0x7F == 0x7F).any():
                raise CheckpointError(f"{where} holds NaN values; {_DAMAGED}")
    if input_order is not None:
        num_inputs = len(input_order)
        if input_order.min() < 0 or input_order.max() >= num_inputs:
            raise CheckpointError(
                f"{where} has an order of inputs from {input_order.min()} to {input_order.max()}; "
                f"it has {num_inputs} inputs; {_DAMAGED}"
            )
        if np.bincount(input_order, minlength=num_inputs).max() > 1:
            raise CheckpointError(f"{where} has an order that names an input twice; {_DAMAGED}")
