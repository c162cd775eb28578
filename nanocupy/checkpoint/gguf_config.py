"""GGUF metadata -> ModelConfig.

Owns what llama.cpp's keys mean and what it assumes where they are absent, and refuses by name every
option that the model here does not run. Knows tensors by name and shape only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nanocupy.checkpoint.fields import Fields, usable_context
from nanocupy.config import MAX_LAYERS, ModelConfig, RopeScaling
from nanocupy.errors import ConfigError
from nanocupy.strict_json import shown

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_NO_ID = 0xFFFFFFFF  # -1 stored unsigned: no such token

# Keys (below the architecture's name) of variants that compute something else; harmless where 0.
_UNSUPPORTED = {
    "expert_count": "mixture-of-experts models are",
    "attention.sliding_window": "sliding window is",
    "attention.scale": "an attention scale of its own is",
    "attention.temperature_scale": "attention temperature is",
    "attention.clamp_kqv": "clamped attention inputs are",
    "attention.max_alibi_bias": "ALiBi is",
    "attn_logit_softcapping": "soft capping is",
    "final_logit_softcapping": "soft capping is",
    "logit_scale": "scaled logits are",
    "residual_scale": "a scaled residual is",
    "embedding_scale": "a scaled embedding is",
    "use_parallel_residual": "a parallel residual is",
}
# Templates that end a turn with these end it with a token the file may not name as a stop.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>")

# (low_freq_factor, high_freq_factor, original context) of LLaMA 3.1, 3.2 and 3.3.
_LLAMA3_RAMP = (1.0, 4.0, 8192)


def model_config(
    fields: Fields, shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None
) -> ModelConfig:
    """The architecture that a GGUF file's metadata describes.

    fields        the whole metadata
    shapes        canonical name -> shape of the file's tensors: they tell the vocabulary's size,
                  whether the head is tied, and which layers have biases
    rope_factors  rope_freqs.weight, float32 [head_size / 2], or None
    Raises CheckpointError and ConfigError for what is broken or not supported.
    """
    architecture = fields.text("general.architecture")
    if architecture not in _ARCHITECTURES:
        fields.fail(
            f"general.architecture {shown(architecture)} is not supported; "
            f"supported: {', '.join(_ARCHITECTURES)}"
        )
    prefix = f"{architecture}."
    own = Fields(
        f"{fields.where}: {architecture}",
        {k.removeprefix(prefix): v for k, v in fields.values.items() if k.startswith(prefix)},
    )
    for key, reason in _UNSUPPORTED.items():
        if own.values.get(key):
            own.fail(f"{key} is {shown(own.values[key])}: {reason} not supported")
    if not own.flag("attention.causal", True):
        own.fail("attention.causal is false: only causal models are supported")

    embedding = shapes.get("embed.weight")
    if embedding is None or len(embedding) != 2:
        fields.fail("tensor token_embd.weight [vocabulary, hidden size] is missing")
    vocab_size = embedding[0]
    hidden_size = own.integer("embedding_length")
    num_layers = own.integer("block_count", high=MAX_LAYERS)
    num_heads = _same_in_all_layers(own, "attention.head_count", num_layers)
    num_kv_heads = _same_in_all_layers(own, "attention.head_count_kv", num_layers, num_heads)
    head_size = own.integer("attention.key_length", max(1, hidden_size // num_heads))
    value_size = own.integer("attention.value_length", head_size)
    rotated = own.integer("rope.dimension_count", head_size)
    if value_size != head_size:
        own.fail(f"value heads of {value_size} and key heads of {head_size}: not supported")
    if rotated != head_size:
        own.fail(
            f"rope.dimension_count {rotated} is not the head size {head_size}: "
            "only full rotary embedding is supported"
        )
    stated_context = own.integer("context_length")
    theta = own.number("rope.freq_base", 10000.0, low=1.0)

    def has_any(*names: str) -> bool:
        return any(f"layers.{i}.{n}.bias" in shapes for i in range(num_layers) for n in names)

    try:
        scaling = _rope_scaling(own, stated_context)
        if rope_factors is not None:
            if scaling.kind != "none":
                own.fail(f"both rope_freqs.weight and rope.scaling.type {scaling.kind!r}")
            scaling = _llama3_scaling(own, rope_factors, theta, head_size)
        return ModelConfig(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_same_in_all_layers(own, "feed_forward_length", num_layers),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            max_context=usable_context(stated_context, scaling),
            rms_norm_eps=own.number("attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_lm_head="lm_head.weight" not in shapes,
            has_qkv_bias=architecture == "qwen2" or has_any("q", "k", "v"),
            has_o_bias=has_any("o"),
            has_mlp_bias=has_any("gate", "up", "down"),
            has_qk_norm=architecture == "qwen3",
            bos_id=next(iter(_token_ids(fields, "bos", vocab_size)), None),
            eos_ids=_stop_ids(fields, vocab_size),
            name=fields.text("general.name") or "",
        )
    except ConfigError as exc:
        raise ConfigError(f"{fields.where}: {exc}") from exc


def _same_in_all_layers(own: Fields, key: str, num_layers: int, default: int | None = None) -> int:
    """A dimension that a file may give once or layer by layer."""
    value = own.values.get(key)
    if not isinstance(value, list):
        return own.integer(key, default)
    if len(value) != num_layers or len(set(value)) != 1:
        own.fail(
            f"{key} is {shown(value)}; a model whose layers differ is not supported "
            f"(expected {num_layers} equal numbers)"
        )
    return Fields(own.where, {key: value[0]}).integer(key)


def _rope_scaling(own: Fields, stated_context: int) -> RopeScaling:
    kind = own.text("rope.scaling.type")
    factor = own.number("rope.scaling.factor", own.number("rope.scale_linear", 0.0))
    # llama.cpp takes a factor without a type as linear, and no factor (or 0) as 1.
    kind, factor = kind or "linear", factor or 1.0
    if kind not in ("none", "linear", "yarn"):
        own.fail(f"rope.scaling.type {shown(kind)} is not supported; supported: none, linear, yarn")
    attention_factor = own.number("rope.scaling.attn_factor", 1.0)
    if kind != "yarn" and attention_factor != 1:
        own.fail(f"rope.scaling.attn_factor {attention_factor:g} without yarn is not supported")
    if kind == "none" or (kind == "linear" and factor == 1):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor)
    for key, neutral in (("ext_factor", 1.0), ("attn_factor", 1.0), ("log_multiplier", 0.0)):
        value = own.number(f"rope.scaling.yarn_{key}", neutral, low=-1.0)
        if value != neutral:
            own.fail(f"rope.scaling.yarn_{key} {value:g} is not supported (only {neutral:g})")
    if factor < 1:
        own.fail(f"rope.scaling.factor is {factor:g}; it must be at least 1")
    return RopeScaling(
        "yarn",
        factor,
        own.integer("rope.scaling.original_context_length", stated_context),
        beta_fast=own.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=own.number("rope.scaling.yarn_beta_slow", 1.0),
        # llama.cpp multiplies this onto YaRN's own factor instead of replacing it.
        attention_factor=(
            None if attention_factor == 1 else attention_factor * (0.1 * math.log(factor) + 1.0)
        ),
    )


def _llama3_scaling(own: Fields, divisors: np.ndarray, theta: float, head_size: int) -> RopeScaling:
    """The scaling whose divisors of the frequencies, one a pair, are those in rope_freqs.weight.

    GGUF keeps only the result of LLaMA 3.1's formula. Its plateau is the factor (8 and 32 exist);
    that the rest of the formula's published constants hold is checked value by value.
    """
    if divisors.shape != (head_size // 2,):
        own.fail(f"rope_freqs.weight has shape {list(divisors.shape)}, expected [{head_size // 2}]")
    if not np.isfinite(divisors).all():
        own.fail("rope_freqs.weight holds NaN or infinite values")
    if (divisors == 1).all():
        return RopeScaling()
    for factor in (8.0, 32.0, float(str(divisors.max()))):
        if factor >= 1 and np.allclose(
            divisors, _llama3_divisors(factor, theta, head_size), rtol=1e-4, atol=0
        ):
            low, high, original = _LLAMA3_RAMP
            return RopeScaling("llama3", factor, original, low, high)
    own.fail(
        "rope_freqs.weight does not follow LLaMA 3.1's formula (low 1, high 4, original context "
        f"8192) for any factor; it runs from {divisors.min():g} to {divisors.max():g}: "
        "such frequencies are not supported"
    )


def _llama3_divisors(factor: float, theta: float, head_size: int) -> np.ndarray:
    """What LLaMA 3.1's scaling divides each pair's frequency by; float64 [head_size / 2]."""
    low, high, original = _LLAMA3_RAMP
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _token_ids(fields: Fields, which: str, vocab_size: int) -> tuple[int, ...]:
    key = f"tokenizer.ggml.{which}_token_id"
    return () if fields.values.get(key) == _NO_ID else fields.token_ids(key, vocab_size)


def _stop_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """End of text, of turn and of message, and the token the chat template ends a turn with."""
    ids = [i for which in ("eos", "eot", "eom") for i in _token_ids(fields, which, vocab_size)]
    template = fields.text("tokenizer.chat_template") or ""
    tokens: Any = fields.values.get("tokenizer.ggml.tokens")
    for text in _END_OF_TURN:
        if text in template and isinstance(tokens, list) and text in tokens[:vocab_size]:
            ids.append(tokens.index(text))
    return tuple(dict.fromkeys(ids))
