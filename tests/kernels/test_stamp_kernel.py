"""`stamp_step`: the ring it leaves, and that the clock goes forward."""

from __future__ import annotations

import time

import numpy as np
import pytest

from nanocupy.cuda.step_stamps import DECODE, OTHER, StepStamps, StepTime, idle_share, steps_of
from nanocupy.errors import CudaError
from nanocupy.ops.launch_shapes import LaunchShape
from tests.shim import build


def stamp(backend, ring, num_steps, kind, is_end):
    numbers = (np.uint32(num_steps), np.uint32(kind), np.uint32(is_end))
    shape = LaunchShape((1,), 32)
    backend.run("stamp.cu", "stamp_step", shape, (ring, *numbers), (0,), SCALAR=0)


@pytest.fixture
def once(backend):
    """A backend that runs a kernel a single time: the clock gives no value twice."""
    if hasattr(backend, "orders"):
        backend.orders = (0,)
    return backend


def test_the_ring_keeps_the_last_steps(once):
    ring = np.zeros(1 + 3 * 2, np.uint64)
    kinds = [DECODE, OTHER, DECODE]
    starts = []
    for kind in kinds:
        stamp(once, ring, 2, kind, 0)
        starts.append(int(ring[1 + 3 * (int(ring[0]) % 2)]))
        time.sleep(0.002)
        stamp(once, ring, 2, kind, 1)
    assert int(ring[0]) == 3
    second, third = steps_of(ring)
    assert (second.index, second.kind) == (1, OTHER)
    assert (third.index, third.kind) == (2, DECODE)
    assert [second.start_ns, third.start_ns] == starts[1:]
    assert second.end_ns - second.start_ns >= 1_900_000
    assert third.start_ns >= second.end_ns


def test_idle_time_by_hand():
    steps = [
        StepTime(4, 1000, 1800, DECODE),
        StepTime(5, 2000, 2800, DECODE),  # 200 idle, 800 busy
        StepTime(6, 3600, 4000, OTHER),
        StepTime(7, 4400, 5000, DECODE),
        StepTime(8, 5200, 5800, DECODE),  # 200 idle, 600 busy
        StepTime(9, 6400, 7200, DECODE),  # 600 idle, 800 busy
    ]
    idle = idle_share(steps)
    assert idle is not None
    assert (idle.num_gaps, idle.idle_ns, idle.busy_ns) == (3, 1000, 2200)
    assert (idle.gap_ns, idle.step_ns, idle.resolution_ns) == (200, 800, 200)
    assert idle.share == pytest.approx(1000 / 3200)
    assert idle_share(steps[2:4]) is None
    assert idle_share([]) is None


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
def test_stamps_within_captured_steps():
    from tests.shim.device import ShimDevice

    device = ShimDevice()
    stamps = StepStamps(device, 8)

    def step():
        stamps.start()
        stamps.end()

    for _ in range(11):
        device.run(("step", stamps), step)
    assert device.counts["replayed"] == 10
    found = stamps.read()
    assert [s.index for s in found] == list(range(3, 11))
    times = [t for s in found for t in (s.start_ns, s.end_ns)]
    assert times == sorted(times)
    assert times[0] < times[-1]
    stamps.clear()
    assert stamps.read() == []
    with pytest.raises(CudaError, match="a ring of 0 steps"):
        StepStamps(device, 0)
