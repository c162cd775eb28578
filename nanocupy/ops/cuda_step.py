"""A decode step as one launch, on a GPU that can do it: all layers and, with weights of its own
16 bits, the logits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nanocupy.ops.cuda_launch import CudaLauncher
from nanocupy.ops.cuda_sizes import step_has_head, step_launch, step_shape
from nanocupy.ops.interface import Array
from nanocupy.ops.launch_decode_step import ENTRY, FILE, num_words
from nanocupy.ops.launch_shapes import LaunchShape

_i32, _f32 = np.int32, np.float32


class StepOps(CudaLauncher):
    """Beyond the interface: what many of its ops do one after the other."""

    def can_step(self, num_seqs: int) -> bool:
        """Whether `decode_step` does this model on this card, for so many sequences."""
        return step_launch(self._sizes, self._traits, num_seqs) is not None

    @property
    def step_has_head(self) -> bool:
        """Whether `decode_step` goes on to the logits; else `lm_head` must follow."""
        return step_has_head(self._sizes)

    def decode_step(
        self, layers: Array, head_norm: Array | None, head: Array | None,
        batch: Mapping[str, Array], buffers: Mapping[str, Array], eps: float, scale: float,
    ) -> None:  # fmt: skip
        """From embeddings to logits, for a token of each of a few sequences; without step_has_head
        to the residual stream.

        layers     uint64 [L, table_words], addresses as LAYER_POINTERS names them, and where these
                   matrices are codes their four units, float32
        head_norm, head   None without step_has_head
        batch      angles, slots, kv_lens, block_tables, as `attend` takes them
        buffers    x (embeddings; without step_has_head the residual stream takes their place) and
                   logits, as the forward names them; and key_cache, of any layer, for its shape
        """
        launch = step_launch(self._sizes, self._traits, len(batch["kv_lens"]))
        assert launch is not None
        shape = step_shape(self._sizes)
        words = num_words(shape, launch, len(batch["kv_lens"]))
        self._launch(
            FILE, ENTRY,
            LaunchShape(launch.grid, launch.block, launch.shared_bytes, resident=True),
            layers, head_norm, head, batch["angles"], batch["slots"], batch["kv_lens"],
            batch["block_tables"], buffers["x"],
            buffers["logits"] if self.step_has_head else None,
            self._workspace("step_words", words), self._workspace("step_moments", 2),
            _f32(eps), _f32(scale),
            *(_i32(n) for n in (
                len(layers), shape.hidden_size, shape.ffn_size, shape.vocab_size,
                shape.num_kv_heads, shape.num_heads // shape.num_kv_heads,
                buffers["key_cache"].shape[2], batch["block_tables"].shape[1],
                launch.tile_inputs, launch.max_parts, launch.part_tokens,
            )),
            **self._cache_types, **launch.macros,
        )  # fmt: skip
