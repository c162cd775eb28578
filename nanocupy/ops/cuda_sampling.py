"""From logits to ids, on a GPU: penalties, and one draw a row."""

from __future__ import annotations

import numpy as np

from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.cuda_launch import CudaLauncher
from nanocupy.ops.interface import Array

_i32 = np.int32


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
        self._launch(
            "sampling.cu", "sample_rows", shapes.sample_rows(*logits.shape),
            logits, temperature, top_k, top_p, min_p, seeds, counters, out,
            _i32(logits.shape[1]), SCALAR=0,
        )  # fmt: skip

    def argmax(self, logits: Array, out: Array) -> None:
        """`sample` where every temperature is 0: out int32 [S], the lowest id of a tie."""
        num_rows, vocab_size = logits.shape
        parts = shapes.argmax_parts(num_rows, vocab_size, self._traits.num_multiprocessors)
        parts = min(parts, max(1, len(self._workspaces["argmax_keys"]) // max(1, num_rows)))
        keys = self._workspace("argmax_keys", num_rows, parts) if parts > 1 else None
        self._launch(
            "sampling.cu", "argmax_rows", shapes.argmax_rows(num_rows, vocab_size, parts),
            logits, keys, out, _i32(vocab_size), SCALAR=0,
        )  # fmt: skip
        if parts > 1:
            shape = shapes.argmax_merge_rows(num_rows)
            self._launch(
                "sampling.cu", "argmax_merge_rows", shape, keys, out, _i32(parts), SCALAR=0
            )
