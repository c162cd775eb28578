"""The container of a GGUF file: key/value metadata and the directory of tensors, strictly bounded.

Owns the format's header, versions 2 and 3, little-endian
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Every count and length is checked
against the bytes that are left before it is used, so that the work is linear in the header's size.
Knows no models and decodes no tensors.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from nanocupy.checkpoint.mapped_file import MappedFile
from nanocupy.errors import CheckpointError
from nanocupy.strict_json import shown

MAGIC = b"GGUF"
Value = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]


@dataclass(frozen=True)
class TensorType:
    """How a tensor is encoded: every `block_size` elements of a row take `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


# The type number in the file -> its encoding. Held equal to the gguf package's by a test: importing
# that package takes longer than opening a file.
TENSOR_TYPES: Mapping[int, TensorType] = {
    0: TensorType("f32", 1, 4),
    1: TensorType("f16", 1, 2),
    2: TensorType("q4_0", 32, 18),
    3: TensorType("q4_1", 32, 20),
    6: TensorType("q5_0", 32, 22),
    7: TensorType("q5_1", 32, 24),
    8: TensorType("q8_0", 32, 34),
    12: TensorType("q4_k", 256, 144),
    13: TensorType("q5_k", 256, 176),
    14: TensorType("q6_k", 256, 210),
    30: TensorType("bf16", 1, 2),
}

_SCALARS = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("u1"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 16
_MAX_NAME_BYTES = 1 << 16  # the specification's bound of a key
# Vocabularies have below 300,000 tokens and about as many merges; a list of Python objects takes
# several times its bytes in the file.
_MAX_ARRAY_ITEMS = 1 << 22
_MAX_RANK = 4
_U32, _U64 = struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `shape` outermost first (the file has it innermost first)."""

    name: str
    type: TensorType
    type_id: int
    shape: tuple[int, ...]
    offset: int  # bytes from the file's start
    nbytes: int


class GGUFFile:
    """version    2 or 3
    metadata   key -> str, int, float, bool, or a list of one of these; a single float32 comes as
               the shortest decimal that rounds to it
    tensors    name -> StoredTensor, in the file's order of bytes

    Raises CheckpointError for anything but a whole, well-formed file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = MappedFile(path)
        self.path = self._file.path
        self.size = self._file.size
        self.metadata: dict[str, Value] = {}
        self._position = 0
        try:
            with self._file.bytes(0, self.size, "header") as self._buffer:
                self._read_header()
        except BaseException:
            self._file.close()
            raise
        finally:
            self._buffer = memoryview(b"")  # nothing but arrays given out may hold the mapping

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}") from None

    # ---- primitives: each moves on by what it read

    def _take(self, length: int, what: str) -> memoryview:
        begin, end = self._position, self._position + length
        if end > self.size:
            self._fail(
                f"{what}: {length} bytes at offset {begin} go beyond the file's {self.size} bytes; "
                "it is truncated or damaged"
            )
        self._position = end
        return self._buffer[begin:end]

    def _u32(self, what: str) -> int:
        return _U32(self._take(4, what))[0]

    def _u64(self, what: str) -> int:
        return _U64(self._take(8, what))[0]

    def _text(self, what: str, max_bytes: int | None = None) -> str:
        length = self._u64(what)
        if max_bytes is not None and length > max_bytes:
            self._fail(f"{what}: length {length} is above {max_bytes}; the file is damaged")
        try:
            return str(self._take(length, what), "utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what}: not UTF-8 text")

    # ---- the header, in the file's order

    def _read_header(self) -> None:
        if bytes(self._take(4, "magic number")) != MAGIC:
            self._fail("not a GGUF file: it does not start with 'GGUF'")
        self.version = self._u32("version")
        if self.version & 0xFFFF == 0 and self.version:
            self._fail("a big-endian GGUF file is not supported; use the little-endian one")
        if self.version not in (2, 3):
            self._fail(f"GGUF version {self.version} is not supported; supported: 2 and 3")
        num_tensors = self._u64("number of tensors")
        num_keys = self._u64("number of metadata keys")
        left = self.size - self._position
        # The shortest entries: a tensor with an empty name and one dimension, an empty key's byte.
        if num_tensors * 32 + num_keys * 13 > left:
            self._fail(
                f"{num_tensors} tensors and {num_keys} metadata keys cannot fit in the "
                f"{left} bytes that follow; it is truncated or damaged"
            )
        for _ in range(num_keys):
            key = self._text("metadata key", _MAX_NAME_BYTES)
            if key in self.metadata:
                self._fail(f"the metadata key {shown(key)} occurs twice")
            self.metadata[key] = self._value(self._u32(f"type of {shown(key)}"), shown(key))
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not (
            0 < alignment <= _MAX_ALIGNMENT and alignment & (alignment - 1) == 0
        ):
            self._fail(
                f"general.alignment is {shown(alignment)}; it must be a power of two up to "
                f"{_MAX_ALIGNMENT}"
            )
        self.alignment = alignment
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        self.tensors = self._place(entries)

    def _value(self, type_id: int, key: str) -> Value:
        if type_id == _STRING:
            return self._text(key)
        if type_id == _ARRAY:
            return self._array(key)
        value = self._numbers(type_id, 1, key)[0]
        if type_id == _FLOAT32:
            # 1e-05 was meant where the file can only say 9.999999747378752e-06.
            value = float(str(np.float32(value)))
        return value

    def _array(self, key: str) -> list:
        type_id, count = self._u32(key), self._u64(key)
        if type_id == _ARRAY:
            self._fail(f"{key}: an array of arrays is not supported")
        if count > _MAX_ARRAY_ITEMS:
            self._fail(f"{key}: {count} items; nanocupy reads arrays of up to {_MAX_ARRAY_ITEMS}")
        if type_id == _STRING:
            return self._texts(count, key)
        return self._numbers(type_id, count, key)

    def _numbers(self, type_id: int, count: int, key: str) -> list:
        dtype = _SCALARS.get(type_id)
        if dtype is None:
            self._fail(f"{key}: value type {type_id} is not known")
        values = np.frombuffer(self._take(count * dtype.itemsize, key), dtype)
        if type_id == _BOOL:
            if count and values.max() > 1:
                self._fail(f"{key}: {int(values.max())} is neither true nor false")
            return values.astype(bool).tolist()
        return values.tolist()

    def _texts(self, count: int, key: str) -> list[str]:
        """An array of strings: the hot loop of the header, hence written out flat."""
        if count * 8 > self.size - self._position:
            self._fail(f"{key}: {count} strings do not fit in the file; it is truncated or damaged")
        buffer, position, size = self._buffer, self._position, self.size
        texts: list[str] = []
        append = texts.append
        try:
            for _ in range(count):
                begin = position + 8
                position = begin + _U64(buffer, position)[0]
                if position > size:
                    break
                append(str(buffer[begin:position], "utf-8"))
        except struct.error:  # a length cut by the end of the file
            position = size + 1
        except UnicodeDecodeError:
            self._fail(f"{key}: string {len(texts)} is not UTF-8 text")
        if position > size:
            self._fail(
                f"{key}: string {len(texts)} of {count} goes beyond the file's {size} bytes; "
                "it is truncated or damaged"
            )
        self._position = position
        return texts

    def _tensor_entry(self) -> StoredTensor:
        """A tensor as the directory has it; its offset still counts from the data's start."""
        name = self._text("tensor name", _MAX_NAME_BYTES)
        what = f"tensor {shown(name)}"
        rank = self._u32(what)
        if not 1 <= rank <= _MAX_RANK:
            self._fail(f"{what}: {rank} dimensions; it must have 1 to {_MAX_RANK}")
        shape = tuple(self._u64(what) for _ in range(rank))[::-1]
        type_id, offset = self._u32(what), self._u64(what)
        encoding = TENSOR_TYPES.get(type_id)
        if encoding is None:
            self._fail(
                f"{what}: type {_type_name(type_id)} is not supported; supported: "
                + ", ".join(t.name.upper() for t in TENSOR_TYPES.values())
            )
        if 0 in shape or shape[-1] % encoding.block_size:
            self._fail(
                f"{what}: shape {list(shape)} does not divide into blocks of "
                f"{encoding.block_size} ({encoding.name})"
            )
        nbytes = math.prod(shape) // encoding.block_size * encoding.block_bytes
        return StoredTensor(name, encoding, type_id, shape, offset, nbytes)

    def _place(self, entries: list[StoredTensor]) -> dict[str, StoredTensor]:
        """Settle the tensors' places: one after the other, each aligned, to the file's end."""
        start = expected = self._aligned(self._position)
        placed: dict[str, StoredTensor] = {}
        end = self._position
        for entry in sorted(entries, key=lambda tensor: tensor.offset):
            what = f"tensor {shown(entry.name)}"
            if entry.name in placed:
                self._fail(f"{what} occurs twice")
            offset = start + entry.offset
            if offset != expected:
                fault = "overlaps another tensor" if offset < expected else "leaves a hole"
                self._fail(f"{what} {fault}: it begins at byte {offset}, expected {expected}")
            end = offset + entry.nbytes
            if end > self.size:
                self._fail(
                    f"{what}: its {entry.nbytes} bytes at offset {offset} go beyond the file's "
                    f"{self.size} bytes; it is truncated or damaged"
                )
            expected = self._aligned(end)
            placed[entry.name] = StoredTensor(
                entry.name, entry.type, entry.type_id, entry.shape, offset, entry.nbytes
            )
        if self.size > max(expected, end):
            self._fail(
                f"{self.size - expected} bytes follow the last tensor, which ends at byte {end}; "
                "the file is padded or damaged"
            )
        return placed

    def _aligned(self, position: int) -> int:
        return -(-position // self.alignment) * self.alignment

    # ---- content

    def array(self, tensor: StoredTensor, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor's bytes as a read-only view of the mapping."""
        return self._file.array(tensor.offset, dtype, shape, f"tensor {shown(tensor.name)}")

    def close(self) -> None:
        self._file.close()


def _type_name(type_id: int) -> str:
    """GGML's name of a tensor type nanocupy does not read."""
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(type_id).name
    except ValueError:
        return f"number {type_id} (not known)"
