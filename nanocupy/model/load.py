"""Reads a checkpoint's tensors into the arrays the NumPy backend runs on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np

from nanocupy.checkpoint.base import FLOAT_DTYPES, Checkpoint, dequantized
from nanocupy.errors import CapacityError, beyond_float16
from nanocupy.model.weights import Weight, weight_layout
from nanocupy.quantized import QuantizedMatrix


def load_numpy_weights(
    checkpoint: Checkpoint,
    dtype: type[np.floating] = np.float32,
    progress: Callable[[int, int], None] | None = None,
    quantized: Callable[[Weight], QuantizedMatrix | None] | None = None,
    dtypes: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """All weights in `dtype`, by the names of `weight_layout`. A tensor already stored so is not
    copied: it stays a view of the mapped file.

    dtypes: of the weights, by name, that are to be kept in another storage type.
    quantized: gives a weight in codes, to be loaded as what they stand for; None for one that comes
    from the checkpoint as it is. It is called from several threads.
    progress is called with (done, total) bytes. Raises CheckpointError, CapacityError, and
    ConfigError where float16 is too narrow.
    """
    layout = list(weight_layout(checkpoint.config))

    def dtype_of(weight: Weight) -> np.dtype:
        return FLOAT_DTYPES[dtypes[weight.name]] if weight.name in dtypes else np.dtype(dtype)

    def read(source: str) -> np.ndarray:
        return dequantized(checkpoint.read(source))

    def load(weight: Weight) -> np.ndarray:
        matrix = None if quantized is None else quantized(weight)
        if matrix is not None:
            return stored_as(weight.name, matrix.dequantize(), dtype_of(weight))
        if len(weight.sources) == 1:
            return stored_as(weight.name, read(weight.sources[0]), dtype_of(weight))
        stacked = np.empty(weight.shape, dtype)
        row = 0
        for source in weight.sources:
            part = read(source)
            stacked[row : row + len(part)] = part
            row += len(part)
        return stacked

    total_bytes = sum(math.prod(weight.shape) * dtype_of(weight).itemsize for weight in layout)
    done_bytes = 0
    loaded: dict[str, np.ndarray] = {}
    # Conversions let go of the interpreter lock, and pages of the file arrive in parallel.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for weight, array in zip(layout, pool.map(load, layout), strict=True):
                loaded[weight.name] = array
                done_bytes += array.nbytes
                if progress is not None:
                    progress(done_bytes, total_bytes)
        except MemoryError:
            raise CapacityError(
                f"{checkpoint.path}: its weights need {total_bytes / 1e9:.1f} GB of memory in "
                f"{np.dtype(dtype).name}, which this machine could not give"
            ) from None
    return loaded


def stored_as(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` in a storage type; themselves where they are of it. Raises ConfigError with the
    weight's name where a value is beyond float16."""
    if dtype != np.float16 or values.dtype == dtype:
        return values.astype(dtype, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        raise beyond_float16(name)
    return stored
