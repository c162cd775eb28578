"""config.json -> ModelConfig, against transformers' own reading of the same file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nanocupy.checkpoint.hf_config import model_config
from nanocupy.config import RopeScaling
from nanocupy.errors import CheckpointError, NanocupyError
from tests.checkpoint.hf_folders import llama_config


def read(config: dict[str, Any], generation: dict[str, Any] | None = None):
    return model_config(config, generation or {}, "folder")


def of_family(kind: str, **changes: Any) -> dict[str, Any]:
    base = {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower()}
    if kind == "Mistral":
        base["sliding_window"] = None
    return llama_config(**base | changes)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4.0}

CASES: dict[str, dict[str, Any]] = {
    "plain": of_family("Llama"),
    "defaults": of_family(
        "Llama",
        num_key_value_heads=...,
        max_position_embeddings=...,
        rms_norm_eps=...,
        bos_token_id=...,
        eos_token_id=...,
        hidden_act=...,
    ),
    "nulls": of_family(
        "Llama",
        num_key_value_heads=None,
        head_dim=None,
        bos_token_id=None,
        eos_token_id=None,
        rope_scaling=None,
        quantization_config=None,
        pretraining_tp=2,
    ),
    "no architectures": of_family("Qwen2", architectures=...),
    "biases": of_family("Llama", attention_bias=True, mlp_bias=True, head_dim=16),
    "mistral": of_family("Mistral", num_attention_heads=8, num_key_value_heads=...),
    "mistral context": of_family("Mistral", max_position_embeddings=..., head_dim=24),
    "qwen2": of_family("Qwen2", use_sliding_window=False, sliding_window=64, max_window_layers=1),
    "qwen2 defaults": of_family(
        "Qwen2",
        hidden_size=64,
        num_attention_heads=32,
        num_key_value_heads=...,
        eos_token_id=...,
        bos_token_id=...,
        max_position_embeddings=...,
    ),
    "qwen3": of_family("Qwen3", attention_bias=True, layer_types=["full_attention"] * 2),
    "qwen3 head": of_family("Qwen3", head_dim=64, tie_word_embeddings=True),
    "eos list": of_family("Llama", eos_token_id=[2, 9]),
    "theta": of_family("Llama", rope_theta=5e5),
    "theta inside": of_family("Llama", rope_theta=7, rope_parameters={"rope_theta": 9e4}),
    "linear": of_family("Llama", rope_scaling={"type": "linear", "factor": 2}),
    "linear new": of_family("Llama", rope_parameters={"rope_type": "linear", "factor": 2.5}),
    "old spelling first": of_family(
        "Llama",
        rope_scaling={"type": "linear", "factor": 2},
        rope_parameters={"rope_type": "linear", "factor": 3},
    ),
    "dynamic": of_family(
        "Llama",
        rope_scaling={"type": "dynamic", "factor": 2, "original_max_position_embeddings": 8},
    ),
    "llama3": of_family("Llama", rope_scaling=LLAMA3 | {"original_max_position_embeddings": 16}),
    "llama3 no original": of_family("Llama", rope_scaling=LLAMA3),
    "llama3 outer original": of_family(
        "Llama",
        original_max_position_embeddings=48,
        rope_scaling=LLAMA3 | {"original_max_position_embeddings": 16},
    ),
    "yarn": of_family("Qwen2", rope_theta=1e6, rope_scaling=YARN),
    "yarn type": of_family("Qwen2", rope_scaling=YARN | {"rope_type": ..., "type": "yarn"}),
    "yarn no original": of_family("Llama", rope_scaling={"rope_type": "yarn", "factor": 4}),
    "yarn null factor": of_family("Llama", rope_scaling=YARN | {"factor": None}),
    "yarn all": of_family(
        "Qwen3",
        rope_parameters=YARN
        | {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2.0, "truncate": False},
    ),
    "yarn zeros": of_family("Llama", rope_parameters=YARN | {"beta_fast": 0, "beta_slow": None}),
    "yarn mscale": of_family(
        "Llama", rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 1.2}
    ),
    "yarn half an mscale": of_family("Llama", rope_parameters=YARN | {"mscale": 0.707}),
    "yarn factor 1": of_family("Llama", rope_parameters=YARN | {"factor": 1.0}),
}
for _case in CASES.values():
    for _key in ("rope_scaling", "rope_parameters"):
        if isinstance(_case.get(_key), dict):
            _case[_key] = {k: v for k, v in _case[_key].items() if v is not ...}


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    (tmp_path / "config.json").write_text(json.dumps(CASES[name]))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = read(CASES[name])
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    head_size = getattr(theirs, "head_dim", None)
    assert ours.head_size == (head_size or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tied_lm_head == theirs.tie_word_embeddings
    assert ours.bos_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert ours.eos_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert ours.has_mlp_bias == getattr(theirs, "mlp_bias", False)
    assert ours.has_o_bias == getattr(theirs, "attention_bias", False)
    assert ours.has_qkv_bias == (theirs.model_type == "qwen2" or ours.has_o_bias)
    assert ours.has_qk_norm == (theirs.model_type == "qwen3")

    theirs.standardize_rope_params()  # as its rotary embedding does before it reads them
    rope, scaling = theirs.rope_parameters, ours.rope_scaling
    assert ours.rope_theta == rope["rope_theta"]
    assert scaling.kind == rope["rope_type"].replace("default", "none")
    if rope.get("factor") is not None:
        assert scaling.factor == rope["factor"]
    context = theirs.max_position_embeddings
    if scaling.kind == "dynamic":
        assert scaling.original_context == context
    if scaling.kind in ("llama3", "yarn"):
        assert scaling.original_context == rope["original_max_position_embeddings"]
    if scaling.kind in ("none", "llama3"):
        assert ours.max_context == context
    else:
        stretched = (scaling.original_context or context) * scaling.factor
        assert ours.max_context == max(context, stretched)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("yarn")])
def test_yarn_attention_factor_equals_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    (tmp_path / "config.json").write_text(json.dumps(CASES[name]))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    if not hasattr(theirs, "head_dim"):
        theirs.head_dim = theirs.hidden_size // theirs.num_attention_heads
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    scaling = read(CASES[name]).rope_scaling
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1
    assert factor == pytest.approx(expected, rel=1e-12)


def test_yarn_by_hand() -> None:
    scaling = read(CASES["yarn all"]).rope_scaling
    assert scaling == RopeScaling(
        "yarn", 4.0, 32, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5, truncate=False
    )
    assert read(CASES["yarn"]).rope_scaling == RopeScaling("yarn", 4.0, 32)
    assert read(CASES["yarn null factor"]).rope_scaling.factor == 4.0  # 128 / 32


def test_stop_ids_are_merged_and_bos_taken_from_generation_config() -> None:
    generation = {"eos_token_id": [5, 2, 7], "bos_token_id": 3}
    assert read(llama_config(), generation).eos_ids == (2, 5, 7)
    assert read(llama_config(), generation).bos_id == 1
    assert read(llama_config(bos_token_id=None), generation).bos_id == 3
    assert read(llama_config(eos_token_id=...), {"eos_token_id": 9}).eos_ids == (9,)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported"),
    ({"architectures": ["Qwen3MoeForCausalLM"]}, "mixture of experts"),
    ({"architectures": ["MixtralForCausalLM"]}, "mixture of experts"),
    ({"architectures": "LlamaForCausalLM"}, "must be a list"),
    ({"architectures": ["LlamaForCausalLM", "X"]}, "LlamaForCausalLM, X"),
    ({"architectures": ..., "model_type": "gemma"}, "model_type 'gemma'"),
    ({"model_type": "qwen2"}, "contradicts model_type 'qwen2'"),
    ({"num_local_experts": 8}, "num_local_experts is 8: mixture-of-experts"),
    ({"num_experts": 128}, "mixture-of-experts"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
    ({"layer_types": ["linear_attention"]}, "'linear_attention'"),
    (of_family("Mistral", sliding_window=4096), "sliding_window is 4096"),
    (of_family("Mistral", sliding_window=...), "sliding_window is absent"),
    (of_family("Qwen2", use_sliding_window=True), "use_sliding_window is true"),
    (of_family("Qwen3", use_sliding_window=True), "use_sliding_window is true"),
    ({"rope_scaling": {"type": "longrope", "factor": 2}}, "'longrope' is not supported"),
    ({"rope_scaling": {"type": "su"}}, "'su' is not supported"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_type is 3"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
    ({"rope_scaling": [1]}, "must be an object"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "high_freq_factor 4 must be above"),
    ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor is -1.0"),
    ({"rope_scaling": YARN | {"truncate": 1}}, "truncate is 1"),
    ({"rope_scaling": YARN | {"beta_fast": 1e-9}}, "beta_fast is 1e-09"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by layer type"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"hidden_size": ...}, "hidden_size is missing"),
    ({"hidden_size": -32}, "hidden_size is -32"),
    ({"hidden_size": 1 << 40}, "hidden_size is 1099511627776"),
    ({"hidden_size": 10**3000}, "hidden_size is"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": 33}, "hidden_size 33 is not a multiple"),
    ({"head_dim": 7}, "head_size 7 is odd"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ({"eos_token_id": 40}, "eos_token_id is 40"),
    ({"eos_token_id": [2, -1]}, r"eos_token_id is \[2, -1\]"),
    ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NanocupyError, match=message) as caught:
        read(llama_config(**changes))
    line = str(caught.value)
    assert line.startswith("folder/config.json: ")
    assert "\n" not in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("generation", "message"),
    [({"eos_token_id": [400]}, "eos_token_id"), ({"eos_token_id": {}}, "eos_token_id")],
)
def test_generation_config_ids_are_checked(generation: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {message}"):
        read(llama_config(), generation)


def test_huge_stretch_does_not_overflow() -> None:
    config = llama_config(rope_scaling={"type": "linear", "factor": 1e300})
    assert read(config).max_context == 1 << 28
