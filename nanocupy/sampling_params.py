"""How one request's tokens are chosen and when it ends: validated, immutable, plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nanocupy.errors import RequestError

MAX_STOPS = 64
MAX_SAMPLES = 256
MAX_LOGPROBS = 100  # tokens told of at each place: all of it travels as Python objects


@dataclass(frozen=True)
class SamplingParams:
    """Applied in this order: logit bias and penalties, temperature, min-p, top-k, top-p over what
    is left, one draw.

    n                    answers to each prompt; they differ where the temperature is not 0
    max_tokens           output tokens at most; None = until the model ends or the context is full
    min_tokens           output tokens before an end-of-text or stop id may come
    temperature          0 = the most likely token, always; up to 100
    top_k                the k most likely tokens; -1 = all
    top_p                the smallest set of tokens with this share of the mass; 1 = all
    min_p                tokens at least this likely, relative to the most likely; 0 = all
    repetition_penalty   > 1 discourages tokens of prompt and output (divides positive logits)
    presence_penalty     subtracted once from tokens of the output, -2 … 2
    frequency_penalty    subtracted for every time they stand in the output, -2 … 2
    logit_bias           token id -> added to its logit, -100 … 100
    seed                 -1 = random; the same seed and request give the same tokens
    stop                 strings that end the text; they are not part of it
    stop_token_ids       ids that end the text, beside the model's own
    ignore_eos           do not end at the model's end-of-text ids
    logprobs             tell the log-probability of each token of the output, and the k most likely
                         ones there; 0 = only the token's own; None = nothing
    prompt_logprobs      the same of the prompt's tokens, from the second on
    Log-probabilities are the model's own: of its logits before everything above, so that they
    compare between requests however these are sampled.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = -1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise RequestError(f"{name} is {value!r}; it must be a list")
            object.__setattr__(self, name, tuple(value))
        _whole("n", self.n, 1, MAX_SAMPLES)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS, "or None for nothing")
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 1 << 30)
        _whole("min_tokens", self.min_tokens, 0, 1 << 30)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}"
            )
        _real("temperature", self.temperature, 0.0, 100.0)
        if self.top_k != -1:
            _whole("top_k", self.top_k, 1, 1 << 30, "or -1 for all")
        _real("top_p", self.top_p, 1e-6, 1.0)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _whole("seed", self.seed, -1, (1 << 63) - 1)
        if len(self.stop) > MAX_STOPS or len(self.stop_token_ids) > MAX_STOPS:
            raise RequestError(f"more than {MAX_STOPS} stops were given")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop {text!r} must be a string that is not empty")
        for token_id in self.stop_token_ids:
            _whole("stop_token_ids", token_id, 0, (1 << 31) - 1)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {self.logit_bias!r}; it must map ids to numbers")
        for token_id, bias in self.logit_bias.items():
            _whole("logit_bias id", token_id, 0, (1 << 31) - 1)
            _real(f"logit_bias of id {token_id}", bias, -100.0, 100.0)

    @property
    def has_penalties(self) -> bool:
        """Whether logits must be changed before the draw."""
        return bool(self.logit_bias) or self.counts_tokens

    @property
    def counts_tokens(self) -> bool:
        """Whether the logits' change depends on the ids there are already."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def with_(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated again; RequestError for an unknown one."""
        unknown = [name for name in changes if name not in self.__dataclass_fields__]
        if unknown:
            raise RequestError(
                f"{unknown[0]} is no sampling parameter; there are "
                f"{', '.join(self.__dataclass_fields__)}"
            )
        return replace(self, **changes)


def _whole(name: str, value: Any, low: int, high: int, note: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(
            f"{name} is {value!r}; it must be a whole number from {low} to {high} {note}".rstrip()
        )


def _real(name: str, value: Any, low: float, high: float) -> None:
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise RequestError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")
