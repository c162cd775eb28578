"""Layers that are in few bits already: which keep their codes, in which groups, and the LM head."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from nanocupy.checkpoint import open_checkpoint
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.exporters.quantizing import QuantizedView
from nanocupy.quantized import QuantizedMatrix, quantize
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.quantized_folders import awq_layer, gptq_layer, quantized_folder
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

LAYERS = ("q", "k", "v", "o", "gate", "up", "down")


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
