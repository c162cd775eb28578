"""One decoder for LLaMA, Qwen2 and Qwen3, as data: the list of op calls of a step.

The list is made once for a model. A backend binds its buffers and runs it, captures it in a graph,
times it call by call, or compares it with another backend's. It knows no arrays and no batch: the
dimensions of a step are the letters of `ops.interface`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanocupy.config import EMBEDDING, HEAD_NORM, LM_HEAD, ModelConfig
from nanocupy.model.rope import RopeParameters


@dataclass(frozen=True)
class Buffer:
    """An array of the step: an input of the batch, an activation, or a part of the cache.

    shape  ints, and letters of `ops.interface`: "T", "B", "B+1", "S", "M", "N", "P"
    dtype  a role ("activation", "residual", "cache", "cache scales") or a dtype's own name
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    @property
    def is_cache(self) -> bool:
        """Whether it is a part of the key/value cache: blocks [N, …] that outlive a step."""
        return self.dtype in ("cache", "cache scales")


@dataclass(frozen=True)
class Size:
    """A number of the step that the host knows: "Q", the most queries a sequence has; "L", a bound
    on the contexts, 0 for none."""

    name: str


@dataclass(frozen=True)
class WeightRef:
    """A weight, by its name in `model.weights.weight_layout`."""

    name: str


@dataclass(frozen=True)
class OpCall:
    """One call of the op `op` of `ops.interface.Ops`.

    arguments: name -> Buffer, WeightRef, Size, or a plain value. `layer` is None outside layers.
    """

    op: str
    layer: int | None
    arguments: Mapping[str, Any]


def decoder_forward(
    config: ModelConfig, rope: RopeParameters, *, quantized_cache: bool = False
) -> list[OpCall]:
    """The step of a decoder: token ids in, logits of the sampled rows out.

    Keys and values of layer i are the cache buffers `key_cache.i` and `value_cache.i`; the scales
    of a quantised cache are `key_scales.i` and `value_scales.i`.
    """
    heads, kv_heads, head_size = config.num_heads, config.num_kv_heads, config.head_size
    eps = config.rms_norm_eps

    token_ids = Buffer("token_ids", ("T",), "int32")
    positions = Buffer("positions", ("T",), "int32")
    slots = Buffer("slots", ("T",), "int32")
    query_starts = Buffer("query_starts", ("B+1",), "int32")
    kv_lens = Buffer("kv_lens", ("B",), "int32")
    block_tables = Buffer("block_tables", ("B", "M"), "int32")
    sample_rows = Buffer("sample_rows", ("S",), "int32")
    rope_lens = Buffer("rope_lens", ("T",), "int32") if rope.is_dynamic else None

    angles = Buffer("angles", ("T", 2, head_size // 2), "float32")
    x = Buffer("x", ("T", config.hidden_size), "residual")
    qkv = Buffer("qkv", ("T", config.q_size + 2 * config.kv_size), "activation")
    q = Buffer("q", ("T", heads, head_size), "activation")
    attended = Buffer("attended", ("T", heads, head_size), "activation")
    attended_rows = Buffer("attended", ("T", config.q_size), "activation")  # the same memory
    activated = Buffer("activated", ("T", config.intermediate_size), "activation")
    logits = Buffer("logits", ("S", config.vocab_size), "float32")

    calls: list[OpCall] = []

    def call(op: str, layer: int | None = None, **arguments: Any) -> None:
        calls.append(OpCall(op, layer, arguments))

    call("embed", token_ids=token_ids, table=WeightRef(EMBEDDING), out=x)
    call(
        "rope_table", positions=positions, rope_lens=rope_lens, inv_freq=Buffer(
            "inv_freq", (head_size // 2,), "float32"), ntk_factor=rope.ntk_factor,
        ntk_context=rope.ntk_context, attention_factor=rope.attention_factor, out=angles,
    )  # fmt: skip
    for i in range(config.num_layers):

        def weight(part: str, i: int = i) -> WeightRef:
            return WeightRef(f"layers.{i}.{part}.weight")

        def bias(part: str, present: bool, i: int = i) -> WeightRef | None:
            return WeightRef(f"layers.{i}.{part}.bias") if present else None

        k_cache = Buffer(f"key_cache.{i}", ("N", kv_heads, "P", head_size), "cache")
        v_cache = Buffer(f"value_cache.{i}", ("N", kv_heads, "P", head_size), "cache")
        k_scales = v_scales = None
        if quantized_cache:
            k_scales = Buffer(f"key_scales.{i}", ("N", kv_heads, "P"), "cache scales")
            v_scales = Buffer(f"value_scales.{i}", ("N", kv_heads, "P"), "cache scales")

        call(
            "norm_linear", i, x=x, norm_weight=weight("attn_norm"), eps=eps, weight=weight("qkv"),
            bias=bias("qkv", config.has_qkv_bias), out=qkv,
        )  # fmt: skip
        call(
            "attend", i, qkv=qkv,
            q_norm=weight("q_norm") if config.has_qk_norm else None,
            k_norm=weight("k_norm") if config.has_qk_norm else None,
            eps=eps, rope=angles, slots=slots, key_cache=k_cache, value_cache=v_cache,
            key_scales=k_scales, value_scales=v_scales, query_starts=query_starts, kv_lens=kv_lens,
            block_tables=block_tables, scale=head_size**-0.5, max_queries=Size("Q"),
            max_kv_len=Size("L"), q_scratch=q, out=attended,
        )  # fmt: skip
        call(
            "linear_add", i, x=attended_rows, weight=weight("o"),
            bias=bias("o", config.has_o_bias), residual=x,
        )  # fmt: skip
        call(
            "norm_swiglu", i, x=x, norm_weight=weight("ffn_norm"), eps=eps,
            weight=weight("gate_up"), bias=bias("gate_up", config.has_mlp_bias), out=activated,
        )  # fmt: skip
        call(
            "linear_add", i, x=activated, weight=weight("down"),
            bias=bias("down", config.has_mlp_bias), residual=x,
        )  # fmt: skip
    head = WeightRef(EMBEDDING if config.tied_lm_head else LM_HEAD)
    call(
        "lm_head", x=x, rows=sample_rows, norm_weight=WeightRef(HEAD_NORM), eps=eps,
        weight=head, out=logits,
    )  # fmt: skip
    return calls
