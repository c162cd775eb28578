"""Times the op calls of steps as they run: what a runner's `observer` can be.

On the CPU an op is over when its call returns. On a device its start and end are events on the
stream, read when the step is done; `clock` hides the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanocupy.model.forward import OpCall
from nanocupy.profiling.cost import StepShape, call_cost, step_shape
from nanocupy.profiling.timeline import Span


class Clock(Protocol):
    """Marks moments now, and tells their times later."""

    def mark(self) -> Any: ...

    def seconds(self, mark: Any) -> float:
        """The moment of a mark on one time line; what was started has ended by now."""
        ...


class HostClock:
    """The CPU's own."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark


@dataclass
class StepRecorder:
    """Collects spans of every op call and step. weight_shapes, itemsize and weight_bytes: see
    `call_cost`."""

    clock: Clock
    weight_shapes: Mapping[str, tuple[int, ...]]
    itemsize: int
    weight_bytes: Mapping[str, int] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    _step: StepShape | None = None
    _marks: list[tuple[OpCall, Any, Any]] = field(default_factory=list)
    _step_start: Any = None

    def begin_step(
        self, dims: Mapping[str, int], query_starts: Sequence[int], kv_lens: Sequence[int]
    ) -> None:
        """See `engine.binding.StepObserver`."""
        self._step = step_shape(dims, query_starts, kv_lens)
        self._marks = []
        self._step_start = self.clock.mark()

    def run(self, call: OpCall, function: Callable[[], None]) -> None:
        """Do one call of the step."""
        start = self.clock.mark()
        function()
        self._marks.append((call, start, self.clock.mark()))

    def end_step(self) -> None:
        """The step is over, and what it started has ended."""
        assert self._step is not None
        end = self.clock.mark()
        step_start = self.clock.seconds(self._step_start)
        dims = self._step.dims
        name = f"{_counted(dims['T'], 'token')}, {_counted(dims['B'], 'sequence')}"
        self.spans.append(
            Span(
                name,
                None,
                step_start,
                self.clock.seconds(end) - step_start,
                track="steps",
                num_tokens=dims["T"],
                num_seqs=dims["B"],
                num_rows=dims["S"],
            )
        )
        for call, start, stop in self._marks:
            begin = self.clock.seconds(start)
            cost = call_cost(call, self._step, self.weight_shapes, self.itemsize, self.weight_bytes)
            duration = self.clock.seconds(stop) - begin
            self.spans.append(Span(call.op, call.layer, begin, duration, cost))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
