"""NanoInfer 2 files, packed independently: honest ones are read, all others end in one line."""

from __future__ import annotations

import json
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocupy.checkpoint import open_checkpoint
from nanocupy.checkpoint.base import GroupedInt8
from nanocupy.checkpoint.nanoinfer2 import MAGIC
from nanocupy.errors import CheckpointError, ConfigError, TokenizerError
from tests.checkpoint import nanoinfer2_files
from tests.checkpoint.nanoinfer2_files import Nano2, Tensor, honest, resealed
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

MODEL = TinyCheckpoint(tiny_config(num_layers=1, has_qkv_bias=True), dtype="bfloat16")


def saved(path: Path, file: Nano2 | bytes) -> Path:
    path.write_bytes(file if isinstance(file, bytes) else file.pack())
    return path


def refused(path: Path, file: Nano2 | bytes, words: str) -> None:
    """Opening `file` must fail in one line that names it and says `words`."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(saved(path, file))
    message = str(caught.value)
    assert str(path) in message
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_are_aligned_read_only_views(tmp_path: Path, dtype: str) -> None:
    model = TinyCheckpoint(tiny_config(), dtype=dtype, vector_dtype="float32")
    with open_checkpoint(saved(tmp_path / "m.nano", honest(model))) as opened:
        assert opened.format == "nanoinfer-2"
        assert opened.config == model.config
        assert dict(opened.tensors) == dict(model.tensors)
        for name in model.tensors:
            got, want = opened.read(name), model.read(name)
            assert isinstance(got, np.ndarray)
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
            assert not got.flags.writeable
            assert not got.flags.owndata
            assert got.ctypes.data % 256 == 0
        assert [problem for _, problem in opened.verify() if problem] == []
        assert opened.tokenizer is None
        assert opened.chat_template is None


def test_grouped_int8_is_read(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config(), int8_group=16)
    with open_checkpoint(saved(tmp_path / "m.nano", honest(model))) as opened:
        got, want = opened.read("layers.1.down.weight"), model.read("layers.1.down.weight")
        assert isinstance(got, GroupedInt8)
        assert isinstance(want, GroupedInt8)
        np.testing.assert_array_equal(got.values, want.values)
        np.testing.assert_array_equal(got.scales, want.scales)
        assert got.scales.ctypes.data % 256 == 0
        assert [problem for _, problem in opened.verify() if problem] == []


def test_sections_are_read(tmp_path: Path) -> None:
    file = honest(MODEL)
    file.sections = [
        (nanoinfer2_files.TEMPLATE, 0, "{{ messages }} é".encode()),
        (nanoinfer2_files.GENERATION, 0, b'{"temperature": 0.6, "top_k": 20, "do_sample": true}'),
        (nanoinfer2_files.METADATA, 0, b'{"license": "Apache-2.0"}'),
    ]
    opened = open_checkpoint(saved(tmp_path / "m.nano", file))
    assert opened.chat_template == "{{ messages }} é"
    assert opened.generation_defaults.temperature == 0.6
    assert opened.generation_defaults.top_k == 20
    assert opened.generation_defaults.do_sample is True
    assert opened.generation_defaults.top_p is None
    assert opened.metadata == {"license": "Apache-2.0"}


def test_an_unknown_name_and_a_closed_file(tmp_path: Path) -> None:
    opened = open_checkpoint(saved(tmp_path / "m.nano", honest(MODEL)))
    with pytest.raises(CheckpointError, match="there is no tensor 'x'"):
        opened.read("x")
    kept = opened.read("embed.weight")
    opened.close()
    assert np.isfinite(kept.astype(np.float32)).all()  # the mapping lives on with its views
    with pytest.raises(CheckpointError, match="closed"):
        opened.read("embed.weight")


def test_what_a_later_minor_version_adds_is_stepped_over(tmp_path: Path) -> None:
    file = honest(MODEL)
    file.fixed = {"minor": 7, "reserved": 12, "flags": 1 | 1 << 20}
    file.fixed_extra = b"a later field   "
    file.sections = [(99, 0, b"a later section")]
    for tensor in file.tensors:
        tensor.reserved, tensor.extra = 5 << 16, b"something new   "
    opened = open_checkpoint(saved(tmp_path / "m.nano", file))
    np.testing.assert_array_equal(opened.read("embed.weight"), MODEL.read("embed.weight"))
    assert [problem for _, problem in opened.verify() if problem] == []


def test_what_a_later_version_requires_is_refused(tmp_path: Path) -> None:
    file = honest(MODEL)
    file.fixed = {"minor": 7}
    file.sections = [(99, 1, b"needed")]
    refused(tmp_path / "m.nano", file, "section of kind 99: not known")
    file = honest(MODEL)
    file.fixed = {"minor": 7, "flags": 1 | 1 << 9}
    refused(tmp_path / "m.nano", file, "does not know 0x200")
    file.fixed = {"minor": 7}
    file.tensors[0].reserved = 1 << 15
    refused(tmp_path / "m.nano", file, "flags are 0x8000; a bfloat16 tensor may have 0x0")
    file.fixed = {"version": 3}
    refused(tmp_path / "m.nano", file, "version is 3")


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ({"minor": 0, "reserved": 1}, "reserved bytes"),
        ({"fixed_bytes": 72}, "fixed_bytes is 72"),
        ({"fixed_bytes": 88}, "fixed_bytes is 88"),
        ({"fixed_bytes": 2**32 - 1}, "fixed_bytes is 4294967295"),
        ({"alignment": 0}, "alignment is 0"),
        ({"alignment": 64}, "alignment is 64"),
        ({"sections": 0}, "header_bytes is"),
        ({"sections": 2**32 - 1}, "section_count is 4294967295"),
        ({"tensors": 0}, "num_layers is 1 but tensor_count is 0"),
        ({"tensors": 3}, "3 entries take"),
        ({"tensors": 2**32 - 1}, "tensor_count is 4294967295"),
        ({"header_bytes": 2**63}, "header_bytes is 9223372036854775808"),
        ({"header_bytes": 0}, "fixed_bytes is 80"),
        ({"header_bytes": 81}, "header_bytes is 81"),
        ({"data_offset": 0}, "data_offset is 0"),
        ({"file_bytes": 1}, "file_bytes is 1"),
        ({"file_bytes": 2**64 - 1}, "truncated"),
        ({"flags": 0}, "has_qkv_bias is False, but the config says True"),
        ({"flags": 9}, "tied_lm_head is True, but the config says False"),
        ({"flags": 1 | 1 << 20}, "does not know 0x100000"),
    ],
)
def test_every_field_of_the_fixed_part_is_checked(
    tmp_path: Path, fixed: dict[str, int], words: str
) -> None:
    file = honest(MODEL)
    file.fixed = fixed
    data = file.pack()
    refused(tmp_path / "m.nano", resealed(data), words)


def _change(**changes: Any) -> Callable[[Nano2], None]:
    def change(file: Nano2) -> None:
        for name, value in changes.items():
            setattr(file.tensors[2], name, value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_change(name=b"embed.weight"), "embed.weight: occurs twice"),
        (_change(name=b"layers.0.r.weight"), "layers.0.q.weight"),
        (_change(name=b"\xff\xfe"), "not UTF-8"),
        (_change(name=b"\x1b[31m\n"), "missing"),
        (_change(code=0), "dtype code 0 is not known"),
        (_change(code=99), "dtype code 99 is not known"),
        (_change(code=1), "nbytes is"),
        (_change(shape=(32, 31)), "nbytes is"),
        (_change(shape=(0, 32)), "dimension below 1"),
        (_change(shape=(2**63, 2**63)), "nbytes is"),
        (_change(shape=()), "dimensions is 0"),
        (_change(shape=(1,) * 3), "dimensions is 3"),
        (_change(shape=(16, 64)), "has shape [16, 64]"),
        (_change(group_size=16), "group_size 16 does not suit"),
        (_change(code=4), "group_size 0 does not suit"),
        (_change(code=4, group_size=3), "group_size 3 does not suit"),
        (_change(offset=0), "at offset 0; it must start at"),
        (_change(offset=2**64 - 1), "it must start at"),
        (_change(nbytes=0), "nbytes is 0"),
        (_change(nbytes=2**64 - 256), "nbytes is"),
        (_change(reserved=1), "flags are 0x1; a bfloat16 tensor may have 0x0"),
        (_change(extra=b"12345678"), "entry_bytes is"),
        (_change(entry_bytes=0), "entry_bytes is 0"),
        (_change(entry_bytes=2**32 - 8), "entry_bytes is 4294967288"),
        (lambda file: file.tensors.pop(), "is missing"),
        (
            lambda file: file.tensors.append(Tensor(b"more", 1, (1,), bytes(4))),
            "more does not belong",
        ),
    ],
)
def test_every_field_of_the_directory_is_checked(
    tmp_path: Path, change: Callable[[Nano2], None], words: str
) -> None:
    file = honest(MODEL)
    change(file)
    refused(tmp_path / "m.nano", file, words)


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        (nanoinfer2_files.TEMPLATE, b"\xff", "chat template is not UTF-8"),
        (nanoinfer2_files.TEMPLATE, bytes(2 << 20), "chat template: 2097152 bytes"),
        (nanoinfer2_files.GENERATION, b'{"temperature": NaN}', "NaN"),
        (nanoinfer2_files.GENERATION, b'{"temperature": 1e999}', "1e999"),
        (nanoinfer2_files.GENERATION, b'{"top_k": "many"}', "top_k"),
        (nanoinfer2_files.GENERATION, b'{"top_p": 2}', "top_p"),
        (nanoinfer2_files.METADATA, b"[" * 50000, "metadata"),
        (nanoinfer2_files.METADATA, b'{"a": 1, "a": 2}', "twice"),
        (nanoinfer2_files.METADATA, b"[]", "not an object"),
        (nanoinfer2_files.METADATA, b"", "metadata"),
        (nanoinfer2_files.CONFIG, b"{}", "config: occurs twice"),
        (7, b"", "section of kind 7: not known"),
    ],
)
def test_every_section_is_checked(tmp_path: Path, kind: int, data: bytes, words: str) -> None:
    file = honest(MODEL)
    file.sections = [(kind, 0, data)]
    refused(tmp_path / "m.nano", file, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 4096}, "num_layers is 4096 but tensor_count"),
        ({"num_layers": 10**30}, "num_layers"),
        ({"num_layers": 1.5}, "num_layers"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"vocab_size": 1 << 27}, "embed.weight has shape"),
        ({"architecture": "mamba"}, "mamba"),
        ({"rope_theta": "x"}, "rope_theta"),
        ({"rope_scaling": {"kind": "none", "factor": 1}, "eos_ids": [99]}, "eos_id"),
        ({"eos_ids": [None]}, "eos_id"),
        ({"head_size": None}, "head_size"),
    ],
)
def test_a_hostile_config_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = honest(MODEL)
    flags = {"flags": 1}
    file.config, file.fixed = file.config | changes, flags
    refused(tmp_path / "m.nano", file, words)


def test_a_missing_config_or_directory_is_refused(tmp_path: Path) -> None:
    file = honest(MODEL)
    file.keep_config = False
    refused(tmp_path / "m.nano", file, "config: missing")


def test_truncated_and_padded_files_are_refused(tmp_path: Path) -> None:
    data = honest(MODEL).pack()
    for cut in (1, 255, 256, len(data) // 2, len(data) - 200, len(data) - 79):
        refused(tmp_path / "m.nano", data[:-cut], "m.nano")
    refused(tmp_path / "m.nano", data[:60], "60 bytes")
    refused(tmp_path / "m.nano", data + b"\0", "followed by bytes")


def test_every_flipped_header_byte_is_noticed(tmp_path: Path) -> None:
    data = honest(MODEL).pack()
    (header_bytes,) = struct.unpack_from("<Q", data, 40)
    path = tmp_path / "m.nano"
    for position in range(header_bytes):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_every_flipped_data_byte_is_noticed_by_verify(tmp_path: Path) -> None:
    data = honest(MODEL).pack()
    (header_bytes,) = struct.unpack_from("<Q", data, 40)
    path = tmp_path / "m.nano"
    for position in range(header_bytes, len(data), 997):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with open_checkpoint(path) as opened:
            assert len([name for name, problem in opened.verify() if problem]) == 1


def test_verify_finds_nan_under_a_right_checksum(tmp_path: Path) -> None:
    file = honest(MODEL)
    file.tensors[4].data = b"\xc0\x7f" + file.tensors[4].data[2:]
    opened = open_checkpoint(saved(tmp_path / "m.nano", file))
    found = {name: problem for name, problem in opened.verify() if problem}
    assert found == {file.tensors[4].name.decode(): "holds NaN or infinite values"}


HONEST = honest(MODEL).pack()
HEADER_BYTES = struct.unpack_from("<Q", HONEST, 40)[0]


@settings(max_examples=400, deadline=None)
@given(
    flips=st.lists(
        st.tuples(st.integers(8, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=6
    ),
    cut=st.sampled_from([0, 0, 0, 1, 4096, len(HONEST) - 100]),
)
def test_resealed_damage_opens_or_fails_cleanly(flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(HONEST[: len(HONEST) - cut])
    for position, value in flips:
        if position < len(data):
            data[position] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.nano"
        path.write_bytes(resealed(data))
        errors = (CheckpointError, ConfigError, TokenizerError)
        with suppress(*errors), open_checkpoint(path) as opened:
            for name, shape in opened.config.tensor_shapes().items():
                assert opened.read(name).shape == shape


@pytest.mark.parametrize(
    "fixed",
    [
        {"sections": 2**32 - 1},
        {"tensors": 2**32 - 1},
        {"header_bytes": 2**62},
        {"file_bytes": 2**62},
        {"fixed_bytes": 2**31},
    ],
)
def test_no_count_allocates_more_than_the_file(tmp_path: Path, fixed: dict[str, int]) -> None:
    file = honest(MODEL)
    file.fixed = fixed
    path = saved(tmp_path / "m.nano", resealed(file.pack()))
    with suppress(CheckpointError):
        open_checkpoint(path)  # imports, once
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size


def test_the_magic_can_begin_no_legacy_file() -> None:
    assert MAGIC == nanoinfer2_files.MAGIC
    # A, B and C begin with a positive count; D and GGUF with magics of their own.
    assert struct.unpack_from("<i", MAGIC)[0] < 0
    assert MAGIC[:4] not in (struct.pack("<I", 0x616B3432), b"GGUF")


def test_config_json_keeps_every_field() -> None:
    config = MODEL.config.with_(name="tiny é", eos_ids=(2, 3))
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
