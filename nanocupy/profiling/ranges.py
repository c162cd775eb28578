"""Ranges of requests, steps, layers and ops for NVIDIA's profilers.

Requests and steps with their parts need a watch alone, so that steps are still replayed as graphs;
layers and ops need an observer, which makes them run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nanocupy.cuda.nvtx import Nvtx
from nanocupy.engine.binding import StepObserver
from nanocupy.engine.watch import StepWatch
from nanocupy.model.forward import OpCall


class RangeWatch(StepWatch):
    """An engine's watch: a range for each request from its arrival to its end, one for each step,
    and within that one for each part of it."""

    def __init__(self, nvtx: Nvtx) -> None:
        self._nvtx = nvtx
        self._requests: dict[str, int] = {}
        self._num_steps = 0
        self._depth = 0  # ranges of this step that are open: itself, and its part

    def request_added(self, request_id: str) -> None:
        self._requests[request_id] = self._nvtx.start(f"request {request_id}")

    def request_finished(self, request_id: str) -> None:
        number = self._requests.pop(request_id, None)
        if number is not None:  # else it came before this watch
            self._nvtx.end(number)

    def part(self, name: str) -> None:
        if self._depth == 0:
            self._nvtx.push(f"step {self._num_steps}")
            self._depth = 1
        elif self._depth == 2:
            self._nvtx.pop()
        self._nvtx.push(name)
        self._depth = 2

    def end_step(self) -> None:
        if self._depth:
            self._num_steps += 1
        for _ in range(self._depth):
            self._nvtx.pop()
        self._depth = 0


class RangeObserver:
    """A runner's observer: a range for each layer, and within it one for each op. `inner` observes
    too, within the ranges."""

    def __init__(self, nvtx: Nvtx, inner: StepObserver | None = None) -> None:
        self._nvtx = nvtx
        self._inner = inner
        self._layer: int | None = None

    def begin_step(
        self, dims: Mapping[str, int], query_starts: Sequence[int], kv_lens: Sequence[int]
    ) -> None:
        """See `engine.binding.StepObserver`."""
        if self._layer is not None:  # the step before has failed
            self._enter(None)
        if self._inner is not None:
            self._inner.begin_step(dims, query_starts, kv_lens)

    def run(self, call: OpCall, function: Callable[[], None]) -> None:
        if call.layer != self._layer:
            self._enter(call.layer)
        self._nvtx.push(call.op)
        try:
            if self._inner is None:
                function()
            else:
                self._inner.run(call, function)
        finally:
            self._nvtx.pop()

    def end_step(self) -> None:
        self._enter(None)
        if self._inner is not None:
            self._inner.end_step()

    def _enter(self, layer: int | None) -> None:
        """Leave the layer that is open, and enter another. None: outside of all."""
        if self._layer is not None:
            self._nvtx.pop()
        if layer is not None:
            self._nvtx.push(f"layer {layer}")
        self._layer = layer
