"""GGUF files that are sound, against the gguf package's own writer, reader and decoder."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from nanocupy.checkpoint import GenerationDefaults, open_checkpoint
from nanocupy.checkpoint.gguf import GGUFCheckpoint
from nanocupy.checkpoint.gguf_file import TENSOR_TYPES, GGUFFile
from nanocupy.config import RopeScaling
from nanocupy.errors import CheckpointError
from tests.checkpoint.gguf_files import array, gguf_name, pair, raw_gguf, text, write_gguf
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

BIASES = {"has_qkv_bias": True, "has_o_bias": True, "has_mlp_bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tied_lm_head": True, "num_kv_heads": 1},
    "llama with biases": BIASES | {"head_size": 16},
    "qwen2": {"architecture": "qwen2", "has_qkv_bias": True, "rope_theta": 1e6},
    "qwen3": {"architecture": "qwen3", "has_qk_norm": True, "head_size": 24, "rms_norm_eps": 1e-6},
    "qwen3 with biases": {"architecture": "qwen3", "has_qk_norm": True, **BIASES},
}


@pytest.mark.parametrize("name", MODELS)
def test_config_and_tensors_come_back(name: str, tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config(**MODELS[name]))
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", model)) as checkpoint:
        assert checkpoint.format == "gguf"
        assert checkpoint.config == model.config
        assert list(checkpoint.tensors) == list(model.tensors)
        for tensor, info in checkpoint.tensors.items():
            assert info == model.tensors[tensor]
            np.testing.assert_array_equal(checkpoint.read(tensor), model.read(tensor), tensor)


def assert_tensors_equal_the_packages(
    checkpoint: GGUFCheckpoint, reader: gguf.GGUFReader, layers: tuple[int, ...]
) -> None:
    """Every tensor outside the layers and in `layers`, decoded by both."""
    theirs = {t.name: t for t in reader.tensors}
    config = checkpoint.config
    for name, info in checkpoint.tensors.items():
        stored = theirs.pop(gguf_name(name))
        if name.startswith("layers.") and int(name.split(".")[1]) not in layers:
            continue
        expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
        expected = expected.reshape(stored.shape[::-1])
        if config.architecture == "llama" and name.split(".")[-2] in ("q", "k"):
            heads = expected.reshape(-1, config.head_size, *expected.shape[1:])
            order = [*range(0, config.head_size, 2), *range(1, config.head_size, 2)]
            expected = heads[:, order].reshape(expected.shape)
        tensor = checkpoint.read(name)
        assert tensor.shape == info.shape
        np.testing.assert_array_equal(tensor.astype(np.float32), expected, name)
    assert not theirs


@pytest.mark.parametrize("type_id", TENSOR_TYPES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_storage_type(architecture: str, type_id: int, tmp_path: Path) -> None:
    config = tiny_config(
        architecture=architecture,
        has_qkv_bias=architecture == "qwen2",
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        head_size=64,
    )
    path = write_gguf(tmp_path / "m.gguf", TinyCheckpoint(config), matrix_type=Type(type_id))
    checkpoint = GGUFCheckpoint(path)
    assert_tensors_equal_the_packages(checkpoint, gguf.GGUFReader(path), (0, 1))
    info = checkpoint.tensors["layers.1.q.weight"]
    block, size = gguf.GGML_QUANT_SIZES[Type(type_id)]
    assert info.nbytes == math.prod(info.shape) // block * size
    down = checkpoint.read("layers.0.down.weight")
    storage = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(Type(type_id).name)
    assert info.dtype == (storage or Type(type_id).name.lower())
    assert down.dtype == (storage or "float32")
    assert down.flags.owndata is False or storage is None  # floats are views of the file
    assert all(fault is None for _, fault in checkpoint.verify())


CODES = {  # type -> kind and group size
    Type.Q4_0: ("int4", 32),
    Type.Q4_1: ("int4", 32),
    Type.Q5_0: ("int8", 32),
    Type.Q8_0: ("int8", 32),
    Type.Q4_K: ("int4", 32),
    Type.Q6_K: ("int8", 16),
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("type_id", CODES)
def test_codes_keep_their_bits(architecture: str, type_id: Type, tmp_path: Path) -> None:
    config = tiny_config(architecture=architecture, has_qkv_bias=architecture == "qwen2")
    width = 256 if type_id in (Type.Q4_K, Type.Q6_K) else 32
    config = config.with_(hidden_size=3 * width, intermediate_size=5 * width)
    config = config.with_(num_heads=4, head_size=3 * width // 4)
    path = write_gguf(tmp_path / "m.gguf", TinyCheckpoint(config), matrix_type=type_id)
    checkpoint = GGUFCheckpoint(path)
    for name, info in checkpoint.tensors.items():
        matrix = checkpoint.read_quantized(name)
        if len(info.shape) == 1:
            assert matrix is None
            continue
        assert matrix is not None
        assert matrix.shape == info.shape
        assert (matrix.kind, matrix.group_size) == CODES[type_id]
        # `read` is held equal to the gguf package's decoder above.
        np.testing.assert_array_equal(matrix.dequantize(), checkpoint.read(name), name)


@pytest.mark.parametrize("type_id", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_elements_of_a_block(type_id: Type, tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config())
    path = write_gguf(tmp_path / "m.gguf", model, matrix_type=type_id)
    checkpoint = GGUFCheckpoint(path)
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    block = bytes(stored.data.reshape(-1)[: gguf.GGML_QUANT_SIZES[type_id][1]])
    d, m = (float(x) for x in np.frombuffer(block[:4], "<f2"))
    matrix = checkpoint.read_quantized("layers.0.down.weight")
    assert matrix is not None
    values = matrix.dequantize()[0]
    for i in range(32):
        if type_id == Type.Q8_0:
            expected = d * int.from_bytes(block[2 + i : 3 + i], signed=True)
        else:
            byte = block[(4 if type_id == Type.Q4_1 else 2) + i % 16]
            code = byte & 15 if i < 16 else byte >> 4
            expected = d * code + m if type_id == Type.Q4_1 else d * (code - 8)
        assert values[i] == np.float32(expected)


def test_other_types_have_no_codes(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=256, num_heads=4, head_size=64)
    for type_id in (Type.Q5_1, Type.Q5_K, Type.BF16):
        path = write_gguf(tmp_path / "m.gguf", TinyCheckpoint(config), matrix_type=type_id)
        assert GGUFCheckpoint(path).read_quantized("layers.0.q.weight") is None


def test_codes_with_scales_that_are_no_numbers(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config())
    path = write_gguf(tmp_path / "m.gguf", model, matrix_type=Type.Q4_1)
    checkpoint = GGUFCheckpoint(path)
    offset = checkpoint._places["layers.1.up.weight"].offset
    checkpoint.close()
    for at in (0, 2):  # the scale, the minimum
        data = bytearray(path.read_bytes())
        data[offset + at : offset + at + 2] = np.float16(np.inf).tobytes()
        (tmp_path / "bad.gguf").write_bytes(data)
        part = "offsets" if at else "scales"
        with pytest.raises(
            CheckpointError, match=f"layers.1.up.weight holds NaN or infinite {part}"
        ):
            GGUFCheckpoint(tmp_path / "bad.gguf").read_quantized("layers.1.up.weight")
    with pytest.raises(CheckpointError, match="no tensor is named 'x'"):
        GGUFCheckpoint(path).read_quantized("x")


def test_type_table_is_the_packages() -> None:
    for type_id, mine in TENSOR_TYPES.items():
        assert mine.name == Type(type_id).name.lower()
        assert (mine.block_size, mine.block_bytes) == gguf.GGML_QUANT_SIZES[Type(type_id)]


def test_metadata_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, Any] = {"s": "é\0✓", "t": True, "f": False}
    writer.add_string("s", values["s"])
    writer.add_bool("t", True)
    writer.add_bool("f", False)
    for width, low in (("uint", 0), ("int", -1)):
        for bits in (8, 16, 32, 64):
            value = 2 ** (bits + low) - 1
            getattr(writer, f"add_{width}{bits}")(f"{width}{bits}", value)
            values[f"{width}{bits}"] = value
    writer.add_float32("f32", 1e-5)
    writer.add_float64("f64", 1e-5)
    values |= {"f32": 1e-5, "f64": 1e-5}
    for key, items in {
        "strings": ["a", "", "漢字"],
        "ints": [1, -2, 3],
        "floats": [0.5, -1.5],
        "bools": [True, False],
    }.items():
        writer.add_array(key, items)
        values[key] = items
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file = GGUFFile(path)
    assert file.tensors == {}
    assert file.metadata == values | {"general.architecture": "llama"}
    for key, value in values.items():
        assert type(file.metadata[key]) is type(value)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_versions_and_alignment(version: int, alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    tensors = {n: np.arange(k, dtype=np.float32) for n, k in (("a", 3), ("b", 70), ("c", 1))}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray(path.read_bytes())
    data[4] = version  # the two differ in byte order alone
    for whole in (data, data[: len(data) - alignment + 4]):  # the last padding may be left out
        path.write_bytes(whole)
        file = GGUFFile(path)
        for name, values in tensors.items():
            stored = file.tensors[name]
            np.testing.assert_array_equal(file.array(stored, "<f4", stored.shape), values)


def test_the_demo_model_equals_the_packages_reading(demo_gguf: Path) -> None:
    checkpoint = GGUFCheckpoint(demo_gguf)
    reader = gguf.GGUFReader(demo_gguf)
    mine = GGUFFile(demo_gguf).metadata
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, float):
            assert np.float32(mine[key]) == np.float32(value)
        else:
            assert mine[key] == value, key
    config = checkpoint.config
    assert (config.num_layers, config.hidden_size, config.head_size) == (30, 576, 64)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 1e5)
    assert config.tied_lm_head
    assert (config.bos_id, config.eos_ids) == (1, (2,))
    assert "<|im_start|>" in checkpoint.chat_template
    assert checkpoint.metadata["general.license"] == "apache-2.0"
    json.dumps(checkpoint.metadata)
    assert_tensors_equal_the_packages(checkpoint, reader, (0, 14, 29))


def test_a_real_vocabulary_is_read_fast(tmp_path: Path) -> None:
    tokens = [f"token-{i}" for i in range(152_000)]
    pairs = [
        pair("tokens", 9, array(8, len(tokens), b"".join(map(text, tokens)))),
        pair("merges", 9, array(8, len(tokens), b"".join(map(text, tokens)))),
        pair("types", 9, array(5, len(tokens), b"\1\0\0\0" * len(tokens))),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf(pairs))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        file = GGUFFile(path)
        seconds.append(time.perf_counter() - start)
    assert file.metadata["tokens"] == tokens
    assert min(seconds) < 0.5


def test_the_package_is_not_imported_for_opening(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", TinyCheckpoint(tiny_config()))
    code = (
        "import sys, nanocupy.checkpoint as c\n"
        f"c.open_checkpoint({str(path)!r}).read('embed.weight')\n"
        "assert 'gguf' not in sys.modules and 'safetensors' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- settings


def open_with(tmp_path: Path, config: dict[str, Any] | None = None, **options: Any):
    model = TinyCheckpoint(tiny_config(**config or {}))
    return GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", model, **options))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type": "none", "factor": 4.0}, RopeScaling()),
        ({"type": "linear"}, RopeScaling()),
        ({"factor": 1.0}, RopeScaling()),
        ({"factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"type": "linear", "factor": 2.5}, RopeScaling("linear", 2.5)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 16},
            RopeScaling("yarn", 4.0, 16),
        ),
        ({"type": "yarn", "factor": 2.0}, RopeScaling("yarn", 2.0, 64)),
        (
            {
                "type": "yarn",
                "factor": 4.0,
                "original_context_length": 16,
                "attn_factor": 0.5,
                "yarn_beta_fast": 16.0,
                "yarn_beta_slow": 2.0,
                "yarn_ext_factor": 1.0,
            },
            RopeScaling(
                "yarn",
                4.0,
                16,
                beta_fast=16.0,
                beta_slow=2.0,
                attention_factor=0.5 * (0.1 * math.log(4) + 1),
            ),
        ),
    ],
)
def test_rope_scaling(keys: dict[str, Any], expected: RopeScaling, tmp_path: Path) -> None:
    keys = {f"llama.rope.scaling.{k}": v for k, v in keys.items()}
    assert open_with(tmp_path, keys=keys).config.rope_scaling == expected


def llama3_divisors(factor: float, theta: float, head_size: int, original: int) -> np.ndarray:
    """LLaMA 3.1's rule as its authors publish it, pair by pair: frequency in over frequency out."""
    divisors = []
    for i in range(head_size // 2):
        frequency = theta ** (-2 * i / head_size)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / 4:
            scaled = frequency
        elif wavelength > original / 1:
            scaled = frequency / factor
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            scaled = (1 - smooth) * frequency / factor + smooth * frequency
        divisors.append(frequency / scaled)
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0, 16.0])
@pytest.mark.parametrize("head_size", [64, 128])
def test_llama3_scaling_is_recovered(factor: float, head_size: int, tmp_path: Path) -> None:
    config = {"head_size": head_size, "rope_theta": 5e5, "max_context": 131072}
    divisors = llama3_divisors(factor, 5e5, head_size, 8192)
    assert divisors.max() == factor
    checkpoint = open_with(tmp_path, config, extra={"rope_freqs.weight": divisors})
    assert checkpoint.config.rope_scaling == RopeScaling("llama3", factor, 8192, 1.0, 4.0)
    assert checkpoint.config.max_context == 131072
    assert list(checkpoint.tensors) == list(checkpoint.config.tensor_shapes())


