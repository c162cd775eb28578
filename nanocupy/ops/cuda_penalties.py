"""Penalties on a GPU, of requests whose counts stay there from step to step.

`penalize` of the interface takes lists that the host has made. These do the same from a request's
slot, which `kernels_cu/penalties.cu` describes, so that a step needs nothing from the host.
"""

from __future__ import annotations

import numpy as np

from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.cuda_launch import CudaLauncher
from nanocupy.ops.interface import Array

_i32 = np.int32


class PenaltyOps(CudaLauncher):
    """slots int32 [S], 0 for a row without; records int32 [P, R]; counts uint16 [P, W]."""

    def penalize_slots(self, logits: Array, slots: Array, records: Array, counts: Array) -> None:
        """Change logits float32 [S, V] in place, as `penalize`."""
        num_rows, vocab_size = logits.shape
        width = counts.shape[1]
        shape = shapes.penalize_slots(num_rows, width, self._traits.num_multiprocessors)
        self._launch(
            "penalties.cu", "penalize_slots", shape, logits, slots, records, counts,
            _i32(vocab_size), _i32(records.shape[1]), _i32(width), SCALAR=0,
        )  # fmt: skip

    def count_tokens(self, sampled: Array, slots: Array, records: Array, counts: Array) -> None:
        """Count what was drawn, int32 [S]."""
        self._launch(
            "penalties.cu", "count_tokens", shapes.one_thread_each(len(sampled)),
            sampled, slots, records, counts, _i32(len(sampled)), _i32(records.shape[1]),
            _i32(counts.shape[1]), SCALAR=0,
        )  # fmt: skip

    def penalize_draft_rows(
        self,
        logits: Array,
        row_places: Array,
        drafts: Array,
        query_starts: Array,
        slots: Array,
        records: Array,
        counts: Array,
    ) -> None:
        """`penalize_slots` for rows with drafts before them, as kernels_cu/drafts.cu lays them out:
        logits float32 [T, V]; row_places, drafts int32 [T]; query_starts int32 [B + 1]; slots int32
        [B], of the places."""
        num_rows, vocab_size = logits.shape
        width = counts.shape[1]
        shape = shapes.penalize_slots(num_rows, width, self._traits.num_multiprocessors)
        self._launch(
            "penalties.cu", "penalize_draft_rows", shape, logits, row_places, drafts, query_starts,
            slots, records, counts, _i32(vocab_size), _i32(records.shape[1]), _i32(width), SCALAR=0,
        )  # fmt: skip

    def count_accepted(
        self,
        sampled: Array,
        drafts: Array,
        query_starts: Array,
        slots: Array,
        records: Array,
        counts: Array,
    ) -> None:
        """Count the drafts that were right and the token after them; sampled int32 [T]."""
        self._launch(
            "penalties.cu", "count_accepted", shapes.one_thread_each(len(slots)),
            sampled, drafts, query_starts, slots, records, counts, _i32(len(slots)),
            _i32(records.shape[1]), _i32(counts.shape[1]), SCALAR=0,
        )  # fmt: skip

    def set_token_counts(self, pairs: Array, counts: Array) -> None:
        """Put words into a slot's cleared counts uint16 [W]: pairs int32 [n, 2], token and word."""
        self._launch(
            "penalties.cu", "set_token_counts", shapes.one_thread_each(len(pairs)),
            pairs, counts, _i32(len(pairs)), SCALAR=0,
        )  # fmt: skip
