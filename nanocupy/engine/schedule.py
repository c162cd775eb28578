"""What the scheduler is told, and what it gives: plain data.

A `Schedule` is one step, made by the scheduler and executed by a runner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property

from nanocupy.engine.policy import PolicyName, PolicyWeights
from nanocupy.engine.request import Request
from nanocupy.memory.host_pool import PreemptionMode, SwapCosts


@dataclass(frozen=True)
class SchedulerSettings:
    """What may change while it runs (`Scheduler.configure`).

    max_num_seqs sequences run at once; max_step_tokens are computed in a step; preemption is by
    swap, by recompute, or as `costs` say; a request that was preempted max_preemptions times keeps
    its place from then on. max_draft_tokens: drafts of one step at most, of all requests together.
    """

    max_num_seqs: int
    max_step_tokens: int
    policy: PolicyName = "fcfs"
    weights: PolicyWeights = field(default_factory=PolicyWeights)
    preemption: PreemptionMode = "auto"
    max_preemptions: int = 4
    costs: SwapCosts = field(default_factory=SwapCosts)
    max_draft_tokens: int = 0


@dataclass(frozen=True)
class ScheduledRequest:
    """`num_tokens` tokens of `request`, from position request.num_computed_tokens on. With
    `samples`, they reach the last token there is, and the step chooses the next one.

    drafts: the last so many of them are guesses of what follows that last token. The step then
    chooses a token after each of these too, as if those before had been right; which of them count
    is decided when they are read (`nanocupy.speculation.acceptance`).
    """

    request: Request
    num_tokens: int
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """Tokens that the step chooses."""
        return 1 + len(self.drafts) if self.samples else 0


@dataclass(frozen=True)
class Schedule:
    """A step: what runs, and the copies between the cache and the host's pool around it.

    swap_out, swap_in: (block of the cache, block of the host's pool). The copies of swap_out come
    first, then those of swap_in, then the forward: blocks that were swapped out may be written
    again by either. A host block of swap_in is in no swap_out of the same schedule.

    While the same requests decode, one token each, and nothing else runs, `requests` is one and
    the same object from step to step; of all their blocks, only those of `grown` are not what they
    were in the step before: they have one more.
    """

    requests: tuple[ScheduledRequest, ...] = ()
    swap_out: tuple[tuple[int, int], ...] = ()
    swap_in: tuple[tuple[int, int], ...] = ()
    grown: tuple[Request, ...] = ()

    @cached_property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.requests)

    @cached_property
    def sampling(self) -> list[Request]:
        """The requests that get a token, in order; not to be changed."""
        return [item.request for item in self.requests if item.samples]

    @cached_property
    def has_drafts(self) -> bool:
        """Whether any request has more than one row; such a step is read before the next one is
        scheduled."""
        return any(item.drafts for item in self.requests)

    @cached_property
    def row_requests(self) -> list[Request]:
        """The request of each token that the step chooses, in order; not to be changed."""
        if not self.has_drafts:
            return self.sampling
        return [item.request for item in self.requests for _ in range(item.num_rows)]

    @cached_property
    def row_drafts(self) -> list[tuple[int, ...]]:
        """For each of `row_requests`, the drafts that stand before the token chosen there."""
        return [item.drafts[:i] for item in self.requests for i in range(item.num_rows)]

    @cached_property
    def members(self) -> frozenset[Request]:
        """Who runs, in no order."""
        return frozenset(item.request for item in self.requests)

    @cached_property
    def changes_logits(self) -> bool:
        """Whether any row's logits may have to be changed before the draw."""
        return any(request.changes_logits for request in self.sampling)

    @cached_property
    def wants_logprobs(self) -> bool:
        """Whether the step must give log-probabilities, of output or prompt."""
        return any(item.request.wants_logprobs for item in self.requests)

    def with_grown(self, grown: Sequence[Request]) -> Schedule:
        """The same step, where `grown` got a block; what was worked out of it is kept."""
        if not grown and not self.grown:
            return self
        # Once, for all copies:
        _ = self.num_tokens, self.sampling, self.changes_logits, self.wants_logprobs
        _ = self.has_drafts
        other = copy(self)
        object.__setattr__(other, "grown", tuple(grown))
        return other

    def __bool__(self) -> bool:
        return bool(self.requests or self.swap_out)

    def __iter__(self) -> Iterator[ScheduledRequest]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)
