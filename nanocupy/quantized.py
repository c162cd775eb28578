"""A matrix of weights in fewer bits: its codes, the scales of its groups, and what they mean.

What readers give and what backends run. Codes lie row by row here; a device lays them out anew. It
knows no file format and no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

KINDS = ("int8", "int4", "fp8")
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_MAX = 448.0  # the largest finite value
_FP8_VALUES = np.arange(256, dtype=np.uint8).view(_FP8).astype(np.float32)
LARGEST_CODES = {"int8": 128.0, "int4": 15.0, "fp8": _FP8_MAX}  # by kind, in magnitude
_CHUNK_VALUES = 1 << 20  # turned into floats in one piece


@dataclass(frozen=True)
class QuantizedForm:
    """How a matrix is quantised, without its codes: what a plan of memory and kernels needs.

    kind, group_size   as in `QuantizedMatrix`
    has_order          whether its inputs have an order of their own
    """

    kind: str
    group_size: int
    has_order: bool = False


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [R, K] as codes of few bits, in groups of consecutive inputs of a row.

    w[r, input_order[k]] = code[r, k] * scales[r, g] + offsets[r, g], with g = k // group_size

    kind         "int8": signed codes; "int4": codes 0 to 15; "fp8": float8 e4m3 values, finite
    codes        int8 [R, K]; uint8 [R, K / 2], the code of the even input in the low four bits;
                 uint8 [R, K], the bytes of the values
    scales       float32 [R, K / group_size], finite
    offsets      float32, as scales; of int4, and None of the others
    group_size   inputs of a group; divides K, and is K where there is one scale for a row
    input_order  int32 [K], a permutation: the input that column k meets (GPTQ's act-order); None
                 where that is k itself
    """

    kind: str
    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    group_size: int
    input_order: np.ndarray | None = None

    def __post_init__(self) -> None:
        num_rows, num_inputs = self.shape
        assert self.kind in KINDS
        assert self.codes.dtype == (np.int8 if self.kind == "int8" else np.uint8)
        assert num_inputs % self.group_size == 0
        assert self.scales.shape == (num_rows, num_inputs // self.group_size)
        assert (self.offsets is not None) == (self.kind == "int4")
        assert self.offsets is None or self.offsets.shape == self.scales.shape
        assert self.input_order is None or self.input_order.shape == (num_inputs,)

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, width = self.codes.shape
        return num_rows, width * 2 if self.kind == "int4" else width

    @property
    def form(self) -> QuantizedForm:
        return QuantizedForm(self.kind, self.group_size, self.input_order is not None)

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scales, self.offsets, self.input_order)
        return sum(part.nbytes for part in parts if part is not None)

    def code_values(self) -> np.ndarray:
        """The codes as float32 numbers, [R, K]."""
        if self.kind == "int4":
            pairs = np.stack((self.codes & 15, self.codes >> 4), axis=-1)
            return pairs.reshape(self.shape).astype(np.float32)
        if self.kind == "fp8":
            return _FP8_VALUES[self.codes]  # ten times as fast as ml_dtypes turns them
        return self.codes.astype(np.float32)

    def dequantize(self) -> np.ndarray:
        """The matrix in float32, [R, K], its inputs in their natural order. Beside it, a piece of
        it takes memory, never a second matrix."""
        matrix = np.empty(self.shape, np.float32)
        columns = slice(None) if self.input_order is None else self.input_order
        for rows in self.row_blocks():
            part = self.rows(rows)
            groups = part.code_values().reshape(*part.scales.shape, self.group_size)
            # Damaged scales may be infinite: readers report them, NumPy need not warn as well.
            with np.errstate(over="ignore", invalid="ignore"):
                groups *= part.scales[..., None]
                if part.offsets is not None:
                    groups += part.offsets[..., None]
            matrix[rows, columns] = groups.reshape(part.shape)
        return matrix

    def row_blocks(self) -> Iterator[slice]:
        """All its rows, in pieces of about a million values."""
        num_rows, num_inputs = self.shape
        step = max(1, _CHUNK_VALUES // max(num_inputs, 1))
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))

    def rows(self, index: slice | np.ndarray) -> QuantizedMatrix:
        """Some of its rows, or all in another order."""
        offsets = None if self.offsets is None else self.offsets[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], offsets=offsets)


