"""Quantised matrices on a device: what an op is given for `weight`, and how rows and scales go in.

The packed bytes are laid out as kernels_cu/quantized_format.cuh says. It knows no device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from nanocupy.ops.launch_quantized import PackedFormat
from nanocupy.quantized import QuantizedMatrix

# float16 of scales and offsets: the largest of a matrix is stored as 2 ** 13 to 2 ** 14, so that
# those 2 ** 27 times smaller still have eleven bits.
_LARGEST_EXPONENT = 14


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [R, K] of codes on a device.

    packed       uint8 [strips, bytes of a strip]
    unit         of its scales and offsets, a power of two: one for all kinds but int4, which keeps
                 both in float16 (rounded to 11 bits)
    pairs        rows of gate and of up in turns, 8 each, of [gate | up]
    input_order  int32 [K] on the device, as QuantizedMatrix.input_order; or None
    """

    packed: Any
    unit: float
    format: PackedFormat
    shape: tuple[int, int]
    pairs: bool = False
    input_order: Any = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.packed.shape)

    def __len__(self) -> int:
        return self.shape[0]


def scale_unit(*parts: QuantizedMatrix) -> float:
    """The unit of a matrix that has the rows of all `parts`."""
    if parts[0].kind != "int4":
        return 1.0
    largest = max(
        (float(np.abs(a).max(initial=0)) for m in parts for a in (m.scales, m.offsets)), default=0.0
    )
    return unit_of_largest(largest)


def unit_of_largest(largest: float) -> float:
    """The unit where no scale or offset of int4 is above `largest`."""
    return 2.0 ** (math.frexp(largest)[1] - _LARGEST_EXPONENT) if largest > 0 else 1.0


def packed_row_order(num_rows: int) -> np.ndarray:
    """Rows of [gate | up], int64 [strips * 16], in the order of strips; where a half is no multiple
    of 8, its last row fills up."""
    half = num_rows // 2
    outputs = np.minimum(np.arange(-(-half // 8) * 8), half - 1).reshape(-1, 1, 8)
    return np.concatenate([outputs, half + outputs], axis=1).reshape(-1)


def random_scales(kind: str, deviation: float) -> tuple[float, float]:
    """(scale, offset) under which codes that are each as likely have mean 0, or nearly, and this
    standard deviation; of fp8, codes of values below 2, as `fill_quantized` makes them."""
    if kind == "int4":
        scale = deviation / math.sqrt((16**2 - 1) / 12)
        return scale, -7.5 * scale
    if kind == "int8":
        return deviation / math.sqrt((256**2 - 1) / 12), 0.0
    values = np.arange(64, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return deviation / float(np.sqrt(np.mean(values**2))), 0.0
