"""Binds the forward's op calls to memory: what stands between the list and running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from nanocupy.model.forward import Buffer, OpCall, Size, WeightRef
from nanocupy.ops.interface import Array, Ops


def bind_calls(
    calls: Sequence[OpCall],
    ops: Ops,
    view: Callable[[str, tuple[int, ...]], Array],
    weights: Mapping[str, Array],
    dims: Mapping[str, int],
) -> list[Callable[[], None]]:
    """Each call as a function without arguments, for a step of these dimensions.

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

    return [
        partial(getattr(ops, call.op), **{n: value_of(v) for n, v in call.arguments.items()})
        for call in calls
        if call.op != "lm_head" or dims["S"]
    ]


def step_dims(num_tokens: int, num_seqs: int, num_rows: int, max_queries: int) -> dict[str, int]:
    """The letters of a step: T, B, B+1, S, and Q, the most queries of a sequence."""
    return {
        "T": num_tokens,
        "B": num_seqs,
        "B+1": num_seqs + 1,
        "S": num_rows,
        "Q": max_queries,
    }
