"""Penalties on the shim's device: counted there, and the same tokens as NumPy's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nanocupy.engine import device_penalties
from nanocupy.engine.device_penalties import PenaltySlots
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.request import Request, RequestState
from tests.engine.device_runs import (
    FLOAT32,
    GREEDY,
    generate,
    penalised,
    runners,
)
from tests.shim import build
from tests.shim.device import ShimDevice

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)


@pytest.mark.parametrize("run_ahead", [False, True], ids=["in step", "run ahead"])
@pytest.mark.parametrize(
    "others_first", [None, False, True], ids=["one", "two", "two, others first"]
)
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_penalties_are_counted_on_the_device(temperature, others_first, run_ahead):
    """Chunks, preemptions, decodes alone and beside prompts: the tokens of lists that are made anew
    for every step."""
    device = ShimDevice(others_first=bool(others_first))
    settings = replace(FLOAT32, two_streams=others_first is not None)
    on_device, on_numpy = runners("qwen2", device, num_blocks=20, chunk=16, settings=settings)
    requests = {n: (at // 2, *rest) for n, (at, *rest) in penalised(temperature).items()}
    assert generate(on_device, requests, run_ahead) == generate(on_numpy, requests)
    assert device.counts["replayed"] > 2 * device.counts["captured"] > 0


def test_a_decode_step_with_penalties_is_a_graph_that_sends_nothing():
    device = ShimDevice()
    on_device, on_numpy = runners("llama", device)
    for penalty in (1.0, 2.0, 1.0):  # none of the graphs of a batch without, nor the other way
        params = GREEDY.with_(repetition_penalty=penalty, max_tokens=9)
        requests = {str(number): (0, [1, 2, number], params) for number in range(2)}
        assert generate(on_device, requests) == generate(on_numpy, requests)
    engine = LLMEngine(on_device.config, on_device, run_ahead=True)
    for number, params in enumerate([GREEDY.with_(repetition_penalty=1.2), GREEDY]):
        engine.add_request(str(number), [1, 2, 3, 4, 5], params.with_(max_tokens=30))
    for _ in range(8):
        engine.step()
    before = device.counts.copy()
    for _ in range(12):
        engine.step()
    changes = device.counts - before
    assert changes == {"replayed": 12, "to_device": 3}  # where a block of 4 tokens begins
    assert len(engine._in_flight) == 1


def test_who_finds_no_slot_or_no_room_in_one_gets_lists(monkeypatch):
    monkeypatch.setattr(device_penalties, "MAX_PENALTY_ENTRIES", 2)
    on_device, on_numpy = runners("llama", ShimDevice(), chunk=16)
    requests = penalised(0.9, 6)
    many = {i: 2.0 * (i % 3) for i in range(9)}
    for number in range(3):
        params = GREEDY.with_(repetition_penalty=1.5, logit_bias=many, max_tokens=12)
        requests[f"many {number}"] = (3 * number, [4 + number, 7, 4], params)
    assert not on_device.counts_tokens(params)
    assert generate(on_device, requests, True) == generate(on_numpy, requests)


def test_slots_go_round():
    """More requests than slots, one after the other and in turns."""
    slots = PenaltySlots(3, (0,))
    lane = SlotLane()
    params = GREEDY.with_(repetition_penalty=1.2)
    requests = [Request(str(i), [1, 2, i], params, 0, 20) for i in range(5)]

    def step(*drawing: int) -> list[int]:
        batch = [requests[i] for i in drawing]
        slots.assign(batch)
        slots.fill(lane, batch)
        return slots.slots_of(batch).tolist()

    assert step(0, 1, 2) == [1, 2, 3]
    assert step(2, 0) == [3, 1]
    assert lane.filled == [1, 2, 3]
    requests[1].state = RequestState.FINISHED
    assert step(0, 3) == [1, 2]
    assert lane.filled == [1, 2, 3, 2]
    assert sorted(step(4, 2, 0)) == [1, 2, 3]  # the one that does not draw has lost its own
    assert lane.filled[4:] == [2]
    assert sorted(step(3, 4)) != [0, 0]
    plain = Request("plain", [1], GREEDY, 0, 20)
    assert slots.slots_of([plain]) is None
    assert not slots.take(plain)
    short = Request("short", [1], GREEDY.with_(min_tokens=2), 0, 20)
    assert slots.take(short)
    short.output_ids, short.num_tokens = [1, 2], 3
    assert not slots.take(short)


class SlotLane:
    """A lane that notes which slots are filled."""

    def __init__(self) -> None:
        self.filled: list[int] = []
        self.inputs = self.device = self.ops = self
        self.num_bytes = 0
        self._record = self

    def view(self, name: str):
        lane = self

        class Rows:
            def __getitem__(self, slot: int):
                if name == "penalty_records":
                    lane.filled.append(slot)
                return np.zeros(2000, np.int32)

        return Rows()

    def make_room(self, num_bytes: int) -> None: ...

    def copy_to(self, target, array) -> None: ...

    def fill(self, array, byte: int) -> None: ...

    def send(self, arrays):
        return arrays

    def set_token_counts(self, pairs, counts) -> None: ...
