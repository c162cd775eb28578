"""The ops on a GPU: which kernel, which launch, which arguments. No arithmetic happens here.

Nothing is allocated: workspaces come from outside, so every op may be captured in a graph. What
launches is given too (`kernels`, `matmul`), which is how the tests run all of this on the CPU.
"""

from __future__ import annotations

import math

import numpy as np

from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.cuda_attention import AttentionOps
from nanocupy.ops.cuda_drafts import DraftOps
from nanocupy.ops.cuda_penalties import PenaltyOps
from nanocupy.ops.cuda_products import ProductOps
from nanocupy.ops.cuda_sampling import SamplingOps
from nanocupy.ops.cuda_step import StepOps
from nanocupy.ops.interface import Array, Ops
from nanocupy.ops.launch_shapes import LaunchShape

_i32, _i64, _f32 = np.int32, np.int64, np.float32


class CudaOps(ProductOps, AttentionOps, SamplingOps, PenaltyOps, DraftOps, StepOps, Ops):
    """See `Ops` for the meaning of every argument, `CudaLauncher` for what it is made with; arrays
    lie on the device, without gaps. Here stand the embedding and what is beyond the interface."""

    def embed(self, token_ids, table, out) -> None:
        shape = shapes.embed_rows(*out.shape)
        width = _i32(out.shape[1])
        types = self._types_of(self._embed_dtype, wide=True)
        self._launch("embed.cu", "embed_rows", shape, token_ids, table, out, width, **types)

    # ----------------------------------------------------------------- beyond the interface

    def resolve_tokens(self, token_ids: Array, sampled: Array) -> None:
        """Put in what the step before sampled: a negative id int32 [T], -1 - r, becomes
        sampled[r]."""
        self._launch(
            "decode_state.cu", "resolve_tokens", shapes.one_thread_each(len(token_ids)),
            token_ids, sampled, _i32(len(token_ids)), SCALAR=0,
        )  # fmt: skip

    def apply_updates(self, updates: Array, state: Array) -> None:
        """Set words of the decode state: updates int32 [n, 2], index and value; state int32."""
        count = len(updates)
        self._launch(
            "decode_state.cu", "apply_updates", shapes.one_thread_each(count),
            updates, state, _i32(count), SCALAR=0,
        )  # fmt: skip

    def fill_normal(self, out: Array, deviation: float, seed: int) -> None:
        """Normal values of mean 0 in an array of a storage type, the same for the same seed."""
        size = math.prod(out.shape)
        grid = min(-(-size // 1024), 32 * self._traits.num_multiprocessors)
        self._launch(
            "random.cu", "fill_normal", LaunchShape((grid,), 256), out, _i64(size),
            _f32(deviation), np.uint64(seed), **self._types_of(out.dtype.name),
        )  # fmt: skip
