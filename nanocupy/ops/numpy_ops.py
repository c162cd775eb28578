"""The ops in NumPy: the reference of every kernel, and what runs where there is no GPU.

Arithmetic is done in `compute` (float32 when running, float64 as an oracle); storage dtypes are
those of the buffers, so 16-bit storage is rounded here as it is on a device.
"""

from __future__ import annotations

import numpy as np

from nanocupy.ops import philox
from nanocupy.ops.interface import Ops
from nanocupy.ops.kv_codes import dequantize_rows, quantize_rows
from nanocupy.quantized import QuantizedMatrix

# Scores of one tile of attention, in elements: bounds the temporary memory of a long prefill.
MAX_SCORE_ELEMENTS = 1 << 24
# Logits that are sampled together: rows of small vocabularies share the cost of each call.
MAX_SAMPLE_ELEMENTS = 1 << 16
WIDE_VOCAB = 1 << 12  # rows of more are drawn one by one, without sorting them
HEAD_ROWS = 1 << 9  # of an LM head in 16 bits, made float32 at a time


class NumpyOps(Ops):
    """See `Ops` for the meaning of every argument; arrays are numpy arrays with any strides."""

    def __init__(self, compute: type[np.floating] = np.float32) -> None:
        self.compute = np.dtype(compute)

    # ----------------------------------------------------------------- helpers

    def _up(self, array: np.ndarray) -> np.ndarray:
        return array.astype(self.compute, copy=False)

    def _rounded(self, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """`array` as it reads after being stored in `dtype` (float32 compute: a no-op there)."""
        if dtype.itemsize >= 4:
            return array
        return array.astype(dtype).astype(self.compute)

    def _rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        x = self._up(x)
        mean_square = np.einsum("...i,...i->...", x, x) / x.shape[-1]
        inverse = 1 / np.sqrt(mean_square + self.compute.type(eps))
        return x * inverse[..., None] * self._up(weight)

    def _weight(self, weight: np.ndarray | QuantizedMatrix) -> np.ndarray:
        return self._up(weight.dequantize() if isinstance(weight, QuantizedMatrix) else weight)

    def _product(
        self, x: np.ndarray, weight: np.ndarray | QuantizedMatrix, bias: np.ndarray | None
    ) -> np.ndarray:
        y = x @ self._weight(weight).T
        if bias is not None:
            y += self._up(bias)
        return y

    # ----------------------------------------------------------------- the ops

    def embed(self, token_ids, table, out) -> None:
        out[...] = table[token_ids]

    def rope_table(
        self, positions, rope_lens, inv_freq, ntk_factor, ntk_context, attention_factor, out
    ) -> None:
        if rope_lens is not None:
            half = len(inv_freq)
            stretch = ntk_factor * rope_lens.astype(np.float64) / ntk_context - (ntk_factor - 1)
            stretch = np.where(rope_lens > ntk_context, np.maximum(stretch, 1), 1)
            exponents = np.arange(half) * (-2.0 / max(2 * half - 2, 1))
            inv_freq = (inv_freq * stretch[:, None] ** exponents).astype(np.float32)
        angles = self._up(positions.astype(np.float32)[:, None] * inv_freq)
        out[:, 0] = np.cos(angles) * attention_factor
        out[:, 1] = np.sin(angles) * attention_factor

    def norm_linear(self, x, norm_weight, eps, weight, bias, out) -> None:
        normed = self._rounded(self._rms_norm(x, norm_weight, eps), out.dtype)
        out[...] = self._product(normed, weight, bias)

    def rope_write_kv(
        self, qkv, q_norm, k_norm, eps, rope, slots, key_cache, value_cache, key_scales,
        value_scales, q_out,
    ) -> None:  # fmt: skip
        num_tokens, num_heads, head_size = q_out.shape
        num_kv_heads, block_size = key_cache.shape[1:3]
        heads = self._up(qkv.reshape(num_tokens, num_heads + 2 * num_kv_heads, head_size))
        q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
        if q_norm is not None:
            q = self._rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = self._rms_norm(k, k_norm, eps)
        cos, sin = self._up(rope[:, None, 0]), self._up(rope[:, None, 1])  # [T, 1, d/2]
        blocks, rows = slots // block_size, slots % block_size
        _rotate(q, cos, sin, q_out)
        rotated = np.empty(k.shape, self.compute)
        _rotate(k, cos, sin, rotated)
        values = heads[:, num_heads + num_kv_heads :]
        for cache, scales, x in (
            (key_cache, key_scales, rotated), (value_cache, value_scales, values)
        ):  # fmt: skip
            if scales is None:
                cache[blocks, :, rows] = x
            else:
                cache[blocks, :, rows], scales[blocks, :, rows] = quantize_rows(x, cache.dtype)

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
        keys, values = (key_cache, key_scales), (value_cache, value_scales)
        num_queries = np.diff(query_starts)
        single = np.flatnonzero(num_queries == 1)
        if len(single) > 1:
            self._attend_single(
                q, keys, values, query_starts[single], kv_lens[single], block_tables[single],
                scale, out,
            )  # fmt: skip
        for b in np.flatnonzero(num_queries > (1 if len(single) > 1 else 0)):
            rows = slice(query_starts[b], query_starts[b + 1])
            self._attend_sequence(
                q[rows], keys, values, int(kv_lens[b]), block_tables[b], scale, out[rows]
            )

    def attend(
        self, qkv, q_norm, k_norm, eps, rope, slots, key_cache, value_cache, key_scales,
        value_scales, query_starts, kv_lens, block_tables, scale, max_queries, max_kv_len,
        q_scratch, out,
    ) -> None:  # fmt: skip
        caches = key_cache, value_cache, key_scales, value_scales
        self.rope_write_kv(qkv, q_norm, k_norm, eps, rope, slots, *caches, q_scratch)
        self.attention(
            q_scratch, *caches, query_starts, kv_lens, block_tables, scale, max_queries, out
        )

    def _gathered(self, gather, cache_and_scales, *where) -> np.ndarray:
        """What `gather` picks of a cache [N, G, P, d], as numbers."""
        cache, scales = cache_and_scales
        if scales is None:
            return self._up(gather(cache, *where))
        # Scales as rows of one value.
        steps = gather(scales[..., None], *where)[..., 0]
        return dequantize_rows(gather(cache, *where), steps, self.compute)

    def _attend_sequence(self, q, keys, values, kv_len, blocks, scale, out) -> None:
        """One sequence, any number of queries, in tiles of queries."""
        num_queries, num_heads, head_size = q.shape
        num_kv_heads = keys[0].shape[1]
        keys = self._gathered(_gather_sequence, keys, blocks, kv_len)  # [G, L, d]
        values = self._gathered(_gather_sequence, values, blocks, kv_len)
        grouped = self._up(q).reshape(num_queries, num_kv_heads, -1, head_size)
        grouped = grouped.transpose(1, 2, 0, 3) * self.compute.type(scale)  # [G, H/G, Tq, d]
        first = kv_len - num_queries  # position of the first query
        tile = max(1, MAX_SCORE_ELEMENTS // (num_heads * kv_len))
        if not np.isfinite(values[:, first:]).all():
            tile = 1  # 0 * NaN is NaN: who comes before it must not have it in its product
        for start in range(0, num_queries, tile):
            queries = grouped[:, :, start : start + tile]
            num = queries.shape[2]
            end = first + start + num  # keys beyond are in every query's future
            flat = queries.reshape(num_kv_heads, -1, head_size)
            scores = flat @ keys[:, :end].swapaxes(1, 2)  # [G, H/G * num, end]
            if num > 1:
                future = np.arange(end) > (first + start + np.arange(num))[:, None]
                scores.reshape(num_kv_heads, -1, num, end)[:, :, future] = -np.inf
            weighted = _softmax(scores) @ values[:, :end]
            weighted = weighted.reshape(num_heads, num, head_size).swapaxes(0, 1)
            out[start : start + tile] = weighted

    def _attend_single(self, q, keys, values, tokens, kv_lens, tables, scale, out) -> None:
        """Many sequences with one query each, at once; shorter ones are padded and masked."""
        num_kv_heads, block_size, head_size = keys[0].shape[1:]
        num_blocks = -(-int(kv_lens.max()) // block_size)
        beyond = np.arange(num_blocks * block_size) >= kv_lens[:, None]  # [B, L]
        # Columns past a sequence's own blocks may hold anything: the null block stands in.
        used = np.arange(num_blocks) * block_size < kv_lens[:, None]
        tables = np.where(used, tables[:, :num_blocks], 0)
        keys = self._gathered(_gather_many, keys, tables)  # [B, G, L, d]
        values = self._gathered(_gather_many, values, tables)
        values = np.where(beyond[:, None, :, None], 0, values)  # 0 * NaN would be NaN
        queries = self._up(q[tokens]).reshape(len(tokens), num_kv_heads, -1, head_size)
        scores = (queries * self.compute.type(scale)) @ keys.swapaxes(2, 3)  # [B, G, H/G, L]
        scores = np.where(beyond[:, None, None], -np.inf, scores)
        out[tokens] = (_softmax(scores) @ values).reshape(len(tokens), -1, head_size)

    def linear_add(self, x, weight, bias, residual) -> None:
        residual[...] = self._up(residual) + self._product(self._up(x), weight, bias)

    def norm_swiglu(self, x, norm_weight, eps, weight, bias, out) -> None:
        normed = self._rounded(self._rms_norm(x, norm_weight, eps), out.dtype)
        gate_up = self._rounded(self._product(normed, weight, bias), out.dtype)
        size = out.shape[-1]
        gate, up = gate_up[:, :size], gate_up[:, size:]
        with np.errstate(over="ignore"):  # exp overflows to inf, and the quotient is the right 0
            out[...] = gate / (1 + np.exp(-gate)) * up

    def lm_head(self, x, rows, norm_weight, eps, weight, out) -> None:
        normed = self._rounded(self._rms_norm(x[rows], norm_weight, eps), norm_weight.dtype)
        # A head in 16 bits becomes numbers a few rows at a time, and so lies in the caches.
        whole = isinstance(weight, QuantizedMatrix) or weight.dtype.itemsize >= 4
        step = out.shape[1] if whole else HEAD_ROWS
        for first in range(0, out.shape[1], step):
            part = slice(first, first + step)
            rows_of = self._weight(weight if whole else weight[part])
            if out.dtype == self.compute:
                np.matmul(normed, rows_of.T, out=out[:, part])
            else:
                out[:, part] = normed @ rows_of.T

    def penalize(
        self, logits, entry_starts, token_ids, output_counts, in_context, bias,
        repetition, presence, frequency,
    ) -> None:  # fmt: skip
        rows = np.repeat(np.arange(len(logits)), np.diff(entry_starts))
        values = self._up(logits[rows, token_ids]) + bias
        factor = np.where(in_context, self._up(repetition)[rows], 1)
        values = np.where(values > 0, values / factor, values * factor)
        values -= self._up(presence)[rows] * (output_counts > 0)
        values -= self._up(frequency)[rows] * output_counts
        logits[rows, token_ids] = values

    def sample(self, logits, temperature, top_k, top_p, min_p, seeds, counters, out) -> None:
        num_rows, vocab = logits.shape
        draws = philox.uniforms(seeds, counters)
        # What stays of this: greedy rows, and those whose largest logit is infinite or NaN.
        best = logits.argmax(axis=1)
        is_finite = np.isfinite(logits[np.arange(num_rows), best])
        out[...] = np.where(is_finite, best, -1)
        drawn = np.flatnonzero((temperature != 0) & is_finite)
        if vocab > WIDE_VOCAB:
            for s in drawn:
                options = float(temperature[s]), int(top_k[s]), float(top_p[s]), float(min_p[s])
                out[s] = _draw_wide(logits[s], *options, draws[s])
            return
        num_tile = max(1, MAX_SAMPLE_ELEMENTS // vocab)
        for start in range(0, len(drawn), num_tile):
            rows = drawn[start : start + num_tile]
            weights = _kept_weights(
                logits[rows], temperature[rows], top_k[rows], top_p[rows], min_p[rows]
            )
            cumulative = np.cumsum(weights, axis=1)
            # A draw is at most 1 - 2^-53: its product with the sum is below the sum, rounded too.
            out[rows] = (cumulative <= draws[rows, None] * cumulative[:, -1:]).sum(axis=1)


def kept_probabilities(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """Unnormalised float64 weights [V] after temperature, min-p, top-k and top-p; 0 = cut.

    logits float32 [V], temperature > 0. The largest weight is 1.
    """
    options = (np.array([value]) for value in (temperature, top_k, top_p, min_p))
    return _kept_weights(logits[None], *options)[0]


def _weights(logits: np.ndarray, temperature: np.ndarray | float) -> np.ndarray:
    """exp((logits - largest of the row) / temperature), float64, of rows [S, V] or of one [V]."""
    weights = np.subtract(logits, logits.max(axis=-1, keepdims=True), dtype=np.float64)
    weights /= temperature
    return np.exp(weights, out=weights)


def _floors(logits, temperature, min_p) -> np.ndarray:
    """The lowest logits min-p keeps, float64; logits [S, V] with [S, 1], or [V] with numbers.

    Logits are compared, here and below, not weights: they can differ where weights do not.
    """
    top = logits.max(axis=-1, keepdims=True).astype(np.float64)
    with np.errstate(divide="ignore"):  # log(0): no floor
        return np.minimum(top + temperature * np.log(np.float64(min_p)), top)


def _kept_weights(logits, temperature, top_k, top_p, min_p) -> np.ndarray:
    """As `kept_probabilities` for rows [S, V], every option [S]."""
    vocab = logits.shape[1]
    temperature, min_p, top_p = temperature[:, None], min_p[:, None], top_p[:, None]
    weights = _weights(logits, temperature)
    floors = _floors(logits, temperature, min_p)  # [S, 1]
    limits_count = (top_k > 0) & (top_k < vocab)
    limits_mass = top_p[:, 0] < 1
    rows = np.flatnonzero(limits_count | limits_mass)
    if len(rows):
        descending = np.sort(logits[rows], axis=1)[:, ::-1]
        last = np.where(limits_count, top_k, vocab)[rows, None] - 1
        floors[rows] = np.maximum(floors[rows], np.take_along_axis(descending, last, axis=1))
    if limits_mass.any():
        sorted_weights = _weights(descending, temperature[rows])
        sorted_weights[descending < floors[rows]] = 0
        up_to = np.cumsum(sorted_weights, axis=1)
        share = np.where(top_p < 1, top_p, np.inf)[rows] * up_to[:, -1:]
        # A token stays while the mass of those above it is short of top_p; the first always does.
        num_kept = 1 + (up_to[:, :-1] < share).sum(axis=1, keepdims=True)
        lowest = np.take_along_axis(descending, num_kept - 1, axis=1)
        floors[rows] = np.maximum(floors[rows], lowest)
    weights *= logits >= floors
    return weights


def _draw_wide(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, draw: float
) -> int:
    """The id that `draw` picks of one row [V], by the same rules without a sort."""
    weights = _weights(logits, temperature)
    ids = None
    if 0 < top_k < len(logits) or min_p > 0:
        floor = _floors(logits, temperature, min_p)
        if 0 < top_k < len(logits):
            floor = np.maximum(floor, np.partition(logits, -top_k)[-top_k])
        ids = np.flatnonzero(logits >= floor)
        logits, weights = logits[ids], weights[ids]
    if top_p < 1:
        stays = np.flatnonzero(logits >= _floor_of_mass(logits, weights, top_p))
        ids = stays if ids is None else ids[stays]
        weights = weights[stays]
    cumulative = np.cumsum(weights)
    pick = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    return pick if ids is None else int(ids[pick])


def _floor_of_mass(logits: np.ndarray, weights: np.ndarray, share: float) -> float:
    """The lowest logit [n] for which those above it hold less than `share` < 1 of the weight.

    Narrowed down around pivots, as quickselect does, to a number that is sorted.
    """
    target = share * weights.sum()
    above = 0.0  # the weight of what lies above all that is left
    floor = logits.max()
    while len(logits) > 256:
        pivot = np.sort(logits[:: len(logits) // 64])[32]
        stays = np.flatnonzero(logits > pivot)  # indices, as masks are slow to pick by
        up_to = above + weights[stays].sum()
        if up_to < target:
            floor = pivot
            above = up_to + weights[np.flatnonzero(logits == pivot)].sum()
            if above >= target:
                return floor
            stays = np.flatnonzero(logits < pivot)
        logits, weights = logits[stays], weights[stays]
    order = np.argsort(logits)[::-1]
    up_to = above + np.cumsum(weights[order])
    num_short = int(np.searchsorted(up_to, target))  # whose whole weight does not reach it
    return logits[order[min(num_short, len(order) - 1)]] if len(order) else floor


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray) -> None:
    """Rotate the pairs (i, i + d/2): x, out [T, heads, d]; cos, sin [T, 1, d/2]."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    out[..., :half] = low * cos - high * sin
    out[..., half:] = high * cos + low * sin


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in place."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def _gather_sequence(cache: np.ndarray, blocks: np.ndarray, kv_len: int) -> np.ndarray:
    """Cache [N, G, P, d] of one sequence -> [G, kv_len, d]; a view if its blocks lie in a row."""
    num_kv_heads, block_size, head_size = cache.shape[1:]
    blocks = blocks[: -(-kv_len // block_size)]
    heads_first = cache.swapaxes(0, 1)
    if len(blocks) == 1 or (np.diff(blocks) == 1).all():
        gathered = heads_first[:, blocks[0] : blocks[0] + len(blocks)]
    else:
        gathered = heads_first[:, blocks]
    return gathered.reshape(num_kv_heads, -1, head_size)[:, :kv_len]


def _gather_many(cache: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Cache [N, G, P, d], tables [B, M] -> [B, G, M * P, d]."""
    num_kv_heads, _, head_size = cache.shape[1:]
    gathered = cache.swapaxes(0, 1)[:, tables]  # [G, B, M, P, d]
    return gathered.swapaxes(0, 1).reshape(len(tables), num_kv_heads, -1, head_size)
