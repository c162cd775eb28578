"""Several samples of a prompt: each is what it would be alone, and the prompt is computed once."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import RequestState
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.scheduler import SchedulerSettings
from nanocupy.model.load import load_numpy_weights
from nanocupy.ops.numpy_ops import NumpyOps
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.engine.fake_runner import FakeRunner

CONFIG = tiny_config(max_context=96)
WEIGHTS = load_numpy_weights(TinyCheckpoint(CONFIG, seed=3))
HOT = SamplingParams(temperature=1.3, max_tokens=10, ignore_eos=True, seed=5)
PROMPT = np.random.default_rng(2).integers(0, 48, 21).tolist()


def make_engine(*, num_blocks=80, chunk=64, prefix_cache=True, run_ahead=False, **settings):
    limits = RunnerLimits(num_blocks, 4, 96, chunk, 6, num_host_blocks=60)
    runner = NumpyRunner(CONFIG, WEIGHTS, limits, deferred=run_ahead)
    return LLMEngine(
        CONFIG, runner, SchedulerSettings(6, chunk, **settings), prefix_cache=prefix_cache,
        run_ahead=run_ahead,
    )  # fmt: skip


def run(engine: LLMEngine, outputs=()) -> dict[tuple[str, int], list[int]]:
    """All tokens of every sample; `outputs` came before."""
    found: dict[tuple[str, int], list[int]] = {}
    outputs = list(outputs)
    while engine.has_unfinished or outputs:
        for output in outputs or engine.step():
            key = output.request_id, output.sample_index
            found.setdefault(key, []).append(output.token_id)
        outputs = []
        engine.scheduler.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks - 1
    return found


def four_samples() -> list[list[int]]:
    engine = make_engine(prefix_cache=False)
    engine.add_request("a", PROMPT, HOT.with_(n=4))
    found = run(engine)
    return [found["a", index] for index in range(4)]


def test_the_first_is_what_one_alone_gives_and_the_others_differ():
    engine = make_engine()
    engine.add_request("a", PROMPT, HOT)
    samples = four_samples()
    assert samples[0] == run(engine)["a", 0]
    assert len({tuple(tokens) for tokens in samples}) == 4


def test_the_index_is_the_second_word_of_the_counter(monkeypatch):
    seen = []
    original = NumpyOps.sample

    def spy(self, logits, *args, seeds, counters, **kwargs):
        seen.append((counters.tolist(), seeds.tolist()))
        original(self, logits, *args, seeds=seeds, counters=counters, **kwargs)

    monkeypatch.setattr(NumpyOps, "sample", spy)
    engine = make_engine(prefix_cache=False)
    engine.add_request("a", [1, 2, 3], HOT.with_(n=3, max_tokens=2))
    run(engine)
    assert seen == [([[n, i] for i in range(3)], [5, 5, 5]) for n in (3, 4)]


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("settings", [
    {}, {"chunk": 7}, {"chunk": 1}, {"num_blocks": 17, "preemption": "swap"},
    {"num_blocks": 17, "preemption": "recompute"},
], ids=str)  # fmt: skip
def test_a_sample_is_the_same_however_it_is_run(settings, prefix_cache, run_ahead):
    engine = make_engine(prefix_cache=prefix_cache, run_ahead=run_ahead, **settings)
    engine.add_request("other", PROMPT[:13], HOT.with_(seed=9))
    engine.step()
    engine.add_request("a", PROMPT, HOT.with_(n=4))
    engine.add_request("late", PROMPT[::-1], HOT.with_(n=2, frequency_penalty=0.5))
    found = run(engine)
    assert [found["a", index] for index in range(4)] == four_samples()
    if "num_blocks" in settings:
        counters = engine.scheduler.counters
        assert counters.num_swapped_out + counters.num_recomputed


@pytest.mark.parametrize("chunk", [512, 16])
def test_the_prompt_is_computed_once(chunk):
    config = tiny_config(vocab_size=40, max_context=128)
    runner = FakeRunner(config, RunnerLimits(200, 4, 128, chunk, 8))
    engine = LLMEngine(config, runner)
    engine.add_request("a", list(range(40)), HOT.with_(n=5))
    leader, *others = engine._requests["a"]
    engine.step()
    assert leader.state is RequestState.RUNNING
    assert all(other.state is RequestState.WAITING for other in others)
    run(engine)
    # 9 blocks are shared; each other sample computes the last 4 tokens.
    assert runner.num_prompt_tokens_run == 40 + 4 * 4
    assert engine.pool.cache.counters.num_tokens_saved == 4 * 36


def test_without_a_leader_they_go_on():
    """The first sample is aborted while it computes the prompt for all."""
    config = tiny_config(vocab_size=40, max_context=128)
    engine = LLMEngine(config, FakeRunner(config, RunnerLimits(200, 4, 128, 8, 8)))
    engine.add_request("a", list(range(40)), HOT.with_(n=3))
    engine.step()
    engine.abort("a", 0)
    found = run(engine)
    assert set(found) == {("a", 1), ("a", 2)}
    assert found["a", 1] == found["a", 2]  # this runner draws nothing
    assert len(found["a", 1]) == 10


def test_one_sample_or_all_can_be_aborted():
    engine = make_engine()
    engine.add_request("a", PROMPT, HOT.with_(n=4))
    first = engine.step()
    engine.abort("a", 2)
    engine.abort("a", 2)
    found = run(engine, first)
    assert set(found) == {("a", 0), ("a", 1), ("a", 3)}
    assert [found["a", i] for i in (0, 1, 3)] == [four_samples()[i] for i in (0, 1, 3)]
    engine.add_request("a", PROMPT, HOT.with_(n=4))
    engine.step()
    engine.abort("a")
    assert not engine.has_unfinished
    assert engine.pool.num_free == engine.pool.num_blocks - 1


def test_a_request_ends_with_its_last_sample():
    engine = make_engine()
    told = []
    engine.watch.request_finished = told.append  # type: ignore[method-assign]
    engine.add_request("a", PROMPT, HOT.with_(n=3, stop_token_ids=tuple(range(12))))
    run(engine)
    assert told == ["a"]
    engine.add_request("a", PROMPT, HOT)  # the name is free again
