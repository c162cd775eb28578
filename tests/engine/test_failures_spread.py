"""A request that fails while others take its blocks from the prefix cache: they do not.

Attention takes keys and values in tiles, and 0 * NaN is NaN. So where one token of a step has no
numbers, those before it in its sequence may get none either, and blocks that the prefix cache has
remembered by then hold a prefix which others share.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from nanocupy.engine.device_plan import DeviceSettings
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import RequestPriority
from nanocupy.engine.results import FAILED_TOKEN
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import SchedulerSettings
from nanocupy.model.load import load_numpy_weights
from tests.checkpoint.tiny import TinyCheckpoint
from tests.engine import test_float16_overflow as overflow
from tests.engine.test_failures import BAD_TOKEN, CONFIG, GREEDY, damaged
from tests.shim import build
from tests.shim.device import MODERN, ShimDevice

DEEP = CONFIG.with_(num_layers=3)
PREFIX = np.random.default_rng(5).integers(0, 46, 24).tolist()
FAILED = [(FAILED_TOKEN, "error")]


class SpreadingRunner(NumpyRunner):
    """What a step has computed of a sequence with the bad token in it is all NaN, as by a kernel
    with one tile for them."""

    def logits(self, batch):
        logits = super().logits(batch)
        starts, size = batch.query_starts, self.limits.block_size
        for first, last in pairwise(starts):
            if BAD_TOKEN in batch.token_ids[first:last]:
                blocks, rows = np.divmod(batch.slots[first:last], size)
                for cache in self._caches.values():
                    cache[blocks, :, rows] = np.nan
        return logits


def make_engine(runner_class=SpreadingRunner, *, run_ahead=True, chunk=64, cache=True, blocks=120):
    weights = damaged(load_numpy_weights(TinyCheckpoint(DEEP, seed=3)))
    limits = RunnerLimits(blocks, 4, 96, chunk, 6, num_host_blocks=40)
    runner = runner_class(DEEP, weights, limits, deferred=run_ahead)
    return LLMEngine(DEEP, runner, run_ahead=run_ahead, prefix_cache=cache)


def run(engine, arrivals):
    """arrivals: (step, name, prompt, params), or (step, name, None, None) for an abort."""
    arrivals, outputs, number = list(arrivals), {}, 0
    with np.errstate(all="ignore"):
        while engine.has_unfinished or arrivals:
            for arrival in [a for a in arrivals if a[0] == number]:
                arrivals.remove(arrival)
                if arrival[2] is None:
                    engine.abort(arrival[1])
                else:
                    engine.add_request(*arrival[1:])
            for o in engine.step():
                outputs.setdefault(o.request_id, []).append((o.token_id, o.finish_reason))
            engine.scheduler.check_integrity()
            number += 1
    assert engine.pool.num_free == engine.pool.num_blocks - 1
    return outputs


def alone(prompt, params=GREEDY):
    engine = make_engine(NumpyRunner, run_ahead=False, cache=False)
    return run(engine, [(0, "it", prompt, params)])["it"]


@pytest.mark.parametrize(
    ("run_ahead", "chunk", "tail"), [(True, 64, 0), (False, 30, 30), (True, 30, 30)], ids=str
)
@pytest.mark.parametrize("runner_class", [NumpyRunner, SpreadingRunner])
def test_who_comes_later_with_the_same_prefix(runner_class, run_ahead, chunk, tail):
    engine = make_engine(runner_class, run_ahead=run_ahead, chunk=chunk)
    prompts = {f"later {n}": [*PREFIX, n, 10, 11] for n in range(3)}
    arrivals = [(0, "bad", [*PREFIX, BAD_TOKEN, 1, 2, 3, *[4] * tail], GREEDY)]
    arrivals += [(1, name, prompt, GREEDY) for name, prompt in prompts.items()]
    outputs = run(engine, arrivals)
    assert engine.memory.cache.counters.num_tokens_saved > 0, "nobody shared anything"
    assert outputs.pop("bad") == FAILED
    assert outputs == {name: alone(prompt) for name, prompt in prompts.items()}


def test_each_of_a_chain_takes_from_the_one_before():
    engine = make_engine()
    prompts = {f"{n}": [*PREFIX, n, 10, 11] for n in range(1, 12)}
    arrivals = [(0, "bad", [*PREFIX, BAD_TOKEN, 1, 2, 3], GREEDY)]
    arrivals += [(n, name, prompt, GREEDY) for n, (name, prompt) in enumerate(prompts.items(), 1)]
    outputs = run(engine, arrivals)
    assert outputs.pop("bad") == FAILED
    assert outputs == {name: alone(prompt) for name, prompt in prompts.items()}
    counters = engine.memory.cache.counters
    saved = counters.num_tokens_saved
    assert run(engine, [(0, "it", prompts["3"], GREEDY)])["it"] == outputs["3"]
    assert run(engine, [(0, "it", prompts["3"], GREEDY)])["it"] == outputs["3"]
    assert counters.num_tokens_saved >= saved + 24, "the prefix is remembered again"


def test_blocks_of_one_that_was_aborted_before_it_could_fail():
    """Nobody has seen it fail; the first that fails with its blocks has them forgotten."""
    engine = make_engine()
    prompt = [*PREFIX, 9, 10, 11]
    outputs = run(
        engine,
        [
            (0, "bad", [*PREFIX, BAD_TOKEN, 1, 2, 3], GREEDY),
            (1, "bad", None, None),
            (1, "later", prompt, GREEDY),
        ],
    )
    assert outputs == {"later": alone(prompt)}
    calls = []
    retry = engine.scheduler.retry
    engine.scheduler.retry = lambda request: calls.append(request) or retry(request)
    for _ in range(2):
        assert run(engine, [(0, "it", prompt, GREEDY)]) == {"it": outputs["later"]}
    assert not calls


def test_a_bad_one_with_a_good_prefix_does_not_cost_others_that_prefix():
    engine = make_engine()
    good = [*PREFIX, 9, 10, 11]
    bad = [*PREFIX, BAD_TOKEN, 1, 2, 3]
    assert run(engine, [(0, "good", good, GREEDY)])["good"] == alone(good)
    num_entries = len(engine.memory.cache)
    assert run(engine, [(0, "bad", bad, GREEDY)]) == {"bad": FAILED}
    assert len(engine.memory.cache) == num_entries
    saved = engine.memory.cache.counters.num_tokens_saved
    assert run(engine, [(0, "good", good, GREEDY)])["good"] == alone(good)
    assert engine.memory.cache.counters.num_tokens_saved == saved + 24


def test_samples_and_penalties_of_one_that_tries_again():
    engine = make_engine()
    params = GREEDY.with_(temperature=1.2, seed=7, n=3, presence_penalty=0.5)
    prompt = [*PREFIX, 9, 10, 11]
    outputs = run(
        engine,
        [
            (0, "bad", [*PREFIX, BAD_TOKEN, 1, 2, 3], GREEDY.with_(n=2)),
            (1, "later", prompt, params),
        ],
    )
    assert outputs["bad"] == FAILED * 2
    assert sorted(outputs["later"], key=str) == sorted(alone(prompt, params), key=str)


def test_one_that_tries_again_can_be_aborted():
    engine = make_engine()
    outputs = run(
        engine,
        [
            (0, "bad", [*PREFIX, BAD_TOKEN, 1, 2, 3], GREEDY),
            (1, "later", [*PREFIX, 9, 10, 11], GREEDY),
            (3, "later", None, None),
        ],
    )
    assert outputs.pop("bad") == FAILED
    assert ("error" in [reason for _, reason in outputs.get("later", [])]) is False


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("seed", range(12))
def test_among_many_with_too_few_blocks(seed, preemption):
    """Requests of few prefixes, some bad, come, give way, come back, and are aborted: who ends has
    the tokens that it has alone."""
    rng = np.random.default_rng(seed)
    settings = SchedulerSettings(5, 16, policy="priority", preemption=preemption)
    engine = make_engine(run_ahead=bool(seed % 2), chunk=16, blocks=40)
    engine.configure(settings)
    arrivals, prompts, good = [], {}, {}
    for number in range(24):
        tail = rng.integers(0, 46, 5).tolist()
        name, is_bad = str(number), rng.random() < 0.3
        prompt = [*PREFIX[: 8 * rng.integers(1, 4)], *([BAD_TOKEN] if is_bad else []), *tail]
        level = RequestPriority(level=int(rng.integers(0, 10)))
        step = int(rng.integers(0, 30))
        arrivals.append((step, name, prompt, GREEDY, level))
        prompts[name] = prompt, is_bad
        if rng.random() < 0.2:
            arrivals.append((step + int(rng.integers(1, 6)), name, None, None))
        elif not is_bad:
            good[name] = prompt
    outputs = run(engine, sorted(arrivals, key=lambda a: a[0]))
    for name, prompt in good.items():
        assert outputs[name] == alone(prompt), name
    for name, found in outputs.items():
        if prompts[name][1]:
            assert found == FAILED
    counters = engine.scheduler.counters
    assert counters.num_swapped_out + counters.num_recomputed > 0


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
def test_through_the_kernels():
    config = overflow.CONFIG.with_(num_layers=3)
    prefix = PREFIX[:16]
    found = {}
    for cache in (True, False):
        settings = DeviceSettings("float16", "float16", "float16")
        limits = RunnerLimits(80, 4, 96, 32, 6)
        runner = DeviceRunner(config, ShimDevice(MODERN), limits, settings)
        runner.upload_weights(overflow.HotCheckpoint(config, "residual"))
        engine = LLMEngine(config, runner, run_ahead=True, prefix_cache=cache)
        arrivals = [(0, "hot", [*prefix, overflow.HOT, 5], overflow.GREEDY)]
        arrivals += [(n, str(n), [*prefix, n, 10], overflow.GREEDY) for n in (1, 2, 3)]
        found[cache] = run(engine, arrivals)
        if cache:
            assert engine.memory.cache.counters.num_tokens_saved > 0
    assert found[True]["hot"] == FAILED
    assert found[True] == found[False]
