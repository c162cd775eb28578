"""Writes NanoInfer 2 files from any checkpoint, one tensor in memory at a time.

Owns the order of writing and the choice of each tensor's type. The bytes themselves are defined in
`nanocupy.checkpoint.nanoinfer2_layout`; what a source looks like is its reader's business.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nanocupy.checkpoint import nanoinfer2_layout as layout
from nanocupy.checkpoint.base import Checkpoint, GroupedInt8, TensorInfo, dequantized
from nanocupy.checkpoint.nanoinfer2_layout import Entry, align
from nanocupy.checkpoint.quantized_checks import check_numbers
from nanocupy.errors import CheckpointError
from nanocupy.exporters.conversion import (
    CHUNK_VALUES,
    Progress,
    check_dtype,
    converted,
    read_checked,
)
from nanocupy.exporters.output_file import output_file
from nanocupy.strict_json import parse_object


def write_nanoinfer2(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write `checkpoint` as the NanoInfer 2 file `out`, which appears whole or not at all.

    dtype      float32, float16 or bfloat16 for all matrices; vectors (norms, biases) keep their
               stored type. None: matrices keep theirs as well, int8, int4 and float8 their codes
               and scales; GGUF's quantised types, and int8 that can only be read as floats,
               become float16, or bfloat16 where a value is beyond float16.
    progress   called with (bytes written, all bytes) after each piece, as planned beforehand

    Raises CheckpointError: a value that float16 cannot hold, NaN or infinite weights, `out` is the
    source, the disk is full; TokenizerError where the source's tokenizer is broken.
    """
    check_dtype(dtype)
    sections = _sections(checkpoint)
    names = list(checkpoint.tensors)
    directory_bytes = sum(
        layout.entry_bytes(name, len(checkpoint.tensors[name].shape)) for name in names
    )
    # The header's size does not hang on the tensors' contents, so these are written first.
    header_bytes = len(_header(checkpoint, sections, bytes(directory_bytes), 0))
    planned = {name: _planned_bytes(checkpoint.tensors[name], dtype) for name in names}
    with output_file(Path(out), checkpoint) as file:
        tensors = _TensorWriter(file, header_bytes, progress, planned)
        for name in names:
            tensors.write(checkpoint, name, dtype)
        file_bytes = tensors.end
        directory = b"".join(layout.pack_entry(entry) for entry in tensors.entries)
        file.seek(0)
        minor_version = layout.minor_version(tensors.entries)
        file.write(_header(checkpoint, sections, directory, file_bytes, minor_version))


