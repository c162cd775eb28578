"""NVTX ranges: a tree of what an engine does, balanced whatever happens."""

from __future__ import annotations

import sys
from itertools import groupby

import pytest

from nanocupy import cli
from nanocupy.bench.shapes import SHAPES
from nanocupy.cuda import nvtx
from nanocupy.engine.backend import make_engine as make_backend_engine
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.watch import StepWatch
from nanocupy.errors import DeviceError
from nanocupy.model.load import load_numpy_weights
from nanocupy.profiling.profile import profile
from nanocupy.profiling.ranges import RangeObserver, RangeWatch
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.profiling.test_step_parts import PARAMS, make_engine


class Tree:
    """Ranges as nested lists: [name, children]."""

    def __init__(self) -> None:
        self.root: list = ["", []]
        self.open = [self.root]
        self.others: dict[int, str] = {}
        self.ended: list[str] = []

    def push(self, name: str) -> None:
        self.open[-1][1].append([name, []])
        self.open.append(self.open[-1][1][-1])

    def pop(self) -> None:
        assert len(self.open) > 1, "more ranges end than begin"
        self.open.pop()

    def start(self, name: str) -> int:
        number = len(self.others) + len(self.ended)
        self.others[number] = name
        return number

    def end(self, number: int) -> None:
        self.ended.append(self.others.pop(number))

    def names(self) -> list[str]:
        assert self.open == [self.root], "a range is left open"
        return [name for name, _ in self.root[1]]


def make_runner() -> NumpyRunner:
    config = tiny_config(max_context=64)
    limits = RunnerLimits(40, 4, 64, 16, 4)
    return NumpyRunner(config, load_numpy_weights(TinyCheckpoint(config)), limits)


def test_ranges_of_requests_and_steps():
    engine = make_engine(run_ahead=False)
    engine.add_request("old", [1], PARAMS)
    engine.watch = RangeWatch(tree := Tree())
    engine.add_request("a", [1, 2, 3], PARAMS)
    engine.add_request("b", [1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True))
    for _ in range(4):
        engine.step()
    engine.abort("b")
    assert tree.names() == [f"step {n}" for n in range(4)]
    assert tree.ended == ["request a", "request b"]
    assert tree.others == {}
    for _, parts in tree.root[1]:
        assert [name for name, _ in parts] == ["schedule", "launch", "wait", "process"]
    engine.step()  # nothing to do: it asks the scheduler, and that is all
    assert tree.root[1][-1] == ["step 4", [["schedule", []]]]


def test_ranges_end_where_a_step_fails():
    engine = make_engine(run_ahead=False)
    engine.watch = RangeWatch(tree := Tree())
    engine.add_request("a", [1, 2, 3], PARAMS)

    def fail(schedule):
        raise RuntimeError

    engine.runner.launch = fail
    with pytest.raises(RuntimeError):
        engine.step()
    assert tree.root[1] == [["step 0", [["schedule", []], ["launch", []]]]]
    assert tree.names() == ["step 0"]


def test_ranges_of_layers_and_ops():
    runner = make_runner()
    runner.observer = RangeObserver(tree := Tree())
    engine = LLMEngine(runner.config, runner)
    engine.add_request("a", [1, 2, 3], PARAMS)
    engine.step()
    tree.names()
    expected = []
    for layer, calls in groupby(runner.forward, lambda call: call.layer):
        ops = [[call.op, []] for call in calls]
        expected += ops if layer is None else [[f"layer {layer}", ops]]
    assert tree.root[1] == expected


def test_ranges_are_left_after_an_op_that_fails():
    runner = make_runner()
    runner.observer = RangeObserver(tree := Tree())
    good = runner.ops.norm_swiglu

    def fail(**arguments):
        raise RuntimeError

    engine = LLMEngine(runner.config, runner)
    runner.ops.norm_swiglu = fail
    engine.add_request("a", [1, 2, 3], PARAMS)
    with pytest.raises(RuntimeError):
        engine.step()
    assert tree.open[-1][0] == "layer 0"  # to be left by the next step
    runner.ops.norm_swiglu = good
    other = LLMEngine(runner.config, runner)
    runner._bound.clear()
    other.add_request("b", [1, 2, 3], PARAMS)
    other.step()
    tree.names()


def test_a_profile_with_ranges_has_the_same_spans():
    tree = Tree()
    arguments = {"prompt_tokens": 20, "output_tokens": 4, "batch": 2, "itemsize": 4}
    plain = profile(make_runner(), **arguments)
    ranged = profile(make_runner(), **arguments, nvtx=tree)
    for part in ("prefill", "decode"):
        names = [[(s.name, s.layer) for s in getattr(p, part)] for p in (plain, ranged)]
        assert names[0] == names[1]
    steps = tree.names()
    assert steps[0] == "step 0"
    launches = [dict(map(tuple, parts))["launch"] for _, parts in tree.root[1] if len(parts) > 1]
    assert all([name for name, _ in ops][-1] == "lm_head" for ops in launches[-3:])
    assert sorted(tree.ended) == ["request profile-0", "request profile-1"]


def test_the_environment_and_the_flag_turn_ranges_on(monkeypatch, capsys):
    tree = Tree()
    monkeypatch.setattr(nvtx, "CupyNvtx", lambda: tree)
    config = tiny_config(max_context=64)
    monkeypatch.setitem(SHAPES, "smollm2-135m", config)
    settings = EngineConfig(device="cpu")
    for value, watch in (("", StepWatch), ("0", StepWatch), ("1", RangeWatch)):
        monkeypatch.setenv("NANOCUPY_NVTX", value)
        assert type(make_backend_engine(TinyCheckpoint(config), settings).watch) is watch
    argv = ["profile", "--device", "cpu", "--prompt", "9", "--output", "3"]
    assert cli.main(argv) == 0
    assert tree.names() == []
    assert cli.main([*argv, "--nvtx"]) == 0
    assert tree.names()[:3] == ["step 0", "step 1", "step 2"]


def test_ranges_without_cupy_are_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(DeviceError, match="NVTX ranges need CuPy, which cannot be imported"):
        nvtx.CupyNvtx()


def test_ranges_of_cupy():
    """CuPy's functions take what is given to them; a profiler would see it."""
    pytest.importorskip("cupy")
    ranges = nvtx.CupyNvtx()
    one, two = ranges.start("request a"), ranges.start("request b")
    ranges.push("step 0")
    ranges.pop()
    ranges.end(one)
    ranges.end(two)
