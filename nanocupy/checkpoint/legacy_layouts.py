"""The legacy NanoInfer layouts as data: which tensors a file holds, in which order and encoding.

Owns the header of each layout and the order of its tensors, for the reader and the writer alike,
and the kinds of model whose settings the files leave out. Knows neither files nor arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nanocupy.config import MAX_DIMENSION, MAX_LAYERS, RopeScaling
from nanocupy.errors import ConfigError

LLAMA2C_MAGIC = 0x616B3432
LLAMA2C_HEADER_BYTES = 256

# Layouts without a magic number, told apart by the file's size.
SIZED_LAYOUTS = ("A", "B", "C")
LAYOUTS = (*SIZED_LAYOUTS, "D1", "D2")
HEADER_BYTES = {"A": 28, "B": 32, "C": 32, "D1": LLAMA2C_HEADER_BYTES, "D2": LLAMA2C_HEADER_BYTES}
QUANTISED_LAYOUTS = frozenset({"B", "D2"})

_LLAMA_HEADER = struct.Struct("<7i")  # D F L H G V seq_len
_QWEN_HEADER = struct.Struct("<8i")  # A D L H G V seq_len F
_LLAMA2C_HEADER = struct.Struct("<Ii7iB")  # magic, version, D F L H G V seq_len, shared head

ROPE_TABLES = "rope tables"


@dataclass(frozen=True)
class Kind:
    """What a family of models implies where the file says nothing."""

    architecture: str
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    bos_id: int
    eos_ids: tuple[int, ...]


KINDS = {
    "llama2": Kind("llama", 1e-5, 1e4, RopeScaling(), 1, (2,)),
    "llama3": Kind(
        "llama",
        1e-5,
        5e5,
        RopeScaling("llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        128000,
        (128001, 128009),
    ),
    "qwen3": Kind("qwen3", 1e-6, 1e6, RopeScaling(), 151643, (151645,)),
}
LLAMA3_VOCAB_SIZE = 128256


@dataclass(frozen=True)
class Dimensions:
    """The counts a legacy header states. `group_size` is 0 in float32 layouts."""

    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    context: int
    tied: bool
    group_size: int = 0

    @property
    def q_size(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_size


@dataclass(frozen=True)
class Run:
    """`repeat` tensors of one shape, one after the other: a tensor of every layer, or one alone.

    name        canonical, with `{}` for the layer; ROPE_TABLES is no tensor of the model
    quantised   int8 values followed at once by their float32 scales
    """

    name: str
    shape: tuple[int, ...]
    repeat: int = 1
    quantised: bool = False

    def nbytes(self, group_size: int) -> int:
        """Bytes of one of the tensors."""
        count = 1
        for dimension in self.shape:
            count *= dimension
        return count + 4 * (count // group_size) if self.quantised else 4 * count

    def names(self) -> Iterator[str]:
        for layer in range(self.repeat):
            yield self.name.format(layer)


def runs(layout: str, dims: Dimensions) -> list[Run]:
    """The tensors of a file, in order. Source: docs/formats.md, after llama2.c's exporter for
    A and D, NanoInfer's for B and C."""
    d, f, n = dims.hidden, dims.inter, dims.layers
    q, kv, head = dims.q_size, dims.kv_size, dims.head_size
    quantised = layout in QUANTISED_LAYOUTS

    def vectors(part: str, size: int) -> Run:
        return Run(f"layers.{{}}.{part}.weight", (size,), n)

    def matrices(part: str, rows: int, cols: int) -> Run:
        return Run(f"layers.{{}}.{part}.weight", (rows, cols), n, quantised)

    attn_norm, ffn_norm = vectors("attn_norm", d), vectors("ffn_norm", d)
    final_norm = Run("final_norm.weight", (d,))
    embed = Run("embed.weight", (dims.vocab, d), 1, layout == "D2")
    head_matrix = [] if dims.tied else [Run("lm_head.weight", (dims.vocab, d), 1, quantised)]
    attention = [
        matrices("q", q, d),
        matrices("k", kv, d),
        matrices("v", kv, d),
        matrices("o", d, q),
    ]
    gate, up, down = matrices("gate", f, d), matrices("up", f, d), matrices("down", d, f)
    ffn = [gate, down, up]  # w1, w2, w3
    if layout == "A":
        tables = Run(ROPE_TABLES, (2, dims.context, head // 2))
        return [
            embed, attn_norm, *attention, ffn_norm, *ffn, final_norm, tables, *head_matrix
        ]  # fmt: skip
    if layout == "B":
        return [*attention, *ffn, *head_matrix, embed, attn_norm, ffn_norm, final_norm]
    if layout == "C":
        wq, wk, wv, wo = attention
        q_norm, k_norm = vectors("q_norm", head), vectors("k_norm", head)
        return [
            attn_norm, ffn_norm, final_norm, embed,
            wq, q_norm, wk, k_norm, wv, wo, gate, down, up, *head_matrix,
        ]  # fmt: skip
    return [attn_norm, ffn_norm, final_norm, embed, *attention, *ffn, *head_matrix]


def file_bytes(layout: str, dims: Dimensions) -> int:
    """The exact size of a file of this layout and these dimensions."""
    return HEADER_BYTES[layout] + sum(
        run.repeat * run.nbytes(dims.group_size) for run in runs(layout, dims)
    )


def parse_header(layout: str, header: bytes) -> Dimensions | str:
    """The dimensions that `header` states when read as `layout`, or why it is no such header."""
    if len(header) < HEADER_BYTES[layout]:
        return f"its header alone takes {HEADER_BYTES[layout]} bytes"
    group_size, tied = 0, False
    if layout == "C":
        q, d, n, h, g, v, context, f = _QWEN_HEADER.unpack_from(header)
    else:
        start = 8 if layout in ("D1", "D2") else 0
        d, f, n, h, g, v, context = _LLAMA_HEADER.unpack_from(header, start)
        q = d
        if layout in ("D1", "D2"):
            if header[36] > 1:
                return f"shared LM head is {header[36]}; it must be 0 or 1"
            tied = header[36] == 1
            if layout == "D2":
                (group_size,) = struct.unpack_from("<i", header, 37)
            used = 41 if layout == "D2" else 37
            if any(header[used:LLAMA2C_HEADER_BYTES]):
                return f"bytes {used} to {LLAMA2C_HEADER_BYTES} of the header must be 0"
        else:
            tied, v = v > 0, abs(v)
            if layout == "B":
                (group_size,) = struct.unpack_from("<i", header, 28)
    for name, value, high in (
        ("hidden size", d, MAX_DIMENSION),
        ("feed-forward size", f, MAX_DIMENSION),
        ("layers", n, MAX_LAYERS),
        ("heads", h, MAX_DIMENSION),
        ("KV heads", g, MAX_DIMENSION),
        ("vocabulary", v, MAX_DIMENSION),
        ("context", context, MAX_DIMENSION),
        ("query size", q, MAX_DIMENSION),
    ):
        if not 1 <= value <= high:
            return f"{name} is {value}; it must be from 1 to {high}"
    if q % h or q // h % 2:
        return f"query size {q} does not give {h} heads of an even size"
    if h % g:
        return f"heads {h} is not a multiple of KV heads {g}"
    dims = Dimensions(d, f, n, h, g, q // h, v, context, tied, group_size)
    if layout in QUANTISED_LAYOUTS:
        if group_size < 1:
            return f"group size is {group_size}; it must be at least 1"
        for run in runs(layout, dims):
            if run.quantised and run.shape[0] * run.shape[1] % group_size:
                return f"group size {group_size} does not divide a matrix of {list(run.shape)}"
    return dims


def pack_header(layout: str, dims: Dimensions) -> bytes:
    """The header bytes of a file; the inverse of `parse_header`."""
    vocab = -dims.vocab if layout in ("A", "B") and not dims.tied else dims.vocab
    counts = (dims.layers, dims.heads, dims.kv_heads, vocab, dims.context)
    if layout == "C":
        return _QWEN_HEADER.pack(dims.q_size, dims.hidden, *counts, dims.inter)
    llama = (dims.hidden, dims.inter, *counts)
    if layout == "A":
        return _LLAMA_HEADER.pack(*llama)
    if layout == "B":
        return _LLAMA_HEADER.pack(*llama) + struct.pack("<i", dims.group_size)
    header = _LLAMA2C_HEADER.pack(LLAMA2C_MAGIC, int(layout[1]), *llama, dims.tied)
    if layout == "D2":
        header += struct.pack("<i", dims.group_size)
    return header.ljust(LLAMA2C_HEADER_BYTES, b"\0")


def parse_rope_scaling(text: str) -> RopeScaling:
    """What `--rope-scaling` names: "none", "linear:FACTOR" or "llama3:FACTOR" (low 1, high 4,
    original context 8192, which all of LLaMA 3.1 and 3.2 share). Raises ConfigError."""
    kind, _, factor_text = text.partition(":")
    if text == "none":
        return RopeScaling()
    try:
        factor = float(factor_text)
    except ValueError:
        factor = None
    if kind not in ("linear", "llama3") or factor is None:
        raise ConfigError(
            f"--rope-scaling is {text!r}; it must be none, linear:FACTOR or llama3:FACTOR"
        )
    if kind == "linear":
        return RopeScaling("linear", factor)
    return replace(KINDS["llama3"].rope_scaling, factor=factor)
