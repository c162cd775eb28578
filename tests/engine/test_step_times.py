"""What steps take is the engine's own time, however long a caller takes over the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.step_times import StepTimes
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.policy import AdaptiveDrafts
from nanocupy.speculation.proposer import Proposer
from nanocupy.speculation.speculator import Speculator
from tests.checkpoint.tiny import tiny_config
from tests.engine.fake_runner import FakeRunner

LIMITS = RunnerLimits(200, 4, 512, 64, 2, max_drafts=3, max_draft_rows=6)
HOST, FINDING, PLAIN, CHECKING = 0.1, 0.2, 1.0, 1.3  # seconds


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TimedRunner(FakeRunner):
    """A device that runs one step after the other beside the host, which launches in HOST."""

    def __init__(self, clock: Clock, *, deferred: bool) -> None:
        super().__init__(tiny_config(vocab_size=40, max_context=512), LIMITS, deferred=deferred)
        self._clock = clock
        self._free_at = 0.0

    def launch(self, schedule) -> Callable[[], list[int]]:
        self._clock.now += HOST
        read = super().launch(schedule)
        seconds = CHECKING if schedule.has_drafts else PLAIN
        ends_at = self._free_at = max(self._free_at, self._clock.now) + seconds
        if not self.can_run_ahead:
            self._clock.now = ends_at

        def reading() -> list[int]:
            self._clock.now = max(self._clock.now, ends_at)
            return read()

        return reading


class Guessing(Proposer):
    name = "guessing"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def is_promising(self, request) -> bool:
        return True

    def propose(self, wanted):
        self._clock.now += FINDING
        return {request: [0] * count for request, count in wanted.items()}

    def forget(self, request) -> None:
        """Nothing is kept."""


def measured(gaps: Callable[[int], float], *, run_ahead: bool) -> tuple[float, float]:
    """Seconds of steps of one sequence without drafts and with two, as the policy knows them, where
    it may lose what it likes and the caller takes gaps(n) seconds after the nth call."""
    clock = Clock()
    runner = TimedRunner(clock, deferred=run_ahead)
    policy = AdaptiveDrafts(2)
    policy.budget.MOST_DEBT = math.inf
    speculator = Speculator(Guessing(clock), policy, lambda drafts, chosen: 0)
    engine = LLMEngine(runner.config, runner, run_ahead=run_ahead, speculator=speculator)
    engine._times = StepTimes(clock)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    number = 0
    for name in "abc":
        engine.add_request(name, [1, 2, 3], params)
        while engine.has_unfinished:
            engine.step()
            clock.now += gaps(number)
            number += 1
            policy._closed = {}
        clock.now += 1000.0  # until another comes
    plain, checking = policy.costs.seconds(1, 0), policy.costs.estimate(1, 2)
    assert plain is not None
    assert checking is not None
    return plain, checking


@pytest.mark.parametrize("gap", [0.0, 0.03, 0.3, 0.6, 0.88, 1.0, 3.0, 50.0])
def test_a_caller_does_not_count_where_steps_are_waited_for(gap):
    plain, checking = measured(lambda number: gap, run_ahead=False)
    assert plain == pytest.approx(HOST + PLAIN)
    assert checking == pytest.approx(FINDING + HOST + CHECKING)


@pytest.mark.parametrize("gap", [0.0, 0.03, 0.3, 0.6, 0.88, 1.0, 3.0, 50.0])
def test_a_caller_does_not_count_where_steps_run_ahead(gap):
    """Beside a step that runs meanwhile it costs nothing; where it takes longer than the step, that
    is waited for, as the launch is then."""
    plain, checking = measured(lambda number: gap, run_ahead=True)
    assert PLAIN * 0.94 <= plain <= HOST + PLAIN + 1e-9
    assert checking == pytest.approx(FINDING + HOST + CHECKING, rel=0.05)


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
def test_a_caller_that_takes_long_now_and_then(run_ahead):
    plain, checking = measured(lambda n: 4.0 if n % 3 == 0 else 0.01, run_ahead=run_ahead)
    assert PLAIN * 0.94 <= plain <= HOST + PLAIN + 1e-9
    assert checking == pytest.approx(FINDING + HOST + CHECKING, rel=0.05)


def test_others_that_come_all_the_time_do_not_end_run_ahead():
    """No two steps of decodes in a row, so that none is measured: few steps are read at once, or a
    caller that takes nearly as long as a step would double the time of all."""
    clock = Clock()
    runner = TimedRunner(clock, deferred=True)
    policy = AdaptiveDrafts(2)
    speculator = Speculator(Guessing(clock), policy, lambda drafts, chosen: 0)
    engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
    engine._times = StepTimes(clock)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    engine.add_request("long", [1, 2, 3], params)
    num_at_once = 0
    for number in range(90):
        if number % 2 == 0:
            engine.add_request(f"short-{number}", [1, 2], SamplingParams(max_tokens=1))
        engine.step()
        num_at_once += speculator.reads_at_once
        clock.now += 0.9 * PLAIN
    assert engine.has_unfinished
    assert 0 < num_at_once <= 2
