"""AWQ, GPTQ and FP8 folders: every value where the formats put it, and what is wrong named."""

from __future__ import annotations

import json
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nanocupy.checkpoint import open_checkpoint
from nanocupy.checkpoint.hf_quantization import quantization_scheme
from nanocupy.checkpoint.hf_quantized import QuantizedLayer
from nanocupy.checkpoint.huggingface import HuggingFaceCheckpoint
from nanocupy.checkpoint.safetensors_file import SafetensorsFile
from nanocupy.cli import main
from nanocupy.errors import CheckpointError
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.model.load import load_numpy_weights
from tests.checkpoint.quantized_folders import (
    awq_layer,
    fp8_layer,
    gptq_layer,
    packed_layer,
    quantized_folder,
)
from tests.checkpoint.test_huggingface import transformers_name

AWQ: dict[str, Any] = {
    "quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm",
}  # fmt: skip
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    fields = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": fields,
                "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    }


def packed(bits: int = 4, **weights: Any) -> dict[str, Any]:
    fields = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": fields}},
        "ignore": ["lm_head"],
    }


UP = "layers.1.up.weight"  # [48, 32]

FORMS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "awq": (AWQ, awq_layer, "int4"),
    "awq GEMM": (AWQ | {"version": "GEMM"}, awq_layer, "int4"),
    "awq of a row": (AWQ | {"group_size": -1}, "row awq", "int4"),
    "awq of 8": (AWQ | {"group_size": 8}, partial(awq_layer, group=8), "int4"),
    "awq bfloat16": (AWQ, partial(awq_layer, scale_dtype=ml_dtypes.bfloat16), "int4"),
    "awq without zeros": (
        AWQ | {"zero_point": False},
        partial(awq_layer, zero_point=False, with_zeros=False),
        "int4",
    ),
    "awq symmetric": (AWQ | {"zero_point": False}, partial(awq_layer, zero_point=False), "int4"),
    "gptq": (GPTQ, gptq_layer, "int4"),
    "gptq of a row": (GPTQ | {"group_size": -1}, "row gptq", "int4"),
    "gptq zeros": (GPTQ | {"sym": False}, partial(gptq_layer, sym=False), "int4"),
    "gptq v2": (
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        partial(gptq_layer, sym=False, version=2),
        "int4",
    ),
    "gptq act-order": (
        GPTQ | {"desc_act": True, "sym": False},
        partial(gptq_layer, act_order=True, sym=False),
        "int4",
    ),
    "gptq without g_idx": (GPTQ, partial(gptq_layer, with_g_idx=False), "int4"),
    "gptq 8 bits": (GPTQ | {"bits": 8}, partial(gptq_layer, bits=8), "int8"),
    "gptq 8 bits act-order": (
        GPTQ | {"bits": 8, "desc_act": True},
        partial(gptq_layer, bits=8, act_order=True),
        "int8",
    ),
    "fp8": (FP8, fp8_layer, "float8_e4m3"),
    "fp8 scalar": (FP8, partial(fp8_layer, scale_shape="scalar"), "float8_e4m3"),
    "fp8 row": (FP8, partial(fp8_layer, scale_shape="row"), "float8_e4m3"),
    "fp8 blocks": (
        FP8 | {"weight_block_size": [10, 16], "fmt": "e4m3"},
        partial(fp8_layer, scale_shape="block", block=(10, 16), name="weight_scale_inv"),
        "float8_e4m3",
    ),
    "compressed tensor": (compressed("tensor"), fp8_layer, "float8_e4m3"),
    "compressed channel": (
        compressed("channel"),
        partial(fp8_layer, scale_shape="channel", scale_dtype=ml_dtypes.bfloat16),
        "float8_e4m3",
    ),
    "compressed blocks": (
        compressed("block", block_structure=[16, 16]),
        partial(fp8_layer, scale_shape="block", block=(16, 16)),
        "float8_e4m3",
    ),
    "packed": (packed(), packed_layer, "int4"),
    "packed of a row": (packed(strategy="channel", group_size=None), "row packed", "int4"),
    "packed zeros": (packed(symmetric=False), partial(packed_layer, sym=False), "int4"),
    "packed act-order": (
        packed(actorder="group", symmetric=False),
        partial(packed_layer, act_order=True, sym=False),
        "int4",
    ),
    "packed static": (packed(actorder="static"), packed_layer, "int4"),
    "packed 8 bits": (packed(8), partial(packed_layer, bits=8), "int8"),
    "packed 8 bits act-order": (
        packed(8, actorder="group"),
        partial(packed_layer, bits=8, act_order=True),
        "int8",
    ),
}


