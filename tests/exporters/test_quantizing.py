"""Models in fewer bits: what is rounded, how, and what it costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nanocupy.checkpoint import open_checkpoint
from nanocupy.errors import CheckpointError, ConfigError
from nanocupy.exporters.conversion import quantised
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.exporters.quantizing import QuantizedView, quantized_matrix
from nanocupy.exporters.scale_search import search_int4
from nanocupy.quantized import quantize
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

LAYERS = ("q", "k", "v", "o", "gate", "up", "down")


# ---- rounding


def exhaustive_error(group: np.ndarray) -> float:
    """The least squared error of 16 evenly spaced values, by trying many spacings and starts."""
    best = np.inf
    for width in np.linspace(0.3, 1.2, 91):
        for middle in np.linspace(-0.25, 0.25, 51):
            low, high = group.min(), group.max()
            scale = (high - low) * width / 15
            offset = (low + high) / 2 + middle * (high - low) - 7.5 * scale
            codes = np.clip(np.round((group - offset) / scale), 0, 15)
            best = min(best, float(((codes * scale + offset - group) ** 2).sum()))
    return best


def test_the_search_comes_near_the_best_there_is() -> None:
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((12, 64)).astype(np.float32)
    groups[:4, 5] *= 6  # outliers
    start = quantize(groups, "int4")
    codes, scales, offsets = search_int4(groups, start.scales[:, 0], start.offsets[:, 0])
    found = ((codes * scales[:, None] + offsets[:, None] - groups) ** 2).sum(axis=1)
    nearest = ((start.dequantize() - groups) ** 2).sum(axis=1)
    assert (found <= nearest).all()
    assert found.sum() < 0.9 * nearest.sum()
    for group, error in zip(groups, found, strict=True):
        assert error < 1.1 * exhaustive_error(group)


def test_the_search_goes_on_until_nothing_is_gained() -> None:
    """Rounding to the scales that it ends with saves next to nothing: these were fitted to just
    such codes."""
    groups = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    start = quantize(groups, "int4")
    codes, scales, offsets = search_int4(groups, start.scales[:, 0], start.offsets[:, 0])
    again = np.clip(np.rint((groups - offsets[:, None]) / scales[:, None]), 0, 15)
    found, better = (
        float(((chosen * scales[:, None] + offsets[:, None] - groups) ** 2).sum())
        for chosen in (codes, again)
    )
    assert found < 1.0005 * better  # without the last rounds: 1.0086


@pytest.mark.parametrize(
    "group",
    [
        np.zeros(8),
        np.full(8, 3.0),
        np.full(8, -2.5),
        np.array([0, 0, 0, 0, 0, 0, 0, 1e-30]),
        np.array([1e-44] * 4 + [-1e-44] * 4),
        np.array([1e30, -1e30, 0, 0, 5, 6, 7, 8]),
        np.array([1.0, 2, 3, 4, 5, 6, 7, 8]),
        np.array([-7.0, 8] * 4),
    ],
)
def test_groups_at_the_edges(group: np.ndarray) -> None:
    values = group.astype(np.float32)[None]
    matrix, error = quantized_matrix(values, "int4", 8, True, "w")
    assert np.isfinite(matrix.scales).all()
    assert matrix.scales.all()
    span = max(group.max(), 0) - min(group.min(), 0)
    assert np.abs(matrix.dequantize() - values).max() <= span / 30 * 1.01 + 1e-37
    assert error.written <= error.nearest


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_pieces_are_rounded_like_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanocupy.exporters.quantizing._CHUNK_VALUES", 7 * 48)
    values = np.random.default_rng(1).standard_normal((33, 48)).astype(np.float32)
    matrix, error = quantized_matrix(values, kind, 16, False, "w")
    whole = quantize(values, kind, 16)
    np.testing.assert_array_equal(matrix.codes, whole.codes)
    np.testing.assert_array_equal(matrix.scales, whole.scales)
    if kind == "int4":
        np.testing.assert_array_equal(matrix.offsets, whole.offsets)
    squares = ((whole.dequantize() - values) ** 2).sum()
    assert error.nearest == error.written == pytest.approx(squares, rel=1e-4)
    assert (error.weights, error.count) == (pytest.approx((values**2).sum(), rel=1e-4), 33 * 48)


def test_values_that_are_no_numbers_are_refused() -> None:
    values = np.ones((4, 16), np.float32)
    values[2, 3] = np.nan
    with pytest.raises(CheckpointError, match="w holds NaN or infinite values"):
        quantized_matrix(values, "int4", 16, True, "w")
    values[2, 3], values[2, 4] = 3e38, -3e38
    with pytest.raises(CheckpointError, match=r"w holds 3e\+38, too large to be rounded to int4"):
        quantized_matrix(values, "int4", 16, True, "w")


def test_int8_is_rounded_in_one_way() -> None:
    """The legacy writers' int8 and `quantize`'s: one rule, and 0 for the scale of zeros."""
    values = np.random.default_rng(2).standard_normal((6, 32)).astype(np.float32)
    values[1, :16] = 0
    values[2, :16] = 1e-44  # its scale would vanish
    legacy, matrix = quantised(values, 16, "w"), quantize(values, "int8", 16)
    np.testing.assert_array_equal(legacy.values, matrix.codes)
    dead = np.zeros((6, 2), bool)
    dead[1:3, 0] = True
    scales = np.where(dead, 0, matrix.scales).reshape(-1)
    np.testing.assert_array_equal(legacy.scales, scales)
    assert (legacy.scales.reshape(6, 2)[dead] == 0).all()
    np.testing.assert_array_equal(legacy.dequantize(), matrix.dequantize())


# ---- a checkpoint in fewer bits


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("lm_head", [False, True])
def test_layers_are_rounded_and_nothing_else(kind: str, lm_head: bool, tmp_path: Path) -> None:
    config = tiny_config(has_qkv_bias=True)
    model = TinyCheckpoint(config, dtype="float16", vector_dtype="float32")
    view = QuantizedView(model, kind, group_size=16, lm_head=lm_head)
    write_nanoinfer2(view, tmp_path / "m.nano")
    with open_checkpoint(tmp_path / "m.nano") as opened:
        for name, info in model.tensors.items():
            want = np.asarray(model.read(name), np.float32)
            part = name.split(".")[-2]
            matrix = opened.read_quantized(name)
            if len(info.shape) == 2 and (part in LAYERS or (part == "lm_head" and lm_head)):
                assert matrix is not None
                assert (matrix.kind, matrix.group_size) == (kind, 16)
                assert view.tensors[name] == opened.tensors[name]
                error = ((matrix.dequantize() - want) ** 2).mean() / (want**2).mean()
                assert error < {"int8": 3e-5, "fp8": 1e-3, "int4": 6e-3}[kind]
                written = view.errors[name].written / view.errors[name].weights
                assert written == pytest.approx(error, rel=1e-3)
            else:
                assert matrix is None
                assert opened.tensors[name] == info
                np.testing.assert_array_equal(opened.read(name), model.read(name))
        assert opened.metadata["quantized"].startswith(f"{kind}, groups of 16")
        assert [problem for _, problem in opened.verify() if problem] == []
    assert os.listdir(tmp_path) == ["m.nano"]


@pytest.mark.parametrize(
    ("stored", "embedding"),
    [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16"), (16, "float16")],
)
def test_the_embedding_takes_16_bits(stored: str | int, embedding: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"int8_group": stored} if stored == 16 else {"dtype": stored}
    model = TinyCheckpoint(tiny_config(), **options)
    write_nanoinfer2(QuantizedView(model, "int8", group_size=32), tmp_path / "m.nano")
    opened = open_checkpoint(tmp_path / "m.nano")
    assert opened.tensors["embed.weight"].dtype == embedding
    # One that is in the kind asked for keeps its codes.
    assert opened.tensors["lm_head.weight"].dtype == ("int8" if stored == 16 else embedding)
    assert opened.tensors["final_norm.weight"].dtype == model.tensors["final_norm.weight"].dtype


def test_the_search_loses_less(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config())
    errors = []
    for search in (True, False):
        view = QuantizedView(model, "int4", search=search)
        assert view.group_size == 32
        write_nanoinfer2(view, tmp_path / "m.nano")
        assert len(view.errors) == 14
        errors.append(sum(error.written for error in view.errors.values()))
        assert ("scale search" in view.metadata["quantized"]) == search
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("lengths", "kind", "asked", "settled"),
    [
        ((1024, 4096), "int4", None, 128),
        ((576, 1536), "int4", None, 64),
        ((576, 1536), "int8", 192, 192),
        ((576, 1536), "fp8", None, -1),
        ((896, 4864), "int8", None, 128),
        ((32, 48), "int8", -1, -1),
    ],
)
def test_group_sizes(lengths: tuple[int, int], kind: str, asked: int | None, settled: int) -> None:
    config = tiny_config(hidden_size=lengths[0], intermediate_size=lengths[1], num_layers=1)
    config = config.with_(num_heads=lengths[0] // 16, num_kv_heads=lengths[0] // 16, head_size=16)
    model = TinyCheckpoint(config)
    assert QuantizedView(model, kind, group_size=asked).group_size == settled


@pytest.mark.parametrize(
    ("changes", "kind", "group_size", "words"),
    [
        ({}, "int3", None, "kind is 'int3'"),
        (
            {},
            "int4",
            24,
            "--group-size is 24, which does not divide the 32 inputs of layers.0.q.we",
        ),
        ({}, "int8", 128, "does not divide the 32 inputs of layers.0.q.weight; 32 divides all"),
        ({}, "int8", 0, "--group-size is 0; it must be at least 8, or -1"),
        ({}, "int8", -2, "--group-size is -2"),
        ({"intermediate_size": 36}, "int8", None, "no group of 8 or more inputs divides every row"),
        ({"intermediate_size": 36}, "int8", 8, "does not divide the 36 inputs of layers.0.down"),
        ({"intermediate_size": 35}, "int4", -1, "has 35 inputs, an odd number"),
    ],
)
def test_groups_that_cannot_be(
    changes: dict[str, Any], kind: str, group_size: int | None, words: str
) -> None:
    model = TinyCheckpoint(tiny_config(**changes))
    with pytest.raises(ConfigError) as caught:
        QuantizedView(model, kind, group_size=group_size)
    assert words in str(caught.value)


def test_failures_leave_nothing(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config())
    array = model.arrays["layers.1.up.weight"]
    assert isinstance(array, np.ndarray)
    array[0, 0] = np.inf
    with pytest.raises(CheckpointError, match=r"layers.1.up.weight holds NaN or infinite values"):
        write_nanoinfer2(QuantizedView(model, "int4"), tmp_path / "m.nano")
    assert os.listdir(tmp_path) == []


def test_a_source_is_never_written_over(tmp_path: Path) -> None:
    write_nanoinfer2(TinyCheckpoint(tiny_config()), tmp_path / "m.nano")
    with (
        open_checkpoint(tmp_path / "m.nano") as opened,
        pytest.raises(CheckpointError, match="is what would be exported"),
    ):
        write_nanoinfer2(QuantizedView(opened, "int8"), tmp_path / "m.nano")


def test_float8_is_what_ml_dtypes_rounds_to() -> None:
    values = np.random.default_rng(3).standard_normal((2, 16)).astype(np.float32)
    matrix, _ = quantized_matrix(values, "fp8", 16, False, "w")
    scaled = values / matrix.scales
    expected = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(matrix.codes, expected)
