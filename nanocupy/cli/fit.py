"""What a model needs in memory, by arithmetic on its config: weights, KV cache, longest context."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nanocupy.cli.console import binary_bytes, make_table
from nanocupy.kv_types import QUANTIZED

if TYPE_CHECKING:
    from rich.table import Table

    from nanocupy.config import ModelConfig

MEMORY_GIB = (8, 12, 16, 24, 48, 80)
USABLE_SHARE = 0.9  # the rest is the driver's, the workspace's and the allocator's
WEIGHT_DTYPES = ("fp32", "bf16", "int8", "int4")
KV_DTYPES = ("fp32", "bf16", "int8", "fp8")

# Bytes of a linear layer's weight, its share of 32-bit scales (and int4's offsets) included, in
# groups of 128: what `nanocupy quantize` writes.
_LINEAR_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 4 / 128, "int4": 0.5 + 8 / 128}
_NOTE = (
    f"Contexts: one sequence, {USABLE_SHARE:.0%} of the memory, KV cache in bf16 (fp32 beside fp32 "
    "weights). int8 (fp8 is as large) and int4 leave embedding, LM head, norms, biases in 16 bits."
)


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all weights where linear layers are stored as `dtype`.

    An embedding that is also the LM head is counted once, in the embedding's type.
    """
    other_bytes = 4 if dtype == "fp32" else 2
    total = 0.0
    for name, shape in config.tensor_shapes().items():
        is_linear = len(shape) == 2 and name not in ("embed.weight", "lm_head.weight")
        total += math.prod(shape) * (_LINEAR_BYTES[dtype] if is_linear else other_bytes)
    return math.ceil(total)


def kv_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values of one token over all layers; int8 and fp8 have a 16-bit scale a
    head."""
    names = {"fp32": "float32", "bf16": "bfloat16", **QUANTIZED}
    return config.kv_bytes_per_token(names[dtype])


def longest_context(config: ModelConfig, memory_bytes: float, dtype: str) -> int:
    """Tokens of one sequence that fit beside the weights; 0 where the weights do not fit."""
    room = memory_bytes * USABLE_SHARE - weight_bytes(config, dtype)
    tokens = int(room // kv_bytes_per_token(config, _kv_dtype(dtype)))
    return max(0, min(tokens, config.max_context))


def describe_memory(config: ModelConfig) -> dict[str, Any]:
    """The arithmetic for every weight type, KV type and memory size, JSON-able."""
    return {
        "weight_bytes": {dtype: weight_bytes(config, dtype) for dtype in WEIGHT_DTYPES},
        "kv_bytes_per_token": {dtype: kv_bytes_per_token(config, dtype) for dtype in KV_DTYPES},
        "max_context": config.max_context,
        "longest_context": {
            str(gib): {
                dtype: longest_context(config, gib * 2**30, dtype) for dtype in WEIGHT_DTYPES
            }
            for gib in MEMORY_GIB
        },
        "note": _NOTE,
    }


def memory_tables(memory: dict[str, Any]) -> list[Table]:
    """`describe_memory`'s figures for the terminal."""
    columns = range(1, len(WEIGHT_DTYPES) + 1)
    needs = make_table("Memory", "", *WEIGHT_DTYPES, right=tuple(columns))
    needs.add_row("weights", *(binary_bytes(memory["weight_bytes"][d]) for d in WEIGHT_DTYPES))
    kv = memory["kv_bytes_per_token"]
    needs.add_row(
        "KV cache per token", *(binary_bytes(kv[d]) if d in kv else "" for d in WEIGHT_DTYPES)
    )
    fits = make_table("Longest context", "memory", *WEIGHT_DTYPES, right=tuple(columns))
    for gib, row in memory["longest_context"].items():
        cells = (_tokens(row[dtype], memory["max_context"]) for dtype in WEIGHT_DTYPES)
        fits.add_row(f"{gib} GiB", *cells)
    return [needs, fits]


def _kv_dtype(weight_dtype: str) -> str:
    return "fp32" if weight_dtype == "fp32" else "bf16"


def _tokens(tokens: int, max_context: int) -> str:
    if tokens == 0:
        return "—"
    return f"{tokens:,}" + (" (all)" if tokens == max_context else "")
