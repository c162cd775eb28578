"""The contract of every op: shapes, dtypes, aliasing, and where values are rounded.

Each op is written again under the same name and signature in `numpy_ops` (the reference) and in
the CUDA backend. Ops write into buffers they are given and return nothing; outputs never alias
inputs unless the docstring says so.

Letters: T tokens of the step (all sequences, flat), B sequences, S sampled rows, V vocabulary,
D hidden size, F feed-forward size, H query heads, G key/value heads, d head size,
N blocks of the cache, P slots in a block, M columns of the block table.

Dtypes: "storage" is float32, float16 or bfloat16; `x` (the residual stream) may be wider than the
other activations. Products and sums accumulate in float32 at least. A value is rounded only when it
is stored in a buffer, and at the points marked "rounded" below, to the dtype of `out` unless
another is named, so that fused and unfused paths round alike.

Where a product's `weight` may be quantised (norm_linear, linear_add, norm_swiglu, lm_head) it is a
`quantized.QuantizedMatrix`, on a device its packed form, `packed_matrix.PackedMatrix`; its value is
`dequantize()` of that. A backend may round its scales and offsets to 11 bits (int4), or its weights
to storage.

A cache is of a storage dtype, with None for its scales; or it is quantised: codes [N, G, P, d],
int8 or uint8 (the bits of float8 e4m3), and scales bfloat16 [N, G, P], one for each row of d. What
a row holds is code * scale. A row is written so: scale = max|x| / 127 (e4m3: / 448), rounded;
code = x / scale with the rounded scale, rounded to nearest, ties to even, saturating. Rows of
zeros, and those whose scale would be subnormal, have scale and codes 0; rows that are not finite
have the scale NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

Array = Any  # numpy.ndarray or a device array, by backend


class Ops(ABC):
    """What a backend offers to the model. The order here is the order of a step."""

    @abstractmethod
    def embed(self, token_ids: Array, table: Array, out: Array) -> None:
        """out[t] = table[token_ids[t]].

        token_ids int32 [T], each in [0, V); table [V, D], of a storage dtype of its own;
        out storage [T, D].
        """

    @abstractmethod
    def rope_table(
        self,
        positions: Array,
        rope_lens: Array | None,
        inv_freq: Array,
        ntk_factor: float,
        ntk_context: int,
        attention_factor: float,
        out: Array,
    ) -> None:
        """Cosines and sines of every token's rotary angles, once a step for all layers.

        positions int32 [T]; inv_freq float32 [d/2]; out float32 [T, 2, d/2], cos then sin, each
        times attention_factor. The angle is the float32 product positions[t] * inv_freq[i].
        With rope_lens int32 [T] (dynamic NTK; None otherwise) the frequencies of token t are
        inv_freq[i] * s ** (-2i / (d - 2)), rounded to float32, with
        s = max(1, ntk_factor * rope_lens[t] / ntk_context - (ntk_factor - 1)); s is 1 up to
        ntk_context. Source: RoFormer (Su et al. 2021); dynamic NTK as in transformers.
        """

    @abstractmethod
    def norm_linear(
        self,
        x: Array,
        norm_weight: Array,
        eps: float,
        weight: Array,
        bias: Array | None,
        out: Array,
    ) -> None:
        """out = rms_norm(x) @ weight.T + bias; rms_norm(x) is rounded before the product.

        x storage [T, D]; norm_weight storage [D]; weight storage [R, D]; bias storage [R] or None;
        out storage [T, R]. rms_norm(x) = x / sqrt(mean(x**2) + eps) * norm_weight, in float32.
        Source: RMSNorm (Zhang & Sennrich 2019).
        """

    @abstractmethod
    def rope_write_kv(
        self,
        qkv: Array,
        q_norm: Array | None,
        k_norm: Array | None,
        eps: float,
        rope: Array,
        slots: Array,
        key_cache: Array,
        value_cache: Array,
        key_scales: Array | None,
        value_scales: Array | None,
        q_out: Array,
    ) -> None:
        """Normalise q and k per head where the model does, rotate them, write k and v to the cache.

        qkv storage [T, (H + 2G) * d], heads of q, then k, then v; q_norm, k_norm storage [d] or
        None; rope float32 [T, 2, d/2] from `rope_table`; slots int32 [T], slot = block * P + row
        (padding tokens have slots in block 0, the null block); key_cache, value_cache
        [N, G, P, d], key_scales, value_scales [N, G, P] or None; q_out storage [T, H, d]. Pairs are
        (i, i + d/2). Nothing is rounded between the norm and the store.
        """

    @abstractmethod
    def attention(
        self,
        q: Array,
        key_cache: Array,
        value_cache: Array,
        key_scales: Array | None,
        value_scales: Array | None,
        query_starts: Array,
        kv_lens: Array,
        block_tables: Array,
        scale: float,
        max_queries: int,
        out: Array,
    ) -> None:
        """Causal attention of ragged queries over the paged cache.

        q storage [T, H, d]; key_cache, value_cache [N, G, P, d], key_scales, value_scales [N, G, P]
        or None; query_starts int32 [B + 1]: sequence b owns tokens query_starts[b] …
        query_starts[b+1]-1, which are the last of its kv_lens[b] positions; block_tables int32 [B,
        M]: position p of sequence b lies in block block_tables[b, p // P], row p % P; out storage
        [T, H, d]. Query head h reads key/value head h // (H / G). Slots at or beyond kv_lens may
        hold anything, NaN included, and so may columns of block_tables beyond a sequence's own
        blocks. A sequence without queries is skipped. Probabilities may be rounded to storage
        before they meet v, after they have met its scale. max_queries: no sequence has more
        queries; the host knows it, and a backend may choose its kernel by it.
        """

    @abstractmethod
    def attend(
        self,
        qkv: Array,
        q_norm: Array | None,
        k_norm: Array | None,
        eps: float,
        rope: Array,
        slots: Array,
        key_cache: Array,
        value_cache: Array,
        key_scales: Array | None,
        value_scales: Array | None,
        query_starts: Array,
        kv_lens: Array,
        block_tables: Array,
        scale: float,
        max_queries: int,
        max_kv_len: int,
        q_scratch: Array,
        out: Array,
    ) -> None:
        """`rope_write_kv`, then `attention`: from the QKV product to the attended values.

        Arguments as there; the slots of a sequence's tokens are those of its last positions in
        block_tables. q is rounded to storage between the two. max_kv_len: no sequence is longer, 0
        where the host does not know; a backend may choose its kernel by it. q_scratch storage
        [T, H, d] is room for q, and undefined after. The cache's null block is undefined too; a
        sequence of length 0 is padding, whose output is 0 or undefined.
        """

    @abstractmethod
    def linear_add(self, x: Array, weight: Array, bias: Array | None, residual: Array) -> None:
        """residual += x @ weight.T + bias, in place, rounded once.

        x storage [T, K]; weight storage [D, K]; bias storage [D] or None; residual storage [T, D].
        """

    @abstractmethod
    def norm_swiglu(
        self,
        x: Array,
        norm_weight: Array,
        eps: float,
        weight: Array,
        bias: Array | None,
        out: Array,
    ) -> None:
        """out = silu(gate) * up, where [gate | up] = rms_norm(x) @ weight.T + bias.

        x storage [T, D]; weight storage [2F, D], rows of gate, then of up; bias storage [2F] or
        None; out storage [T, F]. rms_norm(x), gate and up are each rounded.
        Source: GLU variants (Shazeer 2020).
        """

    @abstractmethod
    def lm_head(
        self,
        x: Array,
        rows: Array,
        norm_weight: Array,
        eps: float,
        weight: Array,
        out: Array,
    ) -> None:
        """Logits of the rows that are sampled, and of no other.

        x storage [T, D]; rows int32 [S], indices of tokens; norm_weight [D] and weight [V, D] of
        one storage dtype, which may be another than the layers'; out float32 [S, V] =
        rms_norm(x[rows]) @ weight.T; rms_norm is rounded to norm_weight's dtype.
        """

    @abstractmethod
    def penalize(
        self,
        logits: Array,
        entry_starts: Array,
        token_ids: Array,
        output_counts: Array,
        in_context: Array,
        bias: Array,
        repetition: Array,
        presence: Array,
        frequency: Array,
    ) -> None:
        """Logit bias and penalties, in place, before everything else of the sampler.

        logits float32 [S, V]; row s owns entries entry_starts[s] … entry_starts[s+1]-1 (int32
        [S + 1]) of token_ids int32 [E] (distinct within a row), output_counts int32 [E] (times the
        token stands in the output), in_context bool [E] (stands in prompt or output) and
        bias float32 [E]; repetition, presence, frequency float32 [S]. For each entry, in order:
        logit += bias; if in context: divided by repetition where positive, else multiplied;
        then logit -= presence (if output_counts > 0) + frequency * output_counts.
        Source: repetition penalty from CTRL (Keskar et al. 2019).
        """

    @abstractmethod
    def sample(
        self,
        logits: Array,
        temperature: Array,
        top_k: Array,
        top_p: Array,
        min_p: Array,
        seeds: Array,
        counters: Array,
        out: Array,
    ) -> None:
        """One token id a row: temperature, min-p, top-k, top-p over what is left, one draw.

        logits float32 [S, V]; temperature float32 [S], 0 = argmax (lowest id wins a tie); top_k
        int32 [S], -1 = off; top_p, min_p float32 [S]; seeds uint64 [S]; counters uint32 [S, 2]:
        position of the token and sample index; out int32 [S]. All tokens that tie with the k-th
        logit stay, and all that tie with the last one top_p keeps. The draw is Philox4x32-10 with
        the seed as key and (position, sample, 0, 0) as counter; u in [0, 1) is made of 53 bits,
        (word0 >> 5) * 2**26 + (word1 >> 6) over 2**53, and picks the first id, in the order of
        ids, whose cumulative weight is above u * total. A row whose largest logit is NaN or
        infinite (or that has no other than -inf) gives -1. A row's token depends on its own logits
        and parameters alone.
        """
