"""The engine on NumPy: what a request gets never depends on how it was run."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.config import RopeScaling
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.results import StepOutput
from nanocupy.engine.runner import RunnerLimits
from nanocupy.errors import RequestError
from nanocupy.model.load import load_numpy_weights
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
CONFIG = tiny_config(max_context=96)
# The base of a dynamic NTK prompt token must survive chunks and preemption.
NTK_CONFIG = tiny_config(
    max_context=96, rope_scaling=RopeScaling("dynamic", factor=2.0, original_context=16)
)


def make_engine(config=CONFIG, *, num_blocks=64, block_size=4, chunk=64, max_num_seqs=8):
    limits = RunnerLimits(num_blocks, block_size, config.max_context, chunk, max_num_seqs)
    weights = load_numpy_weights(TinyCheckpoint(config, seed=3))
    return LLMEngine(config, NumpyRunner(config, weights, limits))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 48, rng.integers(1, 40)).tolist() for _ in range(count)]


def run(engine: LLMEngine, requests: dict[str, tuple[list[int], SamplingParams]]):
    """All tokens of each request; integrity checked after every step."""
    for request_id, (ids, params) in requests.items():
        engine.add_request(request_id, ids, params)
    outputs: dict[str, list[int]] = {request_id: [] for request_id in requests}
    steps = 0
    while engine.has_unfinished:
        for output in engine.step():
            outputs[output.request_id].append(output.token_id)
        engine.pool.check_integrity()
        steps += 1
        assert steps < 5000, "the engine makes no progress"
    assert engine.pool.num_free == engine.pool.num_blocks - 1
    return outputs


@pytest.mark.parametrize("config", [CONFIG, NTK_CONFIG], ids=["plain", "dynamic-ntk"])
@pytest.mark.parametrize("params", [GREEDY, GREEDY.with_(temperature=0.9, seed=7, top_k=20)])
def test_alone_is_batched_is_chunked_is_preempted(config, params):
    batch = {str(i): (ids, params) for i, ids in enumerate(prompts(6))}
    alone = {}
    for request_id, request in batch.items():
        alone |= run(make_engine(config), {request_id: request})
    assert len({tuple(ids) for ids in alone.values()}) > 1  # the prompts do matter
    assert run(make_engine(config), batch) == alone
    for chunk in (1, 7, 16, 512):
        assert run(make_engine(config, chunk=chunk), batch) == alone
    # 14 blocks of 4 tokens hold one long request only: the others are preempted over and over.
    assert run(make_engine(config, num_blocks=15), batch) == alone


def test_tiny_pool_preempts(monkeypatch):
    engine = make_engine(num_blocks=15)
    preempted = []
    original = type(engine.scheduler)._preempt

    def spy(self, request, scheduled):
        preempted.append(request.request_id)
        original(self, request, scheduled)

    monkeypatch.setattr(type(engine.scheduler), "_preempt", spy)
    run(engine, {str(i): (ids, GREEDY) for i, ids in enumerate(prompts(6))})
    assert preempted


def test_random_arrivals_and_aborts_lose_no_block():
    rng = np.random.default_rng(5)
    engine = make_engine(num_blocks=25, chunk=16, max_num_seqs=5)
    alive: set[str] = set()
    for number in range(400):
        if rng.random() < 0.4:
            ids = rng.integers(0, 48, rng.integers(1, 50)).tolist()
            engine.add_request(str(number), ids, GREEDY.with_(max_tokens=int(rng.integers(1, 20))))
            alive.add(str(number))
        if alive and rng.random() < 0.1:
            victim = sorted(alive)[int(rng.integers(len(alive)))]
            engine.abort(victim)
            alive.remove(victim)
        for output in engine.step():
            assert output.request_id in alive
            if output.finish_reason:
                alive.remove(output.request_id)
        engine.pool.check_integrity()
    while engine.has_unfinished:
        engine.step()
    assert engine.pool.num_free == engine.pool.num_blocks - 1


def test_a_chunk_that_is_not_the_last_runs_no_lm_head(monkeypatch):
    engine = make_engine(chunk=8)
    rows = []
    original = engine.runner.ops.lm_head

    def spy(x, rows_, *args, **kwargs):
        rows.append(len(rows_))
        original(x, rows_, *args, **kwargs)

    monkeypatch.setattr(
        engine.runner.ops, "lm_head", lambda **kw: spy(kw.pop("x"), kw.pop("rows"), **kw)
    )
    run(engine, {"a": (list(range(20)), GREEDY.with_(max_tokens=3))})
    assert rows == [1, 1, 1]  # 8 + 8 tokens without, then one row a step


def test_the_same_seed_gives_the_same_tokens_and_others_differ():
    ids = prompts(1)[0]
    hot = GREEDY.with_(temperature=1.5)
    first = run(make_engine(), {"a": (ids, hot.with_(seed=1))})
    assert run(make_engine(), {"a": (ids, hot.with_(seed=1))}) == first
    assert run(make_engine(), {"a": (ids, hot.with_(seed=2))}) != first
    assert run(make_engine(), {"a": (ids, hot)}) != run(make_engine(), {"a": (ids, hot)})


def test_ends():
    ids = [5, 6, 7]
    tokens = run(make_engine(), {"a": (ids, GREEDY)})["a"]
    stop_id = tokens[4]
    first = tokens.index(stop_id)
    stopped = run(make_engine(), {"a": (ids, GREEDY.with_(stop_token_ids=(stop_id,)))})["a"]
    assert stopped == tokens[: first + 1]
    late = GREEDY.with_(stop_token_ids=(stop_id,), min_tokens=first + 3)
    assert stop_id not in run(make_engine(), {"a": (ids, late)})["a"][: first + 2]
    config = CONFIG.with_(eos_ids=(stop_id,))
    engine = make_engine(config)
    engine.add_request("a", ids, GREEDY.with_(ignore_eos=False))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [o.token_id for o in outputs] == tokens[: first + 1]
    assert outputs[-1].finish_reason == "stop"
    assert all(o.finish_reason is None for o in outputs[:-1])


def test_the_context_ends_an_answer():
    tokens = run(make_engine(), {"a": ([1] * 90, GREEDY.with_(max_tokens=None))})["a"]
    assert len(tokens) == 6


def test_penalties_and_bias():
    ids = [5, 6, 7]
    plain = run(make_engine(), {"a": (ids, GREEDY)})["a"]
    biased = run(make_engine(), {"a": (ids, GREEDY.with_(logit_bias={9: 100.0}))})["a"]
    assert biased == [9] * 12
    banned = run(make_engine(), {"a": (ids, GREEDY.with_(logit_bias={plain[0]: -100.0}))})["a"]
    assert plain[0] not in banned
    never_twice = GREEDY.with_(logit_bias={9: 1.0, 3: 1.0}, frequency_penalty=2.0)
    mixed = run(make_engine(), {"a": (ids, never_twice)})["a"]
    assert max(mixed.count(t) for t in mixed) < 6


@pytest.mark.parametrize(
    ("ids", "params", "words"),
    [
        ([], {}, "empty"),
        ([48], {}, "token id 48"),
        ([-1], {}, "token id -1"),
        ([1] * 96, {}, "96 tokens"),
        ([1], {"logit_bias": {99: 1.0}}, "token id 99"),
        ([1], {"stop_token_ids": (48,)}, "token id 48"),
    ],
)
def test_bad_requests_leave_no_trace(ids, params, words):
    engine = make_engine()
    with pytest.raises(RequestError, match=words):
        engine.add_request("a", ids, GREEDY.with_(**params))
    assert not engine.has_unfinished
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(RequestError, match="in use"):
        engine.add_request("a", [1], GREEDY)


def test_aborting_nobody_is_nothing():
    engine = make_engine()
    engine.abort("nobody")
    assert engine.step() == []


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"min_tokens": 5, "max_tokens": 4},
        {"seed": -2},
        {"seed": 1 << 63},
        {"stop": ("",)},
        {"stop": 3},
        {"stop_token_ids": (-1,)},
        {"logit_bias": {1: 101.0}},
        {"logit_bias": [1]},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"frequency_penalty": float("inf")},
    ],
)
def test_sampling_params_out_of_bounds(bad):
    name = next(iter(bad))
    with pytest.raises(RequestError, match=name):
        SamplingParams(**bad)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_give_no_number_fail_the_request(value: float, temperature: float) -> None:
    engine = make_engine()
    weights = dict(engine.runner.weights)
    weights["final_norm.weight"] = np.full_like(weights["final_norm.weight"], value)
    engine = LLMEngine(CONFIG, NumpyRunner(CONFIG, weights, engine.runner.limits))
    engine.add_request("a", [1, 2, 3], GREEDY.with_(temperature=temperature, top_p=0.5))
    with np.errstate(all="ignore"):
        assert engine.step() == [StepOutput("a", -1, "error")]
    assert not engine.has_unfinished
    assert engine.pool.num_free == engine.pool.num_blocks - 1
