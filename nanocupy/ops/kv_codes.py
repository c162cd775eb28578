"""Rows of keys or values as codes and scales: what the NumPy ops do, and what kernels must.

Codes are int8, or uint8 arrays that hold the bits of float8 e4m3 values, as CuPy knows no such
dtype: the dtype of an array of codes says which.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from nanocupy.kv_types import CODE_LIMITS, FP8

SCALE = np.dtype(ml_dtypes.bfloat16)
CODE_DTYPES = {"int8": np.int8, FP8: np.uint8}  # of the arrays of codes, by the cache's dtype
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)  # by their bits
_LIMITS = {"int8": np.float32(CODE_LIMITS["int8"]), "uint8": np.float32(CODE_LIMITS[FP8])}
_LEAST_SCALE = np.float32(2.0**-126)  # smaller numbers are subnormal, which a GPU takes for 0


def quantize_rows(rows: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Codes of `dtype` [..., d] and scales bfloat16 [...] of `rows` [..., d], float32 or float64.

    scale = max|x| / (127 or 448), rounded; code = x / scale with that, rounded to the nearest, ties
    to even, and at most the limit. A row of zeros, or whose scale would be subnormal, has scale and
    codes 0. One that is not finite has the scale NaN: what meets it is NaN as without codes.
    """
    limit = _LIMITS[dtype.name]
    steps = abs(rows).max(axis=-1, initial=0) / limit
    scales = np.where(np.isfinite(steps), np.where(steps < _LEAST_SCALE, 0, steps), np.nan)
    scales = scales.astype(SCALE)
    steps = scales.astype(rows.dtype)[..., None]
    usable = steps > 0
    scaled = np.divide(rows, steps, out=np.zeros_like(rows), where=usable)
    scaled = np.clip(scaled, -limit, limit)
    if dtype == np.int8:
        return np.rint(scaled).astype(np.int8), scales
    return scaled.astype(_E4M3).view(np.uint8), scales


def dequantize_rows(codes: np.ndarray, scales: np.ndarray, compute: np.dtype) -> np.ndarray:
    """code * scale in `compute`: codes [..., d], scales [...]."""
    if codes.dtype == np.int8:
        values = codes.astype(compute)
    else:
        # NumPy takes by indices of its own type five times as fast as by bytes.
        values = _E4M3_VALUES.astype(compute, copy=False).take(codes.astype(np.intp))
    values *= scales.astype(compute)[..., None]
    return values
