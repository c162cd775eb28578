"""From logits to ids, on a GPU: penalties, and one draw a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.cuda_launch import CudaLauncher
from nanocupy.ops.interface import Array

_i32 = np.int32


@dataclass(frozen=True)
class DecodePlaces:
    """A decode batch on the device, which moves on by a position as its tokens are drawn;
    kernels_cu/decode_state.cuh says what becomes of each array."""

    block_tables: Array
    token_ids: Array
    positions: Array
    kv_lens: Array
    slots: Array
    rope_lens: Array | None
    counters: Array
    block_size: int


class SamplingOps(CudaLauncher):
    """The ops of `Ops` that take logits, and `argmax`."""

    def penalize(
        self,
        logits,
        entry_starts,
        token_ids,
        output_counts,
        in_context,
        bias,
        repetition,
        presence,
        frequency,
    ) -> None:
        self._launch(
            "sampling.cu", "penalize_rows", shapes.penalize_rows(len(logits), len(token_ids)),
            logits, entry_starts, token_ids, output_counts, in_context, bias, repetition,
            presence, frequency, _i32(logits.shape[1]), SCALAR=0,
        )  # fmt: skip

    def sample(self, logits, temperature, top_k, top_p, min_p, seeds, counters, out) -> None:
        self._sample(
            logits, temperature, top_k, top_p, min_p, seeds, out, place_arguments(None, counters)
        )

    def sample_places(
        self,
        logits: Array,
        temperature: Array,
        top_k: Array,
        top_p: Array,
        min_p: Array,
        seeds: Array,
        out: Array,
        places: DecodePlaces,
    ) -> None:
        """`sample` for a decode batch, which moves on in the same launch."""
        args = place_arguments(places, places.counters)
        self._sample(logits, temperature, top_k, top_p, min_p, seeds, out, args)

    def _sample(self, logits, temperature, top_k, top_p, min_p, seeds, out, places) -> None:
        traits = self._traits
        clusters = traits.compute_capability >= (9, 0) and not traits.force_plain
        shape = shapes.sample_rows(
            *logits.shape, traits.num_multiprocessors, traits.max_shared_bytes, clusters
        )
        self._launch(
            "sampling.cu", "sample_rows", shape, logits, temperature, top_k, top_p, min_p, seeds,
            out, _i32(logits.shape[1]), _i32(shapes.keeps_logits(shape)), *places, SCALAR=0,
        )  # fmt: skip

    def argmax(self, logits: Array, out: Array, places: DecodePlaces | None = None) -> None:
        """`sample` where every temperature is 0: out int32 [S], the lowest id of a tie. `places`
        move on in the same launch."""
        num_rows, vocab_size = logits.shape
        parts = shapes.argmax_parts(num_rows, vocab_size, self._traits.num_multiprocessors)
        parts = min(parts, max(1, len(self._workspaces["argmax_keys"]) // max(1, num_rows)))
        keys = arrivals = None
        if parts > 1:
            keys = self._workspace("argmax_keys", num_rows, parts)
            arrivals = self._workspace("counters", num_rows)
        self._launch(
            "sampling.cu", "argmax_rows", shapes.argmax_rows(num_rows, vocab_size, parts),
            logits, keys, arrivals, out, _i32(vocab_size),
            *place_arguments(places, None if places is None else places.counters), SCALAR=0,
        )  # fmt: skip


def place_arguments(places: DecodePlaces | None, counters: Array | None) -> tuple[Any, ...]:
    """The arguments of kernels_cu/decode_state.cuh."""
    if places is None:
        return (*[None] * 6, counters, _i32(0), _i32(0))
    return (
        places.block_tables, places.token_ids, places.positions, places.kv_lens, places.slots,
        places.rope_lens, counters, _i32(places.block_tables.shape[1]), _i32(places.block_size),
    )  # fmt: skip
