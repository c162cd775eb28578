"""Hugging Face folders that are broken or hostile: one clear line, little memory, no hang."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocupy.checkpoint import open_checkpoint
from nanocupy.checkpoint.safetensors_file import SafetensorsFile
from nanocupy.errors import CheckpointError, NanocupyError
from nanocupy.strict_json import MAX_JSON_BYTES
from tests.checkpoint.hf_folders import (
    llama_config,
    llama_tensors,
    safetensors_bytes,
    write_folder,
)

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"


def assert_one_clear_line(error: BaseException, path: Path) -> None:
    line = str(error)
    assert "\n" not in line
    assert line.startswith(str(path))
    assert len(line) < len(str(path)) + 500
    assert line.isprintable()


# ---- folders


def edit_config(**changes: Any) -> Callable[[Path], object]:
    return lambda path: (path / "config.json").write_text(json.dumps(llama_config(**changes)))


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: (path / name).write_bytes(data)


def edit_index(tensor: str, shard: Any) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        write_folder(path, num_shards=2)
        (path / "model.safetensors").unlink()
        index = json.loads((path / INDEX).read_text())
        if shard is None:
            del index["weight_map"][tensor]
        else:
            index["weight_map"][tensor] = shard
        (path / INDEX).write_text(json.dumps(index))

    return edit


def with_tensors(**changes: Any) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        tensors = llama_tensors()
        for name, tensor in changes.items():
            name = name.replace("__", ".")
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
        write_folder(path, tensors=tensors)

    return edit


def missing_shard(path: Path) -> None:
    edit_index("lm_head.weight", FIRST)(path)
    (path / FIRST).unlink()


def doubled_tensor(path: Path) -> None:
    write_folder(path, num_shards=2)
    (path / "model.safetensors").unlink()
    (path / FIRST.replace("1-of", "2-of")).write_bytes((path / FIRST).read_bytes())


def append(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes() + data)


def truncate(name: str, length: int) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:length])


def fifo(name: str) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return edit


def dangling_link(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("../blobs/gone")


def only_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


EMBED = "model.embed_tokens.weight"
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "a folder of gguf": (
        lambda p: (p / "config.json").rename(p / "model.gguf"),
        "to read model.gguf, name the file",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "neither model.safetensors"),
    "only pickle": (only_pickle, "only pytorch_model.bin: pickled"),
    "dangling link": (dangling_link, "the target of a link, is missing"),
    "config is text": (write("config.json", "hello"), "not valid JSON"),
    "config is empty": (write("config.json", ""), "not valid JSON"),
    "config is a list": (write("config.json", "[1]"), "is a list, not an object"),
    "config is binary": (write("config.json", b"\xff\xfe{}"), "not UTF-8"),
    "config is deep": (write("config.json", '{"a":' * 40 + "1" + "}" * 40), "deeper than 32"),
    "config is very deep": (write("config.json", '{"a":' * 99999), "deeper than 32"),
    "config says NaN": (write("config.json", '{"rms_norm_eps": NaN}'), "NaN is not a number"),
    "config says 1e999": (write("config.json", '{"rms_norm_eps": 1e999}'), "beyond"),
    "config twice": (write("config.json", '{"a": 1, "a": 2}'), "'a' occurs twice"),
    "config digits": (write("config.json", '{"a": ' + "9" * 9999 + "}"), "thousands of digits"),
    "config surrogate": (write("config.json", '{"a": "\\ud800"}'), "not Unicode"),
    "config huge": (write("config.json", b" " * (MAX_JSON_BYTES + 1)), "larger than"),
    "config fifo": (fifo("config.json"), "not a regular file"),
    "weights fifo": (fifo("model.safetensors"), "not a regular file"),
    "architecture": (edit_config(architectures=["BertModel"]), "'BertModel' is not supported"),
    "mixture": (edit_config(num_local_experts=8), "mixture-of-experts"),
    "other dimensions": (edit_config(hidden_size=64), r"has shape \[40, 32\].*says \[40, 64\]"),
    "more layers": (edit_config(num_hidden_layers=3), "layers.2.attn_norm.weight.*missing"),
    "fewer layers": (edit_config(num_hidden_layers=1), "layers.1.* does not belong"),
    "temperature": (
        write("generation_config.json", '{"temperature": "hot"}'),
        "generation_config.json: temperature is 'hot'",
    ),
    "top_p": (write("generation_config.json", '{"top_p": 1.5}'), "top_p is 1.5"),
    "top_k": (write("generation_config.json", '{"top_k": 2.5}'), "top_k is 2.5"),
    "do_sample": (write("generation_config.json", '{"do_sample": 1}'), "do_sample is 1"),
    "penalty": (write("generation_config.json", '{"repetition_penalty": 0}'), "penalty is 0"),
    "template": (write("tokenizer_config.json", '{"chat_template": 3}'), "chat_template is 3"),
    "template bytes": (write("chat_template.jinja", b"\xff"), "not UTF-8"),
    "template huge": (write("chat_template.jinja", b"a" * (2 << 20)), "larger than"),
    "missing tensor": (with_tensors(model__norm__weight=None), "final_norm.weight.*missing"),
    "unknown tensor": (
        with_tensors(**{"model.layers.0.self_attn.sinks": np.ones(4, np.float32)}),
        "'model.layers.0.self_attn.sinks' in model.safetensors is not part",
    ),
    "stray bias": (
        with_tensors(**{"model.layers.0.mlp.up_proj.bias": np.ones(48, np.float32)}),
        "layers.0.up.bias does not belong",
    ),
    "float64": (with_tensors(model__norm__weight=np.ones(32)), "stored as F64; nanocupy reads"),
    "missing shard": (missing_shard, f"{FIRST}, named by {INDEX}, is missing"),
    "doubled tensor": (doubled_tensor, "is in both"),
    "path above": (edit_index(EMBED, "../model.safetensors"), "only plain .safetensors names"),
    "absolute path": (edit_index(EMBED, "/etc/a.safetensors"), "only plain .safetensors names"),
    "windows path": (edit_index(EMBED, "..\\a.safetensors"), "only plain .safetensors names"),
    "not safetensors": (edit_index(EMBED, "config.json"), "only plain .safetensors names"),
    "shard is a number": (edit_index(EMBED, 3), "only plain .safetensors names"),
    "long shard name": (edit_index(EMBED, "x" * 300 + ".safetensors"), "only plain"),
    "nul in a shard name": (edit_index(EMBED, "a\0.safetensors"), "only plain"),
    "wrong shard": (edit_index(EMBED, FIRST.replace("1-of", "2-of")), f"is in .*{INDEX} says"),
    "unlisted tensor": (edit_index(EMBED, None), f"is in .*{INDEX} says None"),
    "listed for nothing": (edit_index("x", FIRST), f"'x' is not in {FIRST}, where"),
    "truncated": (truncate("model.safetensors", 5000), "truncated"),
    "no header": (truncate("model.safetensors", 4), "too few"),
    "empty": (truncate("model.safetensors", 0), "is empty"),
    "padded": (append("model.safetensors", b"\0" * 64), "padded"),
    "mislabelled gguf": (write("model.safetensors", b"GGUF" + b"\3" * 64), "is a GGUF file"),
    "mislabelled text": (write("model.safetensors", "once upon a time " * 9), "header length"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_bad_folder(name: str, tmp_path: Path) -> None:
    damage, message = FOLDERS[name]
    path = write_folder(tmp_path / "model")
    damage(path)
    with pytest.raises(NanocupyError, match=message) as caught:
        open_checkpoint(path)
    assert_one_clear_line(caught.value, path)
    assert caught.value.exit_code == 2


def test_vocabulary_that_does_not_fit_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Big:
        vocab_size = 41

    monkeypatch.setattr(
        "nanocupy.tokenizer.tokenizer_from_hf_folder", lambda path: Big(), raising=False
    )
    checkpoint = open_checkpoint(write_folder(tmp_path))
    with pytest.raises(CheckpointError, match=r"tokenizer has 41 ids .* only 40 rows"):
        _ = checkpoint.tokenizer


# ---- safetensors headers


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, tuple[bytes, str]] = {
    "length beyond": (struct.pack("<Q", 1 << 62) + b"{}", "header length 4611686018427387904"),
    "length past the end": (struct.pack("<Q", 3) + b"{}", "header length 3"),
    "length zero": (struct.pack("<Q", 0) + b"{}", "header length 0"),
    "no brace": (safetensors_bytes(b" {}"), "does not start with"),
    "not json": (safetensors_bytes(b"{x}"), "header: not valid JSON"),
    "not utf-8": (safetensors_bytes(b'{"\xff": 1}'), "header: not UTF-8"),
    "doubled": (
        safetensors_bytes(
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
            b"\0" * 8,
        ),
        "'a' occurs twice",
    ),
    "unknown dtype": (safetensors_bytes({"a": entry("F7")}, b"\0" * 8), "dtype 'F7' is not known"),
    "no dtype": (safetensors_bytes({"a": {"shape": []}}), "dtype None is not known"),
    "entry": (safetensors_bytes({"a": 3}), "entry is 3, not an object"),
    "shape": (safetensors_bytes({"a": entry(shape="2")}, b"\0" * 8), "shape '2' is not"),
    "negative": (safetensors_bytes({"a": entry(shape=[-2])}, b"\0" * 8), r"shape \[-2\]"),
    "fraction": (safetensors_bytes({"a": entry(shape=[2.0])}, b"\0" * 8), r"shape \[2.0\]"),
    "bool": (safetensors_bytes({"a": entry(shape=[True])}, b"\0" * 8), r"shape \[True\]"),
    "rank": (safetensors_bytes({"a": entry(shape=[1] * 9)}, b"\0" * 8), "up to 8"),
    "product": (
        safetensors_bytes({"a": entry(shape=[1 << 62, 4])}, b"\0" * 8),
        "does not fill",
    ),
    "product wraps to 8": (
        safetensors_bytes({"a": entry(shape=[(1 << 62) + 2])}, b"\0" * 8),
        "does not fill",
    ),
    "digits": (
        safetensors_bytes(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 9999 + b"]}}"),
        "thousands of digits",
    ),
    "offsets": (safetensors_bytes({"a": entry(offsets=[8, 0])}, b"\0" * 8), "are not"),
    "offset count": (safetensors_bytes({"a": entry(offsets=[0])}, b"\0" * 8), "are not"),
    "beyond": (safetensors_bytes({"a": entry(offsets=[8, 16])}, b"\0" * 8), "lie beyond"),
    "far beyond": (
        safetensors_bytes({"a": entry(offsets=[1 << 62, (1 << 62) + 8])}, b"\0" * 8),
        "lie beyond",
    ),
    "overlap": (
        safetensors_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12),
        "'b' overlaps",
    ),
    "same place": (safetensors_bytes({"a": entry(), "b": entry()}, b"\0" * 8), "'b' overlaps"),
    "hole": (
        safetensors_bytes({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20),
        "'b' leaves a hole",
    ),
    "hole first": (safetensors_bytes({"a": entry(offsets=[4, 12])}, b"\0" * 12), "leaves a hole"),
    "padded": (safetensors_bytes({"a": entry()}, b"\0" * 9), "padded"),
    "nothing": (safetensors_bytes({}, b"\0"), "padded"),
    "half a byte": (
        safetensors_bytes({"a": entry("F4", [3], [0, 1])}, b"\0"),
        "does not fill",
    ),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "newlines in a name": (safetensors_bytes({"a\nb\x1b[2J": 3}), r"'a\\nb\\x1b\[2J'"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_bad_safetensors_header(name: str, tmp_path: Path) -> None:
    data, message = HEADERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            SafetensorsFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_one_clear_line(caught.value, path)
    assert peak < 1 << 20


def test_sound_corner_cases_of_safetensors(tmp_path: Path) -> None:
    header = {
        "empty": entry("I64", [0, 7], [8, 8]),
        "first": entry(),
        "scalar": entry("F32", [], [8, 12]),
        "fp4": entry("F4", [4], [12, 14]),
        "__metadata__": {"format": "pt"},
    }
    path = tmp_path / "a.safetensors"
    data = np.array([1, 2, 3], "<f4").tobytes() + b"\0\0"
    path.write_bytes(safetensors_bytes(header, data))
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    np.testing.assert_array_equal(file.read("first"), [1, 2])
    assert file.read("scalar") == 3
    with pytest.raises(CheckpointError, match="'fp4' is stored as F4"):
        file.read("fp4")


# ---- fuzzing

CONFIG_BYTES = json.dumps(llama_config(rope_scaling={"type": "yarn", "factor": 4})).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A sound folder, its weights' bytes, and where their header ends."""
    path = write_folder(tmp_path_factory.mktemp("fuzz") / "model", json.loads(CONFIG_BYTES))
    data = (path / "model.safetensors").read_bytes()
    return path, data, 8 + struct.unpack("<Q", data[:8])[0]


