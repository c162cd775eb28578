"""Whether the host keeps the device waiting: where the host's time of a decode step goes, and how
long the device has nothing to do between two of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from nanocupy.bench.measure import DECODE_OUTPUT, WARMUPS, decode_steps
from nanocupy.cuda.step_stamps import IdleTime, idle_share
from nanocupy.engine.engine import LLMEngine
from nanocupy.profiling.step_parts import PARTS, StepParts


@dataclass(frozen=True)
class HostTime:
    """Of decode steps; all times in microseconds, medians over the steps.

    step_us   the whole of `LLMEngine.step`, on the host's clock
    parts_us  of it by part: schedule, launch, wait (for the device), process
    idle      of the device, by its own clock; None where it has none that can be read
    """

    name: str
    step_us: float
    parts_us: dict[str, float]
    idle: IdleTime | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is not known is None."""
        idle = self.idle
        return {
            "host_step_us": round(self.step_us, 2),
            "host_parts_us": {part: round(value, 2) for part, value in self.parts_us.items()},
            "gpu_idle_share": round(idle.share, 5) if idle else None,
            "gpu_gap_us": round(idle.gap_ns / 1e3, 3) if idle else None,
            "gpu_step_us": round(idle.step_ns / 1e3, 3) if idle else None,
            "gpu_clock_ns": idle.resolution_ns if idle else None,
        }


def decode_idle(engine: LLMEngine, shape: str, dtype: str, batch: int) -> HostTime:
    """Run the work of `measure.decode` once more, watched; steps are a little slower by that.
    Raises ConfigError where it does not fit."""
    parts, watch = StepParts(), engine.watch
    # Room for the steps of the prompts too, so that no decode step falls out of the ring.
    stamps = engine.runner.stamp_steps(2 * DECODE_OUTPUT + 2 * batch)
    try:
        for _ in range(WARMUPS):  # the steps' graphs are captured anew, with stamps
            for _ in decode_steps(engine, batch, 0):
                pass
        if stamps is not None:
            stamps.clear()
        engine.watch = parts
        seconds, spent = [], []
        for step_seconds in decode_steps(engine, batch, 1):
            seconds.append(step_seconds)
            spent.append(parts.last)
        steps = stamps.read() if stamps is not None else []
    finally:
        engine.watch = watch
        engine.runner.stamp_steps(0)
    return HostTime(
        f"decode/{shape}/{dtype}/b{batch}",
        1e6 * statistics.median(seconds),
        {part: 1e6 * statistics.median(step[part] for step in spent) for part in PARTS},
        idle_share(steps),
    )
