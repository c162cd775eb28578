"""Quantised Hugging Face folders for tests, packed number by number from the formats' definitions.

Each packer takes codes, zeros and scales as plain matrices [outputs, inputs or groups], and gives
the tensors that AutoAWQ, AutoGPTQ or an FP8 quantiser would store; `Layer.values` is what they
stand for. Independent of the product's code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.checkpoint.hf_folders import llama_config, llama_tensors, write_folder

GROUP = 16
LINEAR = ("_proj.weight",)


class Layer:
    """A quantised matrix: stored tensors by the end of their names, and its values [N, K]."""

    def __init__(self, tensors: dict[str, np.ndarray], values: np.ndarray) -> None:
        self.tensors = tensors
        self.values = values


def int32(word: int) -> int:
    """The 32 bits of `word` as a signed number."""
    return word - (1 << 32) if word >= 1 << 31 else word


def awq_words(codes: np.ndarray) -> np.ndarray:
    """AutoAWQ's GEMM packing along the outputs: codes [M, N] -> int32 [M, N / 8]."""
    rows, cols = codes.shape
    words = np.zeros((rows, cols // 8), np.int32)
    for r in range(rows):
        for c in range(cols // 8):
            word = 0
            for i, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                word |= int(codes[r, 8 * c + output]) << (4 * i)
            words[r, c] = int32(word)
    return words


def gptq_words(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    """AutoGPTQ's packing along the first axis: codes [M, N] -> int32 [M * bits / 32, N]."""
    per_word = 32 // bits
    rows, cols = codes.shape
    words = np.zeros((rows // per_word, cols), np.int32)
    for r in range(rows // per_word):
        for c in range(cols):
            word = 0
            for i in range(per_word):
                word |= int(codes[per_word * r + i, c]) << (bits * i)
            words[r, c] = int32(word)
    return words


def awq_layer(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    group: int = GROUP,
    zero_point: bool = True,
    with_zeros: bool = True,
    scale_dtype: Any = np.float16,
) -> Layer:
    num_rows, num_inputs = shape
    num_groups = num_inputs // group
    codes = rng.integers(0, 16, (num_inputs, num_rows))
    zeros = rng.integers(0, 16, (num_groups, num_rows))
    if not zero_point:
        zeros[:] = 8
    scales = rng.uniform(0.01, 0.03, (num_groups, num_rows)).astype(scale_dtype)
    values = np.zeros(shape, np.float32)
    for n in range(num_rows):
        for k in range(num_inputs):
            g = k // group
            values[n, k] = (int(codes[k, n]) - int(zeros[g, n])) * np.float32(scales[g, n])
    tensors = {"qweight": awq_words(codes), "scales": scales}
    if with_zeros:
        tensors["qzeros"] = awq_words(zeros)
    return Layer(tensors, values)


def gptq_layer(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    group: int = GROUP,
    bits: int = 4,
    sym: bool = True,
    act_order: bool = False,
    version: int = 1,
    with_g_idx: bool = True,
) -> Layer:
    num_rows, num_inputs = shape
    num_groups = num_inputs // group
    codes = rng.integers(0, 1 << bits, (num_inputs, num_rows))
    zeros = rng.integers(0, 1 << bits, (num_groups, num_rows))
    if sym:
        zeros[:] = 1 << (bits - 1)
    scales = rng.uniform(0.01, 0.03, (num_groups, num_rows)).astype(np.float16)
    g_idx = np.arange(num_inputs) // group
    if act_order:
        g_idx = rng.permutation(g_idx)
    values = np.zeros(shape, np.float32)
    for n in range(num_rows):
        for k in range(num_inputs):
            g = g_idx[k]
            values[n, k] = (int(codes[k, n]) - int(zeros[g, n])) * np.float32(scales[g, n])
    stored_zeros = (zeros - 1) % (1 << bits) if version == 1 else zeros
    tensors = {
        "qweight": gptq_words(codes, bits),
        "qzeros": np.ascontiguousarray(gptq_words(stored_zeros.T, bits).T),
        "scales": scales,
    }
    if with_g_idx:
        tensors["g_idx"] = g_idx.astype(np.int32)
    return Layer(tensors, values)


def packed_layer(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    group: int = GROUP,
    bits: int = 4,
    sym: bool = True,
    act_order: bool = False,
) -> Layer:
    """compressed-tensors' pack-quantized: signed codes plus half the range, from the lowest bits of
    a word up along the inputs; zeros likewise along the outputs."""
    num_rows, num_inputs = shape
    num_groups = num_inputs // group
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, shape)
    zeros = np.zeros((num_rows, num_groups), np.int64)
    if not sym:
        zeros = rng.integers(-half, half, zeros.shape)
    scales = rng.uniform(0.01, 0.03, zeros.shape).astype(ml_dtypes.bfloat16)
    g_idx = np.arange(num_inputs) // group
    if act_order:
        g_idx = rng.permutation(g_idx)
    values = np.zeros(shape, np.float32)
    for n in range(num_rows):
        for k in range(num_inputs):
            g = g_idx[k]
            values[n, k] = (int(codes[n, k]) - int(zeros[n, g])) * np.float32(scales[n, g])
    words = gptq_words((codes + half).T, bits).T
    tensors = {
        "weight_packed": np.ascontiguousarray(words),
        "weight_scale": scales,
        "weight_shape": np.array(shape, np.int64),
    }
    if not sym:
        tensors["weight_zero_point"] = gptq_words(zeros + half, bits)
    if act_order:
        tensors["weight_g_idx"] = g_idx.astype(np.int32)
    return Layer(tensors, values)


def float8(code: int) -> float:
    """The value of an e4m3 byte."""
    sign = -1.0 if code >> 7 else 1.0
    exponent, fraction = code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def fp8_layer(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    scale_shape: str = "tensor",
    name: str = "weight_scale",
    block: tuple[int, int] | None = None,
    scale_dtype: Any = np.float32,
) -> Layer:
    """scale_shape: "scalar" [], "tensor" [1], "row" [N], "channel" [N, 1] or "block"."""
    num_rows, num_inputs = shape
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[codes & 127 == 127] = 1
    dims: dict[str, tuple[int, ...]] = {
        "scalar": (), "tensor": (1,), "row": (num_rows,), "channel": (num_rows, 1),
    }  # fmt: skip
    if block is not None:
        dims["block"] = (-(-num_rows // block[0]), -(-num_inputs // block[1]))
    scales = np.asarray(rng.uniform(0.001, 0.003, dims[scale_shape])).astype(scale_dtype)
    values = np.zeros(shape, np.float32)
    for n in range(num_rows):
        for k in range(num_inputs):
            if scale_shape == "block":
                assert block is not None
                scale = scales[n // block[0], k // block[1]]
            else:
                scale = scales.reshape(-1)[n if scales.size > 1 else 0]
            values[n, k] = np.float32(float8(int(codes[n, k]))) * np.float32(scale)
    weight = codes.view(ml_dtypes.float8_e4m3fn)
    return Layer({"weight": weight, name: scales}, values)


def quantized_folder(
    path: Path,
    settings: dict[str, Any],
    make: Callable[[np.random.Generator, tuple[int, int]], Layer],
    *,
    skip: tuple[str, ...] = (),
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
    num_shards: int = 1,
    **config: Any,
) -> dict[str, np.ndarray]:
    """Write a LLaMA whose projections are quantised, all but those whose names have a text of
    `skip` in them. Gives each stored name -> values, as transformers names weights."""
    rng = np.random.default_rng(5)
    tensors: dict[str, np.ndarray] = {}
    values: dict[str, np.ndarray] = {}
    for name, array in llama_tensors(np.float16).items():
        values[name] = array
        if not name.endswith(LINEAR) or any(text in name for text in skip):
            tensors[name] = array
            continue
        layer = make(rng, array.shape)
        values[name] = layer.values
        for part, stored in layer.tensors.items():
            tensors[name.removesuffix("weight") + part] = stored
    if change is not None:
        change(tensors)
    settings = llama_config(quantization_config=settings, **config)
    write_folder(path, settings, tensors, num_shards=num_shards)
    return values
