"""Legacy files, packed independently, are read exactly; broken ones end in one clear line."""

from __future__ import annotations

import itertools
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocupy.checkpoint import open_checkpoint
from nanocupy.checkpoint.base import Checkpoint, GroupedInt8, dequantized
from nanocupy.config import ModelConfig
from nanocupy.errors import CheckpointError, ConfigError
from tests.checkpoint import legacy_files
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config


def qwen3_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "architecture": "qwen3",
        "head_size": 12,  # not hidden / heads
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "has_qk_norm": True,
        "bos_id": None,
        "eos_ids": (),
    }
    return tiny_config(**(values | changes))


def write(path: Path, layout: str, checkpoint: Checkpoint, group_size: int = 16) -> Path:
    data = {
        "A": lambda: legacy_files.layout_a(checkpoint),
        "B": lambda: legacy_files.layout_b(checkpoint, group_size),
        "C": lambda: legacy_files.layout_c(checkpoint),
        "D1": lambda: legacy_files.layout_d(checkpoint, 1),
        "D2": lambda: legacy_files.layout_d(checkpoint, 2, group_size),
    }[layout]()
    path.write_bytes(data)
    return path


FILES = [
    (layout, tied) for layout, tied in itertools.product(("A", "B", "D1", "D2"), (False, True))
] + [("C", False)]


def source(layout: str, tied: bool) -> TinyCheckpoint:
    config = qwen3_config() if layout == "C" else tiny_config(tied_lm_head=tied)
    return TinyCheckpoint(config, seed=3)


@pytest.mark.parametrize(("layout", "tied"), FILES)
def test_every_tensor_is_read_exactly(tmp_path: Path, layout: str, tied: bool) -> None:
    expected = source(layout, tied)
    path = write(tmp_path / "model.bin", layout, expected)
    with open_checkpoint(path) as opened:
        assert opened.format == f"nanoinfer-legacy-{layout[0]}"
        assert opened.config == expected.config
        assert list(opened.tensors) == list(expected.tensors)
        for name in expected.tensors:
            want, got = expected.read(name), opened.read(name)
            assert got.shape == want.shape
            if opened.tensors[name].dtype == "int8":
                assert isinstance(got, GroupedInt8)
                assert got.group_size == 16
                largest = np.abs(want.reshape(-1, 16)).max(axis=1).repeat(16).reshape(want.shape)
                # Half a step of rounding, and a little for the float32 scale.
                error = np.abs(got.dequantize() - want)
                assert (error <= largest / 254 * 1.001).all()
            else:
                assert got.dtype == np.float32
                np.testing.assert_array_equal(got, want)
        assert [problem for _, problem in opened.verify() if problem] == []


@pytest.mark.parametrize("layout", ["B", "D2"])
def test_int8_rows_move_with_their_scales(tmp_path: Path, layout: str) -> None:
    expected = source(layout, False)
    path = write(tmp_path / "model.bin", layout, expected)
    with open_checkpoint(path) as opened:
        got = opened.read("layers.1.q.weight")
        assert isinstance(got, GroupedInt8)
        # The same matrix, quantised in the half-split order: rows are whole groups.
        packed = legacy_files.pack_groups(expected.read("layers.1.q.weight"), 16)
        count = got.values.size
        np.testing.assert_array_equal(got.values.reshape(-1), np.frombuffer(packed[:count], "i1"))
        np.testing.assert_array_equal(got.scales, np.frombuffer(packed[count:], "<f4"))


def test_groups_that_straddle_rows_come_dequantised(tmp_path: Path) -> None:
    expected = TinyCheckpoint(tiny_config(hidden_size=24, head_size=6, intermediate_size=48))
    path = write(tmp_path / "model.bin", "B", expected)  # rows of 24 in groups of 16
    with open_checkpoint(path) as opened:
        q, gate = opened.read("layers.0.q.weight"), opened.read("layers.0.gate.weight")
        assert isinstance(q, np.ndarray)
        assert q.dtype == np.float32
        assert isinstance(gate, GroupedInt8)
        for name in ("q", "k", "gate"):
            tensor = dequantized(opened.read(f"layers.0.{name}.weight"))
            want = expected.read(f"layers.0.{name}.weight")
            np.testing.assert_allclose(tensor, want, atol=np.abs(want).max() / 250)


