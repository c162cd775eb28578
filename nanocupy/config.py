"""The architecture of a model, as plain frozen data.

Every checkpoint reader produces a `ModelConfig`; the model, the engine and the exporters only ever
read it. It knows no files, arrays or devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from nanocupy.errors import ConfigError
from nanocupy.kv_types import kv_row_bytes

Architecture = Literal["llama", "qwen2", "qwen3"]
RopeScalingKind = Literal["none", "linear", "dynamic", "llama3", "yarn"]

# The tensors around the layers; of a tied model the first two are one. The norm belongs to the LM
# head's product.
EMBEDDING, LM_HEAD, HEAD_NORM = "embed.weight", "lm_head.weight", "final_norm.weight"

# Upper bounds of any dimension read from a file: generous for decades, and small enough that no
# product of two of them overflows 64 bits.
MAX_DIMENSION = 1 << 28
MAX_LAYERS = 4096


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    kind             none | linear | dynamic (NTK) | llama3 | yarn
    factor           stretch factor, >= 1 (all kinds but none)
    original_context tokens the unscaled frequencies were trained for (dynamic, llama3, yarn)
    low_freq_factor, high_freq_factor     llama3 only
    beta_fast, beta_slow                  yarn only: rotations per context that bound the ramp
    attention_factor yarn only: factor on cos and sin; None = 0.1 ln(factor) + 1
    truncate         yarn only: whether the ramp's bounds are rounded to whole dimensions
    """

    kind: RopeScalingKind = "none"
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeScalingKind):
            raise ConfigError(
                f"rope scaling kind {self.kind!r} is not known; "
                f"known: {', '.join(get_args(RopeScalingKind))}"
            )
        if self.kind == "none":
            return
        _require_finite("rope scaling factor", self.factor, minimum=1.0)
        if self.kind in ("dynamic", "llama3", "yarn") and not self.original_context:
            raise ConfigError(
                f"rope scaling {self.kind!r} needs original_context "
                "(original_max_position_embeddings)"
            )
        if self.original_context is not None:
            _require_int("rope scaling original_context", self.original_context, 1, MAX_DIMENSION)
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            _require_finite(f"rope scaling {name}", getattr(self, name), minimum=1e-6)
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope scaling llama3: high_freq_factor {self.high_freq_factor} must be above "
                f"low_freq_factor {self.low_freq_factor}"
            )
        if self.attention_factor is not None:
            _require_finite("rope scaling attention_factor", self.attention_factor, minimum=1e-6)


@dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass needs to know about a model, apart from its weights.

    Dimensions are counts of elements. `bos_id` is None where the model has none; `eos_ids` are all
    ids that end a text. Rotary pairs are half-split: (i, i + head_size/2).
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_context: int  # tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tied_lm_head: bool = False
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    name: str = ""  # a human name where the file has one

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise ConfigError(
                f"architecture {self.architecture!r} is not supported; "
                f"supported: {', '.join(get_args(Architecture))}"
            )
        if not isinstance(self.name, str):
            raise ConfigError(f"name is {self.name!r}; it must be text")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_size",
            "max_context",
        ):
            _require_int(name, getattr(self, name), 1, MAX_DIMENSION)
        _require_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise ConfigError(f"head_size {self.head_size} is odd; rotary embedding needs pairs")
        _require_finite("rms_norm_eps", self.rms_norm_eps, minimum=0.0)
        _require_finite("rope_theta", self.rope_theta, minimum=1.0)
        if self.bos_id is not None:
            _require_int("bos_id", self.bos_id, 0, self.vocab_size - 1)
        for eos_id in self.eos_ids:
            _require_int("eos_id", eos_id, 0, self.vocab_size - 1)

    @property
    def q_size(self) -> int:
        """Rows of the query projection: num_heads * head_size."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Rows of the key (or value) projection: num_kv_heads * head_size."""
        return self.num_kv_heads * self.head_size

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of the keys and values of one token in all layers, in a cache of `dtype`, as
        `kv_types` names them."""
        return 2 * self.num_layers * self.num_kv_heads * kv_row_bytes(self.head_size, dtype)

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied LM head is counted once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor this architecture has, in file order.

        Matrices are [out_features, in_features]. These names are the only ones used beyond the
        checkpoint readers.
        """
        hidden, inter = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, hidden)}
        for i in range(self.num_layers):
            p = f"layers.{i}."
            shapes[p + "attn_norm.weight"] = (hidden,)
            for part, rows in (("q", self.q_size), ("k", self.kv_size), ("v", self.kv_size)):
                shapes[f"{p}{part}.weight"] = (rows, hidden)
                if self.has_qkv_bias:
                    shapes[f"{p}{part}.bias"] = (rows,)
            if self.has_qk_norm:
                shapes[p + "q_norm.weight"] = (self.head_size,)
                shapes[p + "k_norm.weight"] = (self.head_size,)
            shapes[p + "o.weight"] = (hidden, self.q_size)
            if self.has_o_bias:
                shapes[p + "o.bias"] = (hidden,)
            shapes[p + "ffn_norm.weight"] = (hidden,)
            for part, rows, cols in (
                ("gate", inter, hidden),
                ("up", inter, hidden),
                ("down", hidden, inter),
            ):
                shapes[f"{p}{part}.weight"] = (rows, cols)
                if self.has_mlp_bias:
                    shapes[f"{p}{part}.bias"] = (rows,)
        shapes[HEAD_NORM] = (hidden,)
        if not self.tied_lm_head:
            shapes[LM_HEAD] = (self.vocab_size, hidden)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form; `from_dict` reads it back to an equal config."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["eos_ids"] = list(self.eos_ids)
        scaling = self.rope_scaling
        data["rope_scaling"] = {f.name: getattr(scaling, f.name) for f in fields(scaling)}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Build from `to_dict`'s form. Unknown fields are ignored (a later version's file);
        missing or wrongly typed ones raise ConfigError."""
        if not isinstance(data, dict):
            raise ConfigError(f"model config is {type(data).__name__}, not an object")
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        scaling = values.get("rope_scaling", {})
        eos_ids = values.get("eos_ids", [])
        if not isinstance(scaling, dict) or not isinstance(eos_ids, list):
            raise ConfigError("model config: rope_scaling must be an object and eos_ids a list")
        scaling_known = {f.name for f in fields(RopeScaling)}
        try:
            values["rope_scaling"] = RopeScaling(
                **{k: v for k, v in scaling.items() if k in scaling_known}
            )
            values["eos_ids"] = tuple(eos_ids)
            for name in (
                "tied_lm_head",
                "has_qkv_bias",
                "has_o_bias",
                "has_mlp_bias",
                "has_qk_norm",
            ):
                if not isinstance(values.get(name, False), bool):
                    raise ConfigError(
                        f"model config: {name} is {values[name]!r}; it must be true or false"
                    )
            return cls(**values)
        except TypeError as exc:
            raise ConfigError(f"model config: {exc}") from exc

    def with_(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)


def _require_int(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")


def _require_finite(name: str, value: Any, minimum: float) -> None:
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value < minimum
    ):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number >= {minimum:g}")
