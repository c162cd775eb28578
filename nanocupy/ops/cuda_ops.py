"""The ops on a GPU: which kernel, which launch, which arguments. No arithmetic happens here.

Few rows take kernels with everything folded in; more rows take cuBLAS between a norm before and
what follows, with the same rounding points. Nothing is allocated: workspaces come from outside, so
every op may be captured in a graph. What launches is given too (`kernels`, `matmul`), which is how
the tests run all of this on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from nanocupy.ops import launch_attention_decode as decode
from nanocupy.ops import launch_attention_fused as fused
from nanocupy.ops import launch_attention_prefill as prefill
from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.cuda_sizes import (
    ITEMSIZES,
    TYPE_CODES,
    DeviceTraits,
    OpSizes,
    decode_launch,
    fused_launch,
    query_buckets,
)
from nanocupy.ops.interface import Array, Ops
from nanocupy.ops.launch_gemv import (
    MAX_ROWS,
    GemvLaunch,
    GemvTuning,
    default_tuning,
    plan_gemv,
)
from nanocupy.ops.launch_shapes import LaunchShape
from nanocupy.ops.tensor_maps import TensorMaps

_i32, _i64, _f32, _f64 = np.int32, np.int64, np.float32, np.float64


class Kernels(Protocol):
    """Gives kernels by file, entry and macros, as `cuda.kernels.KernelLoader` does."""

    def get(self, file: str, entry: str, **macros: int | str) -> Any: ...


class CudaOps(Ops):
    """See `Ops` for the meaning of every argument; arrays lie on the device, without gaps.

    kernels      launches on the stream that is current
    matmul       (x, w, out, beta): out = x @ w.T + beta * out, float32 sums, on the same stream
    workspaces   as `workspace_plan` says
    """

    def __init__(
        self,
        kernels: Kernels,
        matmul: Callable[..., None],
        workspaces: Mapping[str, Array],
        sizes: OpSizes,
        traits: DeviceTraits,
        gemv_tuning: GemvTuning | None = None,
    ) -> None:
        self._kernels = kernels
        self._matmul = matmul
        self._workspaces = workspaces
        self._sizes = sizes
        self._traits = traits
        plain = traits.force_plain
        self._gemv_tuning = gemv_tuning or default_tuning(
            traits.compute_capability, traits.max_shared_bytes, tensor=not plain
        )
        # Every kernel waits by itself for the one before, so each may start before that has ended.
        self._overlap = not plain and traits.compute_capability >= (9, 0)
        self._maps: TensorMaps | None = None  # made where a kernel takes any
        self._types = {
            "SCALAR": TYPE_CODES[sizes.dtype],
            **({"FORCE_PLAIN": 1} if plain else {}),
        }
        self._row_types = self._types | _other("RESIDUAL", sizes.residual_dtype, sizes.dtype)
        self._cache_types = {
            **self._types,
            **_other("CACHE", sizes.cache_dtype, sizes.dtype),
            "HEAD_SIZE": sizes.head_size,
        }

    # ----------------------------------------------------------------- helpers

    def _launch(self, file: str, entry: str, shape: LaunchShape, *args: Any, **macros: int) -> None:
        if 0 not in shape.grid:
            kernel = self._kernels.get(file, entry, **macros)
            kernel.launch(
                shape.grid, (shape.block,), args, shape.shared_bytes,
                cluster=shape.cluster, overlap_previous=self._overlap,
            )  # fmt: skip

    def _workspace(self, name: str, *shape: int) -> Array:
        """The start of a workspace in this shape."""
        return self._workspaces[name][: math.prod(shape)].reshape(shape)

    def _gemv(
        self, entry: str, rows: int, num_outputs: int, num_inputs: int, *args: Any,
        input_dtype: str = "", pairs: bool = False,
    ) -> None:  # fmt: skip
        """A product of `rows` tokens, few, with all that is folded into it."""
        tuning = self._gemv_tuning
        weight_bytes = ITEMSIZES[self._sizes.dtype]
        plan: GemvLaunch = plan_gemv(
            num_outputs, num_inputs, rows, self._traits.num_multiprocessors,
            weight_bytes=weight_bytes,
            input_bytes=ITEMSIZES[input_dtype] if input_dtype else weight_bytes,
            norm=entry != "linear_add_rows", pairs=pairs, tuning=tuning,
            max_shared_bytes=self._traits.max_shared_bytes,
        )  # fmt: skip
        macros = self._row_types | tuning.macros(rows)
        self._launch(
            "gemv.cu", entry, LaunchShape(plan.grid, plan.block, plan.shared_bytes),
            *args, _i32(num_outputs), _i32(num_inputs), _i32(plan.k_tile), _i32(plan.k_splits),
            **macros,
        )  # fmt: skip

    def _norm_rows(self, x: Array, rows: Array | None, weight: Array, eps: float, out: Array):
        shape = shapes.rms_norm_rows(len(out), x.shape[1])
        self._launch(
            "norm.cu", "rms_norm_rows", shape, x, rows, weight, _f32(eps), out, _i32(x.shape[1]),
            **self._row_types,
        )  # fmt: skip

    def _product_with_bias(self, x: Array, weight: Array, bias: Array | None, out: Array) -> None:
        """out = x @ weight.T + bias, rounded once: the product is added to the bias."""
        if bias is not None:
            shape = shapes.add_rows(*out.shape)
            self._launch(
                "activation.cu", "fill_bias_rows", shape, bias, out, _i32(out.shape[1]),
                **self._types,
            )  # fmt: skip
        self._matmul(x, weight, out, 0.0 if bias is None else 1.0)

    # ----------------------------------------------------------------- the ops

    def embed(self, token_ids, table, out) -> None:
        shape = shapes.embed_rows(*out.shape)
        width = _i32(out.shape[1])
        self._launch(
            "embed.cu", "embed_rows", shape, token_ids, table, out, width, **self._row_types
        )

    def rope_table(
        self, positions, rope_lens, inv_freq, ntk_factor, ntk_context, attention_factor, out
    ) -> None:
        half = len(inv_freq)
        self._launch(
            "rope.cu", "rope_table", shapes.rope_table(len(positions), 2 * half),
            positions, rope_lens, inv_freq, _f64(ntk_factor), _i32(ntk_context),
            _f32(attention_factor), out, _i32(half), **self._cache_types,
        )  # fmt: skip

    def norm_linear(self, x, norm_weight, eps, weight, bias, out) -> None:
        num_rows = len(x)
        if 0 < num_rows <= MAX_ROWS:
            self._gemv(
                "norm_linear_rows", num_rows, *weight.shape, x, norm_weight, _f32(eps), weight,
                bias, out,
            )  # fmt: skip
        elif num_rows:
            normed = self._workspace("normed", *x.shape)
            self._norm_rows(x, None, norm_weight, eps, normed)
            self._product_with_bias(normed, weight, bias, out)

    def rope_write_kv(
        self, qkv, q_norm, k_norm, eps, rope, slots, key_cache, value_cache, q_out
    ) -> None:
        num_tokens, num_heads, _ = q_out.shape
        num_kv_heads, block_size = key_cache.shape[1:3]
        self._launch(
            "rope.cu", "rope_write_kv", shapes.rope_write_kv(num_tokens, num_heads, num_kv_heads),
            qkv, q_norm, k_norm, _f32(eps), rope, slots, key_cache, value_cache, q_out,
            _i32(num_heads), _i32(num_kv_heads), _i32(block_size), **self._cache_types,
        )  # fmt: skip

    def attention(
        self,
        q,
        key_cache,
        value_cache,
        query_starts,
        kv_lens,
        block_tables,
        scale,
        max_queries,
        out,
    ) -> None:
        if not len(q) or not len(kv_lens):
            return
        if max_queries <= self._sizes.max_queries:
            self._attention_decode(
                q, key_cache, value_cache, query_starts, kv_lens, block_tables, scale,
                max_queries, out,
            )  # fmt: skip
        else:
            self._attention_prefill(
                q, key_cache, value_cache, query_starts, kv_lens, block_tables, scale, out
            )

    def _attention_decode(
        self, q, key_cache, value_cache, query_starts, kv_lens, block_tables, scale, max_queries,
        out,
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
            q, key_cache, value_cache, query_starts, kv_lens, block_tables, _f32(scale), out,
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
        self, q, key_cache, value_cache, query_starts, kv_lens, block_tables, scale, out
    ) -> None:
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
            if self._maps is None:
                self._maps = TensorMaps(self._kernels.driver.tensor_map)
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
                *counts, tile=prefill.default_tile(head_size) if tensor else None
            )
            arrays = q, key_cache, value_cache, query_starts, kv_lens, block_tables, out
        self._launch(
            launch.file, launch.entry,
            LaunchShape(launch.grid, launch.block, launch.shared_bytes), *arrays, _f32(scale),
            *(_i32(n) for n in (*counts[1:4], block_size, block_tables.shape[1])),
            **self._cache_types, **launch.macros,
        )  # fmt: skip

    def attend(
        self, qkv, q_norm, k_norm, eps, rope, slots, key_cache, value_cache, query_starts, kv_lens,
        block_tables, scale, max_queries, max_kv_len, q_scratch, out,
    ) -> None:  # fmt: skip
        launch = None
        if max_queries == 1:
            launch = fused_launch(self._sizes, self._traits, len(kv_lens), max_kv_len)
        if launch is None:
            self.rope_write_kv(
                qkv, q_norm, k_norm, eps, rope, slots, key_cache, value_cache, q_scratch
            )
            self.attention(
                q_scratch, key_cache, value_cache, query_starts, kv_lens, block_tables, scale,
                max_queries, out,
            )  # fmt: skip
            return
        num_kv_heads, block_size = key_cache.shape[1:3]
        self._launch(
            fused.FILE, fused.ENTRY,
            LaunchShape(launch.grid, launch.block, launch.shared_bytes, launch.cluster),
            qkv, q_norm, k_norm, _f32(eps), rope, slots, key_cache, value_cache, query_starts,
            kv_lens, block_tables, _f32(scale), out, _i32(num_kv_heads),
            _i32(out.shape[1] // num_kv_heads), _i32(block_size), _i32(block_tables.shape[1]),
            **self._cache_types, **launch.macros,
        )  # fmt: skip

    def linear_add(self, x, weight, bias, residual) -> None:
        num_rows = len(x)
        if 0 < num_rows <= MAX_ROWS:
            self._gemv("linear_add_rows", num_rows, *weight.shape, x, weight, bias, residual)
        elif num_rows and bias is None:
            self._matmul(x, weight, residual, 1.0)
        elif num_rows:
            product = self._workspace("product", *residual.shape)
            self._matmul(x, weight, product, 0.0)
            self._launch(
                "activation.cu", "add_residual_rows", shapes.add_rows(*residual.shape),
                product, bias, residual, _i32(residual.shape[1]),
                **self._row_types, **_other("PRODUCT", "float32", self._sizes.dtype),
            )  # fmt: skip

    def norm_swiglu(self, x, norm_weight, eps, weight, bias, out) -> None:
        num_rows, width = out.shape
        if 0 < num_rows <= MAX_ROWS:
            self._gemv(
                "norm_swiglu_rows", num_rows, width, x.shape[1], x, norm_weight, _f32(eps),
                weight, bias, out, pairs=True,
            )  # fmt: skip
        elif num_rows:
            normed = self._workspace("normed", *x.shape)
            self._norm_rows(x, None, norm_weight, eps, normed)
            gate_up = self._workspace("gate_up", num_rows, 2 * width)
            self._product_with_bias(normed, weight, bias, gate_up)
            self._launch(
                "activation.cu", "swiglu_rows", shapes.swiglu_rows(num_rows, width),
                gate_up, None, out, _i32(width), **self._types,
            )  # fmt: skip

    def lm_head(self, x, rows, norm_weight, eps, weight, out) -> None:
        num_rows = len(rows)
        if 0 < num_rows <= MAX_ROWS:
            self._gemv(
                "lm_head_rows", num_rows, *weight.shape, x, rows, norm_weight, _f32(eps), weight,
                out, input_dtype=self._sizes.residual_dtype,
            )  # fmt: skip
        elif num_rows:
            normed = self._workspace("head_rows", num_rows, x.shape[1])
            self._norm_rows(x, rows, norm_weight, eps, normed)
            self._matmul(normed, weight, out, 0.0)

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

    # ----------------------------------------------------------------- beyond the interface

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

    def advance_decode_state(
        self,
        sampled: Array,
        block_tables: Array,
        token_ids: Array,
        positions: Array,
        kv_lens: Array,
        slots: Array,
        rope_lens: Array | None,
        counters: Array,
        block_size: int,
    ) -> None:
        """Every sequence of a decode batch takes its sampled token and moves on by one position;
        kernels_cu/decode_state.cu says how."""
        num_seqs, table_width = block_tables.shape
        self._launch(
            "decode_state.cu", "advance_decode_state", shapes.advance_decode_state(num_seqs),
            sampled, block_tables, token_ids, positions, kv_lens, slots, rope_lens, counters,
            _i32(num_seqs), _i32(table_width), _i32(block_size), SCALAR=0,
        )  # fmt: skip

    def fill_normal(self, out: Array, deviation: float, seed: int) -> None:
        """Normal values of mean 0 in an array of the storage type, the same for the same seed."""
        size = math.prod(out.shape)
        grid = min(-(-size // 1024), 32 * self._traits.num_multiprocessors)
        self._launch(
            "random.cu", "fill_normal", LaunchShape((grid,), 256), out, _i64(size),
            _f32(deviation), np.uint64(seed), **self._types,
        )  # fmt: skip

    def resolve_tokens(self, token_ids: Array, sampled: Array) -> None:
        """Put in what the step before sampled: a negative id int32 [T], -1 - r, becomes
        sampled[r]."""
        self._launch(
            "decode_state.cu", "resolve_tokens", shapes.advance_decode_state(len(token_ids)),
            token_ids, sampled, _i32(len(token_ids)), SCALAR=0,
        )  # fmt: skip

    def apply_updates(self, updates: Array, state: Array) -> None:
        """Set words of the decode state: updates int32 [n, 2], index and value; state int32."""
        count = len(updates)
        self._launch(
            "decode_state.cu", "apply_updates", shapes.advance_decode_state(count),
            updates, state, _i32(count), SCALAR=0,
        )  # fmt: skip


def _other(macro: str, dtype: str, scalar: str) -> dict[str, int]:
    """The macro of a type that differs from SCALAR; where it does not, one module serves both."""
    return {} if dtype == scalar else {macro: TYPE_CODES[dtype]}
