"""NanoInfer 2 files packed with `struct` alone, from docs/formats.md: honest ones and hostile ones.

Independent of the product's code. `Nano2` holds every field, so that a test can change one and
pack the rest as it was, with the checksum made right again.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanocupy.checkpoint.base import GroupedInt8
from tests.checkpoint.tiny import TinyCheckpoint

CONFIG, TOKENIZER, TEMPLATE, GENERATION, METADATA, DIRECTORY = 1, 2, 3, 4, 5, 6
CODES = {"float32": 1, "float16": 2, "bfloat16": 3, "int8": 4, "int4": 5, "float8_e4m3": 6}
MAGIC = bytes.fromhex("4e4e49f20d0a1a0a")


def up(value: int, multiple: int) -> int:
    while value % multiple:
        value += 1
    return value


@dataclass
class Tensor:
    """A directory entry; offset, nbytes and checksum are computed where they are None."""

    name: bytes
    code: int
    shape: tuple[int, ...]
    data: bytes
    group_size: int = 0
    offset: int | None = None
    nbytes: int | None = None
    checksum: int | None = None
    reserved: int = 0
    extra: bytes = b""  # what a later version adds to an entry
    entry_bytes: int | None = None

    def pack(self, offset: int) -> bytes:
        body = struct.pack(f"<{len(self.shape)}Q", *self.shape) + self.name
        body += b"\0" * (-(40 + len(body)) % 8) + self.extra
        return (
            struct.pack(
                "<IHHIIQQII",
                40 + len(body) if self.entry_bytes is None else self.entry_bytes,
                self.code,
                len(self.name),
                len(self.shape),
                self.group_size,
                offset if self.offset is None else self.offset,
                len(self.data) if self.nbytes is None else self.nbytes,
                zlib.crc32(self.data) if self.checksum is None else self.checksum,
                self.reserved,
            )
            + body
        )


@dataclass
class Nano2:
    config: dict[str, Any]
    tensors: list[Tensor]
    sections: list[tuple[int, int, bytes]] = field(default_factory=list)  # kind, flags, data
    fixed: dict[str, int] = field(default_factory=dict)  # fields to falsify
    fixed_extra: bytes = b""
    trailer: bytes = b""
    keep_config: bool = True

    def pack(self) -> bytes:
        given = list(self.sections)
        if self.keep_config:
            given.insert(0, (CONFIG, 1, json.dumps(self.config).encode()))
        # Entries' sizes do not hang on the offsets in them, so two passes settle both.
        directory = b"".join(t.pack(0) for t in self.tensors)
        header_bytes = self._header(given, directory, 0)[0]
        position = header_bytes
        blob, directory = b"", b""
        for tensor in self.tensors:
            start = up(position, 256)
            blob += b"\0" * (start - position) + tensor.data
            directory += tensor.pack(start)
            position = start + len(tensor.data)
        header = self._header(given, directory, position)[1]
        return header + blob + self.trailer

    def _header(
        self, given: list[tuple[int, int, bytes]], directory: bytes, file_bytes: int
    ) -> tuple[int, bytes]:
        sections = [*given, (DIRECTORY, 1, directory)]
        position = 80 + len(self.fixed_extra) + 24 * len(sections)
        table, body = b"", b""
        for kind, flags, data in sections:
            table += struct.pack("<IIQQ", kind, flags, position, len(data))
            padded = data + b"\0" * (-len(data) % 8)
            body += padded
            position += len(padded)
        flag_names = ("has_qkv_bias", "has_o_bias", "has_qk_norm", "tied_lm_head", "has_mlp_bias")
        values = {
            "version": 2,
            "minor": 0,
            "fixed_bytes": 80 + len(self.fixed_extra),
            "flags": sum(1 << i for i, name in enumerate(flag_names) if self.config.get(name)),
            "alignment": 256,
            "sections": len(sections),
            "tensors": len(self.tensors),
            "checksum": 0,
            "header_bytes": position,
            "data_offset": up(position, 256),
            "file_bytes": file_bytes,
            "reserved": 0,
        } | self.fixed

        def fixed_part(checksum: int) -> bytes:
            v = values
            return (
                MAGIC
                + struct.pack("<IIII", v["version"], v["minor"], v["fixed_bytes"], v["flags"])
                + struct.pack("<IIII", v["alignment"], v["sections"], v["tensors"], checksum)
                + struct.pack("<QQQ", v["header_bytes"], v["data_offset"], v["file_bytes"])
                + struct.pack("<QQ", v["reserved"], 0)
                + self.fixed_extra
            )

        checksum = zlib.crc32(fixed_part(0) + table + body)
        return position, fixed_part(checksum) + table + body


def resealed(data: bytes | bytearray) -> bytes:
    """`data` with its header checksum made right, as an attacker would."""
    (header_bytes,) = struct.unpack_from("<Q", data, 40)
    header = bytearray(data[: max(80, min(header_bytes, len(data)))])
    header[36:40] = bytes(4)
    return bytes(data[:36]) + struct.pack("<I", zlib.crc32(header)) + bytes(data[40:])


def honest(checkpoint: TinyCheckpoint) -> Nano2:
    """The file that should be written for `checkpoint`, but for metadata."""
    tensors = []
    for name, info in checkpoint.tensors.items():
        array = checkpoint.read(name)
        if isinstance(array, GroupedInt8):
            data = array.values.tobytes()
            data += b"\0" * (-len(data) % 256) + array.scales.tobytes()
            group_size = array.group_size
        else:
            data, group_size = array.view(np.uint8).tobytes(), 0
        tensors.append(Tensor(name.encode(), CODES[info.dtype], info.shape, data, group_size))
    return Nano2(checkpoint.config.to_dict(), tensors)
