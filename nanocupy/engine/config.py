"""The settings of an engine: every one declared once, with unit, default, bounds and meaning.

Owns the declaration, its checks, and reading it from a YAML or JSON file. Files, flags, the printed
list and the manual's table all follow the declaration. It knows no model, device or command line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from nanocupy.errors import ConfigError
from nanocupy.strict_json import parse_object, read_small_file, shown

MAX_CONFIG_BYTES = 64 << 10
_MAX_TEXT = 4096  # characters
MAX_DRAFTS = 7  # with the token before them what decode attention takes of a sequence
_MAX_DRAFT_ROWS = 256
# Larger than any model's context, and small enough that no product with a width overflows.
_MAX_TOKENS = 1 << 28


@dataclass(frozen=True)
class Setting:
    """One field of EngineConfig.

    kind      type of its values: bool, int, float or str
    low, high bounds of a number, both allowed
    choices   the values a str may have; none = any text of one line
    optional  None is a value too ("null" in files, "none" as a flag); meaning says what it stands
              for
    live      may change while the engine runs
    """

    name: str
    kind: type
    default: Any
    meaning: str
    unit: str = ""
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    optional: bool = False
    live: bool = False

    @property
    def bounds(self) -> str:
        """The allowed values, for people: "1 to 65536"."""
        if self.kind is bool:
            text = "true or false"
        elif self.is_text:
            text = "text"
        else:
            text = ", ".join(self.choices) or f"{self.low:.15g} to {self.high:.15g}"
        return text + (", or null" if self.optional else "")

    @property
    def is_text(self) -> bool:
        """Whether it takes any text."""
        return self.kind is str and not self.choices

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> Any:
        """`value` as the field holds it (a whole number given for a float becomes one). Raises
        ConfigError naming field, value and bounds."""
        if value is None and self.optional:
            return None
        if self.kind is bool or isinstance(value, bool):
            ok = self.kind is bool and isinstance(value, bool)
        elif self.is_text:
            ok = isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and value.isprintable()
        elif self.kind is str:
            ok = isinstance(value, str) and value in self.choices
        elif self.kind is int:
            ok = isinstance(value, int) and self.low <= value <= self.high
        else:
            # Compared before it is converted: an int may be too large for a float.
            ok = isinstance(value, (int, float)) and self.low <= value <= self.high
        if not ok:
            kinds = {bool: "", str: "one of ", int: "a whole number from ", float: "a number from "}
            text = "null" if value is None else shown(value)
            kind = "" if self.is_text else kinds[self.kind]
            raise ConfigError(f"{self.name} is {text}; it must be {kind}{self.bounds}")
        return float(value) if self.kind is float else value

    def parse(self, text: str) -> Any:
        """The value written as `text` on the command line. Raises ConfigError."""
        if self.optional and text.lower() in ("none", "null"):
            return None
        value: Any = text
        try:
            if self.kind is bool:
                value = {"true": True, "false": False}.get(text.lower(), text)
            elif self.kind is int:
                value = int(text) if len(text) <= 20 else text
            elif self.kind is float and math.isfinite(float(text)):
                value = float(text)
        except ValueError:
            pass  # the text itself is shown
        return self.check(value)


def _setting(kind: type, default: Any, meaning: str, **rest: Any) -> Any:
    """A dataclass field that carries its Setting."""
    return field(default=default, metadata={"kind": kind, "meaning": meaning, **rest})


def _choice(default: str, choices: tuple[str, ...], meaning: str, **rest: Any) -> Any:
    return _setting(str, default, meaning, choices=choices, **rest)


_DTYPES = ("auto", "float32", "float16", "bfloat16")
_KV_DTYPES = (*_DTYPES, "int8", "fp8")
_COUNT = {"low": 1, "high": 65536}
_WEIGHT = {"low": 0.0, "high": 1e6, "live": True}


@dataclass(frozen=True)
class EngineConfig:
    """Everything about an engine that is not the model's; immutable, and checked when made.

    Raises ConfigError, one line, for a value out of bounds. `SETTINGS` has the declaration as data.
    """

    # fmt: off
    device: Literal["auto", "cuda", "cpu"] = _choice(
        "auto", ("auto", "cuda", "cpu"),
        "where to compute; auto takes the GPU where one is usable")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = _choice(
        "auto", _DTYPES,
        "type of weights and activations; auto: float32 on a CPU, 16 bits on a GPU")
    residual_dtype: Literal["auto", "float32", "float16", "bfloat16"] = _choice(
        "auto", _DTYPES,
        "type of the residual stream, which all layers add to; auto: as dtype")
    embed_dtype: Literal["auto", "float32", "float16", "bfloat16"] = _choice(
        "auto", _DTYPES,
        "type of the embedding table; auto: as dtype")
    lm_head_dtype: Literal["auto", "float32", "float16", "bfloat16"] = _choice(
        "auto", _DTYPES,
        "type of the LM head's weights; auto: as dtype, or in codes if stored so")
    weight_format: Literal["auto", "float", "int8", "int4", "fp8"] = _choice(
        "auto", ("auto", "float", "int8", "int4", "fp8"),
        "matrices of layers: auto = as stored, float = as dtype, or quantised at load")
    kv_cache_dtype: Literal["auto", "float32", "float16", "bfloat16", "int8", "fp8"] = _choice(
        "auto", _KV_DTYPES,
        "type of the key/value cache; auto: as dtype; int8, fp8: 8 bits and a scale a row")
    max_context: int | None = _setting(
        int, None, "prompt and output of one sequence at most; null = the model's",
        unit="tokens", low=2, high=_MAX_TOKENS, optional=True)
    max_num_seqs: int = _setting(
        int, 16, "sequences that can ever run at once; memory is planned for them at start",
        unit="sequences", **_COUNT)
    batch_size: int | None = _setting(
        int, None, "sequences that run at once now, up to max_num_seqs; null = max_num_seqs",
        unit="sequences", **_COUNT, optional=True, live=True)
    max_chunk_size: int | None = _setting(
        int, None, "the largest chunk_size while running; null = chunk_size at start",
        unit="tokens", **_COUNT, optional=True)
    chunk_size: int = _setting(
        int, 2048, "tokens one step computes, prompts cut to fit; up to max_chunk_size",
        unit="tokens", **_COUNT, live=True)
    block_size: int = _setting(
        int, 16, "tokens in one block of the key/value cache",
        unit="tokens", low=1, high=256)
    gpu_memory_utilization: float = _setting(
        float, 0.9, "GPU: share of its free memory to take, weights and cache together",
        unit="share", low=0.05, high=0.98)
    cpu_cache_share: float = _setting(
        float, 0.5, "CPU: share of the machine's memory that the key/value cache may grow to",
        unit="share", low=0.01, high=0.9)
    policy: Literal["fcfs", "priority"] = _choice(
        "fcfs", ("fcfs", "priority"),
        "who runs first: by arrival, or by the weights below, in steps of waiting", live=True)
    level_weight: float = _setting(
        float, 1.0, "priority: how far each level puts a request back",
        unit="× 4000 steps", **_WEIGHT)
    vip_weight: float = _setting(
        float, 1.0, "priority: how far requests that are not VIP are put back",
        unit="× 2000 steps", **_WEIGHT)
    deadline_weight: float = _setting(
        float, 1.0, "priority: how far no deadline is behind one that has passed",
        unit="× 2000 steps", **_WEIGHT)
    shortest_first_weight: float = _setting(
        float, 1.0, "priority: how far the longest prompt is behind the shortest",
        unit="× 200 steps", **_WEIGHT)
    ageing_weight: float = _setting(
        float, 1.0, "priority: what a step of waiting makes up; at 0 some may wait for ever",
        unit="× 1 step", **_WEIGHT)
    preemption: Literal["auto", "swap", "recompute"] = _choice(
        "auto", ("auto", "swap", "recompute"),
        "how a request makes room: copied to the host, computed again, or the cheaper")
    max_preemptions: int = _setting(
        int, 4, "times one request may be made to wait; then it stays",
        unit="times", low=0, high=1000)
    host_cache_gb: float = _setting(
        float, 4.0, "host memory for swapped requests, taken as needed; 0 = never swap",
        unit="GB", low=0.0, high=4096.0)
    prefix_cache: bool = _setting(
        bool, True, "keep blocks of past prompts and reuse them where a prompt begins alike")
    use_graphs: bool = _setting(
        bool, True, "GPU: replay steps as captured CUDA graphs")
    whole_steps: bool = _setting(
        bool, True,
        "GPU: decode steps of 1 or 2 sequences as one launch, on compute capability 9.0")
    two_streams: bool = _setting(
        bool, False, "GPU: compute prompts beside decodes, on a stream of their own")
    run_ahead: bool = _setting(
        bool, True, "launch a step before the last one's tokens are read, if the runner can")
    speculate: Literal["auto", "off", "draft", "ngram"] = _choice(
        "auto", ("auto", "off", "draft", "ngram"),
        "guess tokens, check several in a forward; auto: draft with a draft_model")
    draft_model: str | None = _setting(
        str, None, "a smaller model of the same tokenizer, whose guesses are checked",
        optional=True)
    draft_tokens: int = _setting(
        int, 5, "guesses for one sequence in a step at most; fewer where fewer pay",
        unit="tokens", low=1, high=MAX_DRAFTS)
    # fmt: on

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            object.__setattr__(self, name, setting.check(getattr(self, name)))
        for name, limit in (("batch_size", "max_num_seqs"), ("chunk_size", "max_chunk_size")):
            value, most = getattr(self, name), getattr(self, limit)
            if value is not None and most is not None and value > most:
                raise ConfigError(
                    f"{name} is {value}, above {limit}, which is {most}; lower the one or raise "
                    "the other"
                )
        if self.speculate == "draft" and self.draft_model is None:
            raise ConfigError(
                "speculate is draft, and draft_model names no model; name one, or take ngram"
            )
        if self.speculate == "ngram" and self.draft_model is not None:
            raise ConfigError(
                f"speculate is ngram, and draft_model is {shown(self.draft_model)}; leave one out"
            )
        if self.proposer != "off" and self.max_step_tokens == 1:
            name = "chunk_size" if self.max_chunk_size is None else "max_chunk_size"
            raise ConfigError(
                f"{name} is 1 and max_num_seqs 1: no step has room for a guess, and speculate is "
                f"{self.speculate}; raise one of them, or set speculate to off"
            )

    # ------------------------------------------------------------- derived

    @property
    def proposer(self) -> Literal["off", "draft", "ngram"]:
        """Where guesses come from: speculate, resolved."""
        if self.speculate == "auto":
            return "off" if self.draft_model is None else "draft"
        return self.speculate

    @property
    def max_drafts(self) -> int:
        """Guesses that a step may have for one sequence; 0 where nothing guesses."""
        return 0 if self.proposer == "off" else self.draft_tokens

    @property
    def max_draft_rows(self) -> int:
        """Guesses that a step may have for all sequences together, beside a token of at least one.
        Memory is planned for them, and more than some hundred hardly pay."""
        num_rows = self.max_drafts * self.max_num_seqs
        return min(num_rows, _MAX_DRAFT_ROWS, self.max_step_tokens - 1)

    @property
    def chunk_limit(self) -> int:
        """The largest chunk_size an engine started with this takes: max_chunk_size, resolved."""
        return self.chunk_size if self.max_chunk_size is None else self.max_chunk_size

    @property
    def max_step_tokens(self) -> int:
        """The most tokens of one step that memory must be planned for: every running sequence has
        one even where chunks are small."""
        return max(self.chunk_limit, self.max_num_seqs)

    @property
    def num_running(self) -> int:
        """Sequences that may run now: batch_size, resolved."""
        return self.max_num_seqs if self.batch_size is None else self.batch_size

    @property
    def policy_weights(self) -> dict[str, float]:
        """The weights of policy "priority": level, vip, deadline, shortest_first, ageing."""
        ending = "_weight"
        return {n.removesuffix(ending): getattr(self, n) for n in SETTINGS if n.endswith(ending)}

    @property
    def host_cache_bytes(self) -> int:
        """host_cache_gb in bytes (a GB is 10^9 of them)."""
        return int(self.host_cache_gb * 1e9)

    # ------------------------------------------------------------- changes

    def with_(self, **changes: Any) -> EngineConfig:
        """A copy with some fields changed, checked again. Raises ConfigError."""
        require_known(changes)
        return replace(self, **changes)

    def changes_allowed(self, new: EngineConfig) -> tuple[str, ...]:
        """Names of the fields in which `new` differs from this, the configuration an engine was
        started with, where a running engine can take all of them.

        Raises ConfigError naming the first that it cannot: fixed at start, or above its maximum. A
        maximum that `new` leaves open (None) is this one's.
        """
        if new.max_chunk_size in (None, self.chunk_limit):
            if new.chunk_size > self.chunk_limit:
                raise ConfigError(
                    f"chunk_size is {new.chunk_size}; this engine was started for at most "
                    f"{self.chunk_limit} (max_chunk_size)"
                )
            new = replace(new, max_chunk_size=self.max_chunk_size)
        changed = tuple(n for n in SETTINGS if getattr(self, n) != getattr(new, n))
        for name in changed:
            if not SETTINGS[name].live:
                raise ConfigError(
                    f"{name} is fixed at start, where it was {shown(getattr(self, name))}; start "
                    f"again for {shown(getattr(new, name))}. While running can change: "
                    f"{', '.join(n for n, s in SETTINGS.items() if s.live)}"
                )
        return changed

    # ------------------------------------------------------------- files

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form; `EngineConfig(**…)` of it is equal."""
        return {name: getattr(self, name) for name in SETTINGS}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> EngineConfig:
        """The settings of a YAML or JSON file over the defaults. Raises ConfigError naming the
        file, the field, its value and bounds."""
        values = read_settings(path)
        try:
            return cls(**values)
        except ConfigError as exc:  # one value against another
            raise ConfigError(f"{os.fspath(path)}: {exc}") from None


