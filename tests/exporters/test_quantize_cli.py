"""`nanocupy quantize`: what it writes, what its table says, and mistakes in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanocupy.checkpoint.open
from nanocupy.checkpoint import open_checkpoint
from nanocupy.checkpoint.base import dequantized
from nanocupy.cli import main
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from tests.checkpoint.quantized_folders import gptq_layer, quantized_folder
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.cli.test_cli_generate import byte_tokenizer

LAYERS = ("q", "k", "v", "o", "gate", "up", "down")


def run(*argv: object) -> int:
    return main([str(a) for a in argv])


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
