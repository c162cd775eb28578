"""What a request gets is the same however it is run: greedy, float32, on NumPy."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from nanocupy.config import RopeScaling
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.engine import LLMEngine, scheduler_settings
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import RequestPriority
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.scheduler import SchedulerSettings
from nanocupy.errors import ConfigError
from nanocupy.model.load import load_numpy_weights
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

CONFIGS = {
    "plain": tiny_config(max_context=96),
    "dynamic-ntk": tiny_config(
        max_context=96, rope_scaling=RopeScaling("dynamic", factor=2.0, original_context=16)
    ),
}
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
PARAMS = {
    "greedy": GREEDY,
    "random": GREEDY.with_(temperature=1.1, seed=11, top_k=20),
    "penalties": GREEDY.with_(temperature=0.8, seed=4, repetition_penalty=1.4, min_tokens=3),
}
ROOMY, TIGHT = 80, 17


@cache
def weights_of(name: str):
    return load_numpy_weights(TinyCheckpoint(CONFIGS[name], seed=3))


def make_engine(
    name: str,
    *,
    num_blocks: int = ROOMY,
    chunk: int = 64,
    host_blocks: int = 64,
    prefix_cache: bool = True,
    run_ahead: bool = False,
    **settings,
) -> LLMEngine:
    limits = RunnerLimits(num_blocks, 4, 96, chunk, 6, host_blocks)
    runner = NumpyRunner(CONFIGS[name], weights_of(name), limits, deferred=run_ahead)
    return LLMEngine(
        CONFIGS[name], runner, SchedulerSettings(6, chunk, **settings),
        prefix_cache=prefix_cache, run_ahead=run_ahead,
    )  # fmt: skip


@cache
def requests(kind: str = "greedy"):
    """Prompts of which some begin alike, with the step in which each comes."""
    rng = np.random.default_rng(1)
    shared = rng.integers(0, 48, 21).tolist()
    found = []
    for number in range(8):
        ids = rng.integers(0, 48, rng.integers(1, 25)).tolist()
        ids = shared[: 21 - 3 * (number % 3)] + ids if number % 2 else ids
        params = PARAMS[kind].with_(max_tokens=int(rng.integers(4, 15)))
        found.append((2 * (number // 2), ids, params, RequestPriority(number % 3)))
    return found


def run(engine: LLMEngine, batch, stop_ids=()) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in batch]
    step = 0
    while engine.has_unfinished or step == 0 or any(at >= step for at, *_ in batch):
        for number, (at, ids, params, priority) in enumerate(batch):
            if at == step:
                params = params.with_(stop_token_ids=stop_ids)
                engine.add_request(str(number), ids, params, priority)
        for output in engine.step():
            outputs[int(output.request_id)].append(output.token_id)
        engine.scheduler.check_integrity()
        step += 1
        assert step < 3000, "no progress"
    assert engine.pool.num_free == engine.pool.num_blocks - 1
    assert engine.memory.host_pool.num_free == engine.memory.host_pool.num_blocks
    return outputs


@cache
def alone(name: str, kind: str = "greedy", stop_ids: tuple[int, ...] = ()):
    """Every request by itself: no cache, no preemption, nothing in flight."""
    outputs = []
    for _, ids, params, priority in requests(kind):
        engine = make_engine(name, prefix_cache=False, host_blocks=0)
        outputs += run(engine, [(0, ids, params, priority)], stop_ids)
    return outputs


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_batched_chunked_cached(name, chunk, prefix_cache, run_ahead):
    engine = make_engine(name, chunk=chunk, prefix_cache=prefix_cache, run_ahead=run_ahead)
    assert run(engine, requests()) == alone(name)
    if prefix_cache and name == "plain":
        assert engine.pool.cache.counters.num_tokens_saved >= 12


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_preempted(name, policy, mode, prefix_cache, run_ahead):
    engine = make_engine(
        name, num_blocks=TIGHT, prefix_cache=prefix_cache, run_ahead=run_ahead,
        policy=policy, preemption=mode,
    )  # fmt: skip
    assert run(engine, requests()) == alone(name)
    counters = engine.scheduler.counters
    assert (counters.num_swapped_out if mode == "swap" else counters.num_recomputed) >= 2
    assert not (counters.num_recomputed if mode == "swap" else counters.num_swapped_out)


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("num_blocks", [ROOMY, TIGHT])
@pytest.mark.parametrize("kind", ["random", "penalties"])
def test_sampled(kind, num_blocks, run_ahead):
    engine = make_engine("plain", num_blocks=num_blocks, run_ahead=run_ahead, preemption="swap")
    assert run(engine, requests(kind)) == alone("plain", kind)


@pytest.mark.parametrize("num_blocks", [ROOMY, TIGHT])
def test_a_stop_found_late_drops_the_token_after_it(num_blocks):
    counts = np.bincount([t for tokens in alone("plain") for t in tokens], minlength=48)
    stop_ids = tuple(int(t) for t in np.argsort(counts)[-3:])
    wanted = alone("plain", "greedy", stop_ids)
    assert sum(tokens[-1] in stop_ids for tokens in wanted) >= 3
    engine = make_engine("plain", num_blocks=num_blocks, run_ahead=True)
    assert run(engine, requests(), stop_ids) == wanted


def test_abort_while_a_step_is_in_flight():
    engine = make_engine("plain", run_ahead=True)
    for number, (_, ids, params, _) in enumerate(requests()[:3]):
        engine.add_request(str(number), ids, params)
    tokens: list[int] = []
    for step in range(40):
        tokens += [o.token_id for o in engine.step() if o.request_id == "0"]
        if step == 3:
            held = engine.pool.num_free
            engine.abort("1")
            assert engine.pool.num_free == held  # the step in flight still writes there
            engine.add_request("1", [1, 2, 3], GREEDY)  # the same name, another request
        if step == 4:
            assert engine.pool.num_free > held
        engine.scheduler.check_integrity()
    assert tokens == alone("plain")[0]
    assert not engine.has_unfinished


def test_a_step_that_fails_loses_nothing_but_time(monkeypatch):
    engine = make_engine("plain", num_blocks=TIGHT, preemption="swap")
    original, calls = engine.runner.run, []

    def failing(schedule):
        calls.append(schedule)
        if (schedule.swap_out or schedule.swap_in) and len(calls) % 2:
            raise OSError("no luck")
        return original(schedule)

    monkeypatch.setattr(engine.runner, "run", failing)
    outputs: list[list[int]] = [[] for _ in requests()]
    for number, (_, ids, params, priority) in enumerate(requests()):
        engine.add_request(str(number), ids, params, priority)
    failures = 0
    while engine.has_unfinished:
        try:
            for output in engine.step():
                outputs[int(output.request_id)].append(output.token_id)
        except OSError:
            failures += 1
        engine.scheduler.check_integrity()
    assert failures
    assert outputs == alone("plain")


def test_running_ahead_needs_a_runner_that_can():
    runner = make_engine("plain").runner
    with pytest.raises(ConfigError, match="run_ahead"):
        LLMEngine(runner.config, runner, run_ahead=True)


def test_settings_from_the_configuration():
    limits = RunnerLimits(20, 4, 96, 100, 8)
    config = EngineConfig(
        max_num_seqs=8, batch_size=3, chunk_size=50, policy="priority", level_weight=2.0,
        preemption="swap", max_preemptions=2,
    )  # fmt: skip
    settings = scheduler_settings(config, limits)
    assert (settings.max_num_seqs, settings.max_step_tokens) == (3, 50)
    assert (settings.policy, settings.weights.level) == ("priority", 2.0)
    assert (settings.preemption, settings.max_preemptions) == ("swap", 2)