def stacked(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix | None:
    """One matrix with the rows of all; None where they are not of one kind, group size and order of
    inputs."""
    first = parts[0]
    for part in parts[1:]:
        orders = part.input_order, first.input_order
        same_order = orders[0] is orders[1] or (
            all(order is not None for order in orders) and np.array_equal(*orders)
        )
        if (part.kind, part.group_size) != (first.kind, first.group_size) or not same_order:
            return None
    offsets = None
    if first.offsets is not None:
        offsets = np.concatenate([part.offsets for part in parts])
    return replace(
        first,
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        offsets=offsets,
    )


def without_zero_scales(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same values with no scale of 0: such groups, of one value each, get the scale 1 and codes
    of 0. Other formats write zeros there, as float16 scales vanish; NanoInfer 2 has none."""
    zero = matrix.scales == 0  # [R, groups]
    if not zero.any():
        return matrix
    codes = matrix.codes.copy()
    for rows in matrix.row_blocks():
        touched = np.flatnonzero(zero[rows].any(axis=1)) + rows.start
        keep = np.repeat(~zero[touched], matrix.group_size, axis=1)  # [touched, K]
        if matrix.kind == "int4":
            bits = keep[:, 0::2] * np.uint8(0x0F) | keep[:, 1::2] * np.uint8(0xF0)
            codes[touched] &= bits
        else:
            codes[touched] *= keep.astype(codes.dtype)
    scales = np.where(zero, np.float32(1), matrix.scales)
    return replace(matrix, codes=codes, scales=scales)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Codes 0 to 15, [R, K] with K even, two to a byte: uint8 [R, K / 2]."""
    codes = codes.astype(np.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


@np.errstate(over="ignore", invalid="ignore")
def quantize(matrix: np.ndarray, kind: str, group_size: int | None = None) -> QuantizedMatrix:
    """`matrix` [R, K], finite, rounded to the nearest codes, from the largest (and for int4 the
    smallest) value of each group; scales are infinite where float32 cannot hold that; int4's have,
    as offsets do, the bits of `to_half_bits`. group_size: None for one scale a row. Raises
    ValueError where it does not divide K, or K is odd for int4."""
    num_rows, num_inputs = matrix.shape
    group_size = group_size or num_inputs
    if num_inputs % group_size or (kind == "int4" and num_inputs % 2):
        raise ValueError(f"groups of {group_size} do not divide rows of {num_inputs} inputs")
    groups = np.asarray(matrix, np.float32).reshape(num_rows, -1, group_size)
    if kind == "int4":
        low = np.minimum(groups.min(axis=-1), 0.0)
        high = np.maximum(groups.max(axis=-1), 0.0)
        low = to_half_bits(low)
        scales = to_half_bits(_positive((high - low) / np.float32(15)))
        codes = np.clip(np.rint((groups - low[..., None]) / scales[..., None]), 0, 15)
        packed = pack_int4(codes.reshape(matrix.shape))
        return QuantizedMatrix(kind, packed, scales, low, group_size)
    largest = np.abs(groups).max(axis=-1)
    if kind == "int8":
        scales = _positive(largest / np.float32(127))
        codes = np.rint(groups / scales[..., None]).astype(np.int8).reshape(matrix.shape)
    else:
        scales = _positive(largest / np.float32(_FP8_MAX))
        values = np.clip(groups / scales[..., None], -_FP8_MAX, _FP8_MAX).astype(_FP8)
        codes = values.view(np.uint8).reshape(matrix.shape)
    return QuantizedMatrix(kind, codes, scales, None, group_size)


def to_half_bits(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the eleven significant bits of float16, whatever their exponents.

    A GPU keeps scales and offsets of int4 so. Where they are rounded before codes are chosen, it
    multiplies the very weights that the codes stand for; rounded after, all weights of a group are
    off by as much, which adds up where inputs have a mean.
    """
    mantissas, exponents = np.frexp(values)
    return np.ldexp(np.rint(mantissas * np.float32(2048)) / np.float32(2048), exponents)


def _positive(scales: np.ndarray) -> np.ndarray:
    """Scales with 1 in place of those too small to divide by: groups of zeros."""
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)
