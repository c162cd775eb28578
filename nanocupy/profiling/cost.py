"""What an op call must do: bytes that it has to move, and floating-point operations.

From the call's own shapes, nothing measured. Every input is read once and every output written
once; what a backend moves beyond that is its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from nanocupy.model.forward import Buffer, OpCall, WeightRef

_BYTES = {"float32": 4, "int32": 4}


@dataclass(frozen=True)
class Cost:
    """Bytes and floating-point operations, each at least 0."""

    num_bytes: int
    num_flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.num_bytes + other.num_bytes, self.num_flops + other.num_flops)


@dataclass(frozen=True)
class StepShape:
    """A step as costs see it: `dims`, the letters of buffers; kv_tokens, the positions that all
    sequences attend over, summed; pairs, how many (query, position) pairs attention has."""

    dims: Mapping[str, int]
    kv_tokens: int
    pairs: int


def step_shape(
    dims: Mapping[str, int], query_starts: Sequence[int], kv_lens: Sequence[int]
) -> StepShape:
    """The shape of a step from its batch: query_starts [B + 1], kv_lens [B]."""
    pairs = 0
    for b, kv_len in enumerate(kv_lens):
        queries = query_starts[b + 1] - query_starts[b]
        pairs += queries * kv_len - queries * (queries - 1) // 2
    return StepShape(dims, sum(kv_lens), pairs)


def call_cost(
    call: OpCall,
    step: StepShape,
    weight_shapes: Mapping[str, tuple[int, ...]],
    itemsize: int,
    weight_bytes: Mapping[str, int] = MappingProxyType({}),
) -> Cost:
    """The cost of one call; `itemsize`: bytes of a weight, an activation and a cache value;
    weight_bytes: of the weights, by name, that are stored otherwise."""

    def elements(value: object) -> int:
        if isinstance(value, WeightRef):
            return math.prod(weight_shapes[value.name])
        if isinstance(value, Buffer):
            return math.prod(step.dims.get(n, n) if isinstance(n, str) else n for n in value.shape)
        return 0

    def size(value: object) -> int:
        if isinstance(value, WeightRef) and value.name in weight_bytes:
            return weight_bytes[value.name]
        dtype = value.dtype if isinstance(value, Buffer) else ""
        return elements(value) * _BYTES.get(dtype, itemsize)

    args = call.arguments
    tokens = step.dims["T"]
    if call.op == "attend":
        _, heads, head_size = args["out"].shape
        # A quantised cache has codes of a byte, and a scale of 16 bits for each row.
        row_bytes = head_size * itemsize if args["key_scales"] is None else head_size + 2
        kv_bytes = 2 * step.kv_tokens * args["key_cache"].shape[1] * row_bytes
        num_flops = 4 * step.pairs * heads * head_size + 6 * elements(args["qkv"])
        return Cost(size(args["qkv"]) + size(args["out"]) + kv_bytes, num_flops)
    if call.op == "embed":
        return Cost(2 * size(args["out"]), 0)
    if call.op == "rope_table":
        return Cost(size(args["out"]), 0)
    weight = weight_shapes[args["weight"].name]
    rows = step.dims["S"] if call.op == "lm_head" else tokens
    num_bytes = size(args["weight"]) + rows * weight[1] * itemsize
    if call.op == "linear_add":
        num_bytes += 2 * size(args["residual"])
    else:
        num_bytes += size(args["out"])
    return Cost(num_bytes, 2 * rows * math.prod(weight))
