"""A checkpoint of ours as a model of transformers: a peer for benches, an oracle for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from nanocupy.checkpoint.base import Checkpoint, dequantized

_PARTS = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    **{p: f"self_attn.{p}_proj" for p in "qkvo"},
    **{p: f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}


def make_peer(checkpoint: Checkpoint, dtype: Any) -> Any:
    """The model with `checkpoint`'s weights in `dtype` (of torch), on the CPU, in eval mode.

    Rotary scalings other than none and llama3 are not translated (ValueError).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    c = checkpoint.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    scaling = c.rope_scaling
    if scaling.kind == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    elif scaling.kind != "none":
        raise ValueError(f"rope scaling {scaling.kind}")
    config = AutoConfig.for_model(
        c.architecture,
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_size,
        max_position_embeddings=c.max_context,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=c.tied_lm_head,
    )
    peer = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    state = {}
    for name in checkpoint.tensors:
        *owner, part, kind = name.split(".")
        prefix = f"model.layers.{owner[1]}." if owner else ""
        array = dequantized(checkpoint.read(name)).astype(np.float32)
        state[f"{prefix}{_PARTS[part]}.{kind}"] = torch.from_numpy(array).to(dtype)
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= ({"lm_head.weight"} if c.tied_lm_head else set()), missing
    return peer
