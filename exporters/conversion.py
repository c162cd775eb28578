"""Converting one tensor at a time: storage types, float16's limits, int8 groups.

Owns the arithmetic of a change of type. Knows neither files nor formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from nanocupy.checkpoint.base import Checkpoint, GroupedInt8
from nanocupy.errors import CheckpointError
from nanocupy.quantized import quantize

# bytes written, bytes the file will have about
Progress = Callable[[int, int], None]

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Values converted in one piece: small enough that a cast costs no second copy of a tensor.
CHUNK_VALUES = 1 << 20
_DAMAGED = "; the source is damaged, fetch it again"


def check_dtype(dtype: str | None) -> None:
    """Raise CheckpointError unless `dtype` is None or a type that matrices can be stored in."""
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")


def read_checked(checkpoint: Checkpoint, name: str) -> np.ndarray | GroupedInt8:
    """The tensor; CheckpointError unless its shape is what the config says."""
    tensor = checkpoint.read(name)
    expected = checkpoint.tensors[name].shape
    if tuple(tensor.shape) != tuple(expected):
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} came as {list(tensor.shape)}, not {list(expected)}"
        )
    return tensor


def converted(
    array: np.ndarray, dtype: str, what: str, asked: bool = False
) -> Iterator[np.ndarray]:
    """`array` in row-major order as `dtype`, in flat pieces. `what` is its name in errors; asked:
    whether the user chose the type, and so can be told to choose another.

    Raises CheckpointError for NaN or infinite values, and for what the type cannot hold.
    """
    flat = array.reshape(-1)
    for start in range(0, flat.size, CHUNK_VALUES):
        piece = flat[start : start + CHUNK_VALUES]
        with np.errstate(over="ignore"):
            result = piece.astype(DTYPES[dtype])
        if not np.isfinite(result).all():
            wide = piece.astype(np.float32)
            if not np.isfinite(wide).all():
                raise CheckpointError(f"{what} holds NaN or infinite values{_DAMAGED}")
            other = "bfloat16 or float32" if dtype == "float16" else "float32"
            raise CheckpointError(
                f"{what} holds {np.abs(wide).max():g}, beyond what {dtype} can hold "
                f"({ml_dtypes.finfo(DTYPES[dtype]).max:g})"
                + (f"; use --dtype {other}" if asked else "")
            )
        yield result


def quantised(matrix: np.ndarray, group_size: int, what: str) -> GroupedInt8:
    """float [rows, cols] -> int8 with a float32 scale for each `group_size` consecutive values, as
    `quantize` rounds them.

    The scale of a group of zeros, or of denormals, is 0: what the legacy formats' own writers give.
    Raises CheckpointError for NaN or infinite values.
    """
    values = np.empty(matrix.size, np.int8)
    scales = np.empty(matrix.size // group_size, np.float32)
    flat = matrix.reshape(-1)
    step = max(CHUNK_VALUES // group_size, 1) * group_size
    for start in range(0, flat.size, step):
        groups = finite_floats(flat[start : start + step], what).reshape(-1, group_size)
        chunk = quantize(groups, "int8")
        values[start : start + step] = chunk.codes.reshape(-1)
        scale = np.where(chunk.codes.any(axis=1), chunk.scales[:, 0], np.float32(0))
        scales[start // group_size : start // group_size + len(scale)] = scale
    return GroupedInt8(values.reshape(matrix.shape), scales, group_size)


def finite_floats(values: np.ndarray, what: str) -> np.ndarray:
    """`values` in float32; CheckpointError where they are no numbers. `what` names them."""
    values = values.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{what} holds NaN or infinite values{_DAMAGED}")
    return values
