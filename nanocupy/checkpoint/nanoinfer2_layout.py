"""The bytes of a NanoInfer 2 file, shared by its reader and its writer (docs/formats.md).

Owns the magic number, the fixed part, and the packing of sections and directory entries. Knows
neither files nor tensors' contents, and checks nothing: that is the reader's business.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from nanocupy.config import ModelConfig

# Byte 3 has its top bit set, so the first int32 is negative: every legacy layout has a positive
# count there. The rest shows transfers that rewrite line ends or stop at the first Ctrl-Z.
MAGIC = b"NNI\xf2\r\n\x1a\n"
VERSION = 2
MINOR_VERSION = 0

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

# entry bytes, dtype, name bytes, dimensions, group size, offset, byte count, checksum, reserved
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
GROUPED = frozenset({"int8", "int4"})


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
        0,
    )
    packed += struct.pack(f"<{len(entry.shape)}Q", *entry.shape) + name
    return packed.ljust(entry_bytes(entry.name, len(entry.shape)), b"\0")


def config_flags(config: ModelConfig) -> int:
    """The flag word that `config` stands for."""
    return sum(bit for name, bit in FLAG_BITS.items() if getattr(config, name))


def int8_scales_offset(num_values: int) -> int:
    """Where a grouped int8 tensor's scales start, counted from its own offset."""
    return align(num_values, TENSOR_ALIGNMENT)


def int8_nbytes(num_values: int, group_size: int) -> int:
    """Bytes of a grouped int8 tensor: values, zeros up to the alignment, float32 scales."""
    return int8_scales_offset(num_values) + 4 * (num_values // group_size)
