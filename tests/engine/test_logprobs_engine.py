"""Log-probabilities through the engine: those of the model run alone on the whole text."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from nanocupy.engine.batch import build_batch
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import Request
from nanocupy.engine.results import StepOutput
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import ScheduledRequest
from nanocupy.engine.scheduler import SchedulerSettings
from nanocupy.errors import RequestError
from nanocupy.model.load import load_numpy_weights
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.engine.fake_runner import FakeRunner

CONFIG = tiny_config(max_context=96)
WEIGHTS = load_numpy_weights(TinyCheckpoint(CONFIG, seed=3))
RNG = np.random.default_rng(6)
PROMPTS = [RNG.integers(0, 48, count).tolist() for count in (23, 1, 2, 40, 9)]
PROMPTS.append([*PROMPTS[0][:16], 3, 3, 3])  # begins like another
ASKING = SamplingParams(
    temperature=1.2, max_tokens=8, ignore_eos=True, seed=5, logprobs=3, prompt_logprobs=2,
    frequency_penalty=0.7, logit_bias={7: 4.0},
)  # fmt: skip


def make_engine(*, num_blocks=80, chunk=64, run_ahead=False, prefix_cache=True, **settings):
    limits = RunnerLimits(num_blocks, 4, 96, chunk, 6, num_host_blocks=60)
    runner = NumpyRunner(CONFIG, WEIGHTS, limits, deferred=run_ahead)
    return LLMEngine(
        CONFIG, runner, SchedulerSettings(6, chunk, **settings), prefix_cache=prefix_cache,
        run_ahead=run_ahead,
    )  # fmt: skip


def run(engine: LLMEngine) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            outputs.setdefault(f"{output.request_id}.{output.sample_index}", []).append(output)
        engine.scheduler.check_integrity()
    return outputs


def logits_of(ids: list[int]) -> np.ndarray:
    """float64 [len(ids), V], all rows of one text run at once in float64."""
    limits = RunnerLimits(2 + len(ids) // 16, 16, 96, 96, 1)
    weights = load_numpy_weights(TinyCheckpoint(CONFIG, seed=3), np.float64)
    runner = NumpyRunner(CONFIG, weights, limits, np.float64)
    request = Request("", ids, ASKING, 0, 96)
    request.block_ids = list(range(1, limits.num_blocks))
    batch = build_batch([ScheduledRequest(request, len(ids), True)], block_size=16)
    width = np.zeros((1, runner.table_width), np.int32)
    width[:, : batch.block_tables.shape[1]] = batch.block_tables
    rows = np.arange(len(ids), dtype=np.int32)
    return runner.logits(replace(batch, block_tables=width, sample_rows=rows)).copy()


def check(found, token_id: int, row: np.ndarray, num_top: int) -> None:
    """One TokenLogprob beside the logits it is of."""
    total = math.log(math.fsum(math.exp(value) for value in row))
    assert found.token_id == token_id
    assert found.logprob == pytest.approx(row[token_id] - total, abs=1e-4)
    assert found.rank == 1 + sum(value > row[token_id] for value in row)
    order = sorted(range(len(row)), key=lambda i: -row[i])[:num_top]
    assert [i for i, _ in found.top] == order
    assert [v for _, v in found.top] == pytest.approx([row[i] - total for i in order], abs=1e-4)


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("settings", [
    {}, {"chunk": 7}, {"chunk": 1}, {"num_blocks": 14, "preemption": "swap"},
    {"num_blocks": 14, "preemption": "recompute"},
    {"num_blocks": 14, "preemption": "recompute", "prefix_cache": False},
], ids=str)  # fmt: skip
def test_all_are_those_of_the_model_alone(settings, run_ahead):
    engine = make_engine(run_ahead=run_ahead, **settings)
    engine.add_request("plain", PROMPTS[4], ASKING.with_(logprobs=None, prompt_logprobs=None))
    for number, ids in enumerate(PROMPTS):
        engine.add_request(str(number), ids, ASKING)
    requests = [engine._requests[str(number)][0] for number in range(len(PROMPTS))]
    outputs = run(engine)
    assert {(o.logprobs, o.prompt_logprobs) for o in outputs.pop("plain.0")} == {(None, None)}
    assert len(outputs) == len(PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        first, *others = got = outputs[f"{number}.0"]
        logits = logits_of([*prompt, *(o.token_id for o in got)])
        assert len(first.prompt_logprobs) == len(prompt) - 1
        for position, found in enumerate(first.prompt_logprobs):
            check(found, prompt[position + 1], logits[position], 2)
        for position, output in enumerate(got, len(prompt) - 1):
            check(output.logprobs, output.token_id, logits[position], 3)
        assert all(output.prompt_logprobs is None for output in others)
    # Nothing was told twice, though prompts were computed again.
    assert [len(r.prompt_logprobs) for r in requests] == [len(ids) - 1 for ids in PROMPTS]
    if "num_blocks" in settings:
        assert any(request.num_preemptions for request in requests)


def test_asking_changes_no_token():
    def tokens(**changes):
        engine = make_engine(run_ahead=True)
        for number, ids in enumerate(PROMPTS):
            engine.add_request(str(number), ids, ASKING.with_(**changes))
        return {name: [o.token_id for o in found] for name, found in run(engine).items()}

    plain = tokens(logprobs=None, prompt_logprobs=None)
    assert tokens() == tokens(logprobs=0, prompt_logprobs=None) == plain


def test_no_id_is_pending_where_they_are_asked_for(monkeypatch):
    engine = make_engine(run_ahead=True)
    pending = []
    launch = engine.runner.launch

    def spy(schedule):
        pending.append(
            (schedule.wants_logprobs, sum(r.num_pending_tokens for r in schedule.members))
        )
        return launch(schedule)

    monkeypatch.setattr(engine.runner, "launch", spy)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine.add_request("asking", PROMPTS[0], params.with_(max_tokens=4, logprobs=1))
    engine.add_request("plain", PROMPTS[1], params)
    run(engine)
    assert pending[:4] == [(True, 0)] * 4
    assert pending[4:] == [(False, 0)] + [(False, 1)] * 3  # and then it runs ahead


def test_a_prompt_in_the_cache_is_computed_again_for_them():
    engine = make_engine()
    for name in ("first", "second"):
        engine.add_request(name, PROMPTS[0], ASKING.with_(logprobs=None))
        (found,) = run(engine).values()
        assert len(found[0].prompt_logprobs) == 22
        assert engine.pool.cache.counters.num_hits == 0
    engine.add_request("third", PROMPTS[0], ASKING.with_(prompt_logprobs=None))
    run(engine)
    assert engine.pool.cache.counters.num_tokens_saved == 20


def test_samples_share_the_prompts():
    engine = make_engine()
    engine.add_request("a", PROMPTS[0], ASKING.with_(n=3))
    outputs = run(engine)
    given = [outputs[f"a.{index}"][0].prompt_logprobs for index in range(3)]
    assert given[1:] == [None, None]
    assert len(given[0]) == 22
    assert all(o.logprobs is not None for found in outputs.values() for o in found)
    assert engine.pool.cache.counters.num_tokens_saved == 2 * 20


def test_counts_of_nothing_and_of_more_than_there_are():
    engine = make_engine()
    engine.add_request("none", PROMPTS[0], ASKING.with_(logprobs=0, prompt_logprobs=0))
    engine.add_request("all", PROMPTS[4], ASKING.with_(logprobs=100, prompt_logprobs=100))
    outputs = run(engine)
    first = outputs["none.0"][0]
    assert first.logprobs.top == first.prompt_logprobs[0].top == ()
    everything = outputs["all.0"][0]
    for found in (everything.logprobs, everything.prompt_logprobs[3]):
        assert sorted(i for i, _ in found.top) == list(range(48))
        assert sum(math.exp(v) for _, v in found.top) == pytest.approx(1, abs=1e-5)


def test_a_runner_without_them_refuses():
    engine = LLMEngine(CONFIG, FakeRunner(CONFIG, RunnerLimits(40, 4, 96, 16, 2)))
    for params in (ASKING.with_(logprobs=None), ASKING.with_(prompt_logprobs=None)):
        with pytest.raises(RequestError, match="logprobs and prompt_logprobs are not made on fake"):
            engine.add_request("a", [1], params)
    assert not engine.has_unfinished


@pytest.mark.parametrize("bad", [{"logprobs": -1}, {"logprobs": 101}, {"prompt_logprobs": True},
                                 {"n": 0}, {"n": 257}, {"n": 1.5}])  # fmt: skip
def test_out_of_bounds(bad):
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingParams(**bad)
