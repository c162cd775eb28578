"""One request and its life. Plain state; the scheduler and the engine change it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from nanocupy.sampling_params import SamplingParams


class RequestState(Enum):
    """WAITING has no blocks yet; RUNNING has; FINISHED has given them back."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass
class Request:
    """A prompt, what was generated, and how many of its tokens are in the cache.

    seed is drawn at arrival where the parameters ask for a random one, so that every later step of
    the request uses the same. finish_reason: "stop", "length", "abort", or None while it lives.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    max_total_tokens: int  # prompt and output, bounded by max_tokens and the context
    state: RequestState = RequestState.WAITING
    output_ids: list[int] = field(default_factory=list)
    output_counts: Counter[int] = field(default_factory=Counter)
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that exist: prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.output_ids.append(token_id)
        self.output_counts[token_id] += 1

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Token ids of positions start … stop - 1."""
        prompt = self.prompt_ids[start:stop]
        offset = len(self.prompt_ids)
        return prompt + self.output_ids[max(start - offset, 0) : max(stop - offset, 0)]