def row_layer(kind: str) -> Any:
    """Layers with one group a row, whatever the row's length."""
    make = {"row awq": awq_layer, "row gptq": gptq_layer, "row packed": packed_layer}[kind]
    return lambda rng, shape: make(rng, shape, group=shape[1])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str, tmp_path: Path) -> None:
    settings, make, dtype = FORMS[form]
    if isinstance(make, str):
        make = row_layer(make)
    values = quantized_folder(tmp_path, settings, make, num_shards=3 if form == "awq" else 1)
    with HuggingFaceCheckpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == list(checkpoint.config.tensor_shapes())
        for name, info in checkpoint.tensors.items():
            expected = values[transformers_name(name)]
            matrix = checkpoint.read_quantized(name)
            if "layers" in name and len(info.shape) == 2:
                assert matrix is not None
                assert info.dtype == dtype
                assert matrix.kind == {"float8_e4m3": "fp8"}.get(dtype, dtype)
                assert matrix.shape == info.shape == expected.shape
                assert (matrix.input_order is not None) == ("act-order" in form)
                np.testing.assert_array_equal(matrix.dequantize(), expected, name)
            else:
                assert matrix is None
                assert info.dtype == "float16"
            np.testing.assert_array_equal(checkpoint.read(name), expected, name)
        assert [problem for _, problem in checkpoint.verify() if problem] == []
        assert checkpoint.metadata["quantization"]
        loaded = load_numpy_weights(checkpoint)
        gate_up = [values[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        np.testing.assert_array_equal(
            loaded["layers.1.gate_up.weight"], np.concatenate(gate_up).astype(np.float32)
        )


@pytest.mark.parametrize(
    "form", ["awq", "gptq act-order", "gptq 8 bits act-order", "packed act-order"]
)
def test_layers_unpacked_in_pieces(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanocupy.checkpoint.hf_quantized._ROWS_AT_ONCE", 24)
    settings, make, _ = FORMS[form]
    values = quantized_folder(tmp_path, settings, make)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(checkpoint.read(name), values[transformers_name(name)])


def test_sizes_count_scales_and_the_rest(tmp_path: Path) -> None:
    settings, make, _ = FORMS["gptq act-order"]
    quantized_folder(tmp_path, settings, make)
    info = HuggingFaceCheckpoint(tmp_path).tensors["layers.0.up.weight"]  # [48, 32], two groups
    assert info.nbytes == 48 * 16 + 2 * 48 * 2 + 2 * 24 + 32 * 4


def test_inspect_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, make, _ = FORMS["gptq act-order"]
    values = quantized_folder(tmp_path / "hf", settings, make)
    assert main(["inspect", str(tmp_path / "hf"), "--verify", "--json", "--tensors"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtypes"]["int4"]["tensors"] == 14
    assert report["metadata"]["quantization"] == "gptq, 4 bits, groups of 16, act-order"
    assert report["verify"]["damaged"] == {}
    for options, dtype in (((), "int4"), (("--dtype", "float32"), "float32")):
        out = tmp_path / "m.nano"
        assert main(["export-llama", str(tmp_path / "hf"), str(out), *options]) == 0
        capsys.readouterr()
        with open_checkpoint(out) as opened:
            assert opened.tensors["layers.0.q.weight"].dtype == dtype
            for name in opened.tensors:
                np.testing.assert_array_equal(opened.read(name), values[transformers_name(name)])


@pytest.mark.parametrize("form", ["awq", "gptq", "fp8"])
def test_layers_left_as_they_were(form: str, tmp_path: Path) -> None:
    settings, make, dtype = FORMS[form]
    settings = settings | {"modules_to_not_convert": ["layers.0.self_attn", "lm_head"]}
    values = quantized_folder(tmp_path, settings, make, skip=("layers.0.self_attn",))
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert checkpoint.tensors["layers.0.q.weight"].dtype == "float16"
    assert checkpoint.read_quantized("layers.0.q.weight") is None
    assert checkpoint.tensors["layers.1.q.weight"].dtype == dtype
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(checkpoint.read(name), values[transformers_name(name)])


def test_what_the_writers_leave_beside_the_weights(tmp_path: Path) -> None:
    """AutoGPTQ's biases of zeros, scales of activations and of a KV cache."""

    def add_biases(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if n.endswith("qweight")]:
            bias = np.zeros(tensors[name].shape[1], np.float16)
            tensors[name.replace("qweight", "bias")] = bias

    quantized_folder(tmp_path / "gptq", GPTQ, gptq_layer, change=add_biases)
    assert not HuggingFaceCheckpoint(tmp_path / "gptq").config.has_o_bias

    def add_scales(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name.replace("weight_scale", "input_scale")] = np.ones(1, np.float32)
            tensors[name.replace("weight_scale", "activation_scale")] = np.ones(1, np.float32)
        tensors["model.layers.0.self_attn.k_scale"] = np.ones(1, np.float32)

    quantized_folder(tmp_path / "fp8", FP8, fp8_layer, change=add_scales)
    HuggingFaceCheckpoint(tmp_path / "fp8")

    def add_bias(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.up_proj.bias"] = np.ones(48, np.float16)

    quantized_folder(tmp_path / "bad", GPTQ, gptq_layer, change=add_bias)
    with pytest.raises(CheckpointError, match=r"layers.0.up.bias does not belong"):
        HuggingFaceCheckpoint(tmp_path / "bad")


@pytest.mark.parametrize(
    ("form", "part", "at"),
    [
        ("awq", "scales", (1, 5)),
        ("gptq", "scales", (0, 5)),
        ("gptq 8 bits act-order", "scales", (1, 7)),
        ("packed", "weight_scale", (3, 1)),
        ("fp8", "weight_scale", 0),
        ("fp8 blocks", "weight_scale_inv", (1, 1)),
    ],
)
def test_scales_of_0_are_groups_of_one_value(form: str, part: str, at: Any, tmp_path: Path) -> None:
    """Tiny scales vanish in float16: the model is whole all the same, here and once exported."""
    settings, make, _ = FORMS[form]
    name = f"model.layers.1.mlp.up_proj.{part}"
    rest = HuggingFaceCheckpoint(make_folder(tmp_path / "whole", settings, make)).read(UP)

    def vanish(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][at] = 0

    with open_checkpoint(make_folder(tmp_path / "zero", settings, make, vanish)) as checkpoint:
        matrix = checkpoint.read_quantized(UP)
        assert matrix is not None
        assert matrix.scales.all()
        values = checkpoint.read(UP)
        assert ((values == 0) | (values == rest)).all()
        lost = ((values == 0) & (rest != 0)).any(axis=0 if form == "fp8 blocks" else 1)
        assert lost.any()
        assert [problem for _, problem in checkpoint.verify() if problem] == []
        write_nanoinfer2(checkpoint, tmp_path / "m.nano")
    with open_checkpoint(tmp_path / "m.nano") as opened:
        np.testing.assert_array_equal(opened.read(UP), values)
        assert [problem for _, problem in opened.verify() if problem] == []


def make_folder(path: Path, settings: Any, make: Any, change: Any = None) -> Path:
    quantized_folder(path, settings, make, change=change)
    return path


def test_blocks_far_taller_than_the_matrix(tmp_path: Path) -> None:
    """Memory follows the stored tensors, whatever size of blocks the config states."""
    block = (1 << 20, 1)
    make = partial(fp8_layer, scale_shape="block", block=block, name="weight_scale_inv")
    values = quantized_folder(tmp_path, FP8 | {"weight_block_size": list(block)}, make)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    tracemalloc.start()
    found = checkpoint.read(UP)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, values["model.layers.1.mlp.up_proj.weight"])
    assert peak < 1 << 20


def test_rows_need_fill_words_only_where_zeros_are_packed(tmp_path: Path) -> None:
    """Packed along the inputs, codes leave the number of rows free."""
    scheme = quantization_scheme({"quantization_config": packed()}, "here")
    assert scheme is not None
    for sym in (True, False):
        layer = packed_layer(np.random.default_rng(1), (48, 32), sym=sym)
        tensors = {name: part[:44] for name, part in layer.tensors.items()}
        if not sym:
            tensors["weight_zero_point"] = layer.tensors["weight_zero_point"]
        path = tmp_path / f"{sym}.safetensors"
        save_file(tensors | {"weight_shape": np.array([44, 32])}, path)
        file = SafetensorsFile(path)
        parts = {name: (file, file.tensors[name]) for name in tensors if name != "weight_shape"}
        if sym:
            found = QuantizedLayer(scheme, (44, 32), parts, "here").read()
            np.testing.assert_array_equal(found.dequantize(), layer.values[:44])
        else:
            with pytest.raises(CheckpointError, match=r"here is \[44, 32\]: 8 codes to a word"):
                QuantizedLayer(scheme, (44, 32), parts, "here")


def test_older_compressed_tensors_folders(tmp_path: Path) -> None:
    settings, make, _ = FORMS["packed"]
    for number, stated in enumerate(
        (settings, {key: value for key, value in settings.items() if key != "quant_method"})
    ):
        folder = tmp_path / str(number)
        values = quantized_folder(folder, None, make, compression_config=stated)  # type: ignore
        with HuggingFaceCheckpoint(folder) as checkpoint:
            assert checkpoint.tensors[UP].dtype == "int4"
            expected = values["model.layers.1.mlp.up_proj.weight"]
            np.testing.assert_array_equal(checkpoint.read(UP), expected)
    broken = settings | {"format": "x"}
    quantized_folder(tmp_path / "bad", None, make, compression_config=broken)  # type: ignore
    with pytest.raises(CheckpointError, match=r"config.json: compression_config: format is 'x'"):
        HuggingFaceCheckpoint(tmp_path / "bad")


def test_an_unquantised_folder_has_no_codes(tmp_path: Path) -> None:
    quantized_folder(tmp_path, None, awq_layer, skip=("",))  # type: ignore[arg-type]
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert checkpoint.read_quantized("layers.0.q.weight") is None
    assert "quantization" not in checkpoint.metadata
    with pytest.raises(CheckpointError, match="no tensor is named 'x'"):
        checkpoint.read_quantized("x")
