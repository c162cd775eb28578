"""Thousands of random requests over a tiny pool: right tokens, no block lost, nobody starves."""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

import pytest

from nanocupy.config import RopeScaling
from nanocupy.engine import scheduler as scheduler_module
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.policy import PolicyWeights, passing_window
from nanocupy.engine.request import RequestPriority, RequestState
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.scheduler import SchedulerSettings
from nanocupy.errors import ConfigError
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.policy import DraftPolicy
from nanocupy.speculation.speculator import Speculator
from tests.checkpoint.tiny import tiny_config
from tests.engine.drafts import GuessingProposer
from tests.engine.fake_runner import FakeRunner, expected_tokens

CONFIG = tiny_config(vocab_size=40, max_context=64)
NTK = tiny_config(
    vocab_size=40, max_context=64, rope_scaling=RopeScaling("dynamic", 2.0, original_context=16)
)
LIMITS = RunnerLimits(18, 4, 64, 24, 7, num_host_blocks=7)
WEIGHTS = PolicyWeights(level=0.01, vip=0.01, deadline=0.01, shortest_first=0.1, ageing=1.0)


class Stress:
    """Drives an engine with random requests and checks it after every step."""

    def __init__(
        self, seed: int, config=CONFIG, run_ahead=False, limits=LIMITS, right=None, **settings
    ):
        """right: how often drafts are right; None = there are none."""
        self.random = random.Random(seed)
        self.config = config
        self.step = 0
        self.runner = FakeRunner(config, limits, deferred=run_ahead)
        self.settings = SchedulerSettings(
            limits.max_num_seqs, limits.max_step_tokens, weights=WEIGHTS,
            max_draft_tokens=limits.max_draft_rows, **settings,
        )  # fmt: skip
        speculator = None
        if right is not None:
            proposer = GuessingProposer(self.answer, right, 40, seed)
            speculator = Speculator(proposer, DraftPolicy(limits.max_drafts))
        self.engine = LLMEngine(
            config, self.runner, self.settings, run_ahead=run_ahead, speculator=speculator,
            clock=lambda: self.step * 0.01,
        )  # fmt: skip
        self.window = passing_window(WEIGHTS) if settings.get("policy") == "priority" else 0
        self.prefixes = [self.ids(self.random.randrange(1, 30)) for _ in range(12)]
        self.alive: dict[str, tuple[list[int], SamplingParams, list[int]]] = {}
        self.finished = 0
        # For the bound on waiting: when each request came, the work there was, the work it brings.
        self.arrived: list[int] = []
        self.work_before: list[int] = []
        self.works: list[int] = []
        self.work_alive: dict[str, int] = {}
        self.waiting: dict[str, tuple[int, object]] = {}
        self.first_runs: list[tuple[int, int]] = []  # number of the request, step

    def answer(self, request) -> list[int]:
        return expected_tokens(request.prompt_ids, 16, 40, request.rope_base)

    def ids(self, count: int) -> list[int]:
        return [self.random.randrange(40) for _ in range(count)]

    def add(self) -> None:
        rng, number = self.random, len(self.arrived)
        ids = rng.choice(self.prefixes) if rng.random() < 0.5 else []
        ids = ids + self.ids(rng.randrange(1, 12))
        if self.alive and rng.random() < 0.05:
            ids = list(rng.choice(list(self.alive.values()))[0])
        params = SamplingParams(
            temperature=0, max_tokens=rng.randrange(1, 14), ignore_eos=rng.random() < 0.3,
            presence_penalty=0.5 if rng.random() < 0.02 else 0.0,
        )  # fmt: skip
        deadline = rng.choice([None, None, 0.1, 5.0])
        priority = RequestPriority(rng.choice([0, 1, 1, 9]), deadline, rng.random() < 0.1)
        name = str(number)
        self.engine.add_request(name, ids, params, priority)
        self.alive[name] = (ids, params, [])
        request = self.engine._requests[name][0]
        work = (1 + self.settings.max_preemptions) * request.max_total_tokens
        self.work_before.append(sum(self.work_alive.values()))
        self.works.append(work)
        self.work_alive[name] = work
        self.arrived.append(self.engine.scheduler.counters.num_steps)
        self.waiting[name] = (number, request)

    def forget(self, name: str) -> None:
        del self.alive[name], self.work_alive[name]
        self.waiting.pop(name, None)
        self.finished += 1

    def check_order(self) -> None:
        started = [(n, r) for n, r in self.waiting.values() if r.state is not RequestState.WAITING]
        for number, request in started:
            del self.waiting[request.request_id]
            self.first_runs.append((number, self.engine.scheduler.counters.num_steps))
        if started and self.window is not None:
            latest = max(self.arrived[number] for number, _ in started)
            oldest = min((self.arrived[n] for n, _ in self.waiting.values()), default=latest)
            assert latest <= oldest + self.window, "a newcomer passed one who waited long"

    def run(self, count: int, rate: float) -> None:
        rng = self.random
        while len(self.arrived) < count or self.engine.has_unfinished:
            self.step += 1
            while len(self.arrived) < count and rng.random() < rate and len(self.alive) < 60:
                self.add()
            if self.alive and rng.random() < 0.03:
                name = rng.choice(list(self.alive))
                self.engine.abort(name)
                self.forget(name)
            for output in self.engine.step():
                ids, params, tokens = self.alive[output.request_id]
                tokens.append(output.token_id)
                if output.finish_reason:
                    self.check_tokens(ids, params, tokens, output.finish_reason)
                    self.forget(output.request_id)
            self.engine.scheduler.check_integrity()
            self.check_order()
            assert self.step < 100 * count, "no progress"

    def check_tokens(self, ids, params, tokens, reason) -> None:
        base = max(len(ids), 16) if self.config is NTK else 0
        wanted = expected_tokens(ids, params.max_tokens, 40, base)
        if not params.ignore_eos and 2 in wanted:
            wanted = wanted[: wanted.index(2) + 1]
        assert tokens == wanted
        assert reason == ("stop" if wanted[-1] == 2 and not params.ignore_eos else "length")

    def check_end(self) -> None:
        pool = self.engine.pool
        assert pool.num_free == pool.num_blocks - 1
        assert self.engine.memory.host_pool.num_free == self.runner.limits.num_host_blocks
        assert self.finished == len(self.arrived)
        totals = [0, *accumulate(self.works)]
        for number, step in self.first_runs:
            arrived = self.arrived[number]
            last = bisect_right(self.arrived, arrived + self.window)
            bound = self.work_before[number] + totals[last] - totals[number]
            assert step - arrived <= bound