def test_neutral_rope_divisors_are_no_scaling(tmp_path: Path) -> None:
    checkpoint = open_with(tmp_path, extra={"rope_freqs.weight": np.ones(4, np.float32)})
    assert checkpoint.config.rope_scaling == RopeScaling()


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    absent = (
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.freq_base",
        "rope.dimension_count",
    )
    keys: dict[str, Any] = {f"llama.{key}": ... for key in absent}
    keys |= {"tokenizer.ggml.bos_token_id": 0xFFFFFFFF, "tokenizer.ggml.eos_token_id": ...}
    config = open_with(tmp_path, {"num_kv_heads": 4}, keys=keys).config
    assert (config.num_kv_heads, config.head_size, config.rope_theta) == (4, 8, 10000.0)
    assert (config.bos_id, config.eos_ids) == (None, ())


def test_equal_numbers_layer_by_layer(tmp_path: Path) -> None:
    keys = {
        "llama.attention.head_count": [4, 4],
        "llama.attention.head_count_kv": [2, 2],
        "llama.feed_forward_length": [64, 64],
    }
    config = open_with(tmp_path, keys=keys).config
    assert (config.num_heads, config.num_kv_heads, config.intermediate_size) == (4, 2, 64)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (2,)),
        ({"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}, (2, 5)),
        ({"tokenizer.chat_template": "{{ x }}<|im_end|>"}, (2, 3)),
        ({"tokenizer.chat_template": "<|eot_id|>"}, (2,)),  # no such token
        ({"tokenizer.chat_template": "hello"}, (2,)),
    ],
)
def test_stop_ids(keys: dict[str, Any], expected: tuple[int, ...], tmp_path: Path) -> None:
    keys["tokenizer.ggml.tokens"] = ["<unk>", "<s>", "</s>", "<|im_end|>"]
    checkpoint = open_with(tmp_path, keys=keys)
    assert checkpoint.config.eos_ids == expected
    assert checkpoint.chat_template == keys.get("tokenizer.chat_template")


def test_generation_defaults(tmp_path: Path) -> None:
    keys = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.95,
        "general.sampling.penalty_repeat": 1.1,
    }
    assert open_with(tmp_path, keys=keys).generation_defaults == GenerationDefaults(
        0.6, 20, 0.95, repetition_penalty=1.1
    )


def test_verify_names_what_is_not_finite(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config())
    model.arrays["layers.1.up.weight"][3, 4] = np.inf
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", model))
    faults = {name: fault for name, fault in checkpoint.verify() if fault}
    assert faults == {"layers.1.up.weight": "holds NaN or infinite values"}
