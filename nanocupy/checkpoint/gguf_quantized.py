"""GGUF's blocks as matrices of codes, with no bit of them changed.

Owns where codes, scales and minima lie within a block. Scales in two levels (Q4_K, Q6_K) become one
float32 a group: their product, which is exact. Q5_1 and Q5_K have minima and more than four bits,
which `QuantizedMatrix` does not express: those come as floats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from nanocupy.quantized import QuantizedForm, QuantizedMatrix

# codes [R, blocks, elements or pairs], scales and offsets [R, blocks, groups of a block]
Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def quantized_matrix(blocks: np.ndarray, type_name: str) -> QuantizedMatrix:
    """Encoded rows, uint8 [R, blocks, block_bytes], as the matrix [R, K]; type_name: a key of
    `TYPES`."""
    form, unpack = TYPES[type_name]
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales, which a reader reports
        codes, scales, offsets = unpack(blocks)
    num_rows = len(blocks)
    return QuantizedMatrix(
        form.kind,
        codes.reshape(num_rows, -1),
        scales.reshape(num_rows, -1),
        None if offsets is None else offsets.reshape(num_rows, -1),
        form.group_size,
    )


def _float16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, float32 [R, blocks, 1]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2").astype(np.float32)


def _pairs(halves: np.ndarray) -> np.ndarray:
    """Bytes uint8 [..., n] whose low four bits are n codes in order and whose high ones are the
    next n -> the 2 n codes, two neighbours to a byte, uint8 [..., n]."""
    even, odd = halves[..., 0::2], halves[..., 1::2]
    return np.concatenate([even & 15 | odd << 4, even >> 4 | odd & 0xF0], axis=-1)


def _q4_0(blocks: np.ndarray) -> Parts:
    """Scale, 16 bytes of codes; w = d * (code - 8)."""
    scales = _float16(blocks, 0)
    return _pairs(blocks[..., 2:]), scales, scales * -8


def _q4_1(blocks: np.ndarray) -> Parts:
    """Scale, minimum, 16 bytes of codes; w = d * code + m."""
    return _pairs(blocks[..., 4:]), _float16(blocks, 0), _float16(blocks, 2)


def _q8_0(blocks: np.ndarray) -> Parts:
    """Scale, 32 signed codes; w = d * code."""
    return np.ascontiguousarray(blocks[..., 2:]).view(np.int8), _float16(blocks, 0), None


def _q5_0(blocks: np.ndarray) -> Parts:
    """Scale, 32 fifth bits, 16 bytes of four bits; w = d * (code - 16)."""
    high = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    low = np.concatenate([blocks[..., 6:] & 15, blocks[..., 6:] >> 4], axis=-1)
    return (low | high << 4).view(np.int8) - np.int8(16), _float16(blocks, 0), None


def _q4_k(blocks: np.ndarray) -> Parts:
    """Scale, scale of minima, 12 bytes of 8 scales and 8 minima of six bits, 4 times 32 bytes of
    codes, low four bits first; w = d * scale * code - d_min * minimum."""
    packed = blocks[..., 4:16]
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    # The last four of each have their low four bits in the third part, their high two in the top
    # of the first four.
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    halves = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)
    codes = _pairs(halves)
    return codes, _float16(blocks, 0) * scales, -(_float16(blocks, 2) * minima)


def _q6_k(blocks: np.ndarray) -> Parts:
    """Twice 64 bytes of low four bits, twice 32 of high two bits, 16 signed scales, scale; w = d *
    scale * (code - 32). Of 128 elements, 32 at a time have the low bits of the first and of the
    second 32 bytes, then the high bits of both."""
    shape = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*shape, 2, 64)
    low = np.concatenate([low & 15, low >> 4], axis=-1)  # [..., 2, 128]
    high = blocks[..., 128:192].reshape(*shape, 2, 32)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    codes = (low | high << 4).view(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return codes, _float16(blocks, 208) * scales, None


# GGUF's type -> (what it becomes, what takes a block apart)
TYPES: Mapping[str, tuple[QuantizedForm, Callable[[np.ndarray], Parts]]] = {
    "q4_0": (QuantizedForm("int4", 32), _q4_0),
    "q4_1": (QuantizedForm("int4", 32), _q4_1),
    "q5_0": (QuantizedForm("int8", 32), _q5_0),
    "q8_0": (QuantizedForm("int8", 32), _q8_0),
    "q4_k": (QuantizedForm("int4", 32), _q4_k),
    "q6_k": (QuantizedForm("int8", 16), _q6_k),
}
