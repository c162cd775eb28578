"""One request and its life. Plain state; the scheduler and the engine change it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import Enum

from nanocupy.engine.results import TokenLogprob
from nanocupy.errors import RequestError
from nanocupy.sampling_params import SamplingParams

MAX_LEVEL = 9
PENDING_TOKEN = -1  # stands for a token that was sampled and not read yet


class RequestState(Enum):
    """WAITING has not run yet; RUNNING has blocks; PREEMPTED ran, and waits for blocks again: to be
    swapped in where it has host blocks, else to be computed again; FINISHED has ended."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(frozen=True)
class RequestPriority:
    """How urgent a request is, under the policy "priority".

    level     0 (highest) to 9
    deadline  seconds from arrival by which it should be done; None = no hurry
    vip       goes before others of its level
    """

    level: int = 0
    deadline: float | None = None
    vip: bool = False

    def __post_init__(self) -> None:
        level, deadline = self.level, self.deadline
        if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level <= MAX_LEVEL:
            raise RequestError(
                f"priority level is {level!r}; it must be a whole number from 0, the highest, to "
                f"{MAX_LEVEL}"
            )
        if deadline is not None and (
            not isinstance(deadline, (int, float))
            or isinstance(deadline, bool)
            or not math.isfinite(deadline)
            or deadline < 0
        ):
            raise RequestError(
                f"priority deadline is {deadline!r}; it must be seconds from arrival, 0 or more"
            )
        if not isinstance(self.vip, bool):
            raise RequestError(f"priority vip is {self.vip!r}; it must be True or False")


@dataclass(eq=False, slots=True)  # two requests are never the same one
class Request:
    """A prompt, what was generated, and how many of its tokens are in the cache.

    seed is drawn at arrival where the parameters ask for a random one, so that every later step of
    the request uses the same; of several samples of a prompt, sample_index tells them apart.
    finish_reason: "stop", "length", "abort", "error" (the model gave no number), or None while it
    lives.

    Counts run ahead of results: a step that was launched counts as computed, and the token it
    samples exists (`num_tokens`) before its id is read.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    max_total_tokens: int  # prompt and output, bounded by max_tokens and the context
    priority: RequestPriority = RequestPriority()
    # Tokens alone do not say what their keys are where the rotary base follows the prompt's length
    # (dynamic NTK): equal bases share cached blocks, others never do.
    rope_base: int = 0
    sample_index: int = 0
    stop_ids: frozenset[int] = frozenset()  # ids that end it
    # Another sample of the same prompt, which computes that for both.
    leader: Request | None = None
    state: RequestState = RequestState.WAITING
    output_ids: list[int] = field(default_factory=list)
    num_tokens: int = field(init=False)  # that exist: prompt, output, and sampled but not read
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    host_block_ids: list[int] = field(default_factory=list)  # while swapped out
    finish_reason: str | None = None
    # Kept by the scheduler:
    arrival_number: int = 0
    arrival_step: int = 0
    arrival_time: float = 0.0  # seconds on the scheduler's clock
    num_preemptions: int = 0
    # How often tokens that it had were taken back and others put in their places: what a device has
    # as its last token may then be another, at the same position.
    num_rewinds: int = 0
    # Kept by the prefix cache: hashes of full blocks, as far as computed; how many leading blocks
    # are in the cache or were refused by it; the entry of the last of those.
    block_hashes: list[int] = field(default_factory=list)
    num_cached_blocks: int = 0
    cache_parent: int | None = None
    # Blocks that it has taken from there since it began; not computed by itself.
    taken_block_ids: list[int] = field(default_factory=list)
    # It failed once, with blocks of others, and shares nothing now. suspects: those of them that
    # can still be found, and the numbers of their entries.
    is_retry: bool = False
    suspects: tuple[tuple[int, int], ...] = ()
    # Log-probabilities of the prompt's tokens from the second on, as far as there are any.
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    # Of the parameters, as every step asks for it:
    needs_token_ids: bool = field(init=False)
    changes_logits: bool = field(init=False)
    num_logprobs: int | None = field(init=False)
    num_prompt_logprobs: int | None = field(init=False)
    wants_logprobs: bool = field(init=False)
    max_output_tokens: int = field(init=False)
    _counts: Counter[int] = field(default_factory=Counter, repr=False)
    _num_counted: int = 0

    def __post_init__(self) -> None:
        p = self.params
        self.num_tokens = len(self.prompt_ids) + len(self.output_ids)
        self.max_output_tokens = self.max_total_tokens - len(self.prompt_ids)
        # How many of the most likely tokens are told of each; a prompt's by its first sample.
        self.num_logprobs = p.logprobs
        self.num_prompt_logprobs = p.prompt_logprobs if self.sample_index == 0 else None
        self.wants_logprobs = not (self.num_logprobs is self.num_prompt_logprobs is None)
        # Whether the ids of all its tokens must be known to the host before its next step.
        self.needs_token_ids = p.counts_tokens or self.wants_logprobs
        # Whether it may take penalties, a bias or banned ids.
        self.changes_logits = p.has_penalties or p.min_tokens > 0

    def again(self, suspects: tuple[tuple[int, int], ...]) -> Request:
        """Another request in this one's place, which computes all of its tokens anew; steps in
        flight know only this one."""
        other = replace(
            self,
            leader=None,
            state=RequestState.WAITING,
            output_ids=list(self.output_ids),
            num_computed_tokens=0,
            block_ids=[],
            host_block_ids=[],
            block_hashes=[],
            num_cached_blocks=0,
            cache_parent=None,
            taken_block_ids=[],
            is_retry=True,
            suspects=suspects,
            prompt_logprobs=list(self.prompt_logprobs),
            _counts=Counter(),
            _num_counted=0,
        )
        other.needs_token_ids = self.needs_token_ids
        return other

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose ids the host has: prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that were sampled and not read yet."""
        return self.num_tokens - len(self.prompt_ids) - len(self.output_ids)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - len(self.prompt_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens it must catch up by before it can get another; 0 where it gets none."""
        if self.num_tokens >= self.max_total_tokens:
            return 0
        return self.num_tokens - self.num_computed_tokens

    @property
    def output_counts(self) -> Counter[int]:
        """How often each id stands in the output; counted as far as it is asked for."""
        if self._num_counted < len(self.output_ids):
            self._counts.update(self.output_ids[self._num_counted :])
            self._num_counted = len(self.output_ids)
        return self._counts

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether none of the prompt may be left out, though the cache had it."""
        if self.is_retry:
            return True
        num_wanted = 0 if self.num_prompt_logprobs is None else self.num_prompt_tokens - 1
        return len(self.prompt_logprobs) < num_wanted

    def append(self, token_id: int) -> None:
        """Take in a generated token: the first of those not read yet or, if none, one more."""
        self.output_ids.append(token_id)
        self.num_tokens = max(self.num_tokens, self.num_known_tokens)

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Token ids of positions start … stop - 1; PENDING_TOKEN for what was not read yet."""
        offset = len(self.prompt_ids)
        if stop <= offset:
            return self.prompt_ids[start:stop]
        ids = self.prompt_ids[start:] if start < offset else []
        ids = ids + self.output_ids[max(start - offset, 0) : stop - offset]
        return ids + [PENDING_TOKEN] * (min(stop, self.num_tokens) - start - len(ids))
