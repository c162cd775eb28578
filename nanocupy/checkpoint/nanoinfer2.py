"""Reads NanoInfer 2 files: the header is checked whole, the tensors are views of the mapped file.

Owns every check on the bytes (docs/formats.md is the format). Knows nothing of how such a file is
written, nor of what a tokenizer's bytes mean.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import ml_dtypes
import numpy as np

from nanocupy.checkpoint import nanoinfer2_layout as layout
from nanocupy.checkpoint.base import Checkpoint, GroupedInt8, TensorInfo, check_tensors
from nanocupy.checkpoint.fields import Fields, generation_defaults
from nanocupy.checkpoint.mapped_file import MappedFile
from nanocupy.checkpoint.nanoinfer2_layout import MAGIC, Entry, align
from nanocupy.config import ModelConfig
from nanocupy.errors import CheckpointError, ConfigError
from nanocupy.strict_json import parse_object, shown

if TYPE_CHECKING:
    from nanocupy.tokenizer.base import Tokenizer

__all__ = ["MAGIC", "NanoInfer2Checkpoint"]

_NUMPY_DTYPES = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_CHUNK_BYTES = 1 << 24  # of a tensor that `verify` looks at in one piece
_GENERATION_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample")


class NanoInfer2Checkpoint(Checkpoint):
    """A NanoInfer 2 file. Opening reads and checks the header only, whatever the model's size.

    Arrays that `read` gives are read-only views of the mapped file in the stored dtype (float32,
    float16, bfloat16 by ml_dtypes), or `GroupedInt8` of such views; they start at multiples of 256
    bytes. Entries of int4 and float8 are listed, but refused by name when read.

    Raises CheckpointError for whatever the header gets wrong.
    """

    format = "nanoinfer-2"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = MappedFile(self.path)
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        self._read_fixed_part()
        self._sections = self._read_sections()
        self.config = self._read_config()
        self._entries = {entry.name: entry for entry in self._read_directory()}
        self.tensors = {
            e.name: TensorInfo(e.name, e.shape, e.dtype, e.nbytes) for e in self._entries.values()
        }
        check_tensors(self.path, self.config, self.tensors)
        if layout.CHAT_TEMPLATE in self._sections:
            try:
                self.chat_template = str(self._section(layout.CHAT_TEMPLATE), "utf-8")
            except UnicodeDecodeError as exc:
                self._fail(f"chat template is not UTF-8 text (byte {exc.start})")
        if layout.GENERATION in self._sections:
            where = f"{self.path}: generation defaults"
            fields = Fields(where, parse_object(self._section(layout.GENERATION), where))
            self.generation_defaults = generation_defaults(
                fields, {name: name for name in _GENERATION_NAMES}
            )
        if layout.METADATA in self._sections:
            self.metadata = parse_object(self._section(layout.METADATA), f"{self.path}: metadata")

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}") from None

    def _read_fixed_part(self) -> None:
        size = self._file.size
        if size < layout.FIXED.size:
            self._fail(f"{size} bytes; a NanoInfer 2 header alone has {layout.FIXED.size}")
        (
            magic,
            version,
            minor,
            self._fixed_bytes,
            self._flags,
            alignment,
            self._num_sections,
            self._num_tensors,
            checksum,
            self._header_bytes,
            self._data_offset,
            file_bytes,
            reserved,
        ) = layout.FIXED.unpack(self._file.bytes(0, layout.FIXED.size, "header"))
        if magic != MAGIC:
            self._fail(f"magic is {magic!r}; a NanoInfer 2 file starts with {MAGIC!r}")
        if version != layout.VERSION:
            self._fail(f"version is {version}; this nanocupy reads version {layout.VERSION}")
        # A later minor version may use what this one leaves empty; this one's files may not.
        self._lenient = minor > layout.MINOR_VERSION
        if file_bytes != size:
            kind = (
                "truncated" if size < file_bytes else "followed by bytes that do not belong to it"
            )
            self._fail(f"file_bytes is {file_bytes} but the file has {size}; it is {kind}")
        if self._header_bytes % layout.SECTION_ALIGNMENT or self._header_bytes > size:
            self._fail(
                f"header_bytes is {self._header_bytes}; it must be a multiple of "
                f"{layout.SECTION_ALIGNMENT} within the file's {size} bytes"
            )
        if not layout.FIXED.size <= self._fixed_bytes <= self._header_bytes or (
            not self._lenient and self._fixed_bytes != layout.FIXED.size
        ):
            self._fail(f"fixed_bytes is {self._fixed_bytes}; it must be {layout.FIXED.size}")
        if self._header_checksum() != checksum:
            self._fail(
                f"header_checksum is {checksum:08x} but the header's bytes give "
                f"{self._header_checksum():08x}; the file is damaged"
            )
        if alignment != layout.TENSOR_ALIGNMENT:
            self._fail(f"alignment is {alignment}; it must be {layout.TENSOR_ALIGNMENT}")
        if self._data_offset != align(self._header_bytes, alignment):
            self._fail(
                f"data_offset is {self._data_offset}; after a header of {self._header_bytes} bytes "
                f"it must be {align(self._header_bytes, alignment)}"
            )
        if not self._lenient and any(reserved):
            self._fail(f"reserved bytes of the header are {reserved.hex()}; they must be 0")
        known = sum(layout.FLAG_BITS.values())
        unknown = self._flags & ~known & (layout.REQUIRED_FLAGS if self._lenient else 0xFFFFFFFF)
        if unknown:
            self._fail(f"flags are {self._flags:#x}; this nanocupy does not know {unknown:#x}")

    def _header_checksum(self) -> int:
        start, end = layout.CHECKSUM_OFFSET, layout.CHECKSUM_OFFSET + 4
        header = self._file.bytes(0, self._header_bytes, "header")
        return zlib.crc32(header[end:], zlib.crc32(bytes(4), zlib.crc32(header[:start])))

    def _read_sections(self) -> dict[int, tuple[int, int]]:
        """Section kind -> (offset, length). Sections fill the header, in order, without gaps."""
        count = self._num_sections
        table_bytes = count * layout.SECTION.size
        if self._fixed_bytes + table_bytes > self._header_bytes:
            self._fail(
                f"section_count is {count}; so many do not fit a header of "
                f"{self._header_bytes} bytes"
            )
        table = self._file.bytes(self._fixed_bytes, table_bytes, "section table")
        sections: dict[int, tuple[int, int]] = {}
        end = self._fixed_bytes + table_bytes
        for kind, flags, offset, length in layout.SECTION.iter_unpack(table):
            name = layout.SECTION_NAMES.get(kind, f"section of kind {kind}")
            if kind in sections:
                self._fail(f"{name}: occurs twice")
            if kind not in layout.SECTION_NAMES and (
                not self._lenient or flags & layout.SECTION_REQUIRED
            ):
                self._fail(f"{name}: not known to this nanocupy")
            expected = align(end, layout.SECTION_ALIGNMENT)
            if offset != expected or offset + length > self._header_bytes:
                self._fail(
                    f"{name}: {length} bytes at offset {offset}; it must start at {expected} and "
                    f"end within the header's {self._header_bytes} bytes"
                )
            if length > layout.MAX_SECTION_BYTES.get(kind, length):
                self._fail(
                    f"{name}: {length} bytes; at most {layout.MAX_SECTION_BYTES[kind]} are read"
                )
            self._check_zeros(end, offset, f"padding before {name}")
            sections[kind] = (offset, length)
            end = offset + length
        if align(end, layout.SECTION_ALIGNMENT) != self._header_bytes:
            self._fail(f"header_bytes is {self._header_bytes} but the sections end at {end}")
        self._check_zeros(end, self._header_bytes, "padding after the sections")
        for kind in (layout.CONFIG, layout.DIRECTORY):
            if kind not in sections:
                self._fail(f"{layout.SECTION_NAMES[kind]}: missing")
        return sections

    def _check_zeros(self, start: int, end: int, what: str) -> None:
        if any(self._file.bytes(start, end - start, what)):
            self._fail(f"{what}: bytes {start} to {end} must be 0")

    def _section(self, kind: int) -> memoryview:
        offset, length = self._sections[kind]
        return self._file.bytes(offset, length, layout.SECTION_NAMES[kind])

    def _read_config(self) -> ModelConfig:
        where = f"{self.path}: config"
        values = parse_object(self._section(layout.CONFIG), where)
        try:
            config = ModelConfig.from_dict(values)
        except ConfigError as exc:
            raise CheckpointError(f"{where}: {exc}") from exc
        for name, bit in layout.FLAG_BITS.items():
            if getattr(config, name) != bool(self._flags & bit):
                self._fail(
                    f"flags are {self._flags:#x}, where {name} is {bool(self._flags & bit)}, "
                    f"but the config says {getattr(config, name)}"
                )
        # The names of so many layers are only listed where the directory has as many entries.
        if config.num_layers > self._num_tensors:
            self._fail(
                f"config: num_layers is {config.num_layers} but tensor_count is {self._num_tensors}"
            )
        return config

    def _read_directory(self) -> Iterator[Entry]:
        directory = self._section(layout.DIRECTORY)
        if self._num_tensors * layout.ENTRY.size > len(directory):
            self._fail(
                f"tensor_count is {self._num_tensors}; the tensor directory's {len(directory)} "
                "bytes cannot hold so many"
            )
        names: set[str] = set()
        position, end = 0, self._header_bytes
        for index in range(self._num_tensors):
            entry, length = self._parse_entry(directory[position:], f"tensor entry {index}")
            position += length
            if entry.name in names:
                self._fail(f"tensor {entry.name}: occurs twice in the tensor directory")
            names.add(entry.name)
            expected = align(end, layout.TENSOR_ALIGNMENT)
            if entry.offset != expected or entry.offset + entry.nbytes > self._file.size:
                self._fail(
                    f"tensor {entry.name}: {entry.nbytes} bytes at offset {entry.offset}; it must "
                    f"start at {expected} and end within the file's {self._file.size} bytes"
                )
            end = entry.offset + entry.nbytes
            yield entry
        if position != len(directory):
            self._fail(
                f"tensor directory: {len(directory)} bytes, but its {self._num_tensors} entries "
                f"take {position}"
            )
        if end != self._file.size:
            self._fail(f"file_bytes is {self._file.size} but the last tensor ends at {end}")

    def _parse_entry(self, data: memoryview, where: str) -> tuple[Entry, int]:
        """The entry at the start of `data`, and how many bytes it takes."""
        if len(data) < layout.ENTRY.size:
            self._fail(f"{where}: the tensor directory ends within it")
        length, code, name_bytes, ndim, group_size, offset, nbytes, checksum, reserved = (
            layout.ENTRY.unpack(data[: layout.ENTRY.size])
        )
        used = layout.ENTRY.size + 8 * ndim + name_bytes
        least = align(used, layout.SECTION_ALIGNMENT)
        if (
            length % layout.SECTION_ALIGNMENT
            or not least <= length <= len(data)
            or (not self._lenient and length != least)
        ):
            self._fail(
                f"{where}: entry_bytes is {length}; {ndim} dimensions and a name of {name_bytes} "
                f"bytes take {least}, and the directory has {len(data)} left"
            )
        if not self._lenient and (reserved or any(data[used:length])):
            self._fail(f"{where}: its reserved bytes must be 0")
        if not 1 <= ndim <= 2:
            self._fail(f"{where}: dimensions is {ndim}; it must be 1 or 2")
        shape_end = layout.ENTRY.size + 8 * ndim
        shape = struct.unpack(f"<{ndim}Q", data[layout.ENTRY.size : shape_end])
        try:
            name = str(data[shape_end:used], "utf-8")
        except UnicodeDecodeError:
            self._fail(f"{where}: its name {bytes(data[shape_end:used])[:80]!r} is not UTF-8")
        where = f"tensor {shown(name)}"
        dtype = layout.DTYPE_NAMES.get(code)
        if dtype is None:
            self._fail(f"{where}: dtype code {code} is not known")
        if min(shape) < 1:
            self._fail(f"{where}: shape {list(shape)} has a dimension below 1")
        count = math.prod(shape)
        if (group_size > 0) != (dtype in layout.GROUPED) or (group_size and count % group_size):
            self._fail(f"{where}: group_size {group_size} does not suit {count} values of {dtype}")
        if dtype in layout.ITEM_BYTES:
            expected = count * layout.ITEM_BYTES[dtype]
        elif dtype == "int8":
            expected = layout.int8_nbytes(count, group_size)
        else:  # reserved types: how their bytes lie is for a later version to say
            expected = nbytes
        if nbytes != expected:
            self._fail(f"{where}: nbytes is {nbytes}; {list(shape)} of {dtype} takes {expected}")
        return Entry(name, dtype, shape, group_size, offset, nbytes, checksum), length

    def read(self, name: str) -> np.ndarray | GroupedInt8:
        """A view of the stored tensor; see the class. Raises CheckpointError for an unknown name,
        and for int4 and float8, which this version lists but does not run."""
        entry = self._entries.get(name)
        if entry is None:
            self._fail(f"there is no tensor {shown(name)}")
        if entry.dtype in _NUMPY_DTYPES:
            return self._file.array(
                entry.offset, _NUMPY_DTYPES[entry.dtype], entry.shape, f"tensor {name}"
            )
        if entry.dtype != "int8":
            self._fail(
                f"tensor {name}: dtype {entry.dtype} is not run by this version of nanocupy; "
                "export the model again with --dtype bfloat16"
            )
        count = math.prod(entry.shape)
        values = self._file.array(entry.offset, np.int8, entry.shape, f"tensor {name}")
        scales = self._file.array(
            entry.offset + layout.int8_scales_offset(count),
            np.dtype("<f4"),
            (count // entry.group_size,),
            f"scales of tensor {name}",
        )
        return GroupedInt8(values, scales, entry.group_size)

    def _load_tokenizer(self) -> Tokenizer | None:
        if layout.TOKENIZER not in self._sections:
            return None
        from nanocupy.tokenizer import tokenizer_from_bytes

        return tokenizer_from_bytes(bytes(self._section(layout.TOKENIZER)))

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """As `Checkpoint.verify`: each tensor's CRC-32, the zeros before it, and finite values."""
        end = self._header_bytes
        for entry in self._entries.values():
            yield entry.name, self._problem(entry, end)
            end = entry.offset + entry.nbytes

    def _problem(self, entry: Entry, previous_end: int) -> str | None:
        if any(self._file.bytes(previous_end, entry.offset - previous_end, "padding")):
            return f"the padding before it (from byte {previous_end}) is not zero"
        checksum = 0
        data = self._file.bytes(entry.offset, entry.nbytes, f"tensor {entry.name}")
        for start in range(0, entry.nbytes, _CHUNK_BYTES):
            checksum = zlib.crc32(data[start : start + _CHUNK_BYTES], checksum)
        if checksum != entry.checksum:
            return (
                f"its bytes have checksum {checksum:08x}, the directory says "
                f"{entry.checksum:08x}: the file is damaged"
            )
        if entry.dtype not in _NUMPY_DTYPES and entry.dtype != "int8":
            return None
        tensor = self.read(entry.name)
        values = tensor.scales if isinstance(tensor, GroupedInt8) else tensor.reshape(-1)
        step = _CHUNK_BYTES // 4
        for start in range(0, values.size, step):
            if not np.isfinite(values[start : start + step]).all():
                return "holds NaN or infinite values"
        return None

    def close(self) -> None:
        self._file.close()
