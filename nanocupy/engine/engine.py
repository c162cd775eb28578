"""The engine: requests are added, `step` is called, tokens come out. It knows no text, no arrays.

A step: schedule → launch → read the ids of the step that is due → finish what has ended. That is
the same step, or, where the engine runs ahead, the one before: the runner is never idle while the
host reads, and a request that turns out to have ended has one token too many, which is dropped.

With a speculator, a step may have drafts: then all ids are read before, since drafts follow from
them, and its own before the next, since what comes next follows from how many were right.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from nanocupy.config import ModelConfig
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.policy import PolicyWeights
from nanocupy.engine.request import Request, RequestPriority, RequestState
from nanocupy.engine.results import FAILED_TOKEN, StepOutput, StepResult, TokenLogprob
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.engine.schedule import Schedule
from nanocupy.engine.scheduled_drafts import WantedDrafts
from nanocupy.engine.scheduler import Scheduler, SchedulerSettings
from nanocupy.engine.step_times import Launch, StepTimes
from nanocupy.engine.watch import StepWatch
from nanocupy.errors import ConfigError, RequestError
from nanocupy.memory.block_pool import BlockPool
from nanocupy.memory.host_pool import HostPool, SwapCosts
from nanocupy.memory.kv_memory import KVMemory
from nanocupy.memory.prefix_cache import PrefixCache
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.speculator import Speculator


def scheduler_settings(
    config: EngineConfig, limits: RunnerLimits, costs: SwapCosts | None = None
) -> SchedulerSettings:
    """What the scheduler is told of an engine's configuration, within a runner's limits."""
    return SchedulerSettings(
        max_num_seqs=min(config.num_running, limits.max_num_seqs),
        max_step_tokens=min(max(config.chunk_size, config.num_running), limits.max_step_tokens),
        policy=config.policy,
        weights=PolicyWeights(**config.policy_weights),
        preemption=config.preemption,
        max_preemptions=config.max_preemptions,
        costs=costs or SwapCosts(),
        max_draft_tokens=limits.max_draft_rows,
    )


# Makes a StepOutput of a tuple of all its fields: half the time of the class itself, and a step
# makes one for every sequence.
_step_output = partial(tuple.__new__, StepOutput)
_NOTHING = (None, None)  # no log-probabilities
_LEARNT_TOKENS = 256  # of a step that tells what prompts cost


def _one_by_one(
    given: Iterable[tuple[Request, Sequence[int]]],
) -> Iterator[tuple[Request, int, int]]:
    """Every request's new tokens, up to the one with which it ended, and which of its output each
    is."""
    for request, token_ids in given:
        num_before = len(request.output_ids) - len(token_ids)
        for number, token_id in enumerate(token_ids, num_before + 1):
            if request.finish_reason is not None:
                break
            yield request, token_id, number


class LLMEngine:
    """Any number of requests over one runner.

    settings      of the scheduler; None = first come, first served, up to the runner's limits
    prefix_cache  whether blocks of earlier requests serve prompts that begin alike
    run_ahead     launch a step before the ids of the one before are read; the runner must be able
    speculator    makes drafts; None = every forward gives a sequence one token
    clock         seconds, for deadlines
    """

    def __init__(
        self,
        config: ModelConfig,
        runner: Runner,
        settings: SchedulerSettings | None = None,
        *,
        prefix_cache: bool = True,
        run_ahead: bool = False,
        speculator: Speculator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = runner.limits
        if run_ahead and not runner.can_run_ahead:
            raise ConfigError(f"run_ahead is true, but a runner on {runner.device} cannot do that")
        if speculator is not None and speculator.policy.max_drafts > limits.max_drafts:
            raise ConfigError(
                f"guesses are {speculator.policy.max_drafts} tokens at most, but this runner was "
                f"built for {limits.max_drafts}; guess fewer, or build it for more (max_drafts)"
            )
        self.config = config
        self.runner = runner
        self.run_ahead = run_ahead
        self.speculator = speculator
        self.watch = StepWatch()  # another looks on, for profiles
        cache = PrefixCache(limits.block_size) if prefix_cache else None
        self.pool = BlockPool(limits.num_blocks, limits.block_size, cache)
        self.memory = KVMemory(self.pool, HostPool(limits.num_host_blocks))
        settings = settings or SchedulerSettings(
            limits.max_num_seqs, limits.max_step_tokens, max_draft_tokens=limits.max_draft_rows
        )
        self._check(settings)
        self.scheduler = Scheduler(self.memory, settings, clock)
        if speculator is not None:
            speculator.configure(settings.max_step_tokens)
        # A sequence must fit in the whole cache, or it could never finish.
        capacity = (limits.num_blocks - 1) * limits.block_size
        self.max_context = min(limits.max_context, capacity)
        self._requests: dict[str, list[Request]] = {}  # by id: its samples that have not ended
        # Steps that were launched and not read, oldest first: what reads each, and when it was.
        self._in_flight: deque[tuple[Schedule, Callable[[], list[int] | StepResult], Launch]]
        self._in_flight = deque()
        self._must_read = False  # before anything else is launched
        self._times = StepTimes()
        self._costs = runner.swap_costs()
        if self._costs is not None:
            self.scheduler.learn(self._costs)
        self._outputs: list[StepOutput] = []  # not returned yet

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests or self._in_flight or self._outputs)

    def configure(self, settings: SchedulerSettings) -> None:
        """Take new settings from the next step on. Raises ConfigError for what the runner was not
        built for; nothing is changed then."""
        self._check(settings)
        self.scheduler.configure(settings)
        if self.speculator is not None:
            self.speculator.configure(settings.max_step_tokens)
        if self._costs is not None:
            self.scheduler.learn(self._costs)

    def add_request(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        priority: RequestPriority = RequestPriority(),  # noqa: B008 (frozen)
    ) -> None:
        """Queue a prompt of token ids, params.n samples of it. Raises RequestError; nothing is
        queued then."""
        prompt_ids = list(prompt_ids)
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use")
        if not prompt_ids:
            raise RequestError("the prompt is empty: it must have at least one token")
        vocab_size = self.config.vocab_size
        for ids in (prompt_ids, params.logit_bias, params.stop_token_ids):
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                bad = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
                raise RequestError(f"token id {bad} is not in the vocabulary of {vocab_size}")
        if len(prompt_ids) >= self.max_context:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, the context holds {self.max_context} "
                "with at least one of output; shorten the prompt"
            )
        wants_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
        if wants_logprobs and not self.runner.has_logprobs:
            raise RequestError(
                f"logprobs and prompt_logprobs are not made on {self.runner.device}; leave them out"
            )
        max_total = self.max_context
        if params.max_tokens is not None:
            max_total = min(max_total, len(prompt_ids) + params.max_tokens)
        seed = params.seed if params.seed >= 0 else secrets.randbits(63)
        eos_ids = () if params.ignore_eos else self.config.eos_ids
        samples: list[Request] = []
        for index in range(params.n):
            samples.append(
                Request(
                    request_id, prompt_ids, params, seed, max_total, priority,
                    rope_base=self._rope_base(len(prompt_ids)),
                    sample_index=index,
                    stop_ids=frozenset((*params.stop_token_ids, *eos_ids)),
                    leader=samples[0] if samples else None,
                )
            )  # fmt: skip
        if self.runner.counts_tokens(params):
            for request in samples:
                request.needs_token_ids = request.wants_logprobs
        for request in samples:
            self.scheduler.add(request)
        self._requests[request_id] = samples
        self.watch.request_added(request_id)

    def abort(self, request_id: str, sample_index: int | None = None) -> None:
        """End a request now, or one sample of it; what is not running is ignored."""
        for request in list(self._requests.get(request_id, ())):
            if sample_index is None or request.sample_index == sample_index:
                self._finish(request, "abort")

    def step(self) -> list[StepOutput]:
        """Run one step; the new token of every request whose token was read."""
        self._times.enter()
        try:
            self._step()
        finally:
            self.watch.end_step()
            self._times.leave()
        outputs, self._outputs = self._outputs, []
        return outputs

    def _step(self) -> None:
        # Penalties count tokens, so all must be known, unless the runner counts; and
        # log-probabilities are made of what the next step would overwrite.
        must_read = self._must_read or self.scheduler.running.num_needing_ids
        if must_read or any(s.wants_logprobs or s.has_drafts for s, *_ in self._in_flight):
            self._collect(0)
        self._collect(1)  # there are two where reading was interrupted, and no memory for three
        self._must_read = False
        wanted = self._wanted_drafts() if self.speculator is not None else None
        self.watch.part("schedule")
        schedule = self.scheduler.schedule(wanted)
        if schedule:
            launch = self._times.launches()
            self.watch.part("launch")
            try:
                read = self.runner.launch(schedule)
            except BaseException:
                self.scheduler.failed()
                self._must_read = True
                raise
            self.scheduler.launched(schedule)
            self._in_flight.append((schedule, read, launch))
        # Where the caller takes long, what a step takes is seen by waiting for it.
        at_once = self.speculator is not None and self.speculator.reads_at_once
        self._collect(1 if self.run_ahead and schedule and not at_once else 0)

    def _wanted_drafts(self) -> WantedDrafts | None:
        """What drafts the next step is to have, where they may pay; all ids are read then."""
        speculator, running = self.speculator, self.scheduler.running
        assert speculator is not None
        settings = self.scheduler.settings
        room = min(settings.max_draft_tokens, settings.max_step_tokens - len(running))
        counts = speculator.wanted(running, room) if room > 0 else {}
        if not counts:
            return None
        self._collect(0)
        return speculator.asking({r: n for r, n in counts.items() if r in running.decoding})

    def _collect(self, num_left: int) -> None:
        """Read the ids of the oldest steps in flight, but for so many, and finish what has ended.
        What is interrupted can be read again."""
        while len(self._in_flight) > num_left:
            schedule, read, launch = self._in_flight[0]
            self.watch.part("wait")
            self._times.waits()
            result = read()
            self._in_flight.popleft()
            if self._costs is not None or self.speculator is not None:
                self._time(schedule, launch)
            self._take(schedule, result)

    def _take(self, schedule: Schedule, result: list[int] | StepResult) -> None:
        """What a step gave, to those it is of."""
        self.watch.part("process")
        token_ids = result.token_ids if isinstance(result, StepResult) else result
        logprobs = self._take_logprobs(schedule, result)
        if schedule.has_drafts:
            self._take_verified(schedule, token_ids, logprobs)
            return
        given = self.scheduler.update(schedule, token_ids)
        self._hand_out(((r, t, len(r.output_ids)) for r, t in given), logprobs)
        if FAILED_TOKEN in token_ids:
            self._fail(zip(schedule.sampling, token_ids, strict=True))

    def _take_verified(
        self,
        schedule: Schedule,
        token_ids: Sequence[int],
        logprobs: dict[Request, TokenLogprob | None],
    ) -> None:
        """The same for a step with drafts, in which a request may get several tokens."""
        assert self.speculator is not None
        found = self.speculator.verify(schedule, token_ids)
        good = [ids[:-1] if ids[-1] == FAILED_TOKEN else ids for ids in found]
        given = self.scheduler.update_verified(schedule, good)
        self._hand_out(_one_by_one(given), logprobs)
        last = [ids[-1] for ids in found]
        self._fail(zip(schedule.sampling, last, strict=True))

    def _hand_out(
        self,
        given: Iterable[tuple[Request, int, int]],
        logprobs: dict[Request, TokenLogprob | None],
    ) -> None:
        """Each request's token, which is that one's so manieth; who has ended with it is finished
        before the next is taken."""
        outputs = self._outputs
        for request, token_id, num_output in given:
            reason = None
            if token_id in request.stop_ids and num_output >= request.params.min_tokens:
                reason = "stop"
            elif num_output >= request.max_output_tokens:
                reason = "length"
            if reason is not None:
                self._finish(request, reason)
            output = request.request_id, token_id, reason, request.sample_index
            output += self._logprobs_of(request, logprobs) if request.wants_logprobs else _NOTHING
            outputs.append(_step_output(output))

    def _time(self, schedule: Schedule, launch: Launch) -> None:
        """What the step took that was read now, for those who want to know."""
        found = self._times.read(launch)
        if self._costs is not None and found.is_runners:
            self._learn(schedule, found.took_s)
        if self.speculator is not None:
            # How drafts are found is part of it, which nothing runs beside.
            self.speculator.stepped(schedule, found.engine_s)

    def _learn(self, schedule: Schedule, took_s: float) -> None:
        """How quickly prompts are computed, from steps that are prompts for the most part: it
        decides whether who is preempted is copied or computed again."""
        assert self._costs is not None
        if schedule.num_tokens >= max(_LEARNT_TOKENS, 4 * len(schedule.requests)):
            old, rate = self._costs.prefill_tokens_per_s, schedule.num_tokens / took_s
            self._costs = replace(self._costs, prefill_tokens_per_s=old + (rate - old) / 4)
            self.scheduler.learn(self._costs)

    def _take_logprobs(
        self, schedule: Schedule, result: list[int] | StepResult
    ) -> dict[Request, TokenLogprob | None]:
        """Those of the step's tokens; the prompts' are kept with their requests, which end where
        these are no numbers."""
        if not isinstance(result, StepResult):
            return {}
        for request, found in result.prompt_logprobs.items():
            request.prompt_logprobs += found
            is_running = request.state is not RequestState.FINISHED
            if is_running and any(math.isnan(token.logprob) for token in found):
                self._finish_failed(request)
        if not result.logprobs:
            return {}
        return dict(zip(schedule.row_requests, result.logprobs, strict=True))

    def _logprobs_of(
        self, request: Request, logprobs: dict[Request, TokenLogprob | None]
    ) -> tuple[TokenLogprob | None, tuple[TokenLogprob, ...] | None]:
        """The last two fields of a StepOutput."""
        of_prompt = None
        if len(request.output_ids) == 1 and request.num_prompt_logprobs is not None:
            of_prompt = tuple(request.prompt_logprobs)
        return logprobs.get(request), of_prompt

    def _fail(self, given: Iterable[tuple[Request, int]]) -> None:
        """End those for which the model gave no numbers, and no others; who read what others had
        computed first tries without, as numbers that are none spread to all of a step's tokens of
        one sequence, those before the cause too."""
        for request, token_id in given:
            if token_id != FAILED_TOKEN or request.state is RequestState.FINISHED:
                continue
            other = self.scheduler.retry(request)
            if other is None:
                self._finish_failed(request)
                continue
            if self.speculator is not None:
                self.speculator.forget(request)
            samples = self._requests[request.request_id]
            samples[samples.index(request)] = other

    def _finish_failed(self, request: Request) -> None:
        self._finish(request, "error")
        name, index = request.request_id, request.sample_index
        self._outputs.append(StepOutput(name, FAILED_TOKEN, "error", index))

    def _finish(self, request: Request, reason: str) -> None:
        assert request.state is not RequestState.FINISHED
        request.finish_reason = reason
        self.scheduler.finish(request, failed=reason == "error")
        if self.speculator is not None:
            self.speculator.forget(request)
        samples = self._requests[request.request_id]
        samples.remove(request)
        if not samples:
            del self._requests[request.request_id]
            self.watch.request_finished(request.request_id)

    def _rope_base(self, num_prompt_tokens: int) -> int:
        """Dynamic NTK: what the base follows, the prompt's length beyond the trained context."""
        scaling = self.config.rope_scaling
        if scaling.kind != "dynamic":
            return 0
        return max(num_prompt_tokens, scaling.original_context or 1)

    def _check(self, settings: SchedulerSettings) -> None:
        limits = self.runner.limits
        for name in ("max_num_seqs", "max_step_tokens"):
            value, most = getattr(settings, name), getattr(limits, name)
            if not 1 <= value <= most:
                raise ConfigError(f"{name} is {value}; this engine was started for 1 to {most}")
