"""int4, float8 and ordered int8 tensors of NanoInfer 2 files, packed from docs/formats.md."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nanocupy.checkpoint import open_checkpoint
from nanocupy.checkpoint.base import GroupedInt8
from nanocupy.errors import CheckpointError, ConfigError
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from tests.checkpoint.nanoinfer2_files import CODES, Nano2, Tensor, honest, resealed
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

MODEL = TinyCheckpoint(tiny_config(num_layers=1), dtype="bfloat16")
NAME = "layers.0.down.weight"
SHAPE = (32, 64)
GROUP = 16


def float8(code: int) -> float:
    """The value of an e4m3 byte: sign, four bits of exponent (bias 7), three of fraction."""
    sign = -1.0 if code >> 7 else 1.0
    exponent, fraction = code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


class Packed:
    """A matrix of random codes: `data` in the file, and `values`, what it stands for."""

    def __init__(self, dtype: str, *, group: int = GROUP, with_order: bool = False) -> None:
        rng = np.random.default_rng(7)
        rows, cols = SHAPE
        self.dtype, self.group, self.with_order = dtype, group, with_order
        top = {"int4": 16, "int8": 255, "float8_e4m3": 256}[dtype]
        self.codes = rng.integers(0, top, SHAPE)
        if dtype == "float8_e4m3":
            self.codes[self.codes & 127 == 127] = 3  # NaN
        self.scales = rng.uniform(0.01, 0.02, (rows, cols // group)).astype(np.float32)
        self.offsets = rng.uniform(-0.2, 0.1, self.scales.shape).astype(np.float32)
        self.order = rng.permutation(cols) if with_order else np.arange(cols)

    @property
    def values(self) -> np.ndarray:
        result = np.zeros(SHAPE, np.float32)
        for r in range(SHAPE[0]):
            for c in range(SHAPE[1]):
                code = int(self.codes[r, c])
                number = {"int8": code - 127.0, "int4": float(code)}.get(self.dtype)
                value = np.float32(float8(code) if number is None else number)
                value *= self.scales[r, c // self.group]
                if self.dtype == "int4":
                    value += self.offsets[r, c // self.group]
                result[r, self.order[c]] = value
        return result

    @property
    def data(self) -> bytes:
        data = b""
        flat = [int(code) for code in self.codes.reshape(-1)]
        if self.dtype == "int4":
            for low, high in zip(flat[0::2], flat[1::2], strict=True):
                data += bytes([low + 16 * high])
        elif self.dtype == "int8":
            data += struct.pack(f"<{len(flat)}b", *(code - 127 for code in flat))
        else:
            data += bytes(flat)
        parts = [self.scales] + ([self.offsets] if self.dtype == "int4" else [])
        for part in parts:
            data += b"\0" * (-len(data) % 256)
            data += struct.pack(f"<{part.size}f", *part.reshape(-1))
        if self.with_order:
            data += b"\0" * (-len(data) % 256)
            data += struct.pack(f"<{len(self.order)}i", *self.order)
        return data

    def file(self, **changes: Any) -> Nano2:
        file = honest(MODEL)
        file.fixed = {"minor": 1}
        at = next(i for i, t in enumerate(file.tensors) if t.name == NAME.encode())
        fields = {
            "group_size": self.group,
            "reserved": int(self.with_order),
            "data": self.data,
            "shape": SHAPE,
        } | changes
        file.tensors[at] = Tensor(NAME.encode(), CODES[self.dtype], **fields)
        return file


FORMS = [
    ("int4", False), ("int4", True), ("float8_e4m3", False), ("float8_e4m3", True), ("int8", True),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "with_order"), FORMS)
def test_codes_are_views_of_the_file(dtype: str, with_order: bool, tmp_path: Path) -> None:
    packed = Packed(dtype, with_order=with_order)
    (tmp_path / "m.nano").write_bytes(packed.file().pack())
    with open_checkpoint(tmp_path / "m.nano") as opened:
        info = opened.tensors[NAME]
        assert (info.dtype, info.shape, info.nbytes) == (dtype, SHAPE, len(packed.data))
        matrix = opened.read_quantized(NAME)
        assert matrix is not None
        assert matrix.kind == {"float8_e4m3": "fp8"}.get(dtype, dtype)
        assert matrix.group_size == GROUP
        for part in (matrix.codes, matrix.scales, matrix.offsets, matrix.input_order):
            if part is not None:
                assert part.ctypes.data % 256 == 0
                assert not part.flags.writeable
        np.testing.assert_array_equal(matrix.dequantize(), packed.values)
        np.testing.assert_array_equal(opened.read(NAME), packed.values)
        assert [problem for _, problem in opened.verify() if problem] == []
        assert opened.read_quantized("embed.weight") is None
        with pytest.raises(CheckpointError, match="there is no tensor 'x'"):
            opened.read_quantized("x")


def test_int8_without_an_order_is_as_before(tmp_path: Path) -> None:
    packed = Packed("int8")
    file = packed.file()
    file.fixed = {}
    (tmp_path / "m.nano").write_bytes(file.pack())
    opened = open_checkpoint(tmp_path / "m.nano")
    assert isinstance(opened.read(NAME), GroupedInt8)
    matrix = opened.read_quantized(NAME)
    assert matrix is not None
    np.testing.assert_array_equal(matrix.dequantize(), packed.values)


def test_one_group_a_row(tmp_path: Path) -> None:
    for dtype in ("int4", "float8_e4m3"):
        packed = Packed(dtype, group=SHAPE[1])
        (tmp_path / "m.nano").write_bytes(packed.file().pack())
        np.testing.assert_array_equal(
            open_checkpoint(tmp_path / "m.nano").read(NAME), packed.values
        )


@pytest.mark.parametrize(("dtype", "with_order"), FORMS)
def test_quantised_files_are_written_bit_for_bit(
    dtype: str, with_order: bool, tmp_path: Path
) -> None:
    packed = Packed(dtype, with_order=with_order)
    (tmp_path / "a.nano").write_bytes(packed.file().pack())
    with open_checkpoint(tmp_path / "a.nano") as opened:
        write_nanoinfer2(opened, tmp_path / "b.nano")
        write_nanoinfer2(opened, tmp_path / "floats.nano", dtype="float32")
    with open_checkpoint(tmp_path / "b.nano") as again:
        write_nanoinfer2(again, tmp_path / "c.nano")
        matrix = again.read_quantized(NAME)
        assert matrix is not None
        np.testing.assert_array_equal(matrix.dequantize(), packed.values)
        assert [problem for _, problem in again.verify() if problem] == []
    written = (tmp_path / "c.nano").read_bytes()
    assert packed.data in written
    assert struct.unpack_from("<I", written, 12) == (1,)  # the minor version
    plain = (tmp_path / "floats.nano").read_bytes()
    assert struct.unpack_from("<I", plain, 12) == (0,)  # what older readers take
    np.testing.assert_array_equal(
        open_checkpoint(tmp_path / "floats.nano").read(NAME), packed.values
    )


@pytest.mark.parametrize(
    ("dtype", "changes", "words"),
    [
        ("int4", {"group_size": 0}, "group_size 0 does not suit"),
        ("int4", {"group_size": 12}, "group_size 12 does not suit"),
        ("int4", {"group_size": 128}, "groups of 128 do not divide the rows of [32, 64], as int4"),
        ("float8_e4m3", {"group_size": 0}, "group_size 0 does not suit"),
        ("float8_e4m3", {"group_size": 256}, "groups of 256 do not divide the rows"),
        ("int4", {"group_size": 32}, "nbytes is"),
        ("int4", {"data": b"\0" * 100}, "nbytes is 100"),
        ("float8_e4m3", {"data": b"\0" * 2048}, "nbytes is 2048"),
        ("int4", {"reserved": 1}, "nbytes is"),
        ("int4", {"reserved": 2}, "flags are 0x2; a int4 tensor may have 0x1"),
        ("int4", {"shape": (64, 32), "group_size": 64}, "groups of 64 do not divide the rows"),
        ("int4", {"shape": (2048,)}, "groups of 16 do not divide the rows of [2048]"),
        ("int4", {"shape": (1, 1 << 62)}, "takes"),
    ],
)
def test_entries_that_do_not_fit_are_refused(
    dtype: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.nano"
    path.write_bytes(Packed(dtype).file(**changes).pack())
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_an_order_needs_minor_version_1(tmp_path: Path) -> None:
    file = Packed("int8", with_order=True).file()
    file.fixed = {"minor": 0}
    (tmp_path / "m.nano").write_bytes(file.pack())
    with pytest.raises(CheckpointError, match="flags are 0x1; a int8 tensor may have 0x0"):
        open_checkpoint(tmp_path / "m.nano")


@pytest.mark.parametrize("dtype", ["int4", "float8_e4m3"])
def test_fewer_bits_need_minor_version_1(dtype: str, tmp_path: Path) -> None:
    file = Packed(dtype).file()
    file.fixed = {"minor": 0}
    (tmp_path / "m.nano").write_bytes(file.pack())
    with pytest.raises(CheckpointError, match=f"{dtype} needs minor_version 1; the file's is 0"):
        open_checkpoint(tmp_path / "m.nano")


def test_flags_of_later_versions(tmp_path: Path) -> None:
    """Those from bit 16 change nothing about the bytes; the others are refused."""
    packed = Packed("int4", with_order=True)
    file = packed.file(reserved=1 | 1 << 16 | 1 << 31)
    file.fixed = {"minor": 2}
    (tmp_path / "m.nano").write_bytes(file.pack())
    with open_checkpoint(tmp_path / "m.nano") as opened:
        np.testing.assert_array_equal(opened.read(NAME), packed.values)
    file = packed.file(reserved=1 | 1 << 1)
    file.fixed = {"minor": 2}
    (tmp_path / "m.nano").write_bytes(file.pack())
    with pytest.raises(CheckpointError, match="flags are 0x3; a int4 tensor may have 0x1"):
        open_checkpoint(tmp_path / "m.nano")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    data = Packed("int4").file().pack()
    (tmp_path / "m.nano").write_bytes(data[:-64])
    with pytest.raises(CheckpointError, match="it is truncated"):
        open_checkpoint(tmp_path / "m.nano")


@pytest.mark.parametrize(
    ("dtype", "part", "value", "words"),
    [
        ("int4", "scales", np.nan, "holds NaN or infinite scales"),
        ("float8_e4m3", "scales", np.inf, "holds NaN or infinite scales"),
        ("int4", "scales", 0.0, "holds a scale of 0 (row 3, group 1)"),
        ("int4", "offsets", -np.inf, "holds NaN or infinite offsets"),
        ("int4", "scales", 1e38, "holds a scale of 1e+38 (row 3, group 1), with which values"),
        ("float8_e4m3", "scales", -1e36, "holds a scale of -1e+36 (row 3, group 1)"),
        ("float8_e4m3", "codes", 255, "holds NaN values"),
        ("int4", "order", 64, "an order of inputs from 0 to 64; it has 64 inputs"),
        ("int8", "order", -1, "an order of inputs from -1 to 63"),
        ("float8_e4m3", "order", 5, "an order that names an input twice"),
    ],
)
def test_numbers_that_are_none_are_found(
    dtype: str, part: str, value: float, words: str, tmp_path: Path
) -> None:
    packed = Packed(dtype, with_order=part == "order")
    array = getattr(packed, part)
    inner = np.flatnonzero((array != value) & (array % 63 != 0))  # of an order: neither end
    array[int(inner[0]) if part == "order" else (3, 1)] = value
    path = tmp_path / "m.nano"
    path.write_bytes(packed.file().pack())
    with open_checkpoint(path) as opened:  # only the header is looked at
        for read in (opened.read, opened.read_quantized):
            with pytest.raises(CheckpointError) as caught:
                read(NAME)
            assert words in str(caught.value)
            assert str(path) in str(caught.value)
            assert NAME in str(caught.value)
        damaged = {name: problem for name, problem in opened.verify() if problem}
        assert list(damaged) == [NAME]
        assert words.removeprefix("an order")[:20] in damaged[NAME]
        with pytest.raises(CheckpointError):
            write_nanoinfer2(opened, tmp_path / "out.nano")
    assert not (tmp_path / "out.nano").exists()


@pytest.mark.parametrize("group", [GROUP, 128])  # that straddles rows, too
@pytest.mark.parametrize(
    ("scale", "words"),
    [(np.nan, "holds NaN or infinite scales"), (3e38, "holds a scale of 3e+38 (")],
)
def test_scales_of_plain_int8_are_looked_at(
    group: int, scale: float, words: str, tmp_path: Path
) -> None:
    packed = Packed("int8")
    packed.group = group
    packed.scales = packed.scales.reshape(-1)[: 32 * 64 // group].copy()
    packed.scales[3] = scale
    (tmp_path / "m.nano").write_bytes(packed.file().pack())
    with open_checkpoint(tmp_path / "m.nano") as opened:
        problems = dict(opened.verify())
        assert [name for name, problem in problems.items() if problem] == [NAME]
        assert str(problems[NAME]).startswith(words)
        if group == GROUP:
            with pytest.raises(CheckpointError) as caught:
                opened.read_quantized(NAME)
            assert words in str(caught.value)
        with pytest.raises(CheckpointError) as caught:
            write_nanoinfer2(opened, tmp_path / "out.nano")
        assert words in str(caught.value)
        assert NAME in str(caught.value)
    assert not (tmp_path / "out.nano").exists()


def test_a_changed_code_breaks_the_checksum(tmp_path: Path) -> None:
    data = bytearray(Packed("int4").file().pack())
    (tmp_path / "m.nano").write_bytes(data)
    with open_checkpoint(tmp_path / "m.nano") as opened:
        offset = opened._entries[NAME].offset  # type: ignore[attr-defined]
    data[offset + 5] ^= 1
    (tmp_path / "m.nano").write_bytes(data)
    with open_checkpoint(tmp_path / "m.nano") as opened:
        damaged = [name for name, problem in opened.verify() if problem]
    assert damaged == [NAME]


def test_resealed_damage_opens_or_fails_cleanly(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    path = tmp_path / "m.nano"
    for dtype, with_order in FORMS:
        honest_bytes = Packed(dtype, with_order=with_order).file().pack()
        entry = honest_bytes.index(NAME.encode()) - 56  # of two dimensions, before its name
        for _ in range(150):
            data = bytearray(honest_bytes)
            for _ in range(rng.integers(1, 4)):
                data[entry + rng.integers(56)] = rng.choice([0, 1, 2, 16, 255, rng.integers(256)])
            path.write_bytes(resealed(data))
            with suppress(CheckpointError, ConfigError), open_checkpoint(path) as opened:
                assert opened.read(NAME).shape == SHAPE
                opened.read_quantized(NAME)


def test_every_float8_code_is_what_ml_dtypes_says() -> None:
    for code in range(256):
        if code & 127 != 127:
            theirs = np.array([code], np.uint8).view(ml_dtypes.float8_e4m3fn)[0]
            assert float(theirs) == float8(code)
