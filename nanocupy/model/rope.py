"""Rotary frequencies of a model, with every scaling a `ModelConfig` can name.

Only frequencies are made here, once; angles of positions are the op `rope_table`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nanocupy.config import ModelConfig, RopeScaling


@dataclass(frozen=True)
class RopeParameters:
    """Arguments of the op `rope_table`.

    inv_freq          float32 [head_size / 2], radians a token
    attention_factor  on cosines and sines (YaRN), else 1
    ntk_factor, ntk_context   dynamic NTK; used only where `is_dynamic`
    """

    inv_freq: np.ndarray
    attention_factor: float = 1.0
    ntk_factor: float = 1.0
    ntk_context: int = 1
    is_dynamic: bool = False


def rope_parameters(config: ModelConfig) -> RopeParameters:
    """The rotary frequencies of `config`. Sources: RoFormer (Su et al. 2021), position
    interpolation (Chen et al. 2023), YaRN (Peng et al. 2023); llama3 and dynamic as transformers
    computes them."""
    scaling = config.rope_scaling
    exponents = np.arange(0, config.head_size, 2, dtype=np.float64) / config.head_size
    inv_freq = config.rope_theta**-exponents
    attention_factor = 1.0
    if scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling.kind == "llama3":
        inv_freq = _llama3(inv_freq, scaling)
    elif scaling.kind == "yarn":
        inv_freq = _yarn(inv_freq, config, scaling)
        attention_factor = scaling.attention_factor
        if attention_factor is None:
            attention_factor = 0.1 * math.log(scaling.factor) + 1.0
    is_dynamic = scaling.kind == "dynamic"
    return RopeParameters(
        inv_freq=inv_freq.astype(np.float32),
        attention_factor=attention_factor,
        ntk_factor=scaling.factor if is_dynamic else 1.0,
        ntk_context=(scaling.original_context or 1) if is_dynamic else 1,
        is_dynamic=is_dynamic,
    )


def _llama3(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are stretched by the factor, short ones kept, a ramp between."""
    turns = scaling.original_context * inv_freq / (2 * math.pi)  # rotations in the trained context
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(ramp, 0, 1)
    return inv_freq * (kept + (1 - kept) / scaling.factor)


def _yarn(inv_freq: np.ndarray, config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    """Interpolate dimensions that turn less than beta_slow times, keep those above beta_fast."""

    def dimension_of(turns: float) -> float:
        context = scaling.original_context / (turns * 2 * math.pi)
        return config.head_size * math.log(context) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_size - 1)
    if high == low:
        high += 0.001  # a step, not a division by zero
    interpolated = np.clip((np.arange(len(inv_freq)) - low) / (high - low), 0, 1)
    return inv_freq * (1 - interpolated + interpolated / scaling.factor)
