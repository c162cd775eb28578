"""Tiny random models that stand in for real checkpoints, built the same on every machine.

Owns the table of architectures that the logit fixtures cover, and how their weights are drawn. Only
token ids and logits are kept in the repository; the weights are drawn again whenever a test wants
them. Knows the names of Hugging Face's files, and neither nanocupy nor torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NUM_GENERATED = 24  # greedy tokens after each prompt


@dataclass(frozen=True)
class ReferenceModel:
    """One model: the config.json that Hugging Face would write, a seed, the prompts' lengths."""

    name: str
    config: dict[str, Any]
    seed: int
    prompt_lens: tuple[int, ...] = (1, 17, 70)

    @property
    def hidden_size(self) -> int:
        return self.config["hidden_size"]

    @property
    def vocab_size(self) -> int:
        return self.config["vocab_size"]

    @property
    def head_size(self) -> int:
        return self.config.get("head_dim") or self.hidden_size // self.config["num_attention_heads"]


def _config(model_type: str, shape: str, **more: Any) -> dict[str, Any]:
    """A config.json. `shape` = "layers hidden feed-forward heads/kv-heads vocabulary"."""
    layers, hidden, inter, heads, vocab = shape.split()
    num_heads, num_kv_heads = heads.split("/")
    class_name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
    return {
        "architectures": [class_name[model_type] + "ForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "num_hidden_layers": int(layers),
        "hidden_size": int(hidden),
        "intermediate_size": int(inter),
        "num_attention_heads": int(num_heads),
        "num_key_value_heads": int(num_kv_heads),
        "vocab_size": int(vocab),
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        **more,
    }


def _rope(kind: str, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    """The newer spelling: one object with everything about the rotation."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def _rope_scaling(kind: str, theta: float = 10000.0, key: str = "rope_type", **more: Any) -> dict:
    """The older spelling: theta on its own, and the scaling's kind under "rope_type" or "type"."""
    return {"rope_theta": theta, "rope_scaling": {key: kind, **more}}


_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _config("llama", "3 64 176 8/2 256", rope_theta=10000.0),
    "llama-mqa-tied": _config(
        "llama", "2 64 112 4/1 240", tie_word_embeddings=True, **_rope("default")
    ),
    "llama-mha-linear": _config(
        "llama", "2 80 136 4/4 224", **_rope_scaling("linear", key="type", factor=4.0)
    ),
    # Dynamic NTK: every prompt longer than the trained context; and prompts that lie within it (or
    # fill it to the last token) while the generation passes it.
    "llama-dynamic-long": _config(
        "llama",
        "2 64 112 4/2 216",
        max_position_embeddings=32,
        **_rope("dynamic", factor=4.0),
    ),
    "llama-dynamic-crossing": _config(
        "llama",
        "2 48 120 3/3 208",
        head_dim=64,
        max_position_embeddings=32,
        **_rope_scaling("dynamic", key="type", factor=2.0),
    ),
    # LLaMA 3.2's own scaling, and one whose ramp lies among the frequencies of short texts.
    "llama-llama3": _config(
        "llama",
        "2 128 176 2/1 232",
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=[2, 5],
        **_rope_scaling(
            "llama3",
            500000.0,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "llama-llama3-short": _config(
        "llama",
        "2 64 120 4/2 220",
        max_position_embeddings=512,
        **_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": _config(
        "llama",
        "2 80 128 2/1 212",
        head_dim=80,
        max_position_embeddings=2048,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=512),
    ),
    "llama-yarn-explicit": _config(
        "llama",
        "2 64 112 4/2 204",
        max_position_embeddings=512,
        **_rope_scaling(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=64,
            attention_factor=1.25,
            beta_fast=6.0,
            beta_slow=0.5,
        ),
    ),
    "llama-yarn-untruncated": _config(
        "llama",
        "2 64 112 4/2 200",
        max_position_embeddings=512,
        **_rope(
            "yarn", factor=8.0, original_max_position_embeddings=64, beta_fast=4.0, truncate=False
        ),
    ),
    "llama-biases": _config(
        "llama",
        "2 64 112 4/2 228",
        attention_bias=True,
        mlp_bias=True,
        rope_theta=10000.0,
        rope_scaling=None,
    ),
    "llama-attention-bias": _config(
        "llama", "2 96 144 2/1 236", head_dim=96, attention_bias=True, **_rope("default", 50000.0)
    ),
    "llama-head-128": _config(
        "llama", "2 64 112 2/1 244", head_dim=128, mlp_bias=True, rope_theta=1000.0
    ),
    "mistral": _config(
        "mistral",
        "2 64 144 4/2 248",
        head_dim=24,
        sliding_window=None,
        **_rope("default", 1000000.0),
    ),
    "qwen2": _config(
        "qwen2",
        "3 64 144 4/2 320",
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        sliding_window=4096,
        max_window_layers=3,
        rope_theta=1000000.0,
    ),
    "qwen2-yarn": _config(
        "qwen2",
        "2 56 120 7/1 300",
        rms_norm_eps=1e-6,
        max_position_embeddings=256,
        **_rope_scaling(
            "yarn", 10000.0, key="type", factor=4.0, original_max_position_embeddings=64
        ),
    ),
    "qwen3": _config("qwen3", "3 64 120 4/2 312", head_dim=32, rms_norm_eps=1e-6, rope_theta=1e6),
    "qwen3-tied-bias": _config(
        "qwen3",
        "2 72 120 4/4 308",
        head_dim=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=True,
        use_sliding_window=False,
        **_rope("default", 100000.0),
    ),
}

# Seeds are picked so that no greedy token hangs on a rounding error and no text ends in a loop of
# one token (make_logits says which do).
_SEEDS = {
    "llama": 9,
    "llama-mqa-tied": 13,
    "llama-mha-linear": 4,
    "llama-dynamic-long": 6,
    "llama-dynamic-crossing": 3,
    "llama-llama3": 10,
    "llama-llama3-short": 4,
    "llama-yarn": 1,
    "llama-yarn-explicit": 2,
    "llama-yarn-untruncated": 3,
    "llama-biases": 1,
    "llama-attention-bias": 2,
    "llama-head-128": 2,
    "mistral": 2,
    "qwen2": 1,
    "qwen2-yarn": 3,
    "qwen3": 3,
    "qwen3-tied-bias": 55,
}
_PROMPT_LENS = {"llama-dynamic-long": (33, 70), "llama-dynamic-crossing": (1, 20, 31, 32)}

MODELS: dict[str, ReferenceModel] = {
    name: ReferenceModel(name, config, _SEEDS[name], _PROMPT_LENS.get(name, (1, 17, 70)))
    for name, config in _CONFIGS.items()
}


class _Draw:
    """Random values from Philox's raw words and exact integer sums, so that they depend neither on
    the machine nor on the version of numpy (whose `Generator` may change its streams)."""

    def __init__(self, seed: int, stream: str) -> None:
        digest = hashlib.sha256(f"{seed} {stream}".encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def words(self, count: int) -> np.ndarray:
        return np.asarray(self._bits.random_raw(count), dtype=np.uint64)

    def bell(self, shape: tuple[int, ...], std: float) -> np.ndarray:
        """float32, nearly normal: each the sum of the four 16-bit parts of a random word."""
        words = self.words(math.prod(shape))
        parts = sum((words >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
        unit = (parts.astype(np.float64) - 4 * 32767.5) * (math.sqrt(3) / 65536)
        return (unit * std).astype(np.float32).reshape(shape)

    def between(self, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        unit = (self.words(math.prod(shape)) >> np.uint64(11)).astype(np.float64) / 2.0**53
        return (low + unit * (high - low)).astype(np.float32).reshape(shape)


def weights(model: ReferenceModel) -> dict[str, np.ndarray]:
    """Hugging Face's tensor name -> float32 array, drawn from the model's seed.

    Scales are chosen so that logits have a standard deviation of 1 to 4 and attention is far from
    uniform: a wrong rotation, bias or norm then changes the logits visibly.
    """
    config = model.config
    hidden, inter, vocab = model.hidden_size, config["intermediate_size"], model.vocab_size
    q_size = config["num_attention_heads"] * model.head_size
    kv_size = config["num_key_value_heads"] * model.head_size
    is_qwen2, is_qwen3 = config["model_type"] == "qwen2", config["model_type"] == "qwen3"
    qkv_bias = is_qwen2 or config.get("attention_bias", False)
    o_bias = config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    tied = config["tie_word_embeddings"]

    def linear(
        name: str, rows: int, cols: int, gain: float, bias: bool, bias_std: float = 0.2
    ) -> None:
        draw = _Draw(model.seed, name)
        tensors[name + ".weight"] = draw.bell((rows, cols), gain / math.sqrt(cols))
        if bias:
            tensors[name + ".bias"] = draw.bell((rows,), bias_std)

    def norm(name: str, size: int, low: float = 0.5, high: float = 1.5) -> None:
        tensors[name + ".weight"] = _Draw(model.seed, name).between((size,), low, high)

    tensors: dict[str, np.ndarray] = {}
    # A tied embedding is small beside what the layers add, else each token would predict itself.
    embed_std = 2 / math.sqrt(hidden) if tied else 1.0
    embed = _Draw(model.seed, "embed").bell((vocab, hidden), embed_std)
    tensors["model.embed_tokens.weight"] = embed
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        norm(p + "input_layernorm", hidden)
        linear(p + "self_attn.q_proj", q_size, hidden, 1.5, qkv_bias, 0.6)
        linear(p + "self_attn.k_proj", kv_size, hidden, 1.5, qkv_bias, 0.6)
        linear(p + "self_attn.v_proj", kv_size, hidden, 1.0, qkv_bias)
        linear(p + "self_attn.o_proj", hidden, q_size, 1.5, o_bias)
        if is_qwen3:
            norm(p + "self_attn.q_norm", model.head_size, 0.4, 2.4)
            norm(p + "self_attn.k_norm", model.head_size, 0.4, 2.4)
        norm(p + "post_attention_layernorm", hidden)
        linear(p + "mlp.gate_proj", inter, hidden, 1.0, mlp_bias)
        linear(p + "mlp.up_proj", inter, hidden, 1.0, mlp_bias)
        linear(p + "mlp.down_proj", hidden, inter, 1.5, mlp_bias)
    norm("model.norm", hidden)
    if not tied:
        linear("lm_head", vocab, hidden, 2.0, False)
    return tensors


def prompts(model: ReferenceModel) -> list[np.ndarray]:
    """The prompts' token ids, int32, one array for each of `prompt_lens`."""
    return [
        (_Draw(model.seed, f"prompt {n}").words(n) % np.uint64(model.vocab_size)).astype(np.int32)
        for n in model.prompt_lens
    ]


def weights_sha256(model: ReferenceModel) -> str:
    """A digest of all weights: the logits were made from exactly these."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights(model).items()):
        digest.update(f"{name} {tensor.shape}\n".encode())
        digest.update(tensor.astype("<f4").tobytes())
    return digest.hexdigest()


def write_folder(name: str, path: Path) -> Path:
    """Write the model `name` as a Hugging Face folder (config.json, model.safetensors) at `path`.

    The folder is made where it is missing; gives `path` back.
    """
    from safetensors.numpy import save_file

    model = MODELS[name]
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(model.config, indent=2), encoding="utf-8")
    save_file(weights(model), path / "model.safetensors", metadata={"format": "pt"})
    return path
