"""Matrices of codes: their values, piece by piece, scales of 0, and scales beyond float32."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from nanocupy.checkpoint.base import GroupedInt8
from nanocupy.checkpoint.quantized_checks import check_numbers, scale_problem
from nanocupy.errors import CheckpointError
from nanocupy.quantized import QuantizedMatrix, quantize, without_zero_scales


def matrix_of(kind: str, shape: tuple[int, int], group_size: int, order: bool) -> QuantizedMatrix:
    rng = np.random.default_rng(0)
    rows, inputs = shape
    if kind == "int8":
        codes = rng.integers(-128, 128, shape).astype(np.int8)
    else:
        codes = rng.integers(0, 256, (rows, inputs // (2 if kind == "int4" else 1)), np.uint8)
    if kind == "fp8":
        codes[codes & 127 == 127] = 9
    scales = rng.uniform(0.5, 2, (rows, inputs // group_size)).astype(np.float32)
    offsets = rng.standard_normal(scales.shape).astype(np.float32) if kind == "int4" else None
    inputs_order = rng.permutation(inputs).astype(np.int32) if order else None
    return QuantizedMatrix(kind, codes, scales, offsets, group_size, inputs_order)


def values_of(matrix: QuantizedMatrix) -> np.ndarray:
    """By plain loops."""
    result = np.zeros(matrix.shape, np.float32)
    for r in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            if matrix.kind == "int4":
                code = float(matrix.codes[r, k // 2] >> 4 * (k % 2) & 15)
            elif matrix.kind == "fp8":
                code = float(matrix.codes[r, k : k + 1].view(ml_dtypes.float8_e4m3fn)[0])
            else:
                code = float(matrix.codes[r, k])
            g = k // matrix.group_size
            value = np.float32(code) * matrix.scales[r, g]
            if matrix.offsets is not None:
                value += matrix.offsets[r, g]
            column = k if matrix.input_order is None else matrix.input_order[k]
            result[r, column] = value
    return result


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_values_piece_by_piece(kind: str, order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanocupy.quantized._CHUNK_VALUES", 100)  # 4 rows of 7
    matrix = matrix_of(kind, (7, 24), 8, order)
    np.testing.assert_array_equal(matrix.dequantize(), values_of(matrix))
    assert [rows.stop - rows.start for rows in matrix.row_blocks()] == [4, 3]


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_values_take_no_second_matrix(kind: str) -> None:
    matrix = matrix_of(kind, (4096, 1024), 64, True)
    tracemalloc.start()
    values = matrix.dequantize()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.8 * values.nbytes  # a piece here is a quarter of the matrix


@pytest.mark.parametrize("group_size", [8, 3, 1])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_no_scale_of_0_is_left(kind: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where codes of two groups share a byte."""
    monkeypatch.setattr("nanocupy.quantized._CHUNK_VALUES", 100)
    matrix = matrix_of(kind, (7, 24), group_size, True)
    assert without_zero_scales(matrix) is matrix
    matrix.scales[[0, 2, 2, 6], [0, 1, 2, -1]] = 0
    matrix.scales[5] = -0.0
    before = matrix.codes.copy()
    result = without_zero_scales(matrix)
    assert result.scales.all()
    assert (result.scales[matrix.scales == 0] == 1).all()
    np.testing.assert_array_equal(result.dequantize(), matrix.dequantize())
    np.testing.assert_array_equal(matrix.codes, before)


@pytest.mark.parametrize(("kind", "code"), [("int8", 128), ("int4", 15), ("fp8", 448)])
def test_what_codes_make_of_scales_must_be_numbers(kind: str, code: int) -> None:
    matrix = matrix_of(kind, (3, 32), 8, False)
    largest = float(np.finfo(np.float32).max)

    def check() -> None:
        check_numbers(kind, matrix.codes, matrix.scales, matrix.offsets, None, "here")

    matrix.scales[1, 2] = -0.99 * largest / code
    check()
    matrix.scales[1, 2] = -1.01 * largest / code
    with pytest.raises(CheckpointError, match=r"here holds a scale of -.*\(row 1, group 2\), with"):
        check()
    matrix.scales[1, 2] = 1
    if matrix.offsets is not None:
        matrix.offsets[2, 3] = -largest
        check()  # 15 is lost in rounding
        matrix.scales[2, 3] = 1e36
        with pytest.raises(CheckpointError, match=r"a scale of 1e\+36 \(row 2, group 3\)"):
            check()
    for scale in (np.nan, np.inf, -np.inf):
        matrix.scales[2, 3] = scale
        with pytest.raises(CheckpointError, match="here holds NaN or infinite scales"):
            check()


def test_scales_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanocupy.checkpoint.quantized_checks._CHUNK", 4)
    scales, offsets = np.ones((5, 3), np.float32), np.zeros((5, 3), np.float32)
    assert scale_problem("int4", scales, offsets, zeros=False) is None
    scales[3, 1] = 0
    assert scale_problem("int4", scales, offsets) is None
    assert scale_problem("int4", scales, offsets, zeros=False) == (
        "holds a scale of 0 (row 3, group 1)"
    )
    offsets[4, 2] = np.inf
    assert scale_problem("int4", scales, offsets) == "holds NaN or infinite offsets"
    scales[4, 0] = 3e38
    assert "(row 4, group 0)" in str(scale_problem("int8", scales))
    assert "(group 12)" in str(scale_problem("int8", scales.reshape(-1)))


@pytest.mark.filterwarnings("error")
def test_damaged_scales_do_not_warn() -> None:
    """Readers report them; NumPy's lines would stand beside theirs."""
    scales = np.array([np.inf, np.nan, 3e38, 1], np.float32)
    codes = np.zeros((1, 32), np.int8)
    codes[0, 20] = 100
    assert not np.isfinite(GroupedInt8(codes, scales, 8).dequantize()).all()
    assert not np.isfinite(QuantizedMatrix("int8", codes, scales[None], None, 8).dequantize()).all()
    huge = np.array([[3e38, -3e38] * 4], np.float32)
    assert np.isinf(quantize(huge, "int4").scales).all()


def test_a_vector_of_int8_is_no_matrix() -> None:
    values = np.ones(32, np.int8)
    assert GroupedInt8(values, np.ones(2, np.float32), 16).as_matrix() is None