class _TensorWriter:
    """Writes tensors one after the other, aligned, and keeps their directory entries."""

    def __init__(
        self,
        file: BinaryIO,
        header_bytes: int,
        progress: Progress | None,
        planned: Mapping[str, int],
    ) -> None:
        self.entries: list[Entry] = []
        self.end = header_bytes
        self._file = file
        self._progress = progress
        self._planned = planned
        self._total = sum(planned.values())
        self._done = 0  # bytes of finished tensors, as planned
        self._checksum = 0

    def write(self, checkpoint: Checkpoint, name: str, dtype: str | None) -> None:
        info = checkpoint.tensors[name]
        what = f"{checkpoint.path}: tensor {name}"
        self._pad()
        offset, self._checksum = self.end, 0
        grouped = info.dtype in layout.GROUPED and dtype is None
        tensor = _grouped(checkpoint, name) if grouped else read_checked(checkpoint, name)
        if isinstance(tensor, _Grouped):
            stored, group_size = tensor.dtype, tensor.group_size
            flags = layout.HAS_INPUT_ORDER if tensor.has_order else 0
            for number, part in enumerate(tensor.parts):
                if number:
                    self._pad()
                self._put(part)
        else:
            array = dequantized(tensor)
            stored, group_size, flags = _stored_dtype(info, dtype), 0, 0
            if dtype is None and stored == "float16" and _beyond_float16(array):
                stored = "bfloat16"  # of the same size, and nobody asked for float16
            num_done = 0
            for piece in converted(array, stored, what, asked=dtype is not None):
                self._put(piece)
                num_done += piece.size
                self._report(self._planned[name] * num_done // array.size)
        self._done += self._planned[name]
        self._report(0)
        self.entries.append(
            Entry(
                name,
                stored,
                tuple(info.shape),
                group_size,
                offset,
                self.end - offset,
                self._checksum,
                flags,
            )
        )

    def _put(self, array: np.ndarray) -> None:
        # A view of bytes: bfloat16 has no buffer format of its own.
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self.end += data.size

    def _pad(self) -> None:
        """Zeros up to the alignment; before the first tensor this also leaves the header's room."""
        padding = bytes(align(self.end, layout.TENSOR_ALIGNMENT) - self.end)
        self._file.seek(self.end)
        self._file.write(padding)
        self._checksum = zlib.crc32(padding, self._checksum)
        self.end += len(padding)

    def _report(self, num_bytes_of_tensor: int) -> None:
        if self._progress is not None:
            self._progress(self._done + num_bytes_of_tensor, self._total)


@dataclass(frozen=True)
class _Grouped:
    """A quantised tensor as it goes into the file: `parts` in the file's order."""

    dtype: str
    group_size: int
    parts: list[np.ndarray]
    has_order: bool = False


def _grouped(checkpoint: Checkpoint, name: str) -> _Grouped | np.ndarray:
    """A tensor that is quantised in its source, or its values, where the reader can give only
    these: so a legacy file's q and k, whose rows change places, with groups that straddle rows."""
    what = f"{checkpoint.path}: tensor {name}"
    shape = tuple(checkpoint.tensors[name].shape)
    matrix = checkpoint.read_quantized(name)
    if matrix is None:
        tensor = read_checked(checkpoint, name)
        if not isinstance(tensor, GroupedInt8):
            return tensor
        check_numbers("int8", tensor.values, tensor.scales, None, None, what, zero_scales=True)
        parts = [tensor.values, tensor.scales.astype("<f4", copy=False)]
        return _Grouped("int8", tensor.group_size, parts)
    if matrix.shape != shape:
        raise CheckpointError(f"{what} came as {list(matrix.shape)}, not {list(shape)}")
    scales, offsets, order = matrix.scales, matrix.offsets, matrix.input_order
    # Nothing is written that the reader refuses; int8 without an order may have scales of 0.
    plain = matrix.kind == "int8" and order is None
    check_numbers(matrix.kind, matrix.codes, scales, offsets, order, what, zero_scales=plain)
    parts = [matrix.codes, scales.astype("<f4", copy=False)]
    if offsets is not None:
        parts.append(offsets.astype("<f4", copy=False))
    if order is not None:
        parts.append(order.astype("<i4", copy=False))
    dtype = next(name for name, kind in layout.KINDS.items() if kind == matrix.kind)
    return _Grouped(dtype, matrix.group_size, parts, order is not None)


def _beyond_float16(array: np.ndarray) -> bool:
    """Whether it has finite values that float16 does not; what was float16 has none."""
    if array.dtype == np.float16:
        return False
    flat = array.reshape(-1)
    for start in range(0, flat.size, CHUNK_VALUES):
        piece = flat[start : start + CHUNK_VALUES]
        with np.errstate(over="ignore"):
            lost = ~np.isfinite(piece.astype(np.float16))
        if np.isfinite(piece[lost].astype(np.float32)).any():
            return True
    return False


def _stored_dtype(info: TensorInfo, dtype: str | None) -> str:
    """The type to store a tensor in that does not stay quantised."""
    is_matrix = len(info.shape) == 2
    if is_matrix and dtype is not None:
        return dtype
    if info.dtype in layout.ITEM_BYTES:
        return info.dtype
    return "float16" if is_matrix else "float32"


def _planned_bytes(info: TensorInfo, dtype: str | None) -> int:
    """About what the tensor will take in the file."""
    if info.dtype in layout.GROUPED and dtype is None:
        return info.nbytes
    return math.prod(info.shape) * layout.ITEM_BYTES[_stored_dtype(info, dtype)]


def _sections(checkpoint: Checkpoint) -> dict[int, bytes]:
    """The sections of the header but the directory, in file order; empty ones are left out."""
    sections = {layout.CONFIG: _json(checkpoint.config.to_dict(), "config")}
    tokenizer = checkpoint.tokenizer
    if tokenizer is not None:
        sections[layout.TOKENIZER] = tokenizer.to_bytes()
    if checkpoint.chat_template is not None:
        try:
            sections[layout.CHAT_TEMPLATE] = checkpoint.chat_template.encode()
        except UnicodeEncodeError as exc:
            raise CheckpointError(f"{checkpoint.path}: chat template is not Unicode") from exc
    stated = {k: v for k, v in asdict(checkpoint.generation_defaults).items() if v is not None}
    if stated:
        sections[layout.GENERATION] = _json(stated, "generation defaults")
    metadata = {"exported_from": checkpoint.format, **checkpoint.metadata}
    sections[layout.METADATA] = _json(metadata, "metadata")
    for kind, data in sections.items():
        if len(data) > layout.MAX_SECTION_BYTES[kind]:
            raise CheckpointError(
                f"{checkpoint.path}: its {layout.SECTION_NAMES[kind]} takes {len(data)} bytes; "
                f"a NanoInfer 2 file holds at most {layout.MAX_SECTION_BYTES[kind]}"
            )
    return sections


def _json(values: Mapping[str, Any], what: str) -> bytes:
    try:
        data = json.dumps(values, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as exc:
        raise CheckpointError(f"{what} cannot be written as JSON: {exc}") from exc
    parse_object(data, what)  # nothing is written that the reader would refuse
    return data


def _header(
    checkpoint: Checkpoint,
    sections: Mapping[int, bytes],
    directory: bytes,
    file_bytes: int,
    minor_version: int = 0,
) -> bytes:
    """The whole header, with its checksum; its size is that of its sections alone."""
    contents = {**sections, layout.DIRECTORY: directory}
    position = layout.FIXED.size + len(contents) * layout.SECTION.size
    table, body = b"", b""
    for kind, data in contents.items():
        required = layout.SECTION_REQUIRED if kind in (layout.CONFIG, layout.DIRECTORY) else 0
        table += layout.SECTION.pack(kind, required, position, len(data))
        padded = data.ljust(align(len(data), layout.SECTION_ALIGNMENT), b"\0")
        body += padded
        position += len(padded)
    fixed = [
        layout.MAGIC,
        layout.VERSION,
        minor_version,
        layout.FIXED.size,
        layout.config_flags(checkpoint.config),
        layout.TENSOR_ALIGNMENT,
        len(contents),
        len(checkpoint.tensors),
        0,  # the checksum counts as zero in the bytes that it covers
        position,
        align(position, layout.TENSOR_ALIGNMENT),
        file_bytes,
        bytes(16),
    ]
    fixed[8] = zlib.crc32(layout.FIXED.pack(*fixed) + table + body)
    return layout.FIXED.pack(*fixed) + table + body
