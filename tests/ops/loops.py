"""Every op as plain Python loops in float64, written from the interface's docstrings alone.

Slow and obvious: this is what the NumPy reference itself is held against. Arguments are NumPy
arrays, under the interface's names; outputs are written in whatever dtype they have.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np


def rounded(value: float, dtype: np.dtype) -> float:
    """`value` as it reads after being stored in `dtype`."""
    return float(np.float64(value).astype(dtype))


def loop_rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> list[float]:
    mean_square = math.fsum(float(v) ** 2 for v in x) / len(x)
    scale = 1 / math.sqrt(mean_square + eps)
    return [float(v) * scale * float(w) for v, w in zip(x, weight, strict=True)]


def dot(x: Any, y: Any) -> float:
    return math.fsum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def loop_product(x: Any, weight: np.ndarray, bias: np.ndarray | None) -> list[float]:
    return [dot(x, row) + (0.0 if bias is None else float(bias[r])) for r, row in enumerate(weight)]


def loop_embed(token_ids, table, out) -> None:
    for t in range(len(token_ids)):
        for i in range(table.shape[1]):
            out[t, i] = table[token_ids[t], i]


def loop_rope_table(
    positions, rope_lens, inv_freq, ntk_factor, ntk_context, attention_factor, out
) -> None:
    head_size = 2 * len(inv_freq)
    for t in range(len(positions)):
        for i in range(len(inv_freq)):
            frequency = inv_freq[i]
            if rope_lens is not None and i > 0:
                s = max(1, ntk_factor * int(rope_lens[t]) / ntk_context - (ntk_factor - 1))
                frequency = np.float32(float(frequency) * s ** (-2 * i / (head_size - 2)))
            angle = float(np.float32(positions[t]) * frequency)
            out[t, 0, i] = math.cos(angle) * attention_factor
            out[t, 1, i] = math.sin(angle) * attention_factor


def loop_norm_linear(x, norm_weight, eps, weight, bias, out) -> None:
    for t in range(len(x)):
        normed = [rounded(v, out.dtype) for v in loop_rms_norm(x[t], norm_weight, eps)]
        out[t] = loop_product(normed, weight, bias)


BFLOAT16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def loop_codes(values: list[float], dtype: np.dtype) -> tuple[list[Any], float]:
    """The codes of a row, and its scale."""
    limit = 127 if dtype == np.int8 else 448
    scale = rounded(max(abs(v) for v in values) / limit, BFLOAT16)
    codes = []
    for value in values:
        x = min(max(value / scale, -limit), limit) if scale > 0 else 0.0
        # Python rounds ties to even.
        codes.append(round(x) if dtype == np.int8 else np.float64(x).astype(E4M3).view(np.uint8))
    return codes, scale


def loop_row(codes: np.ndarray, scale: Any) -> list[float]:
    """What a row of codes stands for."""
    values = codes if codes.dtype == np.int8 else codes.view(E4M3)
    return [float(v) * float(scale) for v in values]


def loop_rope_write_kv(
    qkv, q_norm, k_norm, eps, rope, slots, key_cache, value_cache, key_scales, value_scales, q_out
) -> None:
    num_heads, d = q_out.shape[1:]
    num_kv_heads, block_size = key_cache.shape[1:3]

    def turned(t: int, head: int, norm: np.ndarray | None) -> list[float]:
        values = [float(v) for v in qkv[t, head * d : (head + 1) * d]]
        if norm is not None:
            values = loop_rms_norm(values, norm, eps)
        result = [0.0] * d
        for i in range(d // 2):
            cos, sin = float(rope[t, 0, i]), float(rope[t, 1, i])
            a, b = values[i], values[i + d // 2]
            result[i], result[i + d // 2] = a * cos - b * sin, b * cos + a * sin
        return result

    for t in range(len(qkv)):
        block, row = divmod(int(slots[t]), block_size)
        for h in range(num_heads):
            q_out[t, h] = turned(t, h, q_norm)
        for g in range(num_kv_heads):
            start = (num_heads + num_kv_heads + g) * d
            key = turned(t, num_heads + g, k_norm)
            value = [float(v) for v in qkv[t, start : start + d]]
            for x, cache, scales in (
                (key, key_cache, key_scales), (value, value_cache, value_scales)
            ):  # fmt: skip
                if scales is None:
                    cache[block, g, row] = x
                else:
                    cache[block, g, row], scales[block, g, row] = loop_codes(x, cache.dtype)


def loop_attention(
    q, key_cache, value_cache, key_scales, value_scales, query_starts, kv_lens, block_tables, scale,
    max_queries, out,
) -> None:  # fmt: skip
    def row_of(cache: np.ndarray, scales: np.ndarray | None, n: int, g: int, row: int) -> Any:
        x = cache[n, g, row]
        return x if scales is None else loop_row(x, scales[n, g, row])

    block_size = key_cache.shape[2]
    queries_per_kv_head = q.shape[1] // key_cache.shape[1]
    for b in range(len(kv_lens)):
        start, end, kv_len = int(query_starts[b]), int(query_starts[b + 1]), int(kv_lens[b])
        for t in range(start, end):
            position = kv_len - (end - t)
            places = [
                (block_tables[b, p // block_size], p % block_size) for p in range(position + 1)
            ]
            for h in range(q.shape[1]):
                g = h // queries_per_kv_head
                keys = [row_of(key_cache, key_scales, n, g, row) for n, row in places]
                scores = [scale * dot(q[t, h], key) for key in keys]
                highest = max(scores)
                weights = [math.exp(s - highest) for s in scores]
                total = math.fsum(weights)
                values = [row_of(value_cache, value_scales, n, g, row) for n, row in places]
                for i in range(q.shape[2]):
                    column = [float(v[i]) for v in values]
                    out[t, h, i] = dot(weights, column) / total


def loop_attend(
    qkv, q_norm, k_norm, eps, rope, slots, key_cache, value_cache, key_scales, value_scales,
    query_starts, kv_lens, block_tables, scale, max_queries, max_kv_len, q_scratch, out,
) -> None:  # fmt: skip
    caches = key_cache, value_cache, key_scales, value_scales
    loop_rope_write_kv(qkv, q_norm, k_norm, eps, rope, slots, *caches, q_scratch)
    loop_attention(q_scratch, *caches, query_starts, kv_lens, block_tables, scale, max_queries, out)


def loop_linear_add(x, weight, bias, residual) -> None:
    for t in range(len(x)):
        before = [float(v) for v in residual[t]]
        added = loop_product(x[t], weight, bias)
        residual[t] = [a + b for a, b in zip(before, added, strict=True)]


def loop_norm_swiglu(x, norm_weight, eps, weight, bias, out) -> None:
    size = out.shape[1]
    for t in range(len(x)):
        normed = [rounded(v, out.dtype) for v in loop_rms_norm(x[t], norm_weight, eps)]
        gate_up = [rounded(v, out.dtype) for v in loop_product(normed, weight, bias)]
        for i in range(size):
            gate, up = gate_up[i], gate_up[size + i]
            sigmoid = 1 / (1 + math.exp(-gate)) if gate > -700 else 0.0
            out[t, i] = gate * sigmoid * up


def loop_lm_head(x, rows, norm_weight, eps, weight, out) -> None:
    for s in range(len(rows)):
        normed = loop_rms_norm(x[rows[s]], norm_weight, eps)
        out[s] = loop_product([rounded(v, norm_weight.dtype) for v in normed], weight, None)


def loop_penalize(
    logits, entry_starts, token_ids, output_counts, in_context, bias, repetition, presence,
    frequency,
) -> None:  # fmt: skip
    for s in range(len(logits)):
        for e in range(entry_starts[s], entry_starts[s + 1]):
            value = float(logits[s, token_ids[e]]) + float(bias[e])
            if in_context[e]:
                factor = float(repetition[s])
                value = value / factor if value > 0 else value * factor
            if output_counts[e] > 0:
                value -= float(presence[s])
            value -= float(frequency[s]) * int(output_counts[e])
            logits[s, token_ids[e]] = value


def loop_philox(counter: list[int], seed: int) -> list[int]:
    """Philox4x32-10 in whole numbers: `counter` of four words, the key from a 64-bit seed."""
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return c


def loop_sample(logits, temperature, top_k, top_p, min_p, seeds, counters, out) -> None:
    for s in range(len(logits)):
        row = [float(v) for v in logits[s]]
        if temperature[s] == 0:
            out[s] = row.index(max(row))
            continue
        weights = {i: math.exp((v - max(row)) / float(temperature[s])) for i, v in enumerate(row)}
        kept = {i for i, w in weights.items() if w > 0 and w >= float(min_p[s])}
        if 0 < top_k[s] < len(row):
            kth = sorted(row, reverse=True)[top_k[s] - 1]
            kept = {i for i in kept if row[i] >= kth}
        total = math.fsum(weights[i] for i in kept)
        # top-p: a token goes when those strictly above it already hold that share of the mass.
        kept = {
            i
            for i in kept
            if math.fsum(weights[j] for j in kept if row[j] > row[i]) < float(top_p[s]) * total
        }
        a, b, _, _ = loop_philox([int(counters[s, 0]), int(counters[s, 1]), 0, 0], int(seeds[s]))
        draw = ((a >> 5) * 2**26 + (b >> 6)) / 2**53
        target = draw * math.fsum(weights[i] for i in kept)
        mass = 0.0
        for i in sorted(kept):
            mass += weights[i]
            out[s] = i
            if mass > target:
                break
