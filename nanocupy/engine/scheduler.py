"""Who runs this step, and how many tokens each. Pure Python: no arrays, no devices.

One rule: a request has tokens and a count of computed tokens, and a step lets it catch up, within a
budget of tokens a step. A prompt's chunk and the decode of one token are the same thing with other
numbers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nanocupy.engine.request import Request, RequestState
from nanocupy.memory.block_pool import BlockPool


@dataclass(frozen=True)
class ScheduledRequest:
    """`num_tokens` tokens of `request`, from position request.num_computed_tokens on. With
    `samples`, they reach the last token there is, and the step chooses the next one."""

    request: Request
    num_tokens: int
    samples: bool


class Scheduler:
    """First come, first served. Blocks are taken as tokens come; when none are left, the request
    that came last gives its own back and is computed again later."""

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_step_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival

    def add(self, request: Request) -> None:
        """Queue a request. Its max_total_tokens must fit in the whole pool, or it could never
        finish."""
        assert self.pool.blocks_for(request.max_total_tokens) < self.pool.num_blocks
        self.waiting.append(request)

    def schedule(self) -> list[ScheduledRequest]:
        """The next step. Requests that decode come first, then prompts, as far as the budget of
        tokens goes; both in order of arrival. Empty when there is nothing to do."""
        scheduled: list[ScheduledRequest] = []
        budget = self.max_step_tokens
        num_running = len(self.running)
        # A stable sort: one token each for those that decode, before prompts take the rest.
        for request in sorted(self.running, key=lambda r: r.num_tokens - r.num_computed_tokens > 1):
            if request.state is RequestState.RUNNING:  # else preempted by one before it
                budget -= self._schedule_one(request, budget, scheduled, may_preempt=True)
        if len(self.running) < num_running:  # somebody was preempted: there is no room for more
            return scheduled
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            num_tokens = self._schedule_one(request, budget, scheduled, may_preempt=False)
            if not num_tokens:
                break
            budget -= num_tokens
            self.waiting.popleft()
            request.state = RequestState.RUNNING
            self.running.append(request)
        return scheduled

    def finish(self, request: Request) -> None:
        """Take the request out, wherever it is, and give its blocks back."""
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        elif request.state is RequestState.WAITING:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED
        self._release(request)

    def _schedule_one(
        self, request: Request, budget: int, scheduled: list[ScheduledRequest], *, may_preempt: bool
    ) -> int:
        """Give `request` blocks and a place in `scheduled`; returns its tokens, 0 if none."""
        behind = request.num_tokens - request.num_computed_tokens
        num_tokens = min(behind, budget)
        needed = self.pool.blocks_for(request.num_computed_tokens + num_tokens)
        needed -= len(request.block_ids)
        while needed > self.pool.num_free:
            if not may_preempt or self.running[-1] is request:
                return 0  # the last to come waits until others finish
            self._preempt(self.running[-1], scheduled)
        if num_tokens:
            request.block_ids += self.pool.allocate(max(needed, 0))
            scheduled.append(ScheduledRequest(request, num_tokens, num_tokens == behind))
        return num_tokens

    def _preempt(self, request: Request, scheduled: list[ScheduledRequest]) -> None:
        """Send `request` back to the head of the queue, out of this step too."""
        scheduled[:] = [s for s in scheduled if s.request is not request]
        self.running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        request.state = RequestState.WAITING
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.pool.free(reversed(request.block_ids))
        request.block_ids = []
