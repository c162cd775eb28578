"""Who runs this step, and how many tokens each. Pure Python: no arrays, no devices.

One rule: a request has tokens and a count of computed tokens, and a step lets it catch up, within a
budget of tokens a step. A prompt's chunk, the decode of one token, what the prefix cache has, and a
request that comes back are the same thing with other numbers. Those that decode are most of a batch
and do the same in every step: they are counted together (`DecodingSet`), and asked one by one only
where a step has too little room for all.

A step goes `schedule` → the runner launches it → `launched` → its ids are read → `update`. Counts
move on in `launched`, so that the next step can be scheduled before the ids of this one are read.

Drafts, guesses of the tokens that come next, are more tokens of a request that has caught up, with
what budget and free blocks a step has left; they are asked for when that is known. They do not
count in `launched`: those that turn out right are counted in `update_verified`, and the others
never were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from nanocupy.engine.in_flight import StepsInFlight
from nanocupy.engine.policy import PREEMPTION_MARGIN_STEPS, Policy, make_policy
from nanocupy.engine.request import Request, RequestState
from nanocupy.engine.results import FAILED_TOKEN
from nanocupy.engine.running import RunningSet, decodes
from nanocupy.engine.schedule import Schedule, ScheduledRequest, SchedulerSettings
from nanocupy.engine.scheduled_drafts import WantedDrafts, add_drafts, count_verified, draft_room
from nanocupy.engine.scheduler_checks import check_running, check_waiting
from nanocupy.engine.step_plan import SchedulerCounters, StepPlan
from nanocupy.engine.waiting import WaitingQueue
from nanocupy.memory.host_pool import SwapCosts, prefers_swap
from nanocupy.memory.kv_memory import KVMemory

__all__ = ["Schedule", "ScheduledRequest", "Scheduler", "SchedulerSettings"]

# A prompt waits for another that is computing what it needs where that saves this many tokens now.
WORTH_WAITING_TOKENS = 128


class Scheduler:
    """Requests run in the order of the policy. Blocks are taken as tokens come; when there are
    none left, the last in that order makes room.

    A request that was preempted as often as is allowed comes back only when all blocks it can ever
    need are free, and takes them: it never has to be preempted again, nor to preempt.
    """

    def __init__(
        self,
        memory: KVMemory,
        settings: SchedulerSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.memory = memory
        self.counters = SchedulerCounters()
        self.running = RunningSet(memory.pool.block_size)
        self._clock = clock
        self._max_preemptions = settings.max_preemptions
        self._num_arrivals = 0
        self._plan = StepPlan(0, 0.0)
        self._in_flight = StepsInFlight(memory)
        self.waiting = WaitingQueue(make_policy(settings.policy, settings.weights))
        self.configure(settings)

    @property
    def policy(self) -> Policy:
        return self.waiting.policy

    def configure(self, settings: SchedulerSettings) -> None:
        """Take new settings from the next step on; not another max_preemptions, as those who keep
        their places have blocks accordingly. Who runs goes on, if there are too many now."""
        assert settings.max_preemptions == self._max_preemptions
        self.settings = settings
        waiting, self.waiting = (
            self.waiting,
            WaitingQueue(make_policy(settings.policy, settings.weights)),
        )
        self.waiting.refresh(self._clock())
        for request in waiting:
            self.waiting.push(request)

    def learn(self, costs: SwapCosts) -> None:
        """Decide by these costs from now on, whatever the settings say."""
        self.settings = replace(self.settings, costs=costs)

    def add(self, request: Request) -> None:
        """Queue a request. Its max_total_tokens must fit in the whole pool, or it could never
        finish."""
        pool = self.memory.pool
        assert pool.blocks_for(request.max_total_tokens) < pool.num_blocks
        request.arrival_number = self._num_arrivals
        request.arrival_step = self.counters.num_steps
        request.arrival_time = self._clock()
        self._num_arrivals += 1
        self.waiting.push(request)

    # ----------------------------------------------------------------- a step

    def schedule(self, wanted: WantedDrafts | None = None) -> Schedule:
        """The next step; false where there is nothing to do, or nothing until a step in flight is
        over. Those that decode come before prompts of the same urgency.

        wanted: drafts for requests that decode. What their proposer raises is raised; the step was
        not run then.
        """
        plan = self._plan = StepPlan(self.settings.max_step_tokens, self._clock())
        self.counters.num_steps += 1
        for request in self._start(plan):
            if request.state is RequestState.RUNNING:  # else preempted by one before it
                self._catch_up(request, plan)
        self._admit_waiting(plan)
        if wanted is not None:
            self._add_drafts(wanted, plan)
        return self._finished(plan)

    def _add_drafts(self, wanted: WantedDrafts, plan: StepPlan) -> None:
        most = self.settings.max_draft_tokens
        room = draft_room(wanted, plan, self.running, self.memory, most)
        if not room:
            return
        try:
            drafts = wanted.propose(room)
        except BaseException:
            self.failed()
            raise
        add_drafts(drafts, room, plan, self.running, self.memory)

    def launched(self, schedule: Schedule) -> None:
        """The runner has started the step that `schedule` gave last: its tokens count."""
        plan, self._plan = self._plan, StepPlan(0, 0.0)
        if plan.lockstep:
            self.running.advance()
        for item in plan.items.values():
            request = item.request
            request.num_computed_tokens += item.num_tokens - len(item.drafts)
            request.num_tokens += item.samples
            self.memory.store(request)
            if not item.drafts:
                self.running.sort_in(request)
        self._in_flight.launched(schedule, plan.host_block_ids)

    def failed(self) -> None:
        """The step that `schedule` gave last was not run: what it was to copy is lost, and is
        computed again."""
        plan, self._plan = self._plan, StepPlan(0, 0.0)
        self.running.decoding.renew_schedule()
        self.memory.host_pool.free(plan.host_block_ids)
        for request in plan.preempted:
            if request.state is RequestState.PREEMPTED:
                self.memory.drop(request)
                request.num_computed_tokens = 0
        if plan.swap_in:
            for request in plan.admitted:
                if request.state is RequestState.RUNNING and request.num_preemptions:
                    self.memory.drop(request)
                    self._requeue(request)
                    request.num_computed_tokens = 0

    def update(self, schedule: Schedule, token_ids: Sequence[int]) -> list[tuple[Request, int]]:
        """Take in the ids of the oldest step in flight. Returns who got which token; not those
        that have ended meanwhile, nor those whose step has failed."""
        given = list(zip(schedule.sampling, token_ids, strict=True))
        if self._in_flight.landed():
            given = [pair for pair in given if pair[0].state is not RequestState.FINISHED]
        if FAILED_TOKEN in token_ids:
            given = [pair for pair in given if pair[1] != FAILED_TOKEN]
        for request, token_id in given:
            request.output_ids.append(token_id)
        for request in self.running.decoding.at_border():
            self.memory.store(request)
        return given

    def update_verified(
        self, schedule: Schedule, token_ids: Sequence[Sequence[int]]
    ) -> list[tuple[Request, Sequence[int]]]:
        """`update` for a step with drafts: token_ids has, for each request that samples, the tokens
        it gets, drafts that were right among them; none where its step has failed."""
        given = list(zip(schedule.sampling, token_ids, strict=True))
        if self._in_flight.landed():
            given = [pair for pair in given if pair[0].state is not RequestState.FINISHED]
        with_drafts = {item.request for item in schedule.requests if item.drafts}
        for request, ids in given:
            count_verified(request, ids)
            if request in with_drafts:
                self.memory.store(request)
                self.running.sort_in(request)
        for request in self.running.decoding.at_border():
            self.memory.store(request)
        return given

    def finish(self, request: Request, *, failed: bool = False) -> None:
        """Take the request out, wherever it is. Its blocks are free when no step that was launched
        with it is in flight. What one that failed has computed is of no use to others."""
        if failed:
            self.memory.forget(request)
        elif request.state is RequestState.RUNNING:
            self.memory.store(request)
            if request.is_retry and request.output_ids:
                self.memory.condemn(request)
        if request.state is RequestState.RUNNING:
            self.running.unseat(request)
        else:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED
        self._in_flight.drop(request)

    def retry(self, request: Request) -> Request | None:
        """Where a request that failed read blocks of others, these may be why: another begins in
        its place, without them. None where there is nothing to try, or it was tried."""
        if request.is_retry or not request.taken_block_ids:
            return None
        other = request.again(self.memory.suspects(request))
        self.finish(request, failed=True)
        self.waiting.push(other)
        return other

    def _finished(self, plan: StepPlan) -> Schedule:
        """The plan as a step."""
        decoding = self.running.decoding.schedule if plan.lockstep else Schedule()
        if not (plan.items or plan.swap_out or plan.swap_in):
            return decoding.with_grown(plan.grown)
        self.running.decoding.renew_schedule()
        return Schedule(
            decoding.requests + tuple(plan.items.values()),
            tuple(plan.swap_out),
            tuple(plan.swap_in),
        )

    # ----------------------------------------------------------------- who runs goes on

    def _start(self, plan: StepPlan) -> list[Request]:
        """Put those that decode into the plan, all at once where that can be. Returns who else is
        to catch up, in order."""
        policy, pool = self.policy, self.memory.pool
        growing = [
            r for r in self.running.decoding.at_border()
            if len(r.block_ids) * pool.block_size <= r.num_computed_tokens
        ]  # fmt: skip
        if policy.preempts:  # others may be more urgent: then only if everyone gets everything
            behind = [(r, r.num_uncomputed_tokens) for r in self.running.others]
            num_tokens = sum(num for _, num in behind)
            num_blocks = sum(
                self.memory.blocks_wanted(r, r.num_computed_tokens + num) for r, num in behind
            )
        else:
            num_tokens = num_blocks = 0
        fits = len(self.running.decoding) + num_tokens <= plan.budget
        if fits and len(growing) + num_blocks <= pool.num_free:
            plan.lockstep, plan.grown = True, growing
            plan.budget -= len(self.running.decoding)
            for request in growing:
                self.memory.grow(request, request.num_computed_tokens + 1)
            return self._in_order(self.running.others, plan)
        self.running.dissolve()
        return self._in_order(self.running.others, plan)

    def _in_order(self, requests: list[Request], plan: StepPlan) -> list[Request]:
        if len(requests) < 2:
            return list(requests)
        policy, now = self.policy, plan.now
        return sorted(
            requests, key=lambda r: (policy.band(r, now), not decodes(r), policy.key(r, now))
        )

    def _catch_up(self, request: Request, plan: StepPlan) -> None:
        """Give a running request as many tokens as it lacks and the budget has."""
        if request.num_uncomputed_tokens > self.memory.pool.block_size:
            self.memory.skip_cached(request)
        num_tokens = min(request.num_uncomputed_tokens, plan.budget)
        if not num_tokens:
            return
        end = request.num_computed_tokens + num_tokens
        while self.memory.blocks_wanted(request, end) > self.memory.pool.num_free:
            victim = self._last_after(request, plan)
            if victim is None:
                return  # it waits, with what it has, until others have finished
            self._preempt(victim, plan)
        self.memory.grow(request, end)
        self._put(request, num_tokens, plan)

    def _last_after(self, request: Request, plan: StepPlan) -> Request | None:
        """Who must make room for `request`, if anyone: the last of those after it."""
        key = self.policy.key
        others = [r for r in self.running if self._may_preempt(r, plan)]
        victim = max(others, key=lambda r: key(r, plan.now), default=None)
        if victim is None or key(victim, plan.now) <= key(request, plan.now):
            return None
        return victim

    def _put(self, request: Request, num_tokens: int, plan: StepPlan) -> None:
        start, behind = request.num_computed_tokens, request.num_uncomputed_tokens
        plan.items[request.arrival_number] = ScheduledRequest(
            request, num_tokens, num_tokens == behind
        )
        plan.budget -= num_tokens
        cache, size = self.memory.cache, self.memory.pool.block_size
        if cache is None or request.is_retry:
            return
        if num_tokens >= WORTH_WAITING_TOKENS and self.waiting:
            first, last = start // size, (start + num_tokens) // size
            plan.filling.update(cache.block_hash(request, i) for i in range(first, last))

    # ----------------------------------------------------------------- who waits is admitted

    def _admit_waiting(self, plan: StepPlan) -> None:
        """Admit as many as there is room for, strictly in order."""
        if not self.waiting or not (self._has_seat() or self.policy.preempts):
            return
        self.waiting.refresh(plan.now)
        aside = []
        while self.waiting and plan.budget:
            request = self.waiting.peek()
            if request in plan.preempted:
                break  # there was no room for it a moment ago
            admitted = self._admit(request, plan)
            if admitted is None:
                self.waiting.remove(request)
                aside.append(request)
            elif not admitted:
                break
        for request in aside:
            self.waiting.push(request)

    def _admit(self, request: Request, plan: StepPlan) -> bool | None:
        """Let a waiting or preempted request run, if there is room; None where it should rather
        wait for one that is computing its prefix."""
        if self._waits_for_leader(request):
            return None
        memory, old_computed = self.memory, request.num_computed_tokens
        num_found = memory.attach(request)
        if self._is_being_filled(request, plan):
            memory.detach(request)
            return None
        num_attached = len(request.block_ids)
        request.num_computed_tokens = max(old_computed, num_found)
        num_tokens = min(request.num_uncomputed_tokens, plan.budget)
        end = request.num_computed_tokens + num_tokens
        if request.num_preemptions >= self._max_preemptions:
            end = request.max_total_tokens  # it keeps its place, so it must never lack a block
        if not num_tokens or not self._make_room(request, end, plan):
            memory.detach(request)
            request.num_computed_tokens = old_computed
            return False
        memory.grow(request, end)
        if request.host_block_ids:
            pairs, host_block_ids = memory.swap_in(request, num_attached)
            plan.swap_in += pairs
            plan.host_block_ids += host_block_ids
        else:
            memory.count_hit(request, num_found)
        self.waiting.remove(request)
        self.counters.num_resumed += request.num_preemptions > 0
        request.state = RequestState.RUNNING
        self.running.seat(request)
        plan.admitted.append(request)
        self._put(request, num_tokens, plan)
        return True

    def _waits_for_leader(self, request: Request) -> bool:
        """Whether another sample of the prompt is computing blocks of it that both can have."""
        leader, size = request.leader, self.memory.pool.block_size
        if leader is None or self.memory.cache is None:
            return False
        num_shared = (request.num_prompt_tokens - 1) // size * size
        waits = leader.state is RequestState.RUNNING and leader.num_computed_tokens < num_shared
        if not waits:
            request.leader = None  # and nothing keeps that one alive
        return waits

    def _is_being_filled(self, request: Request, plan: StepPlan) -> bool:
        cache, size = self.memory.cache, self.memory.pool.block_size
        if cache is None or not plan.filling or request.needs_whole_prompt:
            return False
        first, last = len(request.block_ids), (request.num_known_tokens - 1) // size
        wanted = first + -(-WORTH_WAITING_TOKENS // size)
        return wanted <= last and all(
            cache.block_hash(request, i) in plan.filling for i in range(first, wanted)
        )

    def _make_room(self, request: Request, num_tokens: int, plan: StepPlan) -> bool:
        """Whether a request that waits has a seat and blocks for `num_tokens`; under a policy that
        preempts, requests that are clearly after it leave."""
        pool = self.memory.pool
        wanted = self.memory.blocks_wanted(request, num_tokens)
        victims: list[Request] = []
        if self.policy.preempts and not (self._has_seat() and wanted <= pool.num_free):
            key_of, weights = self.policy.key_of, self.policy.weights
            limit = key_of(request, plan.now, weights) + PREEMPTION_MARGIN_STEPS
            victims = [
                r for r in self.running
                if self._may_preempt(r, plan) and key_of(r, plan.now, weights) > limit
            ]  # fmt: skip
            victims.sort(key=lambda r: self.policy.key(r, plan.now), reverse=True)
        leaving: list[Request] = []
        room = pool.num_free
        while room < wanted or not (leaving or self._has_seat()):
            if len(leaving) == len(victims):
                return False
            victim = victims[len(leaving)]
            leaving.append(victim)
            room += pool.num_sole(victim.block_ids)
        for victim in leaving:
            self._preempt(victim, plan)
        return True

    def _has_seat(self) -> bool:
        return len(self.running) < self.settings.max_num_seqs

    # ----------------------------------------------------------------- preemption

    def _may_preempt(self, request: Request, plan: StepPlan) -> bool:
        allowed = request.num_preemptions < self._max_preemptions
        return allowed and request not in plan.admitted

    def _preempt(self, request: Request, plan: StepPlan) -> None:
        """Take a running request's blocks, out of this step too; its state goes to the host, or is
        computed again."""
        if request in self.running.decoding:
            plan.budget += plan.lockstep
            if request in plan.grown:
                plan.grown.remove(request)
        item = plan.items.pop(request.arrival_number, None)
        plan.budget += item.num_tokens if item else 0
        pool, block_ids = self.memory.pool, request.block_ids
        # Blocks that others hold will still be there.
        lost = pool.num_sole(block_ids[: pool.blocks_for(request.num_computed_tokens)])
        pairs = None
        if request.num_computed_tokens and prefers_swap(
            self.settings.preemption,
            self.settings.costs,
            pool.blocks_for(request.num_computed_tokens),
            lost * pool.block_size,
        ):
            pairs = self.memory.swap_out(request)
        if pairs is None:
            self.memory.drop(request)
            request.num_computed_tokens = 0
            self.counters.num_recomputed += 1
        else:
            plan.swap_out += pairs
            self.counters.num_swapped_out += 1
        request.num_preemptions += 1
        self._requeue(request)
        plan.preempted.append(request)

    def _requeue(self, request: Request) -> None:
        self.running.unseat(request)
        request.state = RequestState.PREEMPTED
        self.waiting.push(request)

    # ----------------------------------------------------------------- checks

    def check_integrity(self) -> None:
        """Assert that every block, here and on the host, is where the requests say; between
        steps."""
        running, waiting = list(self.running), list(self.waiting)
        check_running(self.memory.pool, running, self._max_preemptions)
        check_waiting(self.memory.pool, waiting)
        self.running.check_integrity()
        requests = [*running, *waiting, *self._in_flight.ending]
        self.memory.check_integrity(requests, self._in_flight.host_block_ids)