def test_views_are_read_only_and_not_copied(tmp_path: Path) -> None:
    path = write(tmp_path / "model.bin", "A", source("A", False))
    with open_checkpoint(path) as opened:
        gate = opened.read("layers.0.gate.weight")
        assert not gate.flags.writeable
        assert not gate.flags.owndata
        with pytest.raises(CheckpointError, match="there is no tensor"):
            opened.read("layers.9.q.weight")


def test_the_kind_decides_what_the_file_does_not_say(tmp_path: Path) -> None:
    small = write(tmp_path / "small.bin", "A", source("A", True))
    assert open_checkpoint(small).config.rope_theta == 1e4
    assert "llama2" in open_checkpoint(small).metadata["kind"]
    llama3 = open_checkpoint(small, legacy_kind="llama3").config
    assert (llama3.rope_theta, llama3.rope_scaling.kind) == (5e5, "llama3")
    assert (llama3.rope_scaling.factor, llama3.rope_scaling.original_context) == (32.0, 8192)
    assert (llama3.bos_id, llama3.eos_ids) == (None, ())  # beyond 48 rows
    shape = {"hidden_size": 4, "num_heads": 2, "num_kv_heads": 1, "head_size": 2}
    big = tiny_config(vocab_size=128256, tied_lm_head=True, intermediate_size=4, **shape)
    path = write(tmp_path / "big.bin", "A", TinyCheckpoint(big))
    config = open_checkpoint(path).config
    assert (config.rope_theta, config.bos_id) == (5e5, 128000)
    assert config.eos_ids == (128001, 128009)


def test_a_kind_that_the_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.bin", "A", source("A", True))
    c = write(tmp_path / "c.bin", "C", source("C", False))
    with pytest.raises(CheckpointError, match="holds no q and k norms"):
        open_checkpoint(a, legacy_kind="qwen3")
    with pytest.raises(CheckpointError, match="holds q and k norms"):
        open_checkpoint(c, legacy_kind="llama2")
    with pytest.raises(CheckpointError, match="--kind is 'gpt'"):
        open_checkpoint(a, legacy_kind="gpt")
    with pytest.raises(CheckpointError, match="--format is 'E'"):
        open_checkpoint(a, legacy_format="E")


@pytest.mark.parametrize(("layout", "tied"), FILES)
@pytest.mark.parametrize("change", [-4, -1, 1, 4, 4096])
def test_a_byte_too_few_or_too_many_is_an_error(
    tmp_path: Path, layout: str, tied: bool, change: int
) -> None:
    path = write(tmp_path / "model.bin", layout, source(layout, tied))
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert str(len(data) + change) in message
    assert str(len(data)) in message
    assert "\n" not in message


def ambiguous_file(path: Path) -> Path:
    """Read as A: 1 layer, 4 positions of cos and sin. Read as B: groups of 1, no tables."""
    d, f, layers, h, g, v, context = 2, 2, 1, 1, 1, 3, 4
    matrices = 2 * d * d + 2 * d * d + 3 * f * d
    floats = v * d + 3 * d + matrices + context * 2
    header = struct.pack("<8i", d, f, layers, h, g, v, context, 1)
    path.write_bytes(header.ljust(28 + 4 * floats, b"\0"))
    assert 28 + 4 * floats == 32 + 5 * matrices + 4 * (v * d + 3 * d)
    return path


def test_two_layouts_that_fit_ask_for_format(tmp_path: Path) -> None:
    path = ambiguous_file(tmp_path / "both.bin")
    with pytest.raises(CheckpointError, match=r"A and B alike.*--format"):
        open_checkpoint(path)
    assert open_checkpoint(path, legacy_format="A").format == "nanoinfer-legacy-A"
    assert open_checkpoint(path, legacy_format="B").format == "nanoinfer-legacy-B"


