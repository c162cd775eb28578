"""Reads NanoInfer 2 files: the header is checked whole, the tensors are views of the mapped file.

Owns the checks on the bytes (docs/formats.md is the format), but for those of the tensor directory,
which has a reader of its own. Knows nothing of how such a file is
written, nor of what a tokenizer's bytes mean.
"""

from __future__ import annotations

import os
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
from nanocupy.checkpoint.nanoinfer2_directory import DirectoryReader
from nanocupy.checkpoint.nanoinfer2_layout import MAGIC, Entry, align
from nanocupy.checkpoint.quantized_checks import check_numbers, scale_problem
from nanocupy.config import ModelConfig
from nanocupy.errors import CheckpointError, ConfigError
from nanocupy.quantized import QuantizedForm, QuantizedMatrix
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
    bytes. int4 and float8 come as float32 from `read`, and as views in a `QuantizedMatrix` from
    `read_quantized`.

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
        directory = DirectoryReader(
            self.path, self._minor, self._num_tensors, self._header_bytes, self._file.size
        )
        self._entries = directory.read(self._section(layout.DIRECTORY))
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
        self._minor = minor
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

    def read(self, name: str) -> np.ndarray | GroupedInt8:
        """A view of the stored tensor, or floats; see the class. Raises CheckpointError for an
        unknown name, and as `read_quantized` does."""
        entry = self._entry(name)
        if entry.dtype in _NUMPY_DTYPES:
            return self._file.array(
                entry.offset, _NUMPY_DTYPES[entry.dtype], entry.shape, f"tensor {name}"
            )
        if entry.dtype != "int8" or entry.flags:
            matrix = self.read_quantized(name)
            assert matrix is not None
            return matrix.dequantize()
        values, scales = self._parts(entry)
        return GroupedInt8(values, scales, entry.group_size)

    def read_quantized(self, name: str) -> QuantizedMatrix | None:
        """Views of the stored codes, scales and the rest; see `Checkpoint`. Raises CheckpointError
        also for scales of int4 and float8 that are 0 and an order of inputs that is none."""
        entry = self._entry(name)
        if entry.dtype in _NUMPY_DTYPES:
            return None
        if entry.dtype == "int8" and not entry.flags:
            return super().read_quantized(name)
        codes, scales, *rest = self._parts(entry)
        offsets = rest.pop(0) if entry.dtype == "int4" else None
        order = rest.pop(0) if rest else None
        scales = scales.reshape(entry.shape[0], -1)
        kind = layout.KINDS[entry.dtype]
        where = f"{self.path}: tensor {name}"
        check_numbers(kind, codes, scales, offsets, order, where)
        return QuantizedMatrix(kind, codes, scales, offsets, entry.group_size, order)

    def quantized_form(self, name: str) -> QuantizedForm | None:
        """What the directory says; see `Checkpoint`."""
        entry = self._entry(name)
        if entry.dtype not in layout.KINDS or len(entry.shape) != 2:
            return None
        if entry.shape[1] % entry.group_size:  # int8 whose groups straddle rows
            return None
        has_order = bool(entry.flags & layout.HAS_INPUT_ORDER)
        return QuantizedForm(layout.KINDS[entry.dtype], entry.group_size, has_order)

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            self._fail(f"there is no tensor {shown(name)}")
        return entry

    def _parts(self, entry: Entry) -> list[np.ndarray]:
        """The parts of a grouped tensor, views of the file."""
        has_order = bool(entry.flags & layout.HAS_INPUT_ORDER)
        return [
            self._file.array(
                entry.offset + part.offset,
                part.dtype,
                part.shape,
                f"{part.name} of tensor {entry.name}",
            )
            for part in layout.parts(entry.dtype, entry.shape, entry.group_size, has_order)
        ]

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
        if entry.dtype not in _NUMPY_DTYPES and (entry.dtype != "int8" or entry.flags):
            try:
                self.read_quantized(entry.name)  # checks its numbers
            except CheckpointError as exc:
                return str(exc).removeprefix(f"{self.path}: tensor {entry.name} ")
            return None
        tensor = self.read(entry.name)
        if isinstance(tensor, GroupedInt8):
            return scale_problem("int8", tensor.scales)
        values = tensor.reshape(-1)
        step = _CHUNK_BYTES // 4
        for start in range(0, values.size, step):
            if not np.isfinite(values[start : start + step]).all():
                return "holds NaN or infinite values"
        return None

    def close(self) -> None:
        self._file.close()
