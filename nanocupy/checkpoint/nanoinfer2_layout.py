"""The bytes of a NanoInfer 2 file, shared by its reader and its writer (docs/formats.md).

Owns the magic number, the fixed part, and the packing of sections and directory entries. Knows
neither files nor tensors' contents, and checks nothing: that is the reader's business.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from nanocupy.config import ModelConfig

# Byte 3 has its top bit set, so the first int32 is negative: every legacy layout has a positive
# count there. The rest shows transfers that rewrite line ends or stop at the first Ctrl-Z.
MAGIC = b"NNI\xf2\r\n\x1a\n"
VERSION = 2
# 1 gave int4 and float8_e4m3 their layouts, and entries their flags. A file that has none of these
# is written as 0, which older readers take.
MINOR_VERSION = 1

# A whole number of 16-byte loads, of 128-byte cache lines, and what cudaMalloc aligns to.
TENSOR_ALIGNMENT = 256
SECTION_ALIGNMENT = 8

# magic, version, minor version, fixed-part bytes, flags, alignment, sections, tensors, checksum,
# header bytes, data offset, file bytes, 16 reserved bytes
FIXED = struct.Struct("<8s8I3Q16s")
CHECKSUM_OFFSET = 36

# kind, flags, offset, length
SECTION = struct.Struct("<IIQQ")
SECTION_REQUIRED = 1  # a reader that does not know the section must refuse the file

CONFIG, TOKENIZER, CHAT_TEMPLATE, GENERATION, METADATA, DIRECTORY = range(1, 7)
SECTION_NAMES = {
    CONFIG: "config",
    TOKENIZER: "tokenizer",
    CHAT_TEMPLATE: "chat template",
    GENERATION: "generation defaults",
    METADATA: "metadata",
    DIRECTORY: "tensor directory",
}
# JSON takes many times its text once parsed; honest sections are far below these.
MAX_SECTION_BYTES = {
    CONFIG: 1 << 16,
    TOKENIZER: 1 << 28,
    CHAT_TEMPLATE: 1 << 20,
    GENERATION: 1 << 16,
    METADATA: 1 << 20,
    DIRECTORY: 1 << 26,
}

FLAG_BITS = {
    "has_qkv_bias": 1 << 0,
    "has_o_bias": 1 << 1,
    "has_qk_norm": 1 << 2,
    "tied_lm_head": 1 << 3,
    "has_mlp_bias": 1 << 4,
}
# Of the bits a later version may add, these change the forward pass: an older reader refuses.
REQUIRED_FLAGS = 0x0000FFFF

# entry bytes, dtype, name bytes, dimensions, group size, offset, byte count, checksum, flags
ENTRY = struct.Struct("<IHHIIQQII")
DTYPE_CODES = {
    "float32": 1,
    "float16": 2,
    "bfloat16": 3,
    "int8": 4,
    "int4": 5,
    "float8_e4m3": 6,
}
DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
GROUPED = frozenset({"int8", "int4", "float8_e4m3"})
KINDS = {"int8": "int8", "int4": "int4", "float8_e4m3": "fp8"}  # as `QuantizedMatrix` has them
SINCE_MINOR_1 = frozenset({"int4", "float8_e4m3"})
HAS_INPUT_ORDER = 1  # flag of an entry
# Of the flags of an entry that a later version may add, these change what its bytes mean.
REQUIRED_ENTRY_FLAGS = 0x0000FFFF


@dataclass(frozen=True)
class Entry:
    """One line of the tensor directory. `offset` is absolute; group_size is 0 where ungrouped."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    group_size: int
    offset: int
    nbytes: int
    checksum: int  # CRC-32 of the nbytes at offset
    flags: int = 0


@dataclass(frozen=True)
class Part:
    """A piece of a grouped tensor: codes, scales, offsets or input_order; `offset` counts from the
    tensor's own."""

    name: str
    dtype: str  # as NumPy writes it
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype[-1])


def align(offset: int, alignment: int) -> int:
    """The next multiple of `alignment` at or above `offset`."""
    return -(-offset // alignment) * alignment


def entry_bytes(name: str, num_dimensions: int) -> int:
    """Bytes of a directory entry."""
    return align(ENTRY.size + 8 * num_dimensions + len(name.encode()), SECTION_ALIGNMENT)


def pack_entry(entry: Entry) -> bytes:
    name = entry.name.encode()
    packed = ENTRY.pack(
        entry_bytes(entry.name, len(entry.shape)),
        DTYPE_CODES[entry.dtype],
        len(name),
        len(entry.shape),
        entry.group_size,
        entry.offset,
        entry.nbytes,
        entry.checksum,
        entry.flags,
    )
    packed += struct.pack(f"<{len(entry.shape)}Q", *entry.shape) + name
    return packed.ljust(entry_bytes(entry.name, len(entry.shape)), b"\0")


def config_flags(config: ModelConfig) -> int:
    """The flag word that `config` stands for."""
    return sum(bit for name, bit in FLAG_BITS.items() if getattr(config, name))


def minor_version(entries: Sequence[Entry]) -> int:
    """The least that a file with these tensors needs."""
    return int(any(entry.flags or entry.dtype in SINCE_MINOR_1 for entry in entries))


def parts(
    dtype: str, shape: tuple[int, ...], group_size: int, has_input_order: bool = False
) -> list[Part]:
    """What a grouped tensor is made of, in the order in which it lies in the file, each part at a
    multiple of the alignment. int4 and float8 are matrices [R, K] whose K the groups divide; int8
    is anything whose values they divide."""
    groups = (shape[0], shape[-1] // group_size)
    if dtype == "int8":
        pieces = [("codes", "|i1", shape), ("scales", "<f4", (math.prod(shape) // group_size,))]
    elif dtype == "int4":
        half = (shape[0], shape[1] // 2)
        pieces = [("codes", "|u1", half), ("scales", "<f4", groups), ("offsets", "<f4", groups)]
    else:
        pieces = [("codes", "|u1", shape), ("scales", "<f4", groups)]
    if has_input_order:
        pieces.append(("input_order", "<i4", (shape[1],)))
    found: list[Part] = []
    end = 0
    for name, number, dims in pieces:
        found.append(Part(name, number, dims, align(end, TENSOR_ALIGNMENT)))
        end = found[-1].offset + found[-1].nbytes
    return found


def grouped_nbytes(
    dtype: str, shape: tuple[int, ...], group_size: int, has_input_order: bool = False
) -> int:
    """Bytes of a grouped tensor, the zeros between its parts included."""
    last = parts(dtype, shape, group_size, has_input_order)[-1]
    return last.offset + last.nbytes
