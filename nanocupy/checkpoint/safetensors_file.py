"""One .safetensors file: its header checked in full, its tensors given as views of the mapping.

Owns the container format (https://huggingface.co/docs/safetensors, "Format"): eight bytes of header
length, a JSON header, the tensors' bytes without holes. Knows nothing of models.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from nanocupy.checkpoint.mapped_file import MappedFile
from nanocupy.errors import CheckpointError
from nanocupy.strict_json import MAX_JSON_BYTES, parse_object, shown

# Bits of an element by the format's own dtype name.
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# What nanocupy reads: the format's name -> (nanocupy's name, NumPy dtype).
READABLE: Mapping[str, tuple[str, np.dtype]] = {
    "F32": ("float32", np.dtype("<f4")),
    "F16": ("float16", np.dtype("<f2")),
    "BF16": ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
}
# What quantised layers keep their codes in, as the words or bytes they lie in.
CODES: Mapping[str, np.dtype] = {"I32": np.dtype("<u4"), "F8_E4M3": np.dtype("|u1")}
_MAX_RANK = 8


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `dtype` is the format's own name, `offset` counts from byte 0."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes
    nbytes: int


class SafetensorsFile:
    """tensors    name -> StoredTensor, in the file's order of bytes
    metadata   the header's free text pairs

    Raises CheckpointError for anything but a whole, well-formed file: every byte after the header
    belongs to exactly one tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = MappedFile(path)
        self.path = self._file.path
        try:
            self.tensors, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}")

    def _read_header(self) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        size = self._file.size
        if size < 8:
            self._fail(f"{size} bytes are too few for a safetensors file")
        if bytes(self._file.bytes(0, 4, "magic number")) == b"GGUF":
            self._fail("this is a GGUF file named as safetensors; open the file itself")
        (length,) = struct.unpack("<Q", self._file.bytes(0, 8, "header length"))
        if not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
            self._fail(
                f"header length {length} does not fit (the file has {size} bytes, a header at most "
                f"{MAX_JSON_BYTES}); it is truncated or not a safetensors file"
            )
        text = self._file.bytes(8, length, "header")
        if text[0] != ord("{"):
            self._fail("the header does not start with '{'; this is not a safetensors file")
        header = parse_object(text, f"{self.path}: header")

        free = header.pop("__metadata__", {})
        if not isinstance(free, dict) or not all(isinstance(v, str) for v in free.values()):
            self._fail("__metadata__ in the header is not an object of texts")
        start = 8 + length
        found = [self._parse_entry(name, entry, start) for name, entry in header.items()]
        # Empty tensors first among those that begin at one byte, so that the next check holds.
        found.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
        expected = start
        for tensor in found:
            if tensor.offset != expected:
                fault = "overlaps another tensor" if tensor.offset < expected else "leaves a hole"
                self._fail(
                    f"tensor {shown(tensor.name)} {fault}: it begins at byte {tensor.offset}, "
                    f"expected {expected}"
                )
            expected += tensor.nbytes
        if expected != size:
            self._fail(
                f"the tensors end at byte {expected} but the file has {size} bytes; "
                f"it is {'truncated' if expected > size else 'padded'} or damaged"
            )
        return {tensor.name: tensor for tensor in found}, free

    def _parse_entry(self, name: str, entry: Any, start: int) -> StoredTensor:
        what = f"tensor {shown(name)}"
        if not isinstance(entry, dict):
            self._fail(f"{what}: its header entry is {shown(entry)}, not an object")
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in _BITS:
            self._fail(f"{what}: dtype {shown(dtype)} is not known")
        if not _is_whole_numbers(shape) or len(shape) > _MAX_RANK:
            self._fail(f"{what}: shape {shown(shape)} is not up to {_MAX_RANK} whole numbers")
        if not _is_whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self._fail(f"{what}: data_offsets {shown(offsets)} are not [begin, end]")
        begin, end = offsets
        bits = math.prod(shape) * _BITS[dtype]
        if bits % 8 or bits // 8 != end - begin:
            self._fail(
                f"{what}: {dtype} of shape {shown(shape)} does not fill "
                f"data_offsets {shown(offsets)}"
            )
        if start + end > self._file.size:
            self._fail(
                f"{what}: its bytes {begin} to {end} lie beyond the file's {self._file.size} "
                "bytes; it is truncated"
            )
        return StoredTensor(name, dtype, tuple(shape), start + begin, end - begin)

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file, float32, float16 or bfloat16."""
        tensor = self.tensors[name]
        if tensor.dtype not in READABLE:
            self._fail(
                f"tensor {shown(name)} is stored as {tensor.dtype}; nanocupy reads "
                f"{', '.join(READABLE)}"
            )
        return self._file.array(
            tensor.offset, READABLE[tensor.dtype][1], tensor.shape, f"tensor {shown(name)}"
        )

    def codes(self, name: str) -> np.ndarray:
        """A tensor of I32 as a read-only view in uint32, of F8_E4M3 as its bytes in uint8."""
        tensor = self.tensors[name]
        return self._file.array(
            tensor.offset, CODES[tensor.dtype], tensor.shape, f"tensor {shown(name)}"
        )

    def close(self) -> None:
        self._file.close()


def _is_whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)
