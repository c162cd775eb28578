"""Models in fewer bits: what is rounded and how, what it costs, and the command that does it."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import nanocupy.checkpoint.open
from nanocupy.checkpoint import open_checkpoint
from nanocupy.checkpoint.base import dequantized
from nanocupy.cli import main
from nanocupy.errors import CheckpointError, ConfigError
from nanocupy.exporters.conversion import quantised
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.exporters.quantizing import QuantizedView, quantized_matrix
from nanocupy.exporters.scale_search import search_int4
from nanocupy.quantized import QuantizedMatrix, quantize
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.quantized_folders import awq_layer, gptq_layer, quantized_folder
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.cli.test_cli_generate import byte_tokenizer

LAYERS = ("q", "k", "v", "o", "gate", "up", "down")


def run(*argv: object) -> int:
    return main([str(a) for a in argv])


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


def test_what_is_in_few_bits_already_keeps_them(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=64, head_size=16, vocab_size=64)
    for type_id, kind in ((Type.Q4_0, "int4"), (Type.Q4_1, "int4"), (Type.Q8_0, "int8")):
        model = TinyCheckpoint(config)
        gate = model.arrays["layers.0.gate.weight"]
        assert isinstance(gate, np.ndarray)
        gate[3, :32] = 0  # GGUF gives this group a scale of 0
        gate[4, :32] = 0.25  # and Q4_1 this one
        path = write_gguf(tmp_path / "m.gguf", model, matrix_type=type_id)
        with open_checkpoint(path) as source:
            view = QuantizedView(source, kind)
            assert view.group_size == 32
            write_nanoinfer2(view, tmp_path / "m.nano")
            assert view.rounded_twice == []
            with open_checkpoint(tmp_path / "m.nano") as opened:
                for name in view.layers:
                    stored = opened.read_quantized(name)
                    assert stored is not None
                    np.testing.assert_array_equal(stored.dequantize(), source.read(name), name)
            other = "fp8" if kind == "int8" else "int8"
            assert QuantizedView(source, other).group_size == {"fp8": -1, "int8": 64}[other]
            view = QuantizedView(source, kind, group_size=16)
            write_nanoinfer2(view, tmp_path / "m.nano")
            assert len(view.rounded_twice) == 1
    folder = tmp_path / "awq"
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16}
    quantized_folder(folder, settings, awq_layer)
    with open_checkpoint(folder) as source:
        write_nanoinfer2(source, tmp_path / "m.nano")  # an export keeps them, too
        with open_checkpoint(tmp_path / "m.nano") as opened:
            for name in source.tensors:
                np.testing.assert_array_equal(opened.read(name), source.read(name), name)
            assert opened.tensors["layers.0.q.weight"].dtype == "int4"
        view = QuantizedView(source, "int8", group_size=16)
        write_nanoinfer2(view, tmp_path / "m.nano")
        assert view.rounded_twice == ["int4"]


def int4_model(path: Path, group_sizes: dict[str, int]) -> Path:
    """A NanoInfer file with some layers in int4, part -> group size (-1: a row), others in bf16."""
    model = TinyCheckpoint(tiny_config(), dtype="bfloat16")
    codes: dict[str, QuantizedMatrix] = {}
    for name, info in model.tensors.items():
        group_size = group_sizes.get(name.split(".")[-2])
        if group_size is not None and len(info.shape) == 2:
            values = np.asarray(model.read(name), np.float32)
            codes[name] = quantize(values, "int4", None if group_size == -1 else group_size)
    model.tensors = {
        name: replace(info, dtype="int4") if name in codes else info
        for name, info in model.tensors.items()
    }
    model.read_quantized = codes.get  # type: ignore[method-assign, assignment]
    write_nanoinfer2(model, path)
    return path


@pytest.mark.parametrize(
    ("group_sizes", "settled", "kept"),
    [
        # As long as a row of 32 by chance: rows of 64 have two of them.
        (dict.fromkeys(LAYERS, 32), 32, 14),
        (dict.fromkeys(LAYERS, -1), -1, 14),
        ({"up": -1, "gate": -1}, -1, 4),
        # The first layer has no say of its own.
        ({"up": 8, "down": 8}, 8, 4),
        ({"q": 8, "up": 16, "down": 16}, 16, 4),
        ({"q": -1, "up": 16, "down": 16}, 16, 4),
        # Groups of 64 divide no rows of 32.
        ({"down": 64, "q": 16}, 16, 2),
        ({"down": 4}, 32, 0),
        ({}, 32, 0),
    ],
)
def test_most_layers_settle_the_group_size(
    group_sizes: dict[str, int], settled: int, kept: int, tmp_path: Path
) -> None:
    with open_checkpoint(int4_model(tmp_path / "m.nano", group_sizes)) as source:
        view = QuantizedView(source, "int4")
        assert view.group_size == settled
        assert len(view.kept) == kept
        write_nanoinfer2(view, tmp_path / "out.nano")
        with open_checkpoint(tmp_path / "out.nano") as opened:
            for name in view.layers:
                stored, before = opened.read_quantized(name), source.read_quantized(name)
                assert stored is not None
                assert stored.form == view.quantized_form(name)
                error = view.errors[name]
                if name not in view.kept:
                    assert error.written > 0
                    continue
                assert before is not None
                np.testing.assert_array_equal(stored.codes, before.codes)
                np.testing.assert_array_equal(stored.scales, before.scales)
                values = before.dequantize()
                assert (error.nearest, error.written, error.count) == (0, 0, values.size)
                assert error.weights == pytest.approx(float((values**2).sum()), rel=1e-5)
        # What is written says what was done.
        note = {0: "", 14: ", all layers kept"}.get(kept, f", {kept} of 14 layers kept")
        groups = "a group a row" if settled == -1 else f"groups of {settled}"
        search = "" if kept == 14 else ", scale search"
        assert view.metadata["quantized"] == f"int4, {groups}{search}{note}"
        assert view.rounded_twice == (["int4"] if len(group_sizes) * 2 > kept else [])


def test_a_head_in_the_kind_asked_for_keeps_its_codes(tmp_path: Path) -> None:
    groups = dict.fromkeys(LAYERS, 16)
    with open_checkpoint(int4_model(tmp_path / "m.nano", groups | {"lm_head": 8})) as source:
        before = source.read_quantized("lm_head.weight")
        assert before is not None
        for lm_head, kind, dtype, group_size in (
            (False, "int4", "int4", 8),  # not asked for: as it is
            (True, "int4", "int4", 16),  # asked for: as the layers are
            (False, "int8", "float16", None),
        ):
            view = QuantizedView(source, kind, lm_head=lm_head)
            write_nanoinfer2(view, tmp_path / "out.nano")
            with open_checkpoint(tmp_path / "out.nano") as opened:
                assert opened.tensors["lm_head.weight"] == view.tensors["lm_head.weight"]
                assert opened.tensors["lm_head.weight"].dtype == dtype
                form = opened.quantized_form("lm_head.weight")
                assert (form and form.group_size) == group_size
                if group_size == 8:
                    stored = opened.read_quantized("lm_head.weight")
                    assert stored is not None
                    np.testing.assert_array_equal(stored.codes, before.codes)
                    np.testing.assert_array_equal(stored.scales, before.scales)
                    assert view.metadata["quantized"] == "int4, groups of 16, all layers kept"


def test_kept_layers_keep_the_order_of_their_inputs(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}
    quantized_folder(tmp_path / "hf", settings, partial(gptq_layer, act_order=True))
    with open_checkpoint(tmp_path / "hf") as source:
        view = QuantizedView(source, "int4")
        write_nanoinfer2(view, tmp_path / "m.nano")
        with open_checkpoint(tmp_path / "m.nano") as opened:
            for name in view.layers:
                assert opened.tensors[name] == view.tensors[name]
                np.testing.assert_array_equal(opened.read(name), source.read(name))


def test_what_float16_cannot_hold_becomes_bfloat16(tmp_path: Path) -> None:
    """The head of a quantised model, which nobody asked to have in float16."""

    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        shape = tensors.pop("lm_head.weight").shape
        for part, array in gptq_layer(np.random.default_rng(0), shape).tensors.items():
            tensors[f"lm_head.{part}"] = np.full_like(array, 6e4) if part == "scales" else array

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    quantized_folder(tmp_path / "hf", settings, gptq_layer, change=enlarge)
    assert run("quantize", tmp_path / "hf", "--to", "int8", "-o", tmp_path / "m.nano") == 0
    with open_checkpoint(tmp_path / "m.nano") as opened:
        assert opened.tensors["lm_head.weight"].dtype == "bfloat16"
        assert opened.tensors["embed.weight"].dtype == "float16"
        assert [problem for _, problem in opened.verify() if problem] == []


def test_kept_layers_take_no_matrix_of_floats(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config(intermediate_size=1 << 17, num_layers=1))
    write_nanoinfer2(QuantizedView(model, "int8", group_size=32), tmp_path / "m.nano")
    with open_checkpoint(tmp_path / "m.nano") as source:
        view = QuantizedView(source, "int8")
        tracemalloc.start()
        assert view.read_quantized("layers.0.down.weight") is not None
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2.5 * 32 * (1 << 17)  # floats take 4 bytes each; a piece is a quarter of them


def test_no_type_is_advised_where_none_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = TinyCheckpoint(tiny_config())
    embedding = model.arrays["embed.weight"]
    assert isinstance(embedding, np.ndarray)
    embedding[0, 0] = 3.4e38
    monkeypatch.setattr(nanocupy.checkpoint.open, "open_checkpoint", lambda *_, **__: model)
    (tmp_path / "m").touch()
    assert run("quantize", tmp_path / "m", "--to", "int8", "-o", tmp_path / "q.nano") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "embed.weight holds 3.4e+38, beyond what bfloat16 can hold (3.38953e+38)" in error
    assert "--dtype" not in error


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


# ---- the command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = tiny_config(vocab_size=260, bos_id=256, eos_ids=(258,), name="tiny")
    write_nanoinfer2(
        TinyCheckpoint(config, dtype="bfloat16", tokenizer=byte_tokenizer()), tmp_path / "m.nano"
    )
    return tmp_path / "m.nano"


def test_the_command_writes_and_tells(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / "q.nano"
    assert run("quantize", source, "--to", "int4", "-o", out) == 0
    printed = capsys.readouterr().out
    assert "int4, groups of 32, scale search" in printed
    assert "searched" in printed
    for part in (*LAYERS, "all"):
        assert f"  {part} " in printed
    assert "lm_head" not in printed
    assert printed.splitlines()[-1].startswith(f"{out}: ")
    with open_checkpoint(out) as opened:
        assert opened.tensors["layers.0.q.weight"].dtype == "int4"
        assert opened.tensors["lm_head.weight"].dtype == "bfloat16"
        assert opened.tokenizer is not None
        assert opened.config == open_checkpoint(source).config

    options = ("--to", "int8", "--group-size", "16", "--lm-head", "--out")
    assert run("quantize", source, *options, out) == 0  # over the older one
    printed = capsys.readouterr().out
    assert "int8, groups of 16" in printed
    assert "searched" not in printed
    assert "lm_head" in printed
    assert open_checkpoint(out).tensors["lm_head.weight"].dtype == "int8"
    assert run("quantize", out, "--to", "fp8", "-o", tmp_path / "again.nano") == 0
    assert "has int8, which was rounded a second time" in capsys.readouterr().err
    assert run("inspect", out, "--verify", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtypes"]["int8"]["tensors"] == 15
    assert report["metadata"]["quantized"] == "int8, groups of 16"
    assert run("generate", "-m", out, "--temperature", "0", "--max-tokens", "3", "Hello") == 0


def table_rows(printed: str) -> dict[str, list[str]]:
    """The first cell of a row -> the others."""
    rows = [line.split() for line in printed.splitlines()]
    return {cells[0]: cells[1:] for cells in rows if len(cells) > 3 and cells[-1].endswith("%")}


@pytest.mark.parametrize(
    ("options", "columns"),
    [(("--to", "int4"), 2), (("--to", "int4", "--no-search"), 1), (("--to", "fp8"), 1)],
)
def test_the_table_has_the_errors_of_the_file(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    columns: int,
) -> None:
    """Against the written values; `nearest` against what the command writes without a search."""
    monkeypatch.setenv("COLUMNS", "120")
    files = [tmp_path / "nearest.nano", tmp_path / "q.nano"][-columns:]
    for out in files:
        capsys.readouterr()
        extra = ("--no-search",) if out.name == "nearest.nano" else ()
        assert run("quantize", source, *options, *extra, "-o", out) == 0
    rows = table_rows(capsys.readouterr().out)
    assert list(rows) == [*LAYERS, "all"]
    with open_checkpoint(source) as model:
        for part, (weights, *errors, share) in rows.items():
            names = [
                n
                for n in model.tensors
                if n.split(".")[-2] in (LAYERS if part == "all" else (part,))
            ]
            names = [n for n in names if len(model.tensors[n].shape) == 2]
            before = [np.asarray(model.read(name), np.float64).reshape(-1) for name in names]
            count, squares = sum(map(len, before)), sum(float(v @ v) for v in before)
            assert weights == f"{count:,}"
            assert len(errors) == columns
            for cell, file in zip(errors, files, strict=True):
                with open_checkpoint(file) as written:
                    after = [dequantized(written.read(name)).reshape(-1) for name in names]
                lost = sum(float(((a - b) ** 2).sum()) for a, b in zip(after, before, strict=True))
                assert float(cell) == pytest.approx(lost / count, rel=1e-3)
            assert float(share[:-1]) / 100 == pytest.approx(lost / squares, rel=1e-2, abs=1e-5)
            if columns == 2:
                assert float(errors[1]) < 0.99 * float(errors[0])


def test_the_table_of_kept_layers(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = tmp_path / "first.nano", tmp_path / "q.nano"
    assert run("quantize", source, "--to", "int4", "-o", first) == 0
    capsys.readouterr()
    assert run("quantize", first, "--to", "int4", "-o", out) == 0
    streams = capsys.readouterr()
    assert "Weights in int4, groups of 32, all layers kept" in streams.out
    assert "search" not in streams.out
    assert "rounded a second time" not in streams.err
    rows = table_rows(streams.out)
    assert rows["q"][-2:] == ["0", "0.000%"]
    assert rows["all"][0] == f"{2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32):,}"
    with open_checkpoint(out) as opened:
        assert opened.metadata["quantized"] == "int4, groups of 32, all layers kept"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "int2"), "'int2' is not one of"),
        ((), "Missing option '--to'"),
        (
            ("--to", "int4", "--group-size", "48"),
            "--group-size is 48, which does not divide the 32",
        ),
        (("--to", "int8", "--group-size", "x"), "'x' is not a valid integer"),
    ],
)
def test_mistakes_end_in_one_line(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    words: str,
) -> None:
    assert run("quantize", source, *options, "-o", tmp_path / "q.nano") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("nanocupy: error: ")
    assert words in error
    assert os.listdir(tmp_path) == ["m.nano"]


def test_a_tied_lm_head_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = TinyCheckpoint(tiny_config(tied_lm_head=True))
    monkeypatch.setattr(nanocupy.checkpoint.open, "open_checkpoint", lambda *_, **__: model)
    (tmp_path / "m").touch()
    options = ("--to", "int8", "--lm-head", "-o", tmp_path / "q.nano")
    assert run("quantize", tmp_path / "m", *options) == 2
    assert "its LM head is the embedding, which stays in 16 bits" in capsys.readouterr().err


def test_float8_is_what_ml_dtypes_rounds_to() -> None:
    values = np.random.default_rng(3).standard_normal((2, 16)).astype(np.float32)
    matrix, _ = quantized_matrix(values, "fp8", 16, False, "w")
    scaled = values / matrix.scales
    expected = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(matrix.codes, expected)
