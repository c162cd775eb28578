"""Swaps of the GPU's runner, on the host shim: the tokens of NumPy without a preemption."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanocupy.engine import device_swap
from nanocupy.engine import engine as engine_module
from nanocupy.engine.decode_state import DecodeState
from nanocupy.engine.device_plan import DeviceSettings
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.device_swap import HostBlocks, runs
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.scheduler import Schedule, SchedulerSettings
from nanocupy.errors import CapacityError
from nanocupy.model.load import load_numpy_weights
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.shim import build
from tests.shim.device import ShimDevice

CONFIG = tiny_config(head_size=64, num_heads=2, num_kv_heads=1, max_context=96)
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_runs_are_the_pairs(pairs):
    found = [(a + i, b + i) for a, b, count in runs(pairs) for i in range(count)]
    assert found == pairs


def test_neighbours_go_in_one_copy():
    pairs = [(3, 0), (4, 1), (5, 2), (9, 3), (8, 4)]
    assert list(runs(pairs)) == [(3, 0, 3), (9, 3, 1), (8, 4, 1)]
    assert list(runs(pairs, 2)) == [(3, 0, 2), (5, 2, 1), (9, 3, 1), (8, 4, 1)]
    rng = np.random.default_rng(0)
    caches = [rng.standard_normal((6, 2, 3)).astype(np.float32) for _ in range(2)]
    before = [cache.copy() for cache in caches]
    device = ShimDevice()
    host = HostBlocks(device, caches, 4)
    # Block 3 is overwritten by what comes in after it went out.
    host.copy(Schedule(swap_out=((1, 2), (2, 3))))
    host.copy(Schedule(swap_out=((3, 0),), swap_in=((3, 2), (4, 3))))
    host.copy(Schedule(swap_in=((0, 0),)))
    host.settle()
    device.synchronize("the copies")
    for cache, old in zip(caches, before, strict=True):
        np.testing.assert_array_equal(cache[[3, 4, 0]], old[[1, 2, 3]])
        np.testing.assert_array_equal(cache[[1, 2, 5]], old[[1, 2, 5]])


class CountingDevice(ShimDevice):
    """Counts the bytes of pinned memory, and has no more of it than `pinned_limit`."""

    def __init__(self, pinned_limit: int) -> None:
        super().__init__()
        self.pinned_limit, self.pinned_bytes = pinned_limit, 0

    def pinned(self, num_bytes):
        if self.pinned_bytes + num_bytes > self.pinned_limit:
            raise CapacityError("cudaHostAlloc: no more")
        self.pinned_bytes += num_bytes
        return super().pinned(num_bytes)


@pytest.mark.parametrize(("pinned_limit", "pinned_bytes"), [(1 << 20, 760), (200, 120), (0, 0)])
def test_the_hosts_memory_is_taken_as_blocks_come(pinned_limit, pinned_bytes, monkeypatch):
    """8 blocks a piece, of 24 + 16 bytes; where no more memory can be pinned, other memory does."""
    monkeypatch.setattr(device_swap, "PIECE_BYTES", 1)
    rng = np.random.default_rng(0)
    caches = [rng.integers(0, 99, (30, *shape), np.int32) for shape in ((2, 3), (4,))]
    before = [cache.copy() for cache in caches]
    device = CountingDevice(pinned_limit)
    host = HostBlocks(device, caches, 19)
    assert device.counts["followed"] == device.pinned_bytes == 0
    out = tuple((i, i) for i in range(5, 19))  # of three pieces, the last of 3 blocks
    host.copy(Schedule(swap_out=out[:3]))
    assert host._pieces.keys() == {0}
    host.copy(Schedule(swap_out=out[3:]))
    host.copy(Schedule(swap_in=tuple((29 - i, i) for i in range(18, 4, -1))))
    host.settle()
    device.synchronize("the copies")
    assert device.pinned_bytes == pinned_bytes
    for cache, old in zip(caches, before, strict=True):
        np.testing.assert_array_equal(cache[11:25], old[18:4:-1])
        np.testing.assert_array_equal(cache[:11], old[:11])


def test_a_request_that_comes_back_has_its_new_table():
    state = DecodeState(4, 8, 4)
    request = Request("a", [1] * 9, GREEDY, 0, 30)
    request.append(5)
    request.num_computed_tokens = 9
    request.block_ids = [1, 2, 3]
    state.updates([request])
    request.block_ids, request.num_preemptions = [6, 2, 5], 1  # prompts ran meanwhile, no decode
    state.updates([request])
    assert state.view(state.words, "block_tables", 1)[0, :3].tolist() == [6, 2, 5]


@pytest.mark.parametrize("others_first", [False, True])
def test_a_step_waits_for_what_it_needs_and_the_next_for_all(others_first):
    """Blocks 1 and 2 go out while a step writes block 1; the step after writes block 2, into which
    block 1 comes back later."""
    cache = np.arange(4, dtype=np.float32)[:, None].repeat(2, axis=1)
    device = ShimDevice(others_first=others_first)
    host = HostBlocks(device, [cache], 2)
    device.fill(cache[1:3], 1)  # by a step that is still under way when it is preempted
    before = np.full(8, 1, np.uint8).view(np.float32)
    host.settle()
    host.copy(Schedule(swap_out=((1, 0), (2, 1))), written={1})
    out = host._copies.moment()
    device.fill(cache[1], 2)
    if not others_first:
        device.wait(device.moment(), "the step")
        assert host._copies._queue.num_done == out - 1, "it waited for a block that it leaves alone"
    host.settle()
    device.fill(cache[2], 3)
    host.settle()
    host.copy(Schedule(swap_in=((2, 0), (3, 1))))
    device.synchronize("the copies")
    np.testing.assert_array_equal(cache[2:], np.stack([before, before]))
    assert cache[1].view(np.uint8).tolist() == [2] * 8


def preempted(mode, run_ahead, others_first=False, two_streams=False, params=GREEDY):
    """The tokens of requests that preempt each other, those without, and the engine's counters."""
    checkpoint = TinyCheckpoint(CONFIG, seed=3)
    limits = RunnerLimits(13, 4, 96, 32, 4, num_host_blocks=20)
    roomy = RunnerLimits(60, 4, 96, 32, 4)
    device_runner = DeviceRunner(
        CONFIG, ShimDevice(others_first=others_first), limits,
        DeviceSettings("float32", "float32", "float32", two_streams=two_streams),
    )  # fmt: skip
    device_runner.upload_weights(checkpoint)
    settings = SchedulerSettings(4, 32, preemption=mode)
    engine = LLMEngine(CONFIG, device_runner, settings, run_ahead=run_ahead)
    wanted = LLMEngine(
        CONFIG, NumpyRunner(CONFIG, load_numpy_weights(checkpoint), roomy), prefix_cache=False
    )
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 48, 8).tolist() for _ in range(4)]
    outputs = []
    for each in (engine, wanted):
        tokens: dict[str, list[int]] = {}
        for number, ids in enumerate(prompts):
            each.add_request(str(number), ids, params)
        while each.has_unfinished:
            for output in each.step():
                tokens.setdefault(output.request_id, []).append(output.token_id)
            each.scheduler.check_integrity()
        outputs.append(tokens)
    return *outputs, engine.scheduler.counters


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("others_first", [False, True])
@pytest.mark.parametrize("two_streams", [False, True], ids=["one stream", "two streams"])
@pytest.mark.parametrize("run_ahead", [False, True], ids=["in step", "run ahead"])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preempted_on_the_device(mode, run_ahead, two_streams, others_first):
    got, wanted, counters = preempted(mode, run_ahead, others_first, two_streams)
    assert got == wanted
    assert counters.num_swapped_out if mode == "swap" else counters.num_recomputed


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("left_out", ["copies follow", "followed by the step", "settled"])
def test_copies_that_are_not_ordered_show(left_out, monkeypatch):
    """Each of the three waits is there for a reason: without it, in one order of the streams or the
    other, the tokens are not what they were."""
    copies: list[ShimDevice] = []
    second_stream, follow = ShimDevice.second_stream, ShimDevice.follow
    within = False

    def noted(device):
        copies.append(second_stream(device))
        return copies[-1]

    def copy(*args):
        nonlocal within
        within = True
        host_copy(*args)
        within = False

    def sometimes_follow(device, other):
        kind = "settled"
        if within:
            kind = "copies follow" if device is copies[-1] else "followed by the step"
        if kind != left_out:
            follow(device, other)

    host_copy = HostBlocks.copy
    monkeypatch.setattr(ShimDevice, "second_stream", noted)
    monkeypatch.setattr(ShimDevice, "follow", sometimes_follow)
    monkeypatch.setattr(HostBlocks, "copy", copy)
    different = []
    hot = GREEDY.with_(temperature=1.5, seed=7, max_tokens=20)  # tells small differences
    for others_first in (False, True):
        got, wanted, counters = preempted("swap", True, others_first, params=hot)
        assert counters.num_swapped_out
        different.append(got != wanted)
    assert any(different)


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
def test_what_swapping_costs_is_measured_and_what_prompts_cost_is_learnt(monkeypatch):
    checkpoint = TinyCheckpoint(CONFIG, seed=3)
    limits = RunnerLimits(40, 4, 96, 32, 4, num_host_blocks=20)
    runner = DeviceRunner(
        CONFIG, ShimDevice(), limits, DeviceSettings("float32", "float32", "float32")
    )
    runner.upload_weights(checkpoint)
    monkeypatch.setattr(engine_module, "_LEARNT_TOKENS", 16)
    engine = LLMEngine(CONFIG, runner, SchedulerSettings(4, 32, preemption="auto"))
    costs = engine.scheduler.settings.costs
    assert costs.block_bytes == CONFIG.kv_bytes_per_token("float32") * 4
    assert 0 < costs.copy_bytes_per_s < 1e12
    guess = costs.prefill_tokens_per_s
    engine.add_request("a", list(range(1, 31)), GREEDY)
    while engine.has_unfinished:
        engine.step()
    learnt = engine.scheduler.settings.costs
    assert 0 < learnt.prefill_tokens_per_s < guess  # the emulation is slow
    engine.configure(SchedulerSettings(2, 16))
    assert engine.scheduler.settings.costs == learnt
    no_host = DeviceRunner(CONFIG, ShimDevice(), RunnerLimits(40, 4, 96, 32, 4))
    assert no_host.swap_costs() is None
