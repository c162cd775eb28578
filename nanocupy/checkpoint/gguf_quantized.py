"""GGUF's Q4_0, Q4_1 and Q8_0 blocks as matrices of codes, with no bit of them changed.

Owns where codes and scales lie within a block of 32 elements. What else GGUF quantises has scales
in several levels, which `QuantizedMatrix` does not express: those come as floats.
"""

from __future__ import annotations

import numpy as np

from nanocupy.quantized import QuantizedMatrix

GROUP_SIZE = 32
KINDS = {"q4_0": "int4", "q4_1": "int4", "q8_0": "int8"}  # those that keep their bits


def quantized_matrix(blocks: np.ndarray, type_name: str) -> QuantizedMatrix:
    """Encoded rows, uint8 [R, row_bytes], as the matrix [R, K]; type_name: a key of `KINDS`.

    q4_0 is 2 bytes of float16 scale d and 16 bytes of codes, w = d * (code - 8); q4_1 has a float16
    minimum m behind the scale, w = d * code + m; q8_0 is the scale and 32 signed bytes, w = d *
    code. The low four bits of a block's 16 bytes are its elements 0 to 15, the high ones 16 to 31.
    """
    num_rows = len(blocks)
    header_bytes = 4 if type_name == "q4_1" else 2
    codes_bytes = GROUP_SIZE if type_name == "q8_0" else GROUP_SIZE // 2
    # [R, groups, block_bytes]
    blocks = blocks.reshape(num_rows, -1, header_bytes + codes_bytes)
    header = np.ascontiguousarray(blocks[..., :header_bytes]).view("<f2").astype(np.float32)
    scales = np.ascontiguousarray(header[..., 0])
    codes = blocks[..., header_bytes:]
    if type_name == "q8_0":
        values = np.ascontiguousarray(codes).view(np.int8).reshape(num_rows, -1)
        return QuantizedMatrix("int8", values, scales, None, GROUP_SIZE)
    even, odd = codes[..., 0::2], codes[..., 1::2]  # [R, groups, 8]
    packed = np.empty(codes.shape, np.uint8)
    packed[..., :8] = even & 15 | odd << 4
    packed[..., 8:] = even >> 4 | odd & 0xF0
    offsets = np.ascontiguousarray(header[..., 1]) if type_name == "q4_1" else scales * -8
    return QuantizedMatrix("int4", packed.reshape(num_rows, -1), scales, offsets, GROUP_SIZE)