def test_a_named_layout_must_fit_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", "A", source("A", True))
    for other in ("B", "C", "D"):
        with pytest.raises(CheckpointError):
            open_checkpoint(path, legacy_format=other)
    d = write(tmp_path / "d.bin", "D1", source("D1", True))
    with pytest.raises(CheckpointError, match="it is D"):
        open_checkpoint(d, legacy_format="A")


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (4, b"\3\0\0\0", "version is 3"),
        (36, b"\2", "shared LM head is 2"),
        (37, b"\0\0\0\0", "group size is 0"),
        (37, b"\xff\xff\xff\xff", "group size is -1"),
        (37, b"\7\0\0\0", "group size 7 does not divide"),
        (200, b"\1", "must be 0"),
        (8, b"\0\0\0\0", "hidden size is 0"),
        (12, b"\xff\xff\xff\x7f", "feed-forward size is 2147483647"),
        (16, b"\xff\xff\xff\xff", "layers is -1"),
        (20, b"\3\0\0\0", "does not give 3 heads"),
        (24, b"\3\0\0\0", "heads 4 is not a multiple of KV heads 3"),
        (28, b"\0\0\0\x80", "vocabulary is -2147483648"),
    ],
)
def test_each_field_of_llama2c_headers_is_checked(
    tmp_path: Path, offset: int, data: bytes, words: str
) -> None:
    path = write(tmp_path / "d2.bin", "D2", source("D2", False))
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(data)] = data
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def opened_elements(path: Path, name: str) -> int:
    with open_checkpoint(path) as opened:
        return int(np.prod(opened.tensors[name].shape))


def test_verify_finds_what_is_wrong_inside(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", "A", source("A", True))
    size = path.stat().st_size
    for offset, value, name in (
        (28, struct.pack("<f", np.nan), "embed.weight"),
        (size - 4, struct.pack("<f", 1.5), "rope tables"),
    ):
        write(path, "A", source("A", True))
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(value)
        found = [n for n, problem in open_checkpoint(path).verify() if problem]
        assert found == [name]
    path = write(tmp_path / "b.bin", "B", source("B", True))
    with path.open("r+b") as file:
        file.seek(32)
        file.write(b"\x80")
    found = [n for n, problem in open_checkpoint(path).verify() if problem]
    assert found == ["layers.0.q.weight"]
    with path.open("r+b") as file:
        file.seek(32)
        file.write(b"\x7f")
        file.seek(32 + opened_elements(path, "layers.0.q.weight"))  # its first scale
        file.write(struct.pack("<f", 3e38))
    with open_checkpoint(path) as opened:
        problems = {n: problem for n, problem in opened.verify() if problem}
        assert list(problems) == ["layers.0.q.weight"]
        assert "holds a scale of 3e+38" in problems["layers.0.q.weight"]
        with pytest.raises(CheckpointError, match=r"layers.0.q.weight holds a scale of 3e\+38"):
            opened.read_quantized("layers.0.q.weight")


@pytest.mark.parametrize("content", [b"", b"\0", b"\1\0\0\0" * 3, b"\0" * 4096, b"text\n" * 99])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "no.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no\.bin"):
        open_checkpoint(path)


ORIGINALS = {layout: source(layout, tied) for layout, tied in FILES}


@settings(max_examples=150, deadline=None)
@given(
    layout=st.sampled_from(sorted(ORIGINALS)),
    flips=st.lists(st.tuples(st.integers(0, 41), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 300),
)
def test_flipped_and_cut_headers_open_or_fail_cleanly(
    layout: str, flips: list[tuple[int, int]], cut: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "f.bin", layout, ORIGINALS[layout])
        data = bytearray(path.read_bytes())
        for position, value in flips:
            data[position] = value
        path.write_bytes(data[: len(data) - cut])
        with suppress(CheckpointError, ConfigError), open_checkpoint(path) as opened:
            for name, shape in opened.config.tensor_shapes().items():
                assert opened.read(name).shape == shape


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(1, 64), min_size=8, max_size=8))
def test_random_headers_never_open_by_accident_of_overflow(header: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "h.bin"
        path.write_bytes(struct.pack("<8i", *header) + bytes(64))
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_rope_scaling_can_be_named(tmp_path):
    path = write(tmp_path / "a.bin", "A", TinyCheckpoint(tiny_config()))
    assert open_checkpoint(path, rope_scaling="linear:2").config.rope_scaling.factor == 2.0
    with pytest.raises(ConfigError, match="--rope-scaling is 'x'"):
        open_checkpoint(path, rope_scaling="x")
