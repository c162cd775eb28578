"""Reads a checkpoint's tensors into the arrays the NumPy backend runs on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nanocupy.checkpoint.base import Checkpoint, dequantized
from nanocupy.errors import CapacityError
from nanocupy.model.weights import Weight, weight_layout
from nanocupy.quantized import QuantizedMatrix


def load_numpy_weights(
    checkpoint: Checkpoint,
    dtype: type[np.floating] = np.float32,
    progress: Callable[[int, int], None] | None = None,
    quantized: Callable[[Weight], QuantizedMatrix | None] | None = None,
) -> dict[str, np.ndarray]:
    """All weights in `dtype`, by the names of `weight_layout`. A tensor already stored so is not
    copied: it stays a view of the mapped file.

    quantized: gives a weight in codes, to be loaded as what they stand for; None for one that comes
    from the checkpoint as it is. It is called from several threads.
    progress is called with (done, total) bytes. Raises CheckpointError, CapacityError.
    """
    layout = list(weight_layout(checkpoint.config))

    def read(source: str) -> np.ndarray:
        return dequantized(checkpoint.read(source))

    def load(weight: Weight) -> np.ndarray:
        matrix = None if quantized is None else quantized(weight)
        if matrix is not None:
            return matrix.dequantize().astype(dtype, copy=False)
        if len(weight.sources) == 1:
            return read(weight.sources[0]).astype(dtype, copy=False)
        stacked = np.empty(weight.shape, dtype)
        row = 0
        for source in weight.sources:
            part = read(source)
            stacked[row : row + len(part)] = part
            row += len(part)
        return stacked

    itemsize = np.dtype(dtype).itemsize
    total_bytes = sum(math.prod(weight.shape) for weight in layout) * itemsize
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