def _declared(declaration: Field[Any]) -> Setting:
    return Setting(name=declaration.name, default=declaration.default, **declaration.metadata)


# name -> its declaration, in the order of the class
SETTINGS: dict[str, Setting] = {f.name: _declared(f) for f in fields(EngineConfig)}


def require_known(names: Mapping[str, Any], where: str = "") -> None:
    """ConfigError for a name that is no setting, with the nearest that is."""
    for name in names:
        if name not in SETTINGS:
            from difflib import get_close_matches

            spelt = name.strip().lower().replace("-", "_")[:80] if isinstance(name, str) else ""
            near = get_close_matches(spelt, SETTINGS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`nanocupy config --show` lists them"
            raise ConfigError(f"{where}no setting is called {shown(name)}; {hint}")


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings a file has, each one checked by itself. JSON where its name ends in .json, else
    YAML. Raises ConfigError."""
    from nanocupy.strict_yaml import parse_flat_mapping

    where = os.fspath(path)
    data = read_small_file(Path(where), MAX_CONFIG_BYTES, error=ConfigError)
    if data is None:
        raise ConfigError(f"{where}: no such file; `nanocupy config --init {where}` writes one")
    if where.lower().endswith(".json"):
        found = parse_object(data, where, MAX_CONFIG_BYTES, error=ConfigError)
    else:
        found = parse_flat_mapping(data, where)
    require_known(found, f"{where}: ")
    try:
        return {name: SETTINGS[name].check(value) for name, value in found.items()}
    except ConfigError as exc:
        raise ConfigError(f"{where}: {exc}") from None
