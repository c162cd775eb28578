"""Checking drafts on a GPU, for sequences of the decode batch: inputs of a step, and its end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.cuda_launch import CudaLauncher
from nanocupy.ops.cuda_sampling import DecodePlaces, place_arguments
from nanocupy.ops.interface import Array

_i32 = np.int32
_FILE = "drafts.cu"


class DraftOps(CudaLauncher):
    """rows of a step: see kernels_cu/drafts.cu. query_starts int32 [B + 1], drafts int32 [T]."""

    def lay_out_drafts(
        self,
        row_places: Array,
        drafts: Array,
        query_starts: Array,
        places: DecodePlaces,
        params: Mapping[str, Array],
        out: Mapping[str, Array],
    ) -> None:
        """Fill `out`, the arrays of a step's batch and sampler by name, for T rows of B places.
        row_places int32 [T], -1 for padding; params: the places' sampling parameters."""
        num_rows, num_places = len(row_places), len(query_starts) - 1
        self._launch(
            _FILE, "lay_out_drafts", shapes.one_thread_each(max(num_rows, num_places)),
            row_places, drafts, query_starts, *place_arguments(places, places.counters),
            *(params[name] for name in ("seeds", "temperature", "top_k", "top_p", "min_p")),
            *(out[name] for name in (
                "token_ids", "positions", "slots", "rope_lens", "kv_lens", "sample_rows", "seeds",
                "counters", "temperature", "top_k", "top_p", "min_p",
            )),
            _i32(num_rows), _i32(num_places), SCALAR=0,
        )  # fmt: skip
        # Kernels behind may read lengths and slots before the one in front of them has ended (see
        # READ_EARLY of attention_decode_fused.cu): they must all come after this one's end.
        self._starts_alone = True

    def force_drafts(self, sampled: Array, drafts: Array, forced: Array) -> None:
        """For benches: make drafts right, those where `forced` int32 [T] is 1."""
        self._launch(
            _FILE, "force_drafts", shapes.one_thread_each(len(sampled)),
            sampled, drafts, forced, _i32(len(sampled)), SCALAR=0,
        )  # fmt: skip

    def accept_drafts(
        self, sampled: Array, drafts: Array, query_starts: Array, places: DecodePlaces
    ) -> None:
        """Move places on by the drafts that are right, and the token after them; sampled int32
        [T]: what was chosen after each row."""
        num_places = len(query_starts) - 1
        self._launch(
            _FILE, "accept_drafts", shapes.one_thread_each(num_places),
            sampled, drafts, query_starts, *place_arguments(places, places.counters),
            _i32(num_places), SCALAR=0,
        )  # fmt: skip
