"""Rotation, the write to the paged cache, and attention over it, on a GPU: one launch where
contexts are short and the card can, else each by itself.
"""

from __future__ import annotations

import math

import numpy as np

from nanocupy.ops import launch_attention_decode as decode
from nanocupy.ops import launch_attention_fused as fused
from nanocupy.ops import launch_attention_prefill as prefill
from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.cuda_launch import CudaLauncher
from nanocupy.ops.cuda_sizes import TYPE_CODES, decode_launch, fused_launch, query_buckets
from nanocupy.ops.launch_shapes import LaunchShape

_i32, _f32, _f64 = np.int32, np.float32, np.float64


class AttentionOps(CudaLauncher):
    """The ops of `Ops` that deal with queries, keys and values."""

    def rope_table(
        self, positions, rope_lens, inv_freq, ntk_factor, ntk_context, attention_factor, out
    ) -> None:
        half = len(inv_freq)
        self._launch(
            "rope.cu", "rope_table", shapes.rope_table(len(positions), 2 * half),
            positions, rope_lens, inv_freq, _f64(ntk_factor), _i32(ntk_context),
            _f32(attention_factor), out, _i32(half), **self._cache_types,
        )  # fmt: skip

    def rope_write_kv(
        self, qkv, q_norm, k_norm, eps, rope, slots, key_cache, value_cache, key_scales,
        value_scales, q_out,
    ) -> None:  # fmt: skip
        num_tokens, num_heads, _ = q_out.shape
        num_kv_heads, block_size = key_cache.shape[1:3]
        self._launch(
            "rope.cu", "rope_write_kv", shapes.rope_write_kv(num_tokens, num_heads, num_kv_heads),
            qkv, q_norm, k_norm, _f32(eps), rope, slots, key_cache, value_cache, key_scales,
            value_scales, q_out, _i32(num_heads), _i32(num_kv_heads), _i32(block_size),
            **self._cache_types,
        )  # fmt: skip

    def attend(
        self, qkv, q_norm, k_norm, eps, rope, slots, key_cache, value_cache, key_scales,
        value_scales, query_starts, kv_lens, block_tables, scale, max_queries, max_kv_len,
        q_scratch, out,
    ) -> None:  # fmt: skip
        launch = None
        if 1 <= max_queries <= fused.MAX_QUERIES:
            queries = next(n for n in query_buckets(fused.MAX_QUERIES) if n >= max_queries)
            launch = fused_launch(self._sizes, self._traits, len(kv_lens), max_kv_len, queries)
        if launch is None:
            caches = key_cache, value_cache, key_scales, value_scales
            self.rope_write_kv(qkv, q_norm, k_norm, eps, rope, slots, *caches, q_scratch)
            self.attention(
                q_scratch, *caches, query_starts, kv_lens, block_tables, scale, max_queries, out
            )
            return
        num_kv_heads, block_size = key_cache.shape[1:3]
        self._launch(
            fused.FILE, fused.ENTRY,
            LaunchShape(launch.grid, launch.block, launch.shared_bytes, launch.cluster),
            qkv, q_norm, k_norm, _f32(eps), rope, slots, key_cache, value_cache, key_scales,
            value_scales, query_starts, kv_lens, block_tables, _f32(scale), out, _i32(num_kv_heads),
            _i32(out.shape[1] // num_kv_heads), _i32(block_size), _i32(block_tables.shape[1]),
            **self._cache_types, **launch.macros,
        )  # fmt: skip

    def attention(
        self,
        q,
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        query_starts,
        kv_lens,
        block_tables,
        scale,
        max_queries,
        out,
    ) -> None:
        if not len(q) or not len(kv_lens):
            return
        caches = key_cache, value_cache, key_scales, value_scales
        batch = query_starts, kv_lens, block_tables
        if max_queries <= self._sizes.max_queries:
            self._attention_decode(q, *caches, *batch, scale, max_queries, out)
        else:
            self._attention_prefill(q, *caches, *batch, scale, out)

    def _attention_decode(
        self, q, key_cache, value_cache, key_scales, value_scales, query_starts, kv_lens,
        block_tables, scale, max_queries, out,
    ) -> None:  # fmt: skip
        num_heads, num_kv_heads = q.shape[1], key_cache.shape[1]
        queries = next(n for n in query_buckets(self._sizes.max_queries) if n >= max_queries)
        launch = decode_launch(self._sizes, self._traits, len(kv_lens), queries, None)
        room = len(self._workspaces["partial_values"]) // math.prod(launch.partial_values_shape[1:])
        if launch.num_items > room:  # a batch between those that the plan tried
            launch = decode_launch(self._sizes, self._traits, len(kv_lens), queries, room)
        counters = None
        if launch.merge is None:
            counters = self._workspace("counters", *launch.counters_shape)
        args = (
            q, key_cache, value_cache, key_scales, value_scales, query_starts, kv_lens,
            block_tables, _f32(scale), out,
            self._workspace("partial_values", *launch.partial_values_shape),
            self._workspace("partial_states", *launch.partial_states_shape),
            counters, _i32(len(kv_lens)), _i32(num_kv_heads), _i32(num_heads // num_kv_heads),
            _i32(key_cache.shape[2]), _i32(block_tables.shape[1]), _i32(launch.num_items),
            _i32(launch.least_part), _i32(launch.num_row_tiles),
        )  # fmt: skip
        macros = self._cache_types | launch.macros
        shape = LaunchShape(launch.grid, launch.block, launch.shared_bytes)
        self._launch(decode.FILE, launch.entry, shape, *args, **macros)
        if launch.merge is not None:
            merge = launch.merge
            shape = LaunchShape(merge.grid, merge.block, merge.shared_bytes)
            self._launch(decode.FILE, decode.MERGE_ENTRY, shape, *args, **macros)

    def _attention_prefill(
        self, q, key_cache, value_cache, key_scales, value_scales, query_starts, kv_lens,
        block_tables, scale, out,
    ) -> None:  # fmt: skip
        num_heads, head_size = q.shape[1:]
        num_kv_heads, block_size = key_cache.shape[1:3]
        counts = len(q), len(kv_lens), num_heads, num_kv_heads, head_size
        types = self._types["SCALAR"], TYPE_CODES[self._sizes.cache_dtype]
        group, wgmma = num_heads // num_kv_heads, None
        if self._traits.wgmma:
            wgmma = prefill.wgmma_tile(head_size, group, block_size, *types)
        if wgmma is not None:
            launch = prefill.launch_attention_prefill_wgmma(
                *counts, tile=wgmma, num_multiprocessors=self._traits.num_multiprocessors
            )
            arrays = (
                self._maps.queries(q, wgmma, group), self._maps.cache(key_cache, wgmma),
                self._maps.cache(value_cache, wgmma), query_starts, kv_lens, block_tables, out,
                self._workspace("counters", 1),
            )  # fmt: skip
        else:
            tensor = prefill.uses_tensor_cores(
                head_size, *types, self._traits.compute_capability, self._traits.force_plain
            )
            launch = prefill.launch_attention_prefill(
                *counts, tile=prefill.default_tile(head_size) if tensor else None, cache=types[1]
            )
            arrays = (
                q, key_cache, value_cache, key_scales, value_scales, query_starts, kv_lens,
                block_tables, out,
            )  # fmt: skip
        self._launch(
            launch.file, launch.entry,
            LaunchShape(launch.grid, launch.block, launch.shared_bytes), *arrays, _f32(scale),
            *(_i32(n) for n in (*counts[1:4], block_size, block_tables.shape[1])),
            **self._cache_types, **launch.macros,
        )  # fmt: skip
