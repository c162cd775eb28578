"""Public models by their shapes: the numbers of their published config.json files."""

from __future__ import annotations

from collections.abc import Mapping

from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.config import ModelConfig, RopeScaling
from nanocupy.errors import ConfigError


def _qwen(architecture: str, dims: tuple[int, ...], **more: object) -> ModelConfig:
    qwen3 = architecture == "qwen3"
    return _model(
        architecture, dims, 40960 if qwen3 else 32768, rope_theta=1e6, rms_norm_eps=1e-6,
        has_qkv_bias=not qwen3, has_qk_norm=qwen3, eos_ids=(151645,), **more,
    )  # fmt: skip


def _llama3(dims: tuple[int, ...], factor: float, **more: object) -> ModelConfig:
    scaling = RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    return _model(
        "llama", dims, 131072, rope_theta=5e5, rope_scaling=scaling, bos_id=128000,
        eos_ids=(128001, 128009), **more,
    )  # fmt: skip


def _model(
    architecture: str, dims: tuple[int, ...], max_context: int, **more: object
) -> ModelConfig:
    vocab, hidden, inter, layers, heads, kv_heads, head_size = dims
    return ModelConfig(
        architecture=architecture, vocab_size=vocab, hidden_size=hidden, intermediate_size=inter,
        num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_size=head_size,
        max_context=max_context, **more,
    )  # fmt: skip


# vocabulary, hidden, feed-forward, layers, query heads, KV heads, head size
SHAPES: Mapping[str, ModelConfig] = {
    "smollm2-135m": _model(
        "llama", (49152, 576, 1536, 30, 9, 3, 64), 8192, rope_theta=1e5, tied_lm_head=True
    ),
    "qwen2.5-0.5b": _qwen("qwen2", (151936, 896, 4864, 24, 14, 2, 64), tied_lm_head=True),
    "qwen3-0.6b": _qwen("qwen3", (151936, 1024, 3072, 28, 16, 8, 128), tied_lm_head=True),
    "llama-3.2-1b": _llama3((128256, 2048, 8192, 16, 32, 8, 64), 32.0, tied_lm_head=True),
    "tinyllama-1.1b": _model("llama", (32000, 2048, 5632, 22, 32, 4, 64), 2048),
    "qwen2.5-7b": _qwen("qwen2", (152064, 3584, 18944, 28, 28, 4, 128)),
    "qwen3-8b": _qwen("qwen3", (151936, 4096, 12288, 36, 32, 8, 128)),
    "llama-3.1-8b": _llama3((128256, 4096, 14336, 32, 32, 8, 128), 8.0),
}


def random_checkpoint(
    shape: str, dtype: str = "bfloat16", seed: int = 0, config: ModelConfig | None = None
) -> RandomCheckpoint:
    """Random weights in the shape of that name, or in one made of it, `config`. Raises ConfigError
    for a name not in SHAPES."""
    if shape not in SHAPES:
        raise ConfigError(f"shape {shape!r} is not known; known: {', '.join(SHAPES)}")
    return RandomCheckpoint((config or SHAPES[shape]).with_(name=shape), dtype, seed)
