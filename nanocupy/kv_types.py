"""The types in which keys and values are kept, and what they take. Pure arithmetic.

A quantised cache has one code a value and one scale a row, that is for each token and key/value
head, of keys and of values apart: what a code means is code * scale.
"""

from __future__ import annotations

FP8 = "float8_e4m3fn"
# What the setting `kv_cache_dtype` has for quantised caches -> the dtype of their codes.
QUANTIZED = {"int8": "int8", "fp8": FP8}
# The largest code of each: a row's scale is its largest magnitude over this.
CODE_LIMITS = {"int8": 127.0, FP8: 448.0}
# Scales are bfloat16: they have float32's exponents, so that no row that an activation can hold
# overflows them or falls below them, and a scale that is rounded costs nothing, as codes are made
# for the rounded one.
SCALE_DTYPE = "bfloat16"
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, FP8: 1}


def is_quantized(cache_dtype: str) -> bool:
    return cache_dtype in CODE_LIMITS


def kv_row_bytes(head_size: int, cache_dtype: str) -> int:
    """Bytes of a key (or value) of one token and head, its scale included."""
    return head_size * ITEM_BYTES[cache_dtype] + (2 if is_quantized(cache_dtype) else 0)
