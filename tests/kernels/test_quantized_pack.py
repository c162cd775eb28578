"""Matrices of codes between their forms (quantized_pack.cu), against the layout in NumPy."""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from nanocupy.exporters.quantizing import quantized_matrix
from nanocupy.ops import philox
from nanocupy.ops.launch_quantized import PACK_FILE, packed_format
from nanocupy.ops.launch_shapes import LaunchShape
from nanocupy.ops.packed_matrix import (
    packed_row_order,
    random_scales,
    scale_unit,
    unit_of_largest,
)
from nanocupy.quantized import QuantizedMatrix, quantize
from tests.kernels.backends import CODES
from tests.kernels.quantized_runs import as_stored, pack
from tests.ops.cases import DTYPES


def matrix(kind: str, rows: int, inputs: int, group: int | None, seed: int = 0) -> QuantizedMatrix:
    rng = np.random.default_rng(seed)
    made = quantize(rng.standard_normal((rows, inputs)).astype(np.float32), kind, group)
    if kind != "int4":
        return made
    # Of other makers: with more bits than a device keeps.
    scales, offsets = (
        part * rng.uniform(0.99, 1.01, part.shape).astype(np.float32)
        for part in (made.scales, made.offsets)
    )
    return replace(made, scales=scales, offsets=offsets)


