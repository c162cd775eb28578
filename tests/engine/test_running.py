"""Those that decode in lockstep: one schedule for many steps, and who leaves it when."""

from __future__ import annotations

import random

import pytest

from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.running import DecodingSet, decodes
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import tiny_config
from tests.engine.fake_runner import FakeRunner, expected_tokens

PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
CONFIG = tiny_config(vocab_size=40, max_context=96)


def decoding_request(num_prompt: int, max_total: int) -> Request:
    request = Request("", [1] * num_prompt, PARAMS, 0, max_total)
    request.num_computed_tokens = num_prompt - 1
    return request


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_all_is_where_the_counts_say(block_size):
    rng = random.Random(block_size)
    decoding = DecodingSet(block_size)
    alive: set[Request] = set()
    for _ in range(300):
        if rng.random() < 0.3:
            start = rng.randrange(1, 40)
            request = decoding_request(start, start + rng.randrange(1, 30))
            decoding.join(request)
            alive.add(request)
        if alive and rng.random() < 0.1:
            gone = rng.choice(sorted(alive, key=id))
            alive.remove(gone)
            assert decoding.leave(gone)
            assert not decoding.leave(gone)
        before = {r: (r.num_computed_tokens, r.num_tokens) for r in alive}
        decoding.advance()
        for request, (computed, exist) in before.items():
            assert (request.num_computed_tokens, request.num_tokens) == (computed + 1, exist + 1)
        alive = {r for r in alive if r.num_tokens < r.max_total_tokens}
        assert set(decoding) == alive
        assert all(decodes(request) for request in alive)
        borders = {r for r in alive if r.num_computed_tokens % block_size == 0}
        assert set(decoding.at_border()) == borders
        assert [item.request for item in decoding.schedule] == list(decoding)
        decoding.check_integrity()
    assert alive


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
def test_a_schedule_is_kept_while_the_same_decode(run_ahead, monkeypatch):
    limits = RunnerLimits(60, 4, 96, 16, 4)
    runner = FakeRunner(CONFIG, limits, deferred=run_ahead)
    engine = LLMEngine(CONFIG, runner, run_ahead=run_ahead)
    schedules = []
    launch = runner.launch

    def spy(schedule):
        schedules.append(schedule)
        return launch(schedule)

    monkeypatch.setattr(runner, "launch", spy)
    for number in range(3):
        engine.add_request(str(number), [number] * (4 + number), PARAMS)
    for _ in range(8):
        engine.step()
    assert len({id(s.requests) for s in schedules[1:]}) == 1
    # The prompts have 4, 5 and 6 tokens: position n + 4 of the first is decoded in step n + 1.
    grown = [[r.request_id for r in s.grown] for s in schedules[1:]]
    assert grown[:5] == [["0"], [], ["2"], ["1"], ["0"]]
    engine.add_request("late", [9] * 20, PARAMS)
    for _ in range(4):
        engine.step()
        engine.scheduler.check_integrity()
    # Its prompt takes two steps beside the others; then the four go on together.
    last = schedules[-4:]
    assert [len(s) for s in last] == [4, 4, 4, 4]
    assert last[2].requests is last[3].requests
    assert len({id(s.requests) for s in [schedules[-5], *last]}) == 4


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
def test_what_was_generated_is_found_by_others(run_ahead):
    runner = FakeRunner(CONFIG, RunnerLimits(60, 4, 96, 32, 4), deferred=run_ahead)
    engine = LLMEngine(CONFIG, runner, run_ahead=run_ahead)
    counters = engine.pool.cache.counters
    ids = [5, 6, 7]
    said = [*ids, *expected_tokens(ids, 30, 40)]
    engine.add_request("first", ids, PARAMS)
    for _ in range(15):
        engine.step()
    # 4 blocks of 4 are computed, and their ids are known: it is asked to go on from there.
    engine.add_request("while it runs", [*said[:17], 1], PARAMS.with_(max_tokens=1))
    engine.step()
    assert counters.num_tokens_saved == 16
    while engine.has_unfinished:
        engine.step()
    # It said 30; the last was not computed, and the 32 before it fill 8 blocks.
    engine.add_request("afterwards", said, PARAMS.with_(max_tokens=1))
    engine.step()
    assert counters.num_tokens_saved == 16 + 32


def test_a_step_that_failed_is_not_gone_on_from(monkeypatch):
    runner = FakeRunner(CONFIG, RunnerLimits(60, 4, 96, 16, 4))
    engine = LLMEngine(CONFIG, runner)
    engine.add_request("a", [1, 2, 3], PARAMS)
    engine.step()
    engine.step()
    kept = runner._last_requests
    with monkeypatch.context() as patch:
        patch.setattr(runner, "launch", lambda schedule: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.step()
    assert runner._last_requests is not kept  # who got a block in the failed step is not told again
