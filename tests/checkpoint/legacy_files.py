"""Legacy NanoInfer and llama2.c files, packed by plain loops from the description of the formats.

Independent of the product's code: nothing here imports from nanocupy but the checkpoint's types.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from nanocupy.checkpoint.base import Checkpoint

# What layout A calls wq, wk, wv, wo, then w1, w2, w3.
ATTENTION = ("q", "k", "v", "o")
FFN = ("gate", "down", "up")


def interleave(array: np.ndarray, head_size: int) -> np.ndarray:
    """Half-split rows to interleaved ones: row 2i of a head was i, row 2i + 1 was i + half."""
    result = np.empty_like(array)
    half = head_size // 2
    for start in range(0, array.shape[0], head_size):
        for i in range(half):
            result[start + 2 * i] = array[start + i]
            result[start + 2 * i + 1] = array[start + half + i]
    return result


def stored(checkpoint: Checkpoint, layer: int | None, part: str) -> np.ndarray:
    """A float32 tensor as the file keeps it."""
    prefix = "" if layer is None else f"layers.{layer}."
    array = np.asarray(checkpoint.read(f"{prefix}{part}.weight"), dtype=np.float32)
    if part in ("q", "k", "q_norm", "k_norm"):
        return interleave(array, checkpoint.config.head_size)
    return array


def pack_floats(array: np.ndarray) -> bytes:
    flat = array.reshape(-1).tolist()
    return struct.pack(f"<{len(flat)}f", *flat)


def pack_groups(array: np.ndarray, group_size: int) -> bytes:
    """int8 values, then a float32 scale a group."""
    flat = array.reshape(-1)
    values, scales = b"", b""
    for start in range(0, flat.size, group_size):
        group = flat[start : start + group_size]
        scale = np.float32(np.abs(group).max() / np.float32(127))
        rounded = np.rint(group / (scale if scale > 0 else np.float32(1)))
        values += struct.pack(f"<{group_size}b", *(int(v) for v in rounded))
        scales += struct.pack("<f", scale)
    return values + scales


def counts(checkpoint: Checkpoint, vocab: int) -> tuple[int, ...]:
    c: Any = checkpoint.config
    return (
        c.hidden_size,
        c.intermediate_size,
        c.num_layers,
        c.num_heads,
        c.num_kv_heads,
        vocab,
        c.max_context,
    )


def layout_a(checkpoint: Checkpoint) -> bytes:
    c = checkpoint.config
    layers = range(c.num_layers)
    vocab = c.vocab_size if c.tied_lm_head else -c.vocab_size
    data = struct.pack("<7i", *counts(checkpoint, vocab))
    data += pack_floats(stored(checkpoint, None, "embed"))
    for part in ("attn_norm", *ATTENTION, "ffn_norm", *FFN):
        for layer in layers:
            data += pack_floats(stored(checkpoint, layer, part))
    data += pack_floats(stored(checkpoint, None, "final_norm"))
    for function in (np.cos, np.sin):
        for position in range(c.max_context):
            for i in range(c.head_size // 2):
                angle = position / c.rope_theta ** (2 * i / c.head_size)
                data += struct.pack("<f", function(angle))
    if not c.tied_lm_head:
        data += pack_floats(stored(checkpoint, None, "lm_head"))
    return data


def layout_b(checkpoint: Checkpoint, group_size: int) -> bytes:
    c = checkpoint.config
    layers = range(c.num_layers)
    vocab = c.vocab_size if c.tied_lm_head else -c.vocab_size
    data = struct.pack("<8i", *counts(checkpoint, vocab), group_size)
    for part in (*ATTENTION, *FFN):
        for layer in layers:
            data += pack_groups(stored(checkpoint, layer, part), group_size)
    if not c.tied_lm_head:
        data += pack_groups(stored(checkpoint, None, "lm_head"), group_size)
    data += pack_floats(stored(checkpoint, None, "embed"))
    for part in ("attn_norm", "ffn_norm"):
        for layer in layers:
            data += pack_floats(stored(checkpoint, layer, part))
    return data + pack_floats(stored(checkpoint, None, "final_norm"))


def layout_c(checkpoint: Checkpoint) -> bytes:
    c = checkpoint.config
    layers = range(c.num_layers)
    data = struct.pack(
        "<8i",
        c.num_heads * c.head_size,
        c.hidden_size,
        c.num_layers,
        c.num_heads,
        c.num_kv_heads,
        c.vocab_size,
        c.max_context,
        c.intermediate_size,
    )
    for part in ("attn_norm", "ffn_norm"):
        for layer in layers:
            data += pack_floats(stored(checkpoint, layer, part))
    data += pack_floats(stored(checkpoint, None, "final_norm"))
    data += pack_floats(stored(checkpoint, None, "embed"))
    for part in ("q", "q_norm", "k", "k_norm", "v", "o", "gate", "down", "up"):
        for layer in layers:
            data += pack_floats(stored(checkpoint, layer, part))
    return data + pack_floats(stored(checkpoint, None, "embed" if c.tied_lm_head else "lm_head"))


def layout_d(checkpoint: Checkpoint, version: int, group_size: int = 0) -> bytes:
    c = checkpoint.config
    layers = range(c.num_layers)
    data = struct.pack("<I", 0x616B3432) + struct.pack("<i", version)
    data += struct.pack("<7i", *counts(checkpoint, c.vocab_size))
    data += b"\1" if c.tied_lm_head else b"\0"
    if version == 2:
        data += struct.pack("<i", group_size)
    data += b"\0" * (256 - len(data))
    for part in ("attn_norm", "ffn_norm"):
        for layer in layers:
            data += pack_floats(stored(checkpoint, layer, part))
    data += pack_floats(stored(checkpoint, None, "final_norm"))

    def matrix(layer: int | None, part: str) -> bytes:
        array = stored(checkpoint, layer, part)
        return pack_floats(array) if version == 1 else pack_groups(array, group_size)

    data += matrix(None, "embed")
    for part in (*ATTENTION, *FFN):
        for layer in layers:
            data += matrix(layer, part)
    if not c.tied_lm_head:
        data += matrix(None, "lm_head")
    return data
