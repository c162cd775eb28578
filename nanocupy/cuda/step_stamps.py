"""Start and end of each step by the device's own clock, also where a step is a captured graph.

Owns the ring that the kernel `stamp_step` writes, and what its numbers mean: how long the device
was idle between two steps, which neither the host's clock nor events around a graph can tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from nanocupy.cuda.arena import ArenaPlan, BufferSpec
from nanocupy.errors import CudaError

if TYPE_CHECKING:
    from nanocupy.cuda.device import Device

DECODE, OTHER, DRAFTS = 0, 1, 2  # kinds of steps; the last check drafts of a decode batch
_WORDS = 3  # of a step: start, end, kind


@dataclass(frozen=True)
class StepTime:
    """A step: its number since the ring was cleared, start and end in nanoseconds of the device's
    clock, and its kind."""

    index: int
    start_ns: int
    end_ns: int
    kind: int


class StepStamps:
    """A ring of the last `num_steps` steps on a device.

    `start` and `end` launch on the device's stream, so they may be captured: call them as the first
    and the last thing of a step's body. A graph that holds them is of this object alone; make the
    object a part of the graph's key. Steps that run beside each other on two streams would write to
    one place: stamp those of one stream.
    """

    def __init__(self, device: Device, num_steps: int = 4096) -> None:
        """Takes 24 bytes a step on the device, and as much pinned memory. Raises CudaError."""
        if num_steps < 1:
            raise CudaError(f"a ring of {num_steps} steps was asked for")
        self.num_steps = num_steps
        self._device = device
        spec = BufferSpec("step_stamps", (1 + _WORDS * num_steps,), "uint64", "profiling")
        self._memory = device.allocate(ArenaPlan([spec]))
        self._ring = self._memory.view("step_stamps")
        self._host = device.pinned(spec.num_bytes).view(np.uint64)
        self._kernel = device.kernels.get("stamp.cu", "stamp_step")
        self.clear()

    def __repr__(self) -> str:
        return f"stamps of {self.num_steps} steps"

    def start(self) -> None:
        """A step starts here."""
        self._stamp(DECODE, is_end=0)

    def end(self, kind: int = DECODE) -> None:
        """The step that was started last ends here."""
        self._stamp(kind, is_end=1)

    def clear(self) -> None:
        """Forget all steps, in the stream's order."""
        self._device.fill(self._ring, 0)

    def read(self) -> list[StepTime]:
        """The steps in the ring, oldest first, those that are under way included: it waits for
        them. Raises CudaError for what went wrong in them."""
        self._device.to_host(self._host, self._ring)
        self._device.synchronize("reading the stamps of steps")
        return steps_of(self._host)

    def _stamp(self, kind: int, is_end: int) -> None:
        # Launched without overlap, whatever the other kernels do: an end is an end.
        numbers = (np.uint32(self.num_steps), np.uint32(kind), np.uint32(is_end))
        self._kernel.launch((1,), (32,), (self._ring, *numbers))


def steps_of(ring: np.ndarray) -> list[StepTime]:
    """The steps of a ring, uint64 [1 + 3 * N], oldest first."""
    num_ended = int(ring[0])
    places = ring[1:].reshape(-1, _WORDS)
    first = max(0, num_ended - len(places))
    steps = []
    for index in range(first, num_ended):
        start, end, kind = places[index % len(places)].tolist()
        steps.append(StepTime(index, start, end, kind))
    return steps


@dataclass(frozen=True)
class IdleTime:
    """What the device did in runs of steps of one kind.

    num_gaps       pairs of steps that follow each other
    busy_ns        the second step of each pair, summed
    idle_ns        from the end of the first to the start of the second, summed
    gap_ns, step_ns  medians
    resolution_ns  of the device's clock: the largest number that divides all its values
    """

    num_gaps: int
    busy_ns: int
    idle_ns: int
    gap_ns: float
    step_ns: float
    resolution_ns: int

    @property
    def share(self) -> float:
        """Idle time of all time, 0 to 1."""
        return self.idle_ns / (self.idle_ns + self.busy_ns)


def idle_share(steps: Sequence[StepTime], kind: int = DECODE) -> IdleTime | None:
    """The device's time between steps of `kind` that follow each other directly; None where there
    are no two such. What runs between steps unstamped counts as idle."""
    pairs = [
        (one, two)
        for one, two in pairwise(steps)
        if one.kind == two.kind == kind and two.index == one.index + 1
    ]
    busy = [two.end_ns - two.start_ns for _, two in pairs]
    idle = [two.start_ns - one.end_ns for one, two in pairs]
    if sum(busy) + sum(idle) <= 0:  # no pairs, or a clock too coarse to see any
        return None
    return IdleTime(
        num_gaps=len(pairs),
        busy_ns=sum(busy),
        idle_ns=sum(idle),
        gap_ns=statistics.median(idle),
        step_ns=statistics.median(busy),
        resolution_ns=math.gcd(*(t for step in steps for t in (step.start_ns, step.end_ns))),
    )
