"""Costs by hand, spans from a clock that can be told, the command on a tiny model."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from nanocupy import cli
from nanocupy.bench.shapes import SHAPES
from nanocupy.bench.speculative import FreeProposer
from nanocupy.engine.binding import step_dims
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.runner import RunnerLimits
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.model.forward import decoder_forward
from nanocupy.model.load import load_numpy_weights
from nanocupy.model.rope import rope_parameters
from nanocupy.model.weights import weight_layout
from nanocupy.profiling.cost import Cost, call_cost, step_shape
from nanocupy.profiling.profile import profile
from nanocupy.profiling.recorder import StepRecorder
from nanocupy.profiling.timeline import Span, totals, trace_events
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.policy import DraftPolicy
from nanocupy.speculation.speculator import Speculator
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

CONFIG = tiny_config(max_context=96)  # D 32, F 64, H 4, G 2, d 8, V 48


def costs(num_tokens, query_starts, kv_lens, num_rows):
    """Op -> cost of its first call."""
    max_queries = max(b - a for a, b in pairwise(query_starts))
    dims = step_dims(num_tokens, len(kv_lens), num_rows, max_queries)
    step = step_shape(dims, query_starts, kv_lens)
    shapes = {weight.name: weight.shape for weight in weight_layout(CONFIG)}
    found: dict[str, Cost] = {}
    for call in decoder_forward(CONFIG, rope_parameters(CONFIG)):
        found.setdefault(call.op, call_cost(call, step, shapes, 2))
    return found


def test_costs_by_hand():
    # A chunk of 3 tokens after 5 others, and one token that sees 10 positions.
    found = costs(4, [0, 3, 4], [8, 10], 2)
    qkv = (4 + 2 * 2) * 8
    assert found["norm_linear"] == Cost(2 * (qkv * 32 + 4 * 32 + 4 * qkv), 2 * 4 * qkv * 32)
    pairs = (6 + 7 + 8) + 10
    kv_bytes = 2 * (8 + 10) * 2 * 8 * 2
    # Keys and values of 18 positions are moved: those of 4 are written, the others read.
    assert found["attend"] == Cost(2 * 4 * (qkv + 32) + kv_bytes, 4 * pairs * 32 + 6 * 4 * qkv)
    assert found["norm_swiglu"] == Cost(2 * (128 * 32 + 4 * 32 + 4 * 64), 2 * 4 * 128 * 32)
    assert found["linear_add"] == Cost(2 * (32 * 32 + 4 * 32 + 2 * 4 * 32), 2 * 4 * 32 * 32)
    assert found["lm_head"] == Cost(2 * (48 * 32 + 2 * 32) + 4 * 2 * 48, 2 * 2 * 48 * 32)


def test_the_bytes_of_weights_that_are_stored_otherwise() -> None:
    step = step_shape(step_dims(4, 2, 2, 3), [0, 3, 4], [8, 10])
    shapes = {weight.name: weight.shape for weight in weight_layout(CONFIG)}
    call = next(c for c in decoder_forward(CONFIG, rope_parameters(CONFIG)) if c.op == "linear_add")
    plain = call_cost(call, step, shapes, 2)
    packed = call_cost(call, step, shapes, 2, {"layers.0.o.weight": 700})
    assert plain.num_bytes - packed.num_bytes == 2 * 32 * 32 - 700
    assert plain.num_flops == packed.num_flops


def test_a_quantised_cache_moves_codes_and_scales():
    step = step_shape(step_dims(1, 1, 1, 1), [0, 1], [10])
    shapes = {weight.name: weight.shape for weight in weight_layout(CONFIG)}
    rope, moved = rope_parameters(CONFIG), []
    for quantized in (False, True):
        calls = decoder_forward(CONFIG, rope, quantized_cache=quantized)
        (attend, *_) = [call for call in calls if call.op == "attend"]
        moved.append(call_cost(attend, step, shapes, 2).num_bytes)
    assert moved[0] - moved[1] == 2 * 10 * 2 * (2 * 8 - (8 + 2))


class TickingClock:
    """Every mark is one second after the one before."""

    now = 0.0

    def mark(self):
        self.now += 1
        return self.now

    def seconds(self, mark):
        return mark


def make_runner():
    weights = load_numpy_weights(TinyCheckpoint(CONFIG))
    return NumpyRunner(CONFIG, weights, RunnerLimits(60, 4, 96, 16, 4))


def test_every_call_of_a_step_is_a_span():
    runner = make_runner()
    shapes = {weight.name: weight.shape for weight in weight_layout(CONFIG)}
    runner.observer = recorder = StepRecorder(TickingClock(), shapes, 4)
    engine = LLMEngine(CONFIG, runner)
    engine.add_request("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=2))
    engine.step()
    step, *calls = recorder.spans
    assert (step.track, step.num_tokens, step.num_seqs) == ("steps", 3, 1)
    assert [c.name for c in calls] == [c.op for c in runner.forward]
    assert [c.layer for c in calls] == [c.layer for c in runner.forward]
    assert all(c.duration_s == 1 for c in calls)
    assert step.duration_s == 2 * len(calls) + 1


def test_observing_changes_no_token():
    prompts = {"prompt_tokens": 20, "output_tokens": 6, "batch": 3, "itemsize": 4}
    runner = make_runner()
    result = profile(runner, **prompts)
    assert runner.observer is None
    steps = [s for s in result.decode if s.track == "steps"]
    assert len(steps) >= 4
    assert sum(s.num_tokens for s in result.prefill if s.track == "steps") >= 60
    assert result.memory[0][1]["weights"] == 4 * CONFIG.num_parameters


def test_guesses_are_told_and_their_steps_are_decodes():
    weights = load_numpy_weights(TinyCheckpoint(CONFIG))
    runner = NumpyRunner(CONFIG, weights, RunnerLimits(60, 4, 96, 24, 4, 0, 5, 20))
    speculator = Speculator(FreeProposer(CONFIG.vocab_size), DraftPolicy(5))
    result = profile(
        runner, prompt_tokens=20, output_tokens=9, batch=2, itemsize=4, speculator=speculator
    )
    counters = result.speculation
    assert counters is speculator.counters
    assert counters.num_proposed > 20
    steps = [s for s in result.decode if s.track == "steps"]
    assert counters.num_steps > 3
    # The first of them may have the end of a prompt in it.
    assert sum(s.num_tokens > s.num_seqs for s in steps) >= counters.num_steps - 1
    assert sum(s.num_tokens for s in result.prefill if s.track == "steps") >= 40
    plain = profile(runner, prompt_tokens=20, output_tokens=9, batch=2, itemsize=4)
    assert plain.speculation is None


def test_totals_and_trace():
    spans = [
        Span("a", 0, 1.0, 2.0, Cost(10, 20)),
        Span("b", None, 3.0, 1.0, Cost(1, 1), track="steps"),
        Span("a", 1, 4.0, 1.0, Cost(5, 5)),
    ]
    first, second = totals(spans, lambda s: s.name)
    assert (first.key, first.count, first.seconds, first.share) == ("a", 2, 3.0, 0.75)
    assert first.cost == Cost(15, 25)
    assert first.gigabytes_per_second == pytest.approx(5e-9)
    assert second.key == "b"
    events = trace_events(spans, [(0.5, {"weights": 7})])
    assert events[0] == {
        "name": "a", "ph": "X", "ts": 1e6, "dur": 2e6, "pid": 0, "tid": 0,
        "args": {"bytes": 10, "flops": 20, "layer": 0},
    }  # fmt: skip
    assert [e["ph"] for e in events] == ["X", "X", "X", "M", "M", "C"]
    assert events[-1]["args"] == {"weights": 7}


def test_a_draft_model_alone_guesses(monkeypatch, capsys, tmp_path):
    """As in `generate`: to name one is enough, and off is off."""
    monkeypatch.setitem(SHAPES, "smollm2-135m", CONFIG)
    write_nanoinfer2(TinyCheckpoint(CONFIG), tmp_path / "draft.nano")
    argv = ["profile", "--device", "cpu", "--prompt", "9", "--output", "12", "--json"]
    for more, guesses in (
        ([], True),
        (["--speculate", "auto"], True),
        (["--speculate", "draft"], True),
        (["--speculate", "off"], False),
    ):
        assert cli.main([*argv, "--draft-model", str(tmp_path / "draft.nano"), *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert ("speculation" in found) == guesses
        if guesses:
            assert found["speculation"]["proposed"] > 0
    argv += ["--draft-model", str(tmp_path / "draft.nano"), "--speculate", "ngram"]
    assert cli.main(argv) == 2
    assert "leave one out" in capsys.readouterr().err


def test_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(SHAPES, "smollm2-135m", CONFIG)
    trace = tmp_path / "trace.json"
    argv = ["profile", "--device", "cpu", "--prompt", "20", "--output", "4"]
    assert cli.main([*argv, "--trace", str(trace), "--by-layer"]) == 0
    out = capsys.readouterr().out
    assert "norm_swiglu" in out
    assert "layer 1" in out
    assert "kv cache" in out
    names = {e["name"] for e in json.loads(trace.read_text())["traceEvents"]}
    assert {"attend", "lm_head", "memory (bytes)"} <= names
    assert cli.main([*argv, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["decode"]["steps"] == 3
    assert sum(row["share"] for row in data["decode"]["by_op"]) == pytest.approx(1)
    more = ["--output", "40", "--speculate", "ngram"]
    assert cli.main([*argv, *more, "--json"]) == 0
    guesses = json.loads(capsys.readouterr().out)["speculation"]
    assert guesses["proposed"] >= guesses["accepted"]
    assert cli.main([*argv, *more]) == 0
    assert "guesses: proposed " in capsys.readouterr().out
    assert cli.main([*argv, "--speculate", "draft"]) == 2
    assert "draft_model names no model" in capsys.readouterr().err
    assert cli.main(["profile", "--device", "cpu", "--prompt", "200"]) == 2
    assert "the model's context holds 96" in capsys.readouterr().err
    assert cli.main([*argv, "--trace", str(tmp_path / "none" / "t.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
