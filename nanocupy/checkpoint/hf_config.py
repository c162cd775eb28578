"""Hugging Face's config.json and generation_config.json -> ModelConfig.

Owns what each key means and what it means when it is absent, as transformers 5 reads it, and
refuses by name every option that the model here does not run. Knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nanocupy.checkpoint.fields import Fields, usable_context
from nanocupy.config import MAX_LAYERS, Architecture, ModelConfig, RopeScaling
from nanocupy.errors import ConfigError
from nanocupy.strict_json import shown


@dataclass(frozen=True)
class _Family:
    """One transformers class: its model_type and what its config class assumes of absent keys."""

    model_type: str
    architecture: Architecture
    max_context: int
    num_kv_heads: int | Literal["num_heads"]
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    head_size: int | None = None  # None: hidden_size / num_attention_heads


_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family("llama", "llama", 2048, "num_heads", (1,), (2,)),
    "MistralForCausalLM": _Family("mistral", "llama", 131072, 8, (1,), (2,)),
    "Qwen2ForCausalLM": _Family("qwen2", "qwen2", 32768, 32),
    "Qwen3ForCausalLM": _Family("qwen3", "qwen3", 32768, 32, head_size=128),
}
_DEFAULT_THETA = 10000.0
_DEFAULT_EPS = 1e-6

# Keys of variants that compute something else; harmless where null, false, 0 or the neutral value.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_UNSUPPORTED = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "clip_qkv": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
}


def model_config(
    config: Mapping[str, Any], generation: Mapping[str, Any], where: str, name: str = ""
) -> ModelConfig:
    """The architecture that `config` (config.json) describes.

    The stop ids are the union with those of `generation` (generation_config.json). `where` is the
    folder, for errors. Raises CheckpointError for what is broken or not supported.
    """
    fields = Fields(f"{where}/config.json", config)
    class_name, family = _family(fields)
    _refuse_unsupported(fields, class_name, family)

    vocab_size = fields.integer("vocab_size")
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    num_heads = fields.integer("num_attention_heads")
    kv_heads_default = family.num_kv_heads
    if "num_key_value_heads" in config or kv_heads_default == "num_heads":
        kv_heads_default = num_heads  # an explicit null means no grouping in every family
    num_kv_heads = fields.integer("num_key_value_heads", kv_heads_default)
    if num_heads % num_kv_heads:
        fields.fail(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{num_kv_heads}"
        )
    head_size_default = family.head_size
    if head_size_default is None:
        head_size_default = max(1, hidden_size // num_heads)
        if not fields.has("head_dim") and hidden_size % num_heads:
            fields.fail(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, "
                "and there is no head_dim"
            )
    stated_context = fields.integer("max_position_embeddings", family.max_context)
    # Qwen2 has its three biases whatever the config says, the others four or none.
    attention_bias = family.model_type in ("llama", "qwen3") and fields.flag("attention_bias")
    others = Fields(f"{where}/generation_config.json", generation)
    bos_ids = _ids("bos_token_id", fields, others, vocab_size, family.bos_ids)
    try:
        theta, scaling = _rope(fields, stated_context)
        return ModelConfig(
            architecture=family.architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=fields.integer("head_dim", head_size_default),
            max_context=usable_context(stated_context, scaling),
            rms_norm_eps=fields.number("rms_norm_eps", _DEFAULT_EPS),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_lm_head=fields.flag("tie_word_embeddings"),
            has_qkv_bias=attention_bias or family.model_type == "qwen2",
            has_o_bias=attention_bias,
            has_mlp_bias=family.model_type == "llama" and fields.flag("mlp_bias"),
            has_qk_norm=family.model_type == "qwen3",
            bos_id=bos_ids[0] if bos_ids else None,
            eos_ids=_ids("eos_token_id", fields, others, vocab_size, family.eos_ids, merge=True),
            name=name,
        )
    except ConfigError as exc:
        raise ConfigError(f"{fields.where}: {exc}") from exc


def _ids(
    key: str,
    fields: Fields,
    generation: Fields,
    vocab_size: int,
    default: tuple[int, ...],
    merge: bool = False,
) -> tuple[int, ...]:
    """Ids from config.json, and from generation_config.json where that has others (or the only)."""
    ids = fields.token_ids(key, vocab_size)
    if merge or not ids:
        ids = tuple(dict.fromkeys((*ids, *generation.token_ids(key, vocab_size))))
    if not ids and key not in fields.values:
        ids = tuple(i for i in default if i < vocab_size)
    return ids


def _family(fields: Fields) -> tuple[str, _Family]:
    model_type = fields.text("model_type")
    named = fields.values.get("architectures")
    if named is None or named == []:
        by_type = [name for name, f in _FAMILIES.items() if f.model_type == model_type]
        if not by_type:
            fields.fail(
                f"no architectures, and model_type {shown(model_type)} is not supported; "
                f"supported: {', '.join(_FAMILIES)}"
            )
        return by_type[0], _FAMILIES[by_type[0]]
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named):
        fields.fail(f"architectures is {shown(named)}; it must be a list of names")
    if len(named) != 1 or named[0] not in _FAMILIES:
        names = ", ".join(named)
        why = "a mixture of experts" if "Moe" in names or "Mixtral" in names else "not supported"
        fields.fail(f"architecture {shown(names)} is {why}; supported: {', '.join(_FAMILIES)}")
    family = _FAMILIES[named[0]]
    if model_type is not None and model_type != family.model_type:
        fields.fail(
            f"architecture {named[0]} contradicts model_type {shown(model_type)}; "
            f"expected {family.model_type!r}"
        )
    return named[0], family


def _refuse_unsupported(fields: Fields, class_name: str, family: _Family) -> None:
    config = fields.values
    for key in _EXPERT_KEYS:
        if config.get(key):
            fields.fail(
                f"{key} is {shown(config[key])}: mixture-of-experts models are not supported"
            )
    for key, neutral in _UNSUPPORTED.items():
        if config.get(key) is not None and (neutral is None or config[key] != neutral):
            fields.fail(f"{key} is {shown(config[key])}: not supported for {class_name}")
    activation = fields.text("hidden_act")
    if activation not in (None, "silu", "swish"):
        fields.fail(f"hidden_act is {shown(activation)}; only 'silu' is supported")
    if config.get("partial_rotary_factor") not in (None, 1):
        fields.fail(
            f"partial_rotary_factor is {shown(config['partial_rotary_factor'])}; "
            "only full rotary embedding (1) is supported"
        )
    _refuse_sliding_window(fields, class_name, family)


def _refuse_sliding_window(fields: Fields, class_name: str, family: _Family) -> None:
    config = fields.values
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list):
            fields.fail(f"layer_types is {shown(layer_types)}; it must be a list")
        for kind in layer_types:
            if kind == "sliding_attention":
                fields.fail("layer_types has 'sliding_attention': sliding window is not supported")
            if kind != "full_attention":
                fields.fail(f"layer_types has {shown(kind)}; only 'full_attention' is supported")
    if family.model_type == "mistral":
        if "sliding_window" not in config:
            fields.fail(
                "sliding_window is absent, which transformers takes as 4096: sliding window is not "
                "supported; write null where the model has none"
            )
        if config["sliding_window"] is not None:
            fields.fail(
                f"sliding_window is {shown(config['sliding_window'])}: sliding window is not "
                f"supported for {class_name}"
            )
    elif family.model_type != "llama" and fields.flag("use_sliding_window"):
        fields.fail(f"use_sliding_window is true: not supported for {class_name}")


def _rope(fields: Fields, max_position: int) -> tuple[float, RopeScaling]:
    """Rotary base and scaling from either spelling: `rope_scaling` (older) or `rope_parameters`.

    Source of the precedence and of the defaults: transformers 5, modeling_rope_utils.
    """
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    raw = fields.values.get(key)
    if raw is not None and not isinstance(raw, dict):
        fields.fail(f"{key} is {shown(raw)}; it must be an object")
    params = Fields(f"{fields.where}: {key}", raw or {})
    for inner, value in params.values.items():
        if isinstance(value, dict):
            fields.fail(f"{key} differs by layer type ({shown(inner)}): not supported")
    theta = params.number("rope_theta", fields.number("rope_theta", _DEFAULT_THETA, low=1), low=1)
    if params.number("partial_rotary_factor", 1.0) != 1:
        params.fail("partial_rotary_factor is not 1; only full rotary embedding is supported")
    kind = params.text("rope_type") or params.text("type") or "default"
    if kind == "default":
        return theta, RopeScaling()
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        params.fail(
            f"rope type {shown(kind)} is not supported; "
            "supported: default, linear, dynamic, llama3, yarn"
        )
    if kind == "linear":
        return theta, RopeScaling("linear", params.number("factor", low=1))
    if kind == "dynamic":
        # transformers measures from max_position_embeddings, whatever else is written down.
        factor = params.number("factor", low=1)
        return theta, RopeScaling("dynamic", factor, max_position)

    outer = "original_max_position_embeddings"
    original = fields.integer(outer, params.integer(outer, max_position))
    if kind == "llama3":
        low = params.number("low_freq_factor", low=1e-6)
        high = params.number("high_freq_factor", low=1e-6)
        if high <= low:
            params.fail(f"high_freq_factor {high:g} must be above low_freq_factor {low:g}")
        factor = params.number("factor", low=1)
        return theta, RopeScaling("llama3", factor, original, low, high)
    factor = params.number("factor", max(1.0, max_position / original), low=1)
    return theta, RopeScaling(
        "yarn",
        factor,
        original,
        # transformers writes `or`: 0 counts as absent, too.
        beta_fast=params.number("beta_fast", 32.0) or 32.0,
        beta_slow=params.number("beta_slow", 1.0) or 1.0,
        attention_factor=_yarn_attention_factor(params, factor),
        truncate=params.flag("truncate", "truncate" not in params.values),
    )


def _yarn_attention_factor(params: Fields, factor: float) -> float | None:
    """The factor on cos and sin, or None for YaRN's own 0.1 ln(factor) + 1."""
    stated = params.optional_number("attention_factor", low=1e-6)
    if stated is not None:
        return stated
    mscale, mscale_all = params.number("mscale", 0.0), params.number("mscale_all_dim", 0.0)
    if not (mscale and mscale_all):
        return None
    return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
