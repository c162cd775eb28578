"""AWQ, GPTQ and FP8 folders that are broken or not taken: one line each, with what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanocupy.checkpoint.huggingface import HuggingFaceCheckpoint
from nanocupy.errors import CheckpointError
from tests.checkpoint.quantized_folders import awq_layer, quantized_folder
from tests.checkpoint.test_hf_quantized import AWQ, FORMS, FP8, GPTQ, compressed, packed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("awq", "'awq' is not an object"),
        ({}, "quant_method None is not supported; nanocupy takes awq (4 bits"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported"),
        ({"quant_method": 4}, "quant_method is 4; it must be text"),
        (AWQ | {"bits": 3}, "bits is 3: not supported"),
        (AWQ | {"bits": None}, "bits is missing"),
        (AWQ | {"version": "gemv"}, "version is 'gemv': not supported"),
        (AWQ | {"group_size": 0}, "group_size is 0"),
        (AWQ | {"group_size": "x"}, "group_size is 'x'"),
        (AWQ | {"zero_point": 1}, "zero_point is 1; it must be true or false"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        (GPTQ | {"bits": 2}, "bits is 2: not supported"),
        (GPTQ | {"bits": 8, "sym": False}, "sym is false with 8 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format is true"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        (GPTQ | {"dynamic": {"+:.*up.*": {"bits": 8}}}, "settings by layer are not supported"),
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size is [128]"),
        (FP8 | {"weight_block_size": [0, 16]}, "weight_block_size is [0, 16]"),
        (compressed("tensor") | {"format": "int-quantized"}, "format is 'int-quantized'"),
        (packed(3), "num_bits is 3"),
        (packed(8, symmetric=False), "symmetric is false with 8 bits"),
        (packed(strategy="tensor"), "strategy is 'tensor'"),
        (packed(type="float"), "type is 'float'"),
        (packed(group_size=None), "group_size is missing"),
        (packed(actorder="x"), "actorder is 'x'"),
        (compressed("tensor") | {"config_groups": {}}, "config_groups is {}"),
        (compressed("tensor") | {"config_groups": {"g": {}}}, "'g' has no weights"),
        (compressed("tensor", num_bits=4), "num_bits is 4"),
        (compressed("tensor", type="int"), "type is 'int'"),
        (compressed("group"), "strategy is 'group'"),
        (compressed("tensor", symmetric=False), "symmetric is false"),
        (compressed("block"), "strategy 'block' contradicts block_structure None"),
        (compressed("tensor") | {"sparsity_config": {"format": "2:4"}}, "sparsity_config is"),
    ],
)
def test_settings_that_are_not_taken(settings: Any, words: str, tmp_path: Path) -> None:
    quantized_folder(tmp_path, settings, awq_layer)
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceCheckpoint(tmp_path)
    message = str(caught.value)
    assert f"{tmp_path}/config.json: quantization_config" in message
    assert words in message
    assert "\n" not in message


UP = "model.layers.1.mlp.up_proj."  # [48, 32]


def put(part: str, array: np.ndarray | None) -> Any:
    def change(tensors: dict[str, np.ndarray]) -> None:
        if array is None:
            del tensors[UP + part]
        else:
            tensors[UP + part] = array

    return change


I32, F16, F32 = np.int32, np.float16, np.float32


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("awq", put("qweight", None), "has no qweight, which awq, 4 bits, groups of 16 needs"),
        ("awq", put("qzeros", None), "has no qzeros"),
        ("awq", put("scales", None), "has no scales"),
        ("awq", put("qweight", np.zeros((48, 4), I32)), "has qweight of shape [48, 4]; a matrix"),
        ("awq", put("qweight", np.zeros((32, 6), F32)), "has qweight stored as F32; it must be I3"),
        ("awq", put("qzeros", np.zeros((2, 5), I32)), "has qzeros of shape [2, 5]"),
        ("awq", put("scales", np.zeros((4, 48), F16)), "has scales of shape [4, 48]"),
        ("awq", put("scales", np.zeros((2, 48), I32)), "has scales stored as I32"),
        ("awq", put("weight", np.zeros((48, 32), F16)), "in floating point, but has qweight"),
        ("awq", put("zeros", np.zeros(3, F16)), "up_proj.zeros' in model.safetensors is not part"),
        ("gptq", put("qzeros", None), "has no qzeros, which gptq, 4 bits, groups of 16 needs"),
        ("gptq", put("qweight", np.zeros((32, 6), I32)), "has qweight of shape [32, 6]"),
        ("gptq", put("g_idx", np.zeros(48, I32)), "has g_idx of shape [48]"),
        ("gptq act-order", put("g_idx", None), "has no g_idx"),
        ("gptq 8 bits", put("qweight", np.zeros((4, 48), I32)), "has qweight of shape [4, 48]"),
        ("packed", put("weight_packed", None), "has no weight_packed, which compressed-tensors, 4"),
        ("packed", put("weight_scale", np.ones((48, 3), F16)), "has weight_scale of shape [48, 3]"),
        ("packed zeros", put("weight_zero_point", None), "has no weight_zero_point"),
        ("packed act-order", put("weight_g_idx", None), "has no weight_g_idx"),
        ("fp8", put("weight_scale", None), "has neither weight_scale nor weight_scale_inv"),
        ("fp8", put("weight_scale_inv", np.ones(1, F32)), "need one of weight_scale and"),
        ("fp8", put("weight", None), "has no weight, which fp8"),
        ("fp8", put("weight", np.ones((48, 32), F16)), "is stored in floating point, but has"),
        ("fp8", put("weight_scale", np.ones(7, F32)), "has weight_scale of shape [7]"),
        ("fp8 blocks", put("weight_scale_inv", np.ones((3, 2), F32)), "_inv of shape [3, 2]; a m"),
    ],
)
def test_tensors_that_do_not_fit(form: str, change: Any, words: str, tmp_path: Path) -> None:
    settings, make, _ = FORMS[form]
    quantized_folder(tmp_path, settings, make, change=change)
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceCheckpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("form", "settings", "words"),
    [
        ("awq", {"group_size": 20}, "inputs, which groups of 20 do not divide"),
        ("gptq", {"group_size": 128}, "inputs, which groups of 128 do not divide"),
        ("fp8 blocks", {"weight_block_size": [16, 20]}, "which blocks of 20 do not divide"),
    ],
)
def test_groups_that_do_not_divide(
    form: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    stated, make, _ = FORMS[form]
    quantized_folder(tmp_path, stated | settings, make)
    with pytest.raises(CheckpointError, match=words):
        HuggingFaceCheckpoint(tmp_path)


def with_value(part: str, at: Any, value: Any) -> Any:
    def change(tensors: dict[str, np.ndarray]) -> None:
        array = tensors[UP + part].copy()
        array[at] = value
        tensors[UP + part] = array

    return change


def zero_beside_nan(tensors: dict[str, np.ndarray]) -> None:
    with_value("weight_scale", 0, 0)(tensors)
    with_value("weight", (2, 3), np.nan)(tensors)


@pytest.mark.filterwarnings("error")  # a damaged file is one line, not NumPy's as well
@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("awq", with_value("scales", (1, 5), np.nan), "holds NaN or infinite scales"),
        ("gptq", with_value("scales", (0, 5), np.inf), "holds NaN or infinite scales"),
        ("awq", with_value("scales", slice(None), np.inf), "holds NaN or infinite scales"),
        ("gptq", with_value("g_idx", 3, 2), "has a g_idx of 2; there are the groups 0 to 1"),
        ("gptq", with_value("g_idx", 3, -1), "has a g_idx of -1"),
        ("gptq", with_value("g_idx", 3, 1), "has 15 inputs in group 0 by g_idx"),
        ("packed act-order", with_value("weight_g_idx", 3, 9), "has a weight_g_idx of 9"),
        ("gptq 8 bits", with_value("qzeros", (0, 0), 5), "8-bit codes whose zero is not 128"),
        ("fp8", with_value("weight_scale", 0, np.nan), "holds NaN or infinite scales"),
        (
            "fp8",
            with_value("weight_scale", 0, 1e36),
            "holds a scale of 1e+36 (row 0, group 0), with",
        ),
        ("fp8", with_value("weight", (2, 3), np.nan), "holds NaN values"),
        ("fp8", zero_beside_nan, "holds NaN values"),
    ],
)
def test_numbers_that_are_none(form: str, change: Any, words: str, tmp_path: Path) -> None:
    settings, make, _ = FORMS[form]
    quantized_folder(tmp_path, settings, make, change=change)
    checkpoint = HuggingFaceCheckpoint(tmp_path)  # only headers are looked at
    for read in (checkpoint.read, checkpoint.read_quantized):
        with pytest.raises(CheckpointError) as caught:
            read("layers.1.up.weight")
        assert str(caught.value).startswith(f"{tmp_path}: tensor layers.1.up.weight h")
        assert words in str(caught.value)
    damaged = [name for name, problem in checkpoint.verify() if problem]
    assert damaged == ["layers.1.up.weight"]
