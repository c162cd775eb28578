"""Interrupts at any place of a step on the shim's device cost nobody a token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanocupy.engine import device_penalties
from nanocupy.engine.decode_state import DecodeState
from nanocupy.engine.engine import LLMEngine
from nanocupy.speculation.policy import DraftPolicy
from nanocupy.speculation.speculator import Speculator
from tests.engine.device_runs import (
    FLOAT32,
    GREEDY,
    arrivals,
    generate,
    penalised,
    runners,
)
from tests.engine.drafts import GuessingProposer
from tests.shim import build
from tests.shim.device import ShimDevice

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)


@pytest.mark.parametrize("at", range(2, 6))
@pytest.mark.parametrize("where", ["wait", "advance", "updates", "fetch"])
@pytest.mark.parametrize("two_streams", [False, True], ids=["one stream", "two streams"])
def test_an_interrupt_costs_no_token(two_streams, where, at, monkeypatch):
    """Ctrl-C while a step is read or launched: who goes on gets the same tokens as ever."""
    settings = replace(FLOAT32, two_streams=two_streams)
    on_device, on_numpy = runners("llama", ShimDevice(), settings=settings)
    requests = arrivals(4, GREEDY.with_(max_tokens=9), seed=3)
    wanted = generate(on_numpy, requests)
    assert generate_interrupted(on_device, requests, where, (at,), monkeypatch) == wanted


def test_a_step_that_was_not_read_is_read_before_its_memory_is_used_again(monkeypatch):
    """Interrupted while it waits for one step, the engine must not launch a second one beyond: that
    one's ids go where those of the first lie, on a device that is done at once."""
    device = ShimDevice()
    on_device, on_numpy = runners("llama", device)
    moment = device.moment

    def moment_when_all_is_done():
        now = moment()
        device._queue.run_to(now)
        return now

    monkeypatch.setattr(device, "moment", moment_when_all_is_done)
    requests = arrivals(4, GREEDY.with_(max_tokens=9), seed=3)
    wanted = generate(on_numpy, requests)
    assert generate_interrupted(on_device, requests, "wait", (3, 5), monkeypatch) == wanted


@pytest.mark.parametrize("where", ["fetch", "fill", "penalize"])
@pytest.mark.parametrize("two_streams", [False, True], ids=["one stream", "two streams"])
def test_an_interrupt_costs_no_token_of_who_has_penalties(two_streams, where, monkeypatch):
    """In slots and in lists: what a step that was given up still copies stays as it is."""
    monkeypatch.setattr(device_penalties, "MAX_PENALTY_ENTRIES", 2)
    settings = replace(FLOAT32, two_streams=two_streams)
    on_device, on_numpy = runners("llama", ShimDevice(), chunk=16, settings=settings)
    requests = penalised(0.9, 6)
    many = {i: 2.0 * (i % 3) for i in range(20)}
    for number in range(3):
        params = GREEDY.with_(repetition_penalty=1.5, logit_bias=many, max_tokens=12)
        requests[f"many {number}"] = (0, [4 + number, 7, 4], params)
    wanted = generate(on_numpy, requests)
    turns = range(3, 13, 3)
    assert generate_interrupted(on_device, requests, where, turns, monkeypatch) == wanted


@pytest.mark.parametrize("at", [(4,), (7,), (5, 6, 10)], ids=str)
@pytest.mark.parametrize("where", ["wait", "graph", "catch up", "move on"])
def test_an_interrupt_costs_no_token_of_steps_with_drafts(where, at, monkeypatch):
    """Their graph copies from memory and to memory that the next one with drafts uses again."""
    on_device, on_numpy = runners("llama", ShimDevice(), max_drafts=5)
    requests = {str(i): (0, [i, 7, 3], GREEDY.with_(max_tokens=24)) for i in range(3)}
    wanted = generate(on_numpy, requests)
    proposer = GuessingProposer(lambda request: wanted[request.request_id], 0.6, 48)
    speculator = Speculator(proposer, DraftPolicy(3))
    found = generate_interrupted(on_device, requests, where, at, monkeypatch, speculator)
    assert found == wanted
    assert speculator.counters.num_accepted > 15


def generate_interrupted(on_device, requests, where, turns, monkeypatch, speculator=None):
    """Tokens of requests that are all there at first, where the calls of these numbers are
    interrupted: before they begin or, each second one, when they are done."""
    calls = 0

    def interrupted(function):
        def call(*args):
            nonlocal calls
            calls += 1
            late = calls % 2 and calls in turns
            result = function(*args) if late or calls not in turns else None
            if calls in turns:
                raise KeyboardInterrupt
            return result

        return call

    engine = LLMEngine(on_device.config, on_device, run_ahead=True, speculator=speculator)
    owner, name = {
        "wait": (on_device._device, "wait"), "advance": (DecodeState, "advance"),
        "updates": (on_device._decoding, "update"), "fetch": (on_device._main, "fetch"),
        "fill": (on_device._penalties, "fill"), "penalize": (on_device._mixed, "_penalize"),
        "graph": (on_device._device, "run"), "catch up": (DecodeState, "caught_up"),
        "move on": (DecodeState, "move_on"),
    }[where]  # fmt: skip
    monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
    outputs: dict[str, list[int]] = {}
    for request_id, (_, ids, params) in requests.items():
        engine.add_request(request_id, ids, params)
    for _ in range(200):
        try:
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output.token_id)
        except KeyboardInterrupt:
            continue
        engine.scheduler.check_integrity()
        if not engine.has_unfinished:
            break
    assert calls >= max(turns)
    assert engine.pool.num_free == engine.pool.num_blocks - 1
    return outputs
