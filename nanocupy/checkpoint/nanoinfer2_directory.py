"""Reads a NanoInfer 2 file's tensor directory: every entry checked before anything uses it."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import NoReturn

from nanocupy.checkpoint import nanoinfer2_layout as layout
from nanocupy.checkpoint.nanoinfer2_layout import Entry, align
from nanocupy.errors import CheckpointError
from nanocupy.strict_json import shown


class DirectoryReader:
    """path           the file, for errors
    minor_version  of the file: a later one may use what this one leaves empty, this one's may not
    num_tensors, header_bytes, file_bytes   what the fixed part says of them
    """

    def __init__(
        self, path: Path, minor_version: int, num_tensors: int, header_bytes: int, file_bytes: int
    ) -> None:
        self._path = path
        self._minor = minor_version
        self._lenient = minor_version > layout.MINOR_VERSION
        self._num_tensors = num_tensors
        self._header_bytes = header_bytes
        self._file_bytes = file_bytes

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {reason}") from None

    def read(self, directory: memoryview) -> dict[str, Entry]:
        """Name -> entry, in the file's order. Raises CheckpointError for anything but entries that
        fill directory and file as the format wants it."""
        if self._num_tensors * layout.ENTRY.size > len(directory):
            self._fail(
                f"tensor_count is {self._num_tensors}; the tensor directory's {len(directory)} "
                "bytes cannot hold so many"
            )
        entries: dict[str, Entry] = {}
        position, end = 0, self._header_bytes
        for index in range(self._num_tensors):
            entry, length = self._parse_entry(directory[position:], f"tensor entry {index}")
            position += length
            if entry.name in entries:
                self._fail(f"tensor {entry.name}: occurs twice in the tensor directory")
            entries[entry.name] = entry
            expected = align(end, layout.TENSOR_ALIGNMENT)
            if entry.offset != expected or entry.offset + entry.nbytes > self._file_bytes:
                self._fail(
                    f"tensor {entry.name}: {entry.nbytes} bytes at offset {entry.offset}; it must "
                    f"start at {expected} and end within the file's {self._file_bytes} bytes"
                )
            end = entry.offset + entry.nbytes
        if position != len(directory):
            self._fail(
                f"tensor directory: {len(directory)} bytes, but its {self._num_tensors} entries "
                f"take {position}"
            )
        if end != self._file_bytes:
            self._fail(f"file_bytes is {self._file_bytes} but the last tensor ends at {end}")
        return entries

    def _parse_entry(self, data: memoryview, where: str) -> tuple[Entry, int]:
        """The entry at the start of `data`, and how many bytes it takes."""
        if len(data) < layout.ENTRY.size:
            self._fail(f"{where}: the tensor directory ends within it")
        length, code, name_bytes, ndim, group_size, offset, nbytes, checksum, flags = (
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
        if not self._lenient and any(data[used:length]):
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
        if self._minor < 1 and dtype in layout.SINCE_MINOR_1:
            self._fail(f"{where}: {dtype} needs minor_version 1; the file's is {self._minor}")
        flags = self._known_flags(flags, where, dtype)
        expected = self._expected_bytes(where, dtype, shape, group_size, flags)
        if nbytes != expected:
            self._fail(f"{where}: nbytes is {nbytes}; {list(shape)} of {dtype} takes {expected}")
        return Entry(name, dtype, shape, group_size, offset, nbytes, checksum, flags), length

    def _known_flags(self, flags: int, where: str, dtype: str) -> int:
        """Those of `flags` that this version knows; refuses others, but those that a later version
        may set without a change of what the tensor's bytes mean."""
        known = layout.HAS_INPUT_ORDER if self._minor >= 1 and dtype in layout.GROUPED else 0
        if flags & ~known & (layout.REQUIRED_ENTRY_FLAGS if self._lenient else 0xFFFFFFFF):
            self._fail(f"{where}: flags are {flags:#x}; a {dtype} tensor may have {known:#x}")
        return flags & known

    def _expected_bytes(
        self, where: str, dtype: str, shape: tuple[int, ...], group_size: int, flags: int
    ) -> int:
        count = math.prod(shape)
        if (group_size > 0) != (dtype in layout.GROUPED) or (group_size and count % group_size):
            self._fail(f"{where}: group_size {group_size} does not suit {count} values of {dtype}")
        if dtype in layout.ITEM_BYTES:
            return count * layout.ITEM_BYTES[dtype]
        # Groups of int8 may straddle rows, as they do in some legacy files.
        if (dtype != "int8" or flags) and (
            len(shape) != 2 or shape[1] % group_size or (dtype == "int4" and shape[1] % 2)
        ):
            self._fail(
                f"{where}: groups of {group_size} do not divide the rows of {list(shape)}, as "
                f"{dtype} needs it"
            )
        return layout.grouped_nbytes(dtype, shape, group_size, bool(flags))
