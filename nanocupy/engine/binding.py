"""Binds the forward's op calls to memory: what stands between the list and running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from nanocupy.model.forward import Buffer, OpCall, Size, WeightRef
from nanocupy.ops.interface import Array, Ops

BoundCall = tuple[OpCall, Callable[[], None]]


class StepObserver(Protocol):
    """Sees every call of a step: `profiling.recorder.StepRecorder`, for one."""

    def begin_step(
        self, dims: Mapping[str, int], query_starts: Sequence[int], kv_lens: Sequence[int]
    ) -> None:
        """A step of these dimensions, queries and lengths starts."""
        ...

    def run(self, call: OpCall, function: Callable[[], None]) -> None:
        """Do one call of it."""
        ...

    def end_step(self) -> None:
        """All that the step started has ended."""
        ...


def bind_calls(
    calls: Sequence[OpCall],
    ops: Ops,
    view: Callable[[str, tuple[int, ...]], Array],
    weights: Mapping[str, Array],
    dims: Mapping[str, int],
) -> list[BoundCall]:
    """Each call with a function without arguments that does it, for a step of these dimensions.

    view(name, shape) gives a buffer's memory in a shape; dims: letters of buffers' shapes, and
    sizes. Without sampled rows (S = 0, a chunk that is not its prompt's last) the LM head is left
    out.
    """

    def value_of(value: Any) -> Any:
        if isinstance(value, Buffer):
            return view(value.name, tuple(dims.get(n, n) for n in value.shape))
        if isinstance(value, WeightRef):
            return weights[value.name]
        return dims[value.name] if isinstance(value, Size) else value

    bound = []
    for call in calls:
        if call.op != "lm_head" or dims["S"]:
            arguments = {name: value_of(value) for name, value in call.arguments.items()}
            bound.append((call, partial(getattr(ops, call.op), **arguments)))
    return bound


def run_calls(bound: Sequence[BoundCall], observer: StepObserver | None = None) -> None:
    """Do the calls in order; an observer does each of them itself."""
    if observer is None:
        for _, function in bound:
            function()
    else:
        for call, function in bound:
            observer.run(call, function)


def step_dims(
    num_tokens: int, num_seqs: int, num_rows: int, max_queries: int, max_kv_len: int = 0
) -> dict[str, int]:
    """The letters of a step: T, B, B+1, S; Q, the most queries of a sequence; L, a bound on the
    contexts, 0 for none."""
    return {
        "T": num_tokens,
        "B": num_seqs,
        "B+1": num_seqs + 1,
        "S": num_rows,
        "Q": max_queries,
        "L": max_kv_len,
    }
