"""Policies: the order they give, its bound, and what priority brings under load."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.policy import (
    PolicyWeights,
    fcfs_key,
    make_policy,
    passing_window,
    priority_key,
)
from nanocupy.engine.request import Request, RequestPriority, RequestState
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.scheduler import SchedulerSettings
from nanocupy.engine.waiting import WaitingQueue
from nanocupy.errors import ConfigError, RequestError
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import tiny_config
from tests.engine.fake_runner import FakeRunner

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def request(number=0, step=0, prompt=10, time=0.0, **priority) -> Request:
    made = Request(str(number), [1] * prompt, PARAMS, 0, prompt + 4, RequestPriority(**priority))
    made.arrival_number, made.arrival_step, made.arrival_time = number, step, time
    return made


def before(first: Request, second: Request, now: float = 0.0, **weights) -> bool:
    w = PolicyWeights(**weights)
    return priority_key(first, now, w) < priority_key(second, now, w)


def test_each_term_orders():
    assert before(request(step=100, level=0), request(level=1))
    assert before(request(step=100, vip=True), request())
    assert before(request(level=0), request(level=1, vip=True, deadline=1.0))
    assert before(request(step=100, prompt=10), request(prompt=3000))
    assert before(request(), request(step=1))
    assert not before(request(step=1, level=0), request(level=1), level=0)
    assert before(request(number=5), request(number=7)) is False  # the queue breaks ties


def test_earliest_deadline_first():
    # At any moment, whoever came when: the one due first.
    late, early = request(time=0.0, deadline=10.0), request(time=7.0, deadline=2.0)
    for now in (7.0, 8.0, 8.9):
        assert before(early, late, now)
    assert before(late, request(time=0.0), 0.0)
    assert before(request(step=100, deadline=0.0), request(deadline=500.0), 1.0)


def test_age_beats_everything():
    worst = request(step=0, level=9, prompt=100_000)
    best = {"level": 0, "vip": True, "deadline": 0.0, "prompt": 1}
    window = passing_window(PolicyWeights())
    assert before(request(step=int(window) - 200, **best), worst)
    assert before(worst, request(step=int(window) + 1, **best))
    assert passing_window(PolicyWeights(ageing=0)) == float("inf")


_PRIORITIES = st.builds(
    RequestPriority, st.integers(0, 9), st.none() | st.floats(0, 1e6), st.booleans()
)


@given(_PRIORITIES, _PRIORITIES, st.floats(0, 1e6), st.floats(0.01, 10), st.integers(0, 10**6))
def test_nobody_is_passed_after_the_window(one, other, now, ageing, prompt):
    weights = PolicyWeights(ageing=ageing)
    first = replace(request(), priority=one, prompt_ids=[1] * (prompt % 5000 + 1))
    second = replace(request(1), priority=other, arrival_step=int(passing_window(weights)) + 1)
    assert priority_key(first, now, weights) < priority_key(second, now, weights) + 1e-6


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=60), st.booleans())
def test_the_queue_is_in_order(actions, by_priority):
    rng = random.Random(len(actions))
    policy = make_policy("priority" if by_priority else "fcfs")
    queue, model, now = WaitingQueue(policy), [], 0.0
    for number, (action, level) in enumerate(actions):
        if action or not model:
            new = request(number, number, level=level, deadline=rng.choice([None, 3.0]))
            queue.push(new)
            model.append(new)
        else:
            gone = rng.choice(model)
            queue.remove(gone)
            model.remove(gone)
            if action == 0 and level > 5:  # it ran a while, and is back
                gone.num_computed_tokens = 3
                queue.push(gone)
                model.append(gone)
        now += 0.5
        queue.refresh(now)
        assert len(queue) == len(model)
        assert set(queue) == set(model)
        if model:
            assert queue.peek() is min(model, key=lambda r: policy.key(r, now))


@pytest.mark.parametrize(
    "bad", [{"level": 10}, {"level": -1}, {"level": True}, {"level": 1.0}, {"deadline": -1},
            {"deadline": float("nan")}, {"deadline": "soon"}, {"vip": 1}]
)  # fmt: skip
def test_priorities_out_of_bounds(bad):
    with pytest.raises(RequestError, match=f"priority {next(iter(bad))}"):
        RequestPriority(**bad)


def test_unknown_policies_and_bad_weights():
    with pytest.raises(ConfigError, match="policy is 'random'"):
        make_policy("random")
    with pytest.raises(ConfigError, match="policy weight ageing"):
        PolicyWeights(ageing=-1)
    assert fcfs_key(request(7), 0.0, PolicyWeights()) == 7.0


# ------------------------------------------------------------------------------ in an engine

CONFIG = tiny_config(vocab_size=40, max_context=512)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_engine(clock: Clock, limits: RunnerLimits, **settings) -> LLMEngine:
    settings = SchedulerSettings(limits.max_num_seqs, limits.max_step_tokens, **settings)
    return LLMEngine(CONFIG, FakeRunner(CONFIG, limits), settings, clock=clock)


def test_an_urgent_request_takes_the_place_of_another():
    limits = RunnerLimits(60, 4, 64, 64, 2, num_host_blocks=60)
    for policy, first in (("priority", "urgent"), ("fcfs", "slow")):
        engine = make_engine(Clock(), limits, policy=policy)
        for name in ("slow", "slower"):
            engine.add_request(name, [1] * 8, PARAMS.with_(max_tokens=30), RequestPriority(1))
        engine.step()
        engine.add_request("urgent", [3] * 8, PARAMS, RequestPriority(0))
        slower = engine._requests["slower"][0]
        engine.step()
        assert (slower.state is RequestState.PREEMPTED) == (policy == "priority")
        ended = []
        while engine.has_unfinished:
            ended += [o.request_id for o in engine.step() if o.finish_reason]
            engine.scheduler.check_integrity()
        assert ended[0] == first
        assert slower.num_preemptions == (policy == "priority")


def test_an_urgent_prompt_goes_before_those_that_decode():
    limits = RunnerLimits(60, 4, 64, 4, 4)
    # In its first step it gets what the others leave, one token; then all 4, or one in each step.
    for policy, num_steps in (("priority", 4), ("fcfs", 12)):
        engine = make_engine(Clock(), limits, policy=policy)
        for name in "abc":
            engine.add_request(name, [1], PARAMS.with_(max_tokens=40), RequestPriority(1))
        engine.step()
        engine.add_request("urgent", [3] * 12, PARAMS, RequestPriority(0))
        steps = 0
        while not engine._requests["urgent"][0].output_ids:
            engine.step()
            steps += 1
        assert steps == num_steps


def test_preemptions_of_one_request_are_capped():
    limits = RunnerLimits(60, 4, 64, 64, 1, num_host_blocks=60)
    engine = make_engine(Clock(), limits, policy="priority", max_preemptions=3)
    engine.add_request("slow", [1] * 8, PARAMS.with_(max_tokens=40), RequestPriority(9))
    slow = engine._requests["slow"][0]
    steps = 0
    while "slow" in engine._requests:
        if steps % 2 == 0:
            engine.add_request(f"urgent {steps}", [2], PARAMS.with_(max_tokens=1))
        engine.step()
        steps += 1
        assert steps < 200
    assert slow.num_preemptions == 3


def simulate(policy: str, arrivals, limits: RunnerLimits, **settings):
    """Serve arrivals (time, prompt, params, priority) on a machine whose steps take 4 ms and 0.02
    ms a token. Returns seconds to the first token of each, and the seconds until all was done."""
    clock = Clock()
    engine = make_engine(clock, limits, policy=policy, **settings)
    first: dict[str, float] = {}
    done, number = 0, 0
    while done < len(arrivals):
        while number < len(arrivals) and (
            arrivals[number][0] <= clock.now or not engine.has_unfinished
        ):
            clock.now = max(clock.now, arrivals[number][0])
            engine.add_request(str(number), *arrivals[number][1:])
            number += 1
        engine.runner.last_num_tokens = 0
        outputs = engine.step()
        clock.now += 4e-3 + 2e-5 * engine.runner.last_num_tokens
        for output in outputs:
            first.setdefault(output.request_id, clock.now)
            done += output.finish_reason is not None
    times = [first[str(n)] - arrival[0] for n, arrival in enumerate(arrivals)]
    return times, clock.now


def test_high_priority_under_overload():
    """Poisson arrivals at 1.2 times what the machine can do, one in ten urgent."""
    rng = random.Random(3)
    limits = RunnerLimits(200, 8, 512, 256, 12, num_host_blocks=400)
    requests = [
        ([rng.randrange(40) for _ in range(rng.randrange(20, 180))],
         PARAMS.with_(max_tokens=rng.randrange(4, 40)),
         RequestPriority(0 if rng.random() < 0.1 else 1))
        for _ in range(1200)
    ]  # fmt: skip
    _, seconds = simulate("fcfs", [(0.0, *r) for r in requests], limits)
    rate = 1.2 * len(requests) / seconds
    time, arrivals = 0.0, []
    for entry in requests:
        time += rng.expovariate(rate)
        arrivals.append((time, *entry))
    fcfs, fcfs_end = simulate("fcfs", arrivals, limits)
    priority, priority_end = simulate("priority", arrivals, limits)
    high = [n for n, r in enumerate(requests) if r[2].level == 0]

    def p99(times):
        return sorted(times[n] for n in high)[int(0.99 * len(high))]

    assert p99(fcfs) >= 5 * p99(priority)
    assert fcfs_end >= 0.95 * priority_end  # the same tokens, so this is the throughput
    assert len(priority) == len(requests)  # every low one finished


def test_a_shared_prefix_is_computed_once():
    config = tiny_config(vocab_size=40, max_context=4608)
    rng = random.Random(0)
    shared = [rng.randrange(40) for _ in range(4096)]
    prompts = [[*shared, *(rng.randrange(40) for _ in range(64))] for _ in range(6)]
    for budget in (512, 1500, 10_000):  # also where several prompts fit in one step
        limits = RunnerLimits(400, 16, 4608, budget, 8)
        runner = FakeRunner(config, limits)
        engine = LLMEngine(config, runner)
        for number, ids in enumerate(prompts):
            engine.add_request(str(number), ids, PARAMS)
        while engine.has_unfinished:
            engine.step()
            engine.scheduler.check_integrity()
        assert runner.num_prompt_tokens_run == 4096 + 6 * 64
        counters = engine.pool.cache.counters
        assert counters.num_tokens_saved == 5 * 4096
        assert counters.num_hits == 5
