"""What an engine tells its watch, and the time it adds up to."""

from __future__ import annotations

import pytest

from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.watch import StepWatch
from nanocupy.model.load import load_numpy_weights
from nanocupy.profiling.step_parts import StepParts
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


class Notes(StepWatch):
    """Everything that was told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def request_added(self, request_id: str) -> None:
        self.told.append(f"+{request_id}")

    def request_finished(self, request_id: str) -> None:
        self.told.append(f"-{request_id}")

    def part(self, name: str) -> None:
        self.told.append(name)

    def end_step(self) -> None:
        self.told.append("end")

    def take(self) -> list[str]:
        told, self.told = self.told, []
        return told


def make_engine(*, run_ahead: bool) -> LLMEngine:
    config = tiny_config(max_context=64)
    weights = load_numpy_weights(TinyCheckpoint(config))
    runner = NumpyRunner(config, weights, RunnerLimits(40, 4, 64, 16, 4), deferred=run_ahead)
    return LLMEngine(config, runner, run_ahead=run_ahead)


def test_the_parts_of_steps_in_order():
    engine = make_engine(run_ahead=False)
    engine.watch = notes = Notes()
    engine.add_request("a", [1, 2, 3], PARAMS)
    assert notes.take() == ["+a"]
    engine.step()
    assert notes.take() == ["schedule", "launch", "wait", "process", "end"]
    engine.abort("a")
    assert notes.take() == ["-a"]


def test_an_engine_that_runs_ahead_waits_for_the_step_before():
    engine = make_engine(run_ahead=True)
    engine.watch = notes = Notes()
    engine.add_request("a", [1, 2, 3], PARAMS)
    steps = []
    notes.take()
    while engine.has_unfinished:
        engine.step()
        steps.append(notes.take())
    assert steps[0] == ["schedule", "launch", "end"]
    assert steps[1] == ["schedule", "launch", "wait", "process", "end"]
    assert steps[-1][-2:] == ["-a", "end"]


def test_a_step_that_fails_is_over_too():
    engine = make_engine(run_ahead=False)
    engine.watch = notes = Notes()
    engine.add_request("a", [1, 2, 3], PARAMS)

    def fail(schedule):
        raise RuntimeError

    engine.runner.launch = fail
    with pytest.raises(RuntimeError):
        engine.step()
    assert notes.take() == ["+a", "schedule", "launch", "end"]


def test_times_of_parts_are_summed():
    moments = iter([1.0, 2.0, 6.0, 7.0, 17.0, 100.0, 103.0])
    parts = StepParts(lambda: next(moments))
    parts.part("wait")
    parts.part("process")
    parts.part("schedule")
    parts.part("process")
    parts.end_step()
    assert parts.last == {"schedule": 1.0, "launch": 0.0, "wait": 1.0, "process": 14.0}
    parts.part("launch")
    parts.end_step()
    assert parts.last == {"schedule": 0.0, "launch": 3.0, "wait": 0.0, "process": 0.0}