def laid_out(weight: QuantizedMatrix, pairs: bool) -> np.ndarray:
    """The packed form, code by code, as quantized_format.cuh describes it."""
    num_rows, num_inputs = weight.shape
    form = packed_format(weight.kind, num_inputs, weight.group_size)
    unit = scale_unit(weight)
    order = packed_row_order(num_rows) if pairs else np.arange(num_rows)
    values = weight.code_values()
    if weight.kind == "fp8":
        values = weight.codes
    num_strips, num_chunks = -(-len(order) // 16), -(-num_inputs // 128)
    whole = np.zeros((num_strips * 16, num_chunks * 128), np.int64)
    rows = np.minimum(np.arange(num_strips * 16), len(order) - 1)
    whole[:, :num_inputs] = values[order[rows]].astype(np.int64) & 255
    out = np.zeros((num_strips, num_chunks, form.chunk_bytes), np.uint8)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for quarter in range(4):
            for second in range(2):
                for i in range(8):
                    codes = whole[g + 8 * second :: 16, 32 * quarter + 8 * t + i :: 128]
                    pair, high = divmod(i, 2)
                    if weight.kind == "int4":
                        word = (quarter // 2) * 128 + lane * 4 + quarter % 2 * 2 + second
                        nibble = pair + 4 * high
                        out[:, :, word * 4 + nibble // 2] |= (codes << nibble % 2 * 4).astype(
                            np.uint8
                        )
                    else:
                        word = quarter * 128 + lane * 4 + i // 4 * 2 + second
                        out[:, :, word * 4 + pair % 2 + 2 * high] = codes
    scales = out[:, :, form.code_bytes :].view(np.uint32)
    for group in range(128 // form.group):
        for row in range(16):
            place = group * 16 + row % 8 * 2 + row // 8
            for chunk in range(num_chunks):
                k = chunk * 128 + group * form.group
                if k >= num_inputs:
                    continue
                of_rows = order[rows[row::16]], k // weight.group_size
                scale = weight.scales[of_rows] / np.float32(unit)
                if weight.kind == "int4":
                    pair = np.stack((scale, weight.offsets[of_rows] / np.float32(unit)), axis=-1)
                    scales[:, chunk, place] = pair.astype(np.float16).view(np.uint32)[:, 0]
                else:
                    scales[:, chunk, place] = scale.view(np.uint32)
    return out.reshape(num_strips, -1)


CASES = [
    ("int4", 37, 384, 32), ("int4", 16, 192, 64), ("int4", 50, 256, 128), ("int4", 20, 96, 48),
    ("int8", 37, 320, 64), ("int8", 18, 1024, 256), ("fp8", 37, 264, None), ("fp8", 16, 128, 32),
]  # fmt: skip


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("kind", "rows", "inputs", "group"), CASES)
def test_packed_as_described_and_back(backend, kind, rows, inputs, group, pairs) -> None:
    rows += rows % 2
    weight = matrix(kind, rows, inputs, group)
    form = packed_format(kind, inputs, weight.group_size)
    packed, unit = pack(backend.run, weight, pairs, "bfloat16")
    assert np.array_equal(packed, laid_out(weight, pairs))

    stored = as_stored(weight) if kind == "int4" else weight
    wanted = stored.dequantize()
    order = np.random.default_rng(1).permutation(inputs).astype(np.int32)
    for dtype in ("float32", "bfloat16", "float16"):
        for columns in (None, order):
            out = np.full((rows, inputs), np.nan).astype(DTYPES[dtype])
            chunks = len(packed) * (packed.shape[1] // form.chunk_bytes)
            backend.run(
                PACK_FILE, "dequantize_rows", LaunchShape((-(-chunks // 4),), 128),
                [packed, columns, out, np.float32(unit), *map(np.int32, (rows, inputs, pairs))],
                (2,), SCALAR=CODES[dtype], **form.macros,
            )  # fmt: skip
            natural = wanted
            if columns is not None:
                natural = replace(stored, input_order=order).dequantize()
            error = abs(out.astype(np.float32) - natural)
            assert (error <= np.finfo(np.float32).eps * 4 + _half_step(natural, dtype)).all()


def _half_step(values: np.ndarray, dtype: str) -> np.ndarray:
    bits = {"float32": 24, "bfloat16": 8, "float16": 11}[dtype]
    return np.maximum(abs(values), 2.0**-14) * 2.0**-bits


def test_units_leave_float16_its_bits() -> None:
    for largest in (1e-6, 0.01, 1.0, 3000.0):
        unit = unit_of_largest(largest)
        assert 2**13 <= largest / unit < 2**14
        assert math.frexp(unit)[0] == 0.5
    weight = matrix("int4", 16, 128, 32)
    stored = as_stored(weight)
    assert 0 < abs(stored.scales / weight.scales - 1).max() < 2.0**-11
    zeros = replace(weight, scales=0 * weight.scales, offsets=0 * weight.offsets)
    assert scale_unit(zeros) == 1.0
    assert scale_unit(matrix("int8", 16, 128, 32)) == 1.0


@pytest.mark.parametrize("search", [False, True])
def test_what_is_quantised_here_loses_no_bit_of_scales(search: bool) -> None:
    """Rows of magnitudes that are 2**20 apart, some of one sign, one of zeros."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((24, 256)) * 2.0 ** rng.uniform(-10, 10, (24, 1))
    values[3], values[4:8] = 0, abs(values[4:8])
    made, _ = quantized_matrix(values.astype(np.float32), "int4", 64, search, "w")
    stored = as_stored(made)
    assert np.array_equal(stored.scales, made.scales)
    assert np.array_equal(stored.offsets, made.offsets)


def test_rows_of_gate_and_up_take_turns() -> None:
    order = packed_row_order(22)
    assert order.tolist() == [*range(8), *range(11, 19), 8, 9, 10, *[10] * 5, 19, 20, 21, *[21] * 5]


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_random_codes(backend, kind: str) -> None:
    form = packed_format(kind, 256, 128)
    out = np.zeros(form.packed_shape(64, 256, False), np.uint8)
    word, seed = np.uint32(0x3C001234), 5 << 32 | 9
    backend.run(
        PACK_FILE, "fill_quantized", LaunchShape((3,), 64),
        [out, np.int64(out.size // 16), word, np.uint64(seed)], (0,), SCALAR=2, **form.macros,
    )  # fmt: skip
    chunks = out.reshape(-1, form.chunk_bytes)
    assert (chunks[:, form.code_bytes :].copy().view(np.uint32) == word).all()
    codes = chunks[:, : form.code_bytes]
    index = 3 * form.chunk_bytes // 16 + 7
    words = philox.philox4x32(np.array([[index, 0, 0, 0]], np.uint32), np.array([seed], np.uint64))
    wanted = np.asarray(words, np.uint32).reshape(-1)[:4] & np.uint32(
        0xBFBFBFBF if kind == "fp8" else 0xFFFFFFFF
    )
    assert np.array_equal(codes[3, 7 * 16 : 8 * 16].view(np.uint32), wanted)
    if kind == "int4":
        values = np.concatenate((codes & 15, codes >> 4)).astype(np.float64)
    else:
        values = codes.view(np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn)
        values = values.astype(np.float64)
    scale, offset = random_scales(kind, 0.02)
    assert np.isfinite(values).all()
    assert abs((values * scale + offset).std() / 0.02 - 1) < 0.05


def test_inputs_in_another_order(backend) -> None:
    x = np.arange(3 * 200, dtype=np.float32).reshape(3, 200).astype(DTYPES["bfloat16"])
    order = np.random.default_rng(2).permutation(200).astype(np.int32)
    out = np.zeros_like(x)
    backend.run(
        PACK_FILE, "gather_inputs", LaunchShape((3,), 64), [x, order, out, np.int32(200)], (2,),
        SCALAR=2, WEIGHT_KIND=0,
    )  # fmt: skip
    assert np.array_equal(out, x[:, order])