def damaged(data: bytes, end: int) -> st.SearchStrategy[bytes]:
    """`data` with up to four of its first `end` bytes replaced, cut, or with more behind it."""

    def replace(places: list[tuple[int, int]]) -> bytes:
        copy = bytearray(data)
        for at, value in places:
            copy[at] = value
        return bytes(copy)

    replacement = st.tuples(st.integers(0, end - 1), st.integers(0, 255))
    return st.one_of(
        st.lists(replacement, min_size=1, max_size=4).map(replace),
        st.integers(0, len(data) - 1).map(lambda n: data[:n]),
        st.binary(min_size=1, max_size=64).map(lambda more: data + more),
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda head: head + data[len(head) :]),
    )


def open_and_read_all(path: Path) -> None:
    """Only an error of ours may come of it, and in one line."""
    line = ""
    try:
        with open_checkpoint(path) as checkpoint:
            list(checkpoint.verify())
    except NanocupyError as exc:
        line = str(exc)
    assert "\n" not in line


@given(data=st.data())
@settings(max_examples=400, deadline=2000)
def test_fuzzed_weights(folder: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, sound, header_end = folder
    (path / "config.json").write_bytes(CONFIG_BYTES)
    (path / "model.safetensors").write_bytes(data.draw(damaged(sound, header_end)))
    open_and_read_all(path)


@given(data=st.data())
@settings(max_examples=300, deadline=2000)
def test_fuzzed_config(folder: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, sound, _ = folder
    (path / "model.safetensors").write_bytes(sound)
    (path / "config.json").write_bytes(data.draw(damaged(CONFIG_BYTES, len(CONFIG_BYTES))))
    open_and_read_all(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(key=st.sampled_from([*llama_config(), "rope_scaling", "head_dim"]), value=JSON_VALUES)
@settings(max_examples=300, deadline=2000)
def test_any_value_in_any_setting(folder: tuple[Path, bytes, int], key: str, value: Any) -> None:
    path, sound, _ = folder
    (path / "model.safetensors").write_bytes(sound)
    (path / "config.json").write_text(json.dumps(llama_config(**{key: value})))
    open_and_read_all(path)


def test_a_safetensors_file_alone_points_to_its_folder(tmp_path):
    folder = write_folder(tmp_path / "model")
    with pytest.raises(CheckpointError, match="give the folder"):
        open_checkpoint(folder / "model.safetensors")