def test_ten_thousand_requests():
    stress = Stress(1, policy="priority", preemption="swap")
    stress.run(10_000, rate=0.8)
    stress.check_end()
    counters = stress.engine.scheduler.counters
    saved = stress.engine.pool.cache.counters
    assert min(counters.num_swapped_out, counters.num_recomputed, saved.num_tokens_saved) > 100


@pytest.mark.parametrize("config", [CONFIG, NTK], ids=["plain", "ntk"])
@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_every_way_to_run(config, run_ahead, policy, mode, monkeypatch):
    # Wait for prefixes that are being computed, also for short ones.
    monkeypatch.setattr(scheduler_module, "WORTH_WAITING_TOKENS", 8)
    stress = Stress(2, config, run_ahead, policy=policy, preemption=mode)
    stress.window = None  # who waits for a prefix may be passed
    stress.run(500, rate=0.5)
    stress.window = 10**9
    stress.check_end()
    counters = stress.engine.scheduler.counters
    assert counters.num_recomputed + counters.num_swapped_out > 20
    assert mode != "recompute" or not counters.num_swapped_out


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("num_hashes", [1, 7])
def test_blocks_of_one_hash_are_never_mixed_up(num_hashes, run_ahead):
    stress = Stress(5, NTK, run_ahead, policy="priority", preemption="recompute")
    cache = stress.engine.pool.cache
    cache._hash_block = lambda before, tokens: sum(tokens) % num_hashes
    stress.run(500, rate=0.5)
    stress.check_end()
    assert 0 < len(cache) <= num_hashes
    assert cache.counters.num_hits


@pytest.mark.parametrize("max_preemptions", [0, 1])
@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
def test_few_preemptions_and_a_small_budget(max_preemptions, run_ahead):
    limits = RunnerLimits(17, 4, 64, 3, 6, num_host_blocks=5)
    stress = Stress(
        3, CONFIG, run_ahead, limits, policy="priority", max_preemptions=max_preemptions,
        preemption="swap",
    )  # fmt: skip
    stress.run(300, rate=0.1)
    stress.check_end()
    if not max_preemptions:
        counters = stress.engine.scheduler.counters
        assert not counters.num_recomputed + counters.num_swapped_out


@pytest.mark.parametrize("config", [CONFIG, NTK], ids=["plain", "ntk"])
@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_drafts_everywhere(config, run_ahead, policy, mode):
    limits = replace(LIMITS, max_drafts=6, max_draft_rows=15)
    stress = Stress(6, config, run_ahead, limits, right=0.7, policy=policy, preemption=mode)
    stress.window = None
    stress.run(400, rate=0.5)
    stress.window = 10**9
    stress.check_end()
    counters, drafts = stress.engine.scheduler.counters, stress.engine.speculator.counters
    assert counters.num_recomputed + counters.num_swapped_out > 20
    assert 200 < drafts.num_accepted < drafts.num_proposed


def test_drafts_of_blocks_of_one_token():
    limits = RunnerLimits(60, 1, 64, 24, 7, num_host_blocks=30, max_drafts=5, max_draft_rows=20)
    stress = Stress(8, CONFIG, True, limits, right=0.5, policy="priority", preemption="swap")
    stress.window = None
    stress.run(200, rate=0.4)
    assert stress.engine.speculator.counters.num_accepted > 100


def test_settings_change_while_it_runs():
    stress = Stress(4, policy="fcfs")
    stress.window = None
    changes = [
        SchedulerSettings(2, 5, policy="priority"),
        SchedulerSettings(7, 24, policy="fcfs", preemption="swap"),
        SchedulerSettings(1, 1, weights=WEIGHTS, policy="priority"),
        SchedulerSettings(7, 24, preemption="recompute"),
    ]
    for _ in range(50):
        stress.add()
    for settings in changes:
        stress.engine.configure(settings)
        for _ in range(20):
            stress.engine.step()
            stress.engine.scheduler.check_integrity()
    with pytest.raises(ConfigError, match="max_num_seqs is 8; this engine was started for 1 to 7"):
        stress.engine.configure(SchedulerSettings(8, 24))
    while stress.engine.has_unfinished:
        stress.engine.step()
    assert stress.engine.pool.num_free == stress.engine.pool.num_blocks - 1
