"""How long the host spends in each part of a step: an engine's watch."""

from __future__ import annotations

import time
from collections.abc import Callable

from nanocupy.engine.watch import StepWatch

PARTS = ("schedule", "launch", "wait", "process")


class StepParts(StepWatch):
    """Seconds of each part of the last step; a part that came twice is summed. For the parts, see
    `StepWatch`. The time of all parts is less than the step's by what lies outside of them, which
    is next to nothing."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """clock: seconds, from anywhere."""
        self.last = dict.fromkeys(PARTS, 0.0)
        self._clock = clock
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._open: tuple[str, float] | None = None

    def part(self, name: str) -> None:
        now = self._clock()
        self._close(now)
        self._open = (name, now)

    def end_step(self) -> None:
        self._close(self._clock())
        self._open = None
        self.last, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)

    def _close(self, now: float) -> None:
        if self._open is not None:
            name, start = self._open
            self._seconds[name] += now - start
