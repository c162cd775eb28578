"""What steps take, and how much of it is the engine's own. Pure Python.

Between two calls of `step` the caller does what it likes with the tokens, for as long as it likes:
that is no part of a step. Where a step is under way meanwhile, a runner that was still busy when it
was waited for was busy all along, so that the caller has cost nothing; of one that had ended before
nobody knows when it did.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

_LITTLE = 1 / 16  # of a step: what the caller may take of it, at any place, and it counts
_WAITED = 1 / 8  # of a step: who was waited for so long has not ended before


class Launch(NamedTuple):
    """When a step was launched: on the clock, and by what callers had taken until then; seconds."""

    at: float
    callers_s: float


class StepTime(NamedTuple):
    """Of a step that was read, in seconds. took_s: since its launch, or since the one before was
    read, if that was later; it is the runner's own where `is_runners`. engine_s: from what was read
    before to this, less what callers took; None where nobody knows."""

    took_s: float
    is_runners: bool
    engine_s: float | None


class StepTimes:
    """Told when a call begins and ends, and of each step when it is launched, waited for and read,
    in this order."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._entered_at = self._left_at = self._read_at = self._waits_at = clock()
        self._callers_s = 0.0  # all that callers took until now
        self._callers_s_at_read = 0.0
        self._was_busy = False  # the runner, when the step before was waited for

    def enter(self) -> None:
        """The caller calls `step`."""
        self._entered_at = self._clock()
        self._callers_s += self._entered_at - self._left_at

    def leave(self) -> None:
        """The call ends."""
        self._left_at = self._clock()

    def launches(self) -> Launch:
        """A step is launched now."""
        return Launch(self._clock(), self._callers_s)

    def waits(self) -> None:
        """The oldest step is waited for from now on."""
        self._waits_at = self._clock()

    def read(self, launch: Launch) -> StepTime:
        """It was read."""
        now, read_at = self._clock(), self._read_at
        took_s, period_s = now - max(launch.at, read_at), now - read_at
        beside_s = self._callers_s - max(launch.callers_s, self._callers_s_at_read)
        before_s = self._callers_s - self._callers_s_at_read - beside_s
        is_busy = now - self._waits_at >= _WAITED * took_s
        engine_s: float | None = None
        if beside_s <= _LITTLE * took_s:
            engine_s = period_s - before_s - beside_s
        elif is_busy and (self._was_busy or launch.at >= read_at):
            engine_s = period_s - before_s
        caller_s = self._entered_at - self._left_at
        is_runners = launch.at >= self._entered_at or caller_s <= _LITTLE * took_s
        self._read_at, self._was_busy = now, is_busy
        self._callers_s_at_read = self._callers_s
        return StepTime(took_s, is_runners, engine_s)
