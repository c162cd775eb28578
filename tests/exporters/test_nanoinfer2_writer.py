"""NanoInfer 2 files as they are written: round trips, types, atomicity, full disks."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanocupy.checkpoint import open_checkpoint
from nanocupy.checkpoint.base import GenerationDefaults, GroupedInt8, dequantized
from nanocupy.config import RopeScaling
from nanocupy.errors import CheckpointError
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.quantized import QuantizedMatrix, quantize
from tests.checkpoint.nanoinfer2_files import METADATA, honest
from tests.checkpoint.tiny import DTYPES, TinyCheckpoint, tiny_config

FLAGS = ("has_qkv_bias", "has_o_bias", "has_mlp_bias", "has_qk_norm", "tied_lm_head")


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=5)))
def test_every_flag_survives_in_every_type(
    tmp_path: Path, flags: tuple[bool, ...], dtype: str | None
) -> None:
    config = tiny_config(head_size=10, **dict(zip(FLAGS, flags, strict=True)))
    model = TinyCheckpoint(config, dtype="bfloat16", vector_dtype="float32")
    write_nanoinfer2(model, tmp_path / "m.nano", dtype=dtype)
    with open_checkpoint(tmp_path / "m.nano") as opened:
        assert opened.config == config
        assert list(opened.tensors) == list(model.tensors)
        for name, info in model.tensors.items():
            got, want = opened.read(name), np.asarray(model.read(name))
            stored = dtype or "bfloat16" if len(info.shape) == 2 else "float32"
            assert got.dtype == DTYPES[stored]
            np.testing.assert_array_equal(got, want.astype(np.float32).astype(DTYPES[stored]))
        assert [problem for _, problem in opened.verify() if problem] == []
    assert os.listdir(tmp_path) == ["m.nano"]


@pytest.mark.parametrize("int8_group", [None, 16])
def test_the_bytes_are_those_of_the_description(tmp_path: Path, int8_group: int | None) -> None:
    model = TinyCheckpoint(tiny_config(has_qkv_bias=True), int8_group=int8_group)
    write_nanoinfer2(model, tmp_path / "m.nano")
    expected = honest(model)
    # JSON may be spelt in many ways; everything else is fixed.
    opened = open_checkpoint(tmp_path / "m.nano")
    expected.config = model.config.to_dict()
    expected.sections = [(METADATA, 0, b'{"exported_from": "huggingface"}')]
    assert (tmp_path / "m.nano").read_bytes() == expected.pack()
    assert opened.metadata == {"exported_from": "huggingface"}


def test_what_belongs_to_the_model_goes_along(tmp_path: Path) -> None:
    scaling = RopeScaling("yarn", 4.0, 32, attention_factor=1.25, truncate=False)
    model = TinyCheckpoint(
        tiny_config(rope_scaling=scaling, eos_ids=(2, 7, 9), name="Tiny é"),
        chat_template="{% for m in messages %}<{{ m.content }}>\n{% endfor %}",
        generation_defaults=GenerationDefaults(temperature=0.7, top_k=20, do_sample=True),
        metadata={"license": "Apache-2.0", "numbers": [1, 2.5, None]},
    )
    write_nanoinfer2(model, tmp_path / "a.nano")
    write_nanoinfer2(open_checkpoint(tmp_path / "a.nano"), tmp_path / "b.nano")
    assert (tmp_path / "a.nano").read_bytes() == (tmp_path / "b.nano").read_bytes()
    opened = open_checkpoint(tmp_path / "b.nano")
    assert opened.config == model.config
    assert opened.chat_template == model.chat_template
    assert opened.generation_defaults == model.generation_defaults
    assert opened.metadata == {"exported_from": "huggingface", **model.metadata}


def test_int8_becomes_float_on_request(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config(), int8_group=16)
    write_nanoinfer2(model, tmp_path / "m.nano", dtype="float32")
    opened = open_checkpoint(tmp_path / "m.nano")
    np.testing.assert_array_equal(
        opened.read("layers.0.q.weight"), dequantized(model.read("layers.0.q.weight"))
    )
    write_nanoinfer2(model, tmp_path / "m.nano")
    assert isinstance(open_checkpoint(tmp_path / "m.nano").read("embed.weight"), GroupedInt8)


def test_quantised_sources_become_float16(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config())
    model.tensors = {
        n: replace(i, dtype="q4_1") if len(i.shape) == 2 else i for n, i in model.tensors.items()
    }
    write_nanoinfer2(model, tmp_path / "m.nano")
    opened = open_checkpoint(tmp_path / "m.nano")
    assert opened.tensors["embed.weight"].dtype == "float16"
    assert opened.tensors["final_norm.weight"].dtype == "float32"


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (65536.0, "float16", "layers.1.gate.weight holds 65536, beyond what float16 can hold"),
        (3.4e38, "bfloat16", "beyond what bfloat16 can hold"),
        (np.nan, "float32", "tensor layers.1.gate.weight holds NaN or infinite values; the source"),
        (np.inf, "float16", "layers.1.gate.weight holds NaN or infinite values"),
        (-np.inf, None, "layers.1.gate.weight holds NaN or infinite values"),
    ],
)
def test_values_that_do_not_fit_are_an_error(
    tmp_path: Path, value: float, dtype: str | None, words: str
) -> None:
    model = TinyCheckpoint(tiny_config())
    array = model.arrays["layers.1.gate.weight"]
    assert isinstance(array, np.ndarray)
    array[3, 5] = value
    with pytest.raises(CheckpointError, match=words):
        write_nanoinfer2(model, tmp_path / "m.nano", dtype=dtype)
    assert os.listdir(tmp_path) == []


def test_values_beyond_float16_make_bfloat16_where_none_was_asked_for(tmp_path: Path) -> None:
    """Values that codes stand for, of which only one tensor is so large."""
    model = TinyCheckpoint(tiny_config())
    model.tensors = {
        n: replace(i, dtype="q4_1") if len(i.shape) == 2 else i for n, i in model.tensors.items()
    }
    array = model.arrays["layers.1.gate.weight"]
    assert isinstance(array, np.ndarray)
    array[3, 5] = -65536.0
    write_nanoinfer2(model, tmp_path / "m.nano")
    with open_checkpoint(tmp_path / "m.nano") as opened:
        types = {name: info.dtype for name, info in opened.tensors.items() if len(info.shape) == 2}
        assert types.pop("layers.1.gate.weight") == "bfloat16"
        assert set(types.values()) == {"float16"}
        expected = array.astype(DTYPES["bfloat16"])
        np.testing.assert_array_equal(opened.read("layers.1.gate.weight"), expected)
    with pytest.raises(CheckpointError, match=r"float16 can hold .*; use --dtype bfloat16 or fl"):
        write_nanoinfer2(model, tmp_path / "m.nano", dtype="float16")
    array[3, 5] = np.nan
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        write_nanoinfer2(model, tmp_path / "m.nano")


class OfCodes(TinyCheckpoint):
    """Its layers.0.up.weight comes as the given codes, whether they are sound or not."""

    def __init__(self, tensor: QuantizedMatrix | GroupedInt8) -> None:
        super().__init__(tiny_config())
        dtype = "int8" if isinstance(tensor, GroupedInt8) else DTYPE_OF[tensor.kind]
        self.given = tensor
        self.tensors = {
            name: replace(info, dtype=dtype) if name == "layers.0.up.weight" else info
            for name, info in self.tensors.items()
        }

    def read(self, name: str) -> np.ndarray | GroupedInt8:
        if name == "layers.0.up.weight" and isinstance(self.given, GroupedInt8):
            return self.given
        return super().read(name)

    def read_quantized(self, name: str) -> QuantizedMatrix | None:
        if name == "layers.0.up.weight" and isinstance(self.given, QuantizedMatrix):
            return self.given
        return None


DTYPE_OF = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3"}
VALUES = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)


def spoilt(kind: str, part: str, value: float) -> QuantizedMatrix:
    matrix = quantize(VALUES, kind, 16)
    getattr(matrix, part)[3, 1] = value
    return matrix


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (spoilt("int4", "scales", 0), "holds a scale of 0 (row 3, group 1)"),
        (spoilt("int4", "offsets", np.inf), "holds NaN or infinite offsets"),
        (spoilt("fp8", "codes", 255), "holds NaN values"),
        (spoilt("fp8", "scales", 0), "holds a scale of 0"),
        (spoilt("int8", "scales", np.nan), "holds NaN or infinite scales"),
        (spoilt("int8", "scales", 1e37), "holds a scale of 1e+37"),
        (
            replace(quantize(VALUES, "int8", 16), input_order=np.zeros(32, np.int32)),
            "has an order that names an input twice",
        ),
        (quantize(VALUES[:60], "int4", 16), "came as [60, 32], not [64, 32]"),
        (quantize(VALUES[:60], "int8", 16), "came as [60, 32], not [64, 32]"),
        (GroupedInt8(np.ones((64, 32), np.int8), np.full(32, np.inf), 64), "or infinite scales"),
        (GroupedInt8(np.ones((60, 32), np.int8), np.ones(30), 64), "came as [60, 32], not [64"),
    ],
)
def test_codes_that_the_reader_would_refuse_are_not_written(
    tensor: QuantizedMatrix | GroupedInt8, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_nanoinfer2(OfCodes(tensor), tmp_path / "m.nano")
    assert "tensor layers.0.up.weight" in str(caught.value)
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_sound_codes_are_written(tmp_path: Path) -> None:
    for kind in DTYPE_OF:
        matrix = quantize(VALUES, kind, 16)
        if kind == "int8":
            matrix.scales[3, 1] = 0  # which other formats than ours write, and ours may have
        write_nanoinfer2(OfCodes(matrix), tmp_path / "m.nano")
        with open_checkpoint(tmp_path / "m.nano") as opened:
            np.testing.assert_array_equal(
                dequantized(opened.read("layers.0.up.weight")), matrix.dequantize()
            )


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = TinyCheckpoint(tiny_config(), dtype="bfloat16")
    write_nanoinfer2(
        model, tmp_path / "m.nano", progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {2 * model.config.num_parameters}
    assert seen[-1][0] == seen[-1][1]


def test_a_failure_leaves_an_older_file_alone(tmp_path: Path) -> None:
    out = tmp_path / "m.nano"
    write_nanoinfer2(TinyCheckpoint(tiny_config()), out)
    before = out.read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    other = TinyCheckpoint(tiny_config(), seed=1)
    with pytest.raises(KeyboardInterrupt):
        write_nanoinfer2(other, out, progress=interrupt)
    assert out.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.nano"]
    write_nanoinfer2(other, out)
    np.testing.assert_array_equal(
        open_checkpoint(out).read("embed.weight"), other.read("embed.weight")
    )


def test_a_source_is_never_written_over(tmp_path: Path) -> None:
    write_nanoinfer2(TinyCheckpoint(tiny_config()), tmp_path / "m.nano")
    (tmp_path / "link.nano").symlink_to("m.nano")
    os.link(tmp_path / "m.nano", tmp_path / "hard.nano")
    with open_checkpoint(tmp_path / "m.nano") as opened:
        for name in ("m.nano", "link.nano", "hard.nano"):
            with pytest.raises(CheckpointError, match="is what would be exported"):
                write_nanoinfer2(opened, tmp_path / name)


def test_a_source_folder_keeps_its_files_but_not_old_exports(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config())
    model.path = tmp_path
    (tmp_path / "model.safetensors").write_bytes(b"shard")
    with pytest.raises(CheckpointError, match="is what would be exported"):
        write_nanoinfer2(model, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == b"shard"
    write_nanoinfer2(model, tmp_path / "m.nano")
    write_nanoinfer2(model, tmp_path / "m.nano")


def test_places_that_take_no_file_are_refused(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config())
    for out, words in (
        (tmp_path / "none" / "m.nano", "there is no folder"),
        (tmp_path, "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            write_nanoinfer2(model, out)
    with pytest.raises(CheckpointError, match="dtype is 'int3'"):
        write_nanoinfer2(model, tmp_path / "m.nano", dtype="int3")


def test_the_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_nanoinfer2(TinyCheckpoint(tiny_config()), tmp_path / "m.nano")
    finally:
        os.umask(before)
    assert (tmp_path / "m.nano").stat().st_mode & 0o777 == 0o640


FULL_DISK = """
import resource, sys
from pathlib import Path
from nanocupy.errors import CheckpointError
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_nanoinfer2(TinyCheckpoint(tiny_config()), Path(sys.argv[1]))
except CheckpointError as exc:
    print(exc)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.nano"
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(out)], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"{out}: cannot be written: File too large; nothing was left behind\n"
    assert os.listdir(tmp_path) == []

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_nanoinfer2(TinyCheckpoint(tiny_config()), out)
    assert os.listdir(tmp_path) == []


def test_names_as_long_as_the_disk_allows_and_longer(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    model = TinyCheckpoint(tiny_config())
    write_nanoinfer2(model, tmp_path / ("x" * longest))
    assert os.listdir(tmp_path) == ["x" * longest]
    with pytest.raises(CheckpointError, match="cannot be written: File name too long"):
        write_nanoinfer2(model, tmp_path / ("y" * (longest + 1)))
    assert len(os.listdir(tmp_path)) == 1


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=4096, hidden_size=256, intermediate_size=1024, num_layers=8)
    model = TinyCheckpoint(config)
    tracemalloc.start()
    write_nanoinfer2(model, tmp_path / "m.nano", dtype="bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(info.nbytes for info in model.tensors.values())
    assert peak < 3 * largest < 4 * config.num_parameters
