"""A step's inputs in one piece of memory, padded to one of few shapes, so that steps repeat.

A graph holds addresses and sizes. So the sizes of a step with prompts in it are rounded up, its
arrays lie at places that follow from the rounded sizes, and one copy brings them all. Host side,
NumPy only; it knows no device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nanocupy.engine.batch import ForwardBatch, SamplerBatch
from nanocupy.engine.binding import step_dims

_ALIGNMENT = 16  # bytes
# What a padded token, sequence or row has: it belongs to no sequence, and writes to the null block.
_SAMPLER_PADDING = {"top_p": 1.0}


@dataclass(frozen=True)
class StepShape:
    """The rounded sizes of a step: what a graph is captured for.

    max_queries: of a sequence; rounded up to a power of two where it is small, else num_tokens.
    num_rows: sampled ones.
    """

    num_tokens: int
    num_seqs: int
    table_width: int
    num_rows: int
    max_queries: int

    @property
    def arrays(self) -> Mapping[str, tuple[int, np.dtype, tuple[int, ...]]]:
        """name -> (offset in bytes, dtype, shape)."""
        return _layout(self)[0]

    @property
    def num_bytes(self) -> int:
        return _layout(self)[1]

    @property
    def dims(self) -> dict[str, int]:
        """The letters of the step, as `step_dims`."""
        return step_dims(self.num_tokens, self.num_seqs, self.num_rows, self.max_queries)


@lru_cache(maxsize=512)
def _layout(shape: StepShape) -> tuple[dict[str, tuple[int, np.dtype, tuple[int, ...]]], int]:
    tokens, seqs, rows = (shape.num_tokens,), (shape.num_seqs,), (shape.num_rows,)
    sizes: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_ids": ("int32", tokens),
        "positions": ("int32", tokens),
        "slots": ("int32", tokens),
        "rope_lens": ("int32", tokens),
        "query_starts": ("int32", (shape.num_seqs + 1,)),
        "kv_lens": ("int32", seqs),
        "block_tables": ("int32", (shape.num_seqs, shape.table_width)),
        "sample_rows": ("int32", rows),
        "seeds": ("uint64", rows),
        "counters": ("uint32", (shape.num_rows, 2)),
        "temperature": ("float32", rows),
        "top_k": ("int32", rows),
        "top_p": ("float32", rows),
        "min_p": ("float32", rows),
        "penalty_slots": ("int32", rows),
    }
    arrays, offset = {}, 0
    for name, (dtype, size) in sizes.items():
        kind = np.dtype(dtype)
        arrays[name] = (offset, kind, size)
        offset += -(-math.prod(size) * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
    return arrays, offset


def step_shape(
    batch: ForwardBatch,
    *,
    max_tokens: int,
    max_num_seqs: int,
    max_table_width: int,
    max_rows: int,
    few_queries: int,
) -> StepShape:
    """The rounded sizes of a batch, none above its maximum. few_queries: up to so many queries of a
    sequence count, a power of two; above them all is one."""
    num_tokens = bucket(len(batch.token_ids), max_tokens)
    max_queries = int(np.diff(batch.query_starts).max(initial=0))
    num_seqs, table_width = batch.block_tables.shape
    num_rows = coarse_bucket(len(batch.sample_rows), max_rows)
    if len(batch.sample_rows) == len(batch.token_ids):  # then it brings no new shapes
        num_rows = min(num_tokens, max_rows)
    return StepShape(
        num_tokens,
        coarse_bucket(num_seqs, max_num_seqs),
        coarse_bucket(max(table_width, 16), max_table_width),
        num_rows,
        query_bucket(max_queries) if max_queries <= few_queries else num_tokens,
    )


def query_bucket(count: int) -> int:
    """`count` rounded up to 0, 1, 2, 4, 8 …: the queries that decode attention is built for."""
    return 1 << (count - 1).bit_length() if count else 0


def bucket(count: int, most: int) -> int:
    """`count` rounded up by an eighth at most, above 64: 1, 2, 4, 8, 16 … 64, 72, 80 …"""
    if count <= 64:
        size = 1 << max(count - 1, 0).bit_length()
    else:
        step = 1 << ((count - 1).bit_length() - 4)
        size = -(-count // step) * step
    return min(size, most)


def coarse_bucket(count: int, most: int) -> int:
    """`count` rounded up to 0, 1, 4, 16, 64, 256 …: where padding costs little."""
    if count <= 1:
        return count
    return min(1 << ((count - 1).bit_length() + 1) // 2 * 2, most)


def fill(
    memory: np.ndarray,
    shape: StepShape,
    batch: ForwardBatch,
    sampler: SamplerBatch | None,
    penalty_slots: np.ndarray | None = None,
) -> None:
    """Write a batch, and the parameters and penalty slots of its sampled rows, to `memory` uint8
    [num_bytes]."""
    given = dict(vars(batch)) | (vars(sampler) if sampler is not None else {})
    if penalty_slots is not None:
        given["penalty_slots"] = penalty_slots
    for name, (offset, dtype, size) in shape.arrays.items():
        num_bytes = math.prod(size) * dtype.itemsize
        target = memory[offset : offset + num_bytes].view(dtype).reshape(size)
        values = given.get(name)
        padding = _SAMPLER_PADDING.get(name, 0)
        if values is None:
            target[...] = padding
            continue
        if name == "query_starts":
            padding = values[-1]
        if target.ndim == 2:
            rows, columns = values.shape
            target[:rows, :columns] = values
            target[:rows, columns:] = padding
            target[rows:] = padding
        else:
            target[: len(values)] = values
            target[len(values) :] = padding
