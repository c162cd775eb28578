"""Whether codes, scales, offsets and orders of inputs that a file holds are numbers to run on.

Shared by the readers of formats that no quantiser writes a zero scale into. Knows no format.
"""

from __future__ import annotations

import numpy as np

from nanocupy.errors import CheckpointError

_CHUNK = 1 << 22  # codes looked at in one piece
_DAMAGED = "the file is damaged, fetch or make it again"


def check_numbers(
    kind: str,
    codes: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray | None,
    input_order: np.ndarray | None,
    where: str,
) -> None:
    """Raise CheckpointError unless scales are finite and not 0, offsets finite, float8 codes
    numbers, and `input_order` a permutation. The arrays are those of `QuantizedMatrix`; `where`
    names file and tensor."""
    if not np.isfinite(scales).all():
        raise CheckpointError(f"{where} holds NaN or infinite scales; {_DAMAGED}")
    if not scales.all():
        row, group = np.argwhere(scales == 0)[0]
        raise CheckpointError(f"{where} holds a scale of 0 (row {row}, group {group}); {_DAMAGED}")
    if offsets is not None and not np.isfinite(offsets).all():
        raise CheckpointError(f"{where} holds NaN or infinite offsets; {_DAMAGED}")
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
