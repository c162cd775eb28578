"""Writes small GGUF files for tests: through the gguf package, or byte by byte where they lie."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type

from nanocupy.checkpoint.base import Checkpoint

# Spelled out on its own, not taken from the reader.
GGUF_NAMES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "attn_norm": "attn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def gguf_name(name: str) -> str:
    *layer, part, kind = name.split(".")
    prefix = f"blk.{layer[1]}." if layer else ""
    return f"{prefix}{GGUF_NAMES[part]}.{kind}"


def interleaved(rows: np.ndarray, head_size: int) -> np.ndarray:
    """Half-split -> GGUF's llama layout, row by row."""
    out = np.empty_like(rows)
    for head in range(0, len(rows), head_size):
        for i in range(head_size // 2):
            out[head + 2 * i] = rows[head + i]
            out[head + 2 * i + 1] = rows[head + i + head_size // 2]
    return out


def gguf_keys(config: Any) -> dict[str, Any]:
    """The metadata below the architecture's name that llama.cpp's converter writes."""
    return {
        "context_length": config.max_context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_size,
    }


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(key)


def write_gguf(
    path: Path,
    model: Checkpoint,
    *,
    matrix_type: Type = Type.F32,
    architecture: str | None = None,
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    drop: Iterable[str] = (),
) -> Path:
    """`model` as a GGUF file. Matrices become `matrix_type`, vectors stay F32.

    keys   full metadata key -> value, over the usual ones; ... removes one
    extra  further tensors by GGUF's name;  drop: GGUF names left out
    """
    architecture = architecture or model.config.architecture
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {f"{architecture}.{k}": v for k, v in gguf_keys(model.config).items()}
    metadata |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    for key, value in (metadata | (keys or {})).items():
        if value is not ...:
            add_value(writer, key, value)
    tensors = {}
    for name in model.tensors:
        values = np.asarray(model.read(name), np.float32)
        if architecture == "llama" and name.split(".")[-2] in ("q", "k"):
            values = interleaved(values, model.config.head_size)
        tensors[gguf_name(name)] = values
    tensors |= extra or {}
    for name, values in tensors.items():
        if name in drop:
            continue
        if values.ndim == 1 or matrix_type == Type.F32:
            writer.add_tensor(name, values)
        elif matrix_type == Type.F16:
            writer.add_tensor(name, values.astype(np.float16))
        elif matrix_type == Type.BF16:
            raw = values.astype(ml_dtypes.bfloat16).view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=matrix_type)
        else:
            writer.add_tensor(name, encode(values, matrix_type), raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encode(values: np.ndarray, matrix_type: Type) -> np.ndarray:
    """Quantised rows; for the types the package cannot encode any blocks with tame scales."""
    if matrix_type not in (Type.Q4_K, Type.Q5_K, Type.Q6_K):
        return gguf.quants.quantize(values, matrix_type)
    block, size = gguf.GGML_QUANT_SIZES[matrix_type]
    rng = np.random.default_rng(values.size)
    shape = (*values.shape[:-1], values.shape[-1] // block, size)
    blocks = rng.integers(0, 256, shape, dtype=np.uint8)
    scales = [208] if matrix_type == Type.Q6_K else [0, 2]  # where the block keeps float16
    for at in scales:
        scale = rng.uniform(1e-3, 1e-2, shape[:-1]).astype("<f2")
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-2], -1)


# ---- byte by byte


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, type_id: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", type_id) + value


def array(type_id: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", type_id, count) + items


def tensor(name: str, dims: Iterable[int] = (8,), type_id: int = 0, offset: int = 0) -> bytes:
    dims = tuple(dims)
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def raw_gguf(
    pairs: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    num_pairs: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these parts; the counts may lie."""
    pairs, tensors = list(pairs), list(tensors)
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(pairs) if num_pairs is None else num_pairs,
    )
    head += b"".join(pairs) + b"".join(tensors)
    return head + (b"\0" * (-len(head) % alignment) + data if data else b"")
