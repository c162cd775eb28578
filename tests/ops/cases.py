"""Seeded calls of every op, shared by all backends: arguments, which of them are written, poison.

Owns the shapes and values that the ops are tried on. Knows nothing of any backend: everything here
is a NumPy array that a test puts where its backend wants it, inside `guarded` buffers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "float64": np.dtype(np.float64),  # not a storage type: for the reference alone
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

SCALE = DTYPES["bfloat16"]  # of the rows of a quantised cache
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# Quantised caches: the dtype of their codes, and a code that no row has (of e4m3 a NaN).
CODES = {"int8": (np.dtype(np.int8), -128), "fp8": (np.dtype(np.uint8), 0x7F)}

GUARD_ROWS = 16  # keeps a buffer's start a multiple of 32 bytes, whatever its width
GUARD_VALUE = 113
FAR_BLOCK = 1 << 30  # fills block-table columns that no sequence owns: must not be followed


@dataclass(frozen=True)
class Call:
    """One call: every argument by name in the interface's order; `written` are the outputs, which
    hold NaN (-1 where they are integers) or, if the op updates in place, what is there before.

    `ignored` masks elements of an output whose value means nothing (the null block)."""

    arguments: dict[str, Any]
    written: tuple[str, ...]
    ignored: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def head_dtype(self) -> np.dtype | None:
        """Of lm_head: what its normed rows are rounded to, where float32 and float64 may come to
        neighbours."""
        return self.arguments["norm_weight"].dtype if "rows" in self.arguments else None


@dataclass(frozen=True)
class Case:
    """A named call of one op; `build(storage)` gives it in a storage dtype."""

    op: str
    name: str
    make: Callable[[np.random.Generator, np.dtype], Call]

    def build(self, storage: np.dtype) -> Call:
        return self.make(np.random.default_rng(zlib.crc32(f"{self.op} {self}".encode())), storage)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def guarded(array: np.ndarray, fill: float = GUARD_VALUE) -> np.ndarray:
    """`array` with GUARD_ROWS rows of `fill` before and after it: use `inner` of it."""
    rows = np.full((GUARD_ROWS, *array.shape[1:]), fill).astype(array.dtype)
    return np.concatenate([rows, array, rows])


def inner(whole: Any) -> Any:
    """The part of a guarded buffer (of any array library) that is the argument itself."""
    return whole[GUARD_ROWS : len(whole) - GUARD_ROWS]


def guards_intact(whole: np.ndarray, fill: float = GUARD_VALUE) -> bool:
    """Whether nothing was written outside `inner`."""
    rows = np.concatenate([whole[:GUARD_ROWS], whole[len(whole) - GUARD_ROWS :]])
    return bool((rows == np.asarray(fill).astype(whole.dtype)).all())


def _nan(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    return np.full(shape, np.nan).astype(dtype)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, std: float = 1.0):
    return (rng.standard_normal(shape) * std).astype(dtype)


def _norm_weight(rng: np.random.Generator, size: int, dtype: np.dtype) -> np.ndarray:
    return rng.uniform(0.5, 1.5, size).astype(dtype)


def _int32(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


# ------------------------------------------------------------------------------ embed, rope_table


def _embed(num_tokens: int, vocab: int, hidden: int, table: str = "") -> Callable[..., Call]:
    """table: its dtype, if not the storage type."""

    def make(rng: np.random.Generator, storage: np.dtype) -> Call:
        arguments = {
            "token_ids": _int32(rng.integers(0, vocab, num_tokens)),
            "table": _normal(rng, (vocab, hidden), DTYPES[table] if table else storage),
            "out": _nan((num_tokens, hidden), storage),
        }
        if num_tokens > 1:
            arguments["token_ids"][:2] = vocab - 1, 0
        return Call(arguments, ("out",))

    return make


def _rope_table(
    positions: list[int], head_size: int, rope_lens: list[int] | None = None, attention=1.0
) -> Callable[..., Call]:
    def make(rng: np.random.Generator, storage: np.dtype) -> Call:
        half = head_size // 2
        inv_freq = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
        arguments = {
            "positions": _int32(positions),
            "rope_lens": None if rope_lens is None else _int32(rope_lens),
            "inv_freq": inv_freq,
            "ntk_factor": 4.0 if rope_lens is not None else 1.0,
            "ntk_context": 32,
            "attention_factor": attention,
            "out": _nan((len(positions), 2, half), np.float32),
        }
        return Call(arguments, ("out",))

    return make


# ------------------------------------------------------------------------------ products


def _product(
    op: str,
    num_tokens: int,
    inputs: int,
    outputs: int,
    bias: bool = False,
    wide: bool = False,
    x_scale: float = 1.0,
) -> Callable[..., Call]:
    """norm_linear, linear_add, norm_swiglu; `wide`: the residual stream is float32."""

    def make(rng: np.random.Generator, storage: np.dtype) -> Call:
        residual_dtype = np.dtype(np.float32) if wide and storage.itemsize < 4 else storage
        rows = 2 * outputs if op == "norm_swiglu" else outputs
        weight = _normal(rng, (rows, inputs), storage, 1 / np.sqrt(inputs))
        bias_array = _normal(rng, (rows,), storage) if bias else None
        if op == "linear_add":
            arguments = {
                "x": _normal(rng, (num_tokens, inputs), storage, x_scale),
                "weight": weight,
                "bias": bias_array,
                "residual": _normal(rng, (num_tokens, outputs), residual_dtype),
            }
            return Call(arguments, ("residual",))
        arguments = {
            "x": _normal(rng, (num_tokens, inputs), residual_dtype, x_scale),
            "norm_weight": _norm_weight(rng, inputs, storage),
            "eps": 1e-5,
            "weight": weight,
            "bias": bias_array,
            "out": _nan((num_tokens, outputs), storage),
        }
        return Call(arguments, ("out",))

    return make


def _lm_head(
    num_tokens: int, rows: list[int], hidden: int, vocab: int, wide: bool = False, head: str = ""
) -> Callable[..., Call]:
    """head: the dtype of its weights, if not the storage type."""

    def make(rng: np.random.Generator, storage: np.dtype) -> Call:
        own = DTYPES[head] if head else storage
        x_dtype = np.dtype(np.float32) if wide and storage.itemsize < 4 else storage
        x = _normal(rng, (num_tokens, hidden), x_dtype)
        x[[t for t in range(num_tokens) if t not in rows]] = np.nan  # rows nobody asked for
        arguments = {
            "x": x,
            "rows": _int32(rows),
            "norm_weight": _norm_weight(rng, hidden, own),
            "eps": 1e-6,
            "weight": _normal(rng, (vocab, hidden), own, 1 / np.sqrt(hidden)),
            "out": _nan((len(rows), vocab), np.float32),
        }
        return Call(arguments, ("out",))

    return make


# ------------------------------------------------------------------------------ the paged cache


class Rows:
    """Makes a cache's parts, and random rows for it; codes: of `CODES`, "" for a storage dtype."""

    def __init__(self, rng: np.random.Generator, storage: np.dtype, codes: str) -> None:
        self.rng, self.storage, self.codes = rng, storage, codes

    def poison(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
        """A cache [N, G, P, d] and its scales [N, G, P], of which nothing may be used."""
        if not self.codes:
            return _nan(shape, self.storage), None
        return np.full(shape, *CODES[self.codes][::-1]), _nan(shape[:3], SCALE)

    def normal(self, *shape: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows [..., d], and their scales [...]: such that they are about normal, each its own."""
        x = self.rng.standard_normal(shape)
        if not self.codes:
            return x.astype(self.storage), None
        scales = (self.rng.uniform(0.5, 1.5, shape[:-1]) / 40).astype(SCALE)
        if self.codes == "int8":
            return np.clip(np.rint(x * 40), -127, 127).astype(np.int8), scales
        return (x * 40).astype(E4M3).view(np.uint8), scales

    def fill(self, parts: tuple[np.ndarray, np.ndarray | None], where: Any) -> None:
        """Random rows at an index of the first three axes."""
        cache, scales = parts
        cache[where], new = self.normal(*cache[where].shape)
        if scales is not None:
            scales[where] = new


def code_order(codes: np.ndarray) -> np.ndarray:
    """Codes as whole numbers of which neighbours differ by one."""
    if codes.dtype == np.int8:
        return codes.astype(np.int32)
    return (codes & 0x7F).astype(np.int32) * np.where(codes & 0x80, -1, 1)


def assert_codes_close(
    got: np.ndarray, wanted: np.ndarray, ignored: np.ndarray | None = None, most: int = 1
) -> None:
    """Codes differ by `most` neighbours, and few of them: their rows are rounded numbers, which may
    fall to the other side of a tie."""
    assert got.dtype == wanted.dtype
    differences = abs(code_order(got) - code_order(wanted))
    if ignored is not None:
        differences = differences[~ignored]
    assert differences.max(initial=0) <= most
    assert (differences > 0).sum() <= 1 + differences.size // 50


def _rope_write_kv(
    num_tokens: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    block_size: int = 16,
    norms: str = "",
    padding: int = 0,
    codes: str = "",
) -> Callable[..., Call]:
    """`norms`: letters of "qk" that have a norm; `padding`: tokens at the end that are none; codes:
    of a quantised cache, whose first token's key and value are then zeros."""

    def make(rng: np.random.Generator, storage: np.dtype) -> Call:
        half, num_blocks = head_size // 2, 3 + num_tokens // block_size
        slots = rng.permutation(np.arange(block_size, num_blocks * block_size))[:num_tokens]
        slots[num_tokens - padding :] = rng.integers(0, block_size, padding)
        angles = rng.uniform(0, 2 * np.pi, (num_tokens, half))
        cache_shape = (num_blocks, kv_heads, block_size, head_size)
        null_block = np.zeros(cache_shape, bool)
        null_block[0] = True
        qkv = _normal(rng, (num_tokens, (heads + 2 * kv_heads) * head_size), storage)
        if codes:
            qkv[:1, heads * head_size :] = 0
        cache_rows = Rows(rng, storage, codes)
        (key_cache, key_scales), (value_cache, value_scales) = (
            cache_rows.normal(*cache_shape) for _ in range(2)
        )
        arguments = {
            "qkv": qkv,
            "q_norm": _norm_weight(rng, head_size, storage) if "q" in norms else None,
            "k_norm": _norm_weight(rng, head_size, storage) if "k" in norms else None,
            "eps": 1e-6,
            "rope": (1.25 * np.stack([np.cos(angles), np.sin(angles)], 1)).astype(np.float32),
            "slots": _int32(slots),
            "key_cache": key_cache,
            "value_cache": value_cache,
            "key_scales": key_scales,
            "value_scales": value_scales,
            "q_out": _nan((num_tokens, heads, head_size), storage),
        }
        parts = "key_cache", "value_cache", *(("key_scales", "value_scales") if codes else ())
        ignored = {n: null_block[..., 0] if n.endswith("scales") else null_block for n in parts}
        return Call(arguments, (*parts, "q_out"), ignored)

    return make


def _attention(
    sequences: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_size: int,
    block_size: int = 16,
    shuffled: bool = True,
    q_scale: float = 1.0,
    codes: str = "",
) -> Callable[..., Call]:
    """`sequences`: (queries, kv length) of each. Whatever lies behind a length is NaN; codes: of a
    quantised cache."""

    def make(rng: np.random.Generator, storage: np.dtype) -> Call:
        needed = [-(-kv_len // block_size) for _, kv_len in sequences]
        num_blocks, num_columns = 3 + sum(needed), 2 + max(needed, default=0)
        ids = np.arange(1, num_blocks)
        if shuffled:
            ids = rng.permutation(ids)
        cache_shape = (num_blocks, kv_heads, block_size, head_size)
        cache_rows = Rows(rng, storage, codes)
        keys, values = cache_rows.poison(cache_shape), cache_rows.poison(cache_shape)
        tables = np.full((len(sequences), num_columns), FAR_BLOCK, np.int32)
        for b, (_, kv_len) in enumerate(sequences):
            first = sum(needed[:b])
            tables[b, : needed[b]] = ids[first : first + needed[b]]
            for position in range(kv_len):
                block, row = tables[b, position // block_size], position % block_size
                for parts in (keys, values):
                    cache_rows.fill(parts, (block, slice(None), row))
        num_tokens = sum(queries for queries, _ in sequences)
        arguments = {
            "q": _normal(rng, (num_tokens, heads, head_size), storage, q_scale),
            "key_cache": keys[0],
            "value_cache": values[0],
            "key_scales": keys[1],
            "value_scales": values[1],
            "query_starts": _int32(np.cumsum([0] + [queries for queries, _ in sequences])),
            "kv_lens": _int32([kv_len for _, kv_len in sequences]),
            "block_tables": tables,
            "scale": head_size**-0.5,
            "max_queries": max((queries for queries, _ in sequences), default=0),
            "out": _nan((num_tokens, heads, head_size), storage),
        }
        return Call(arguments, ("out",))

    return make


def _attend(
    sequences: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_size: int,
    block_size: int = 16,
    norms: str = "",
    bounded: bool = True,
    codes: str = "",
) -> Callable[..., Call]:
    """`sequences` and `codes` as above; the last positions' keys and values come from qkv, and
    what the cache holds there before is NaN. `norms` as in `_rope_write_kv`; bounded: the longest
    length is told.
    """
    make_attention = _attention(sequences, heads, kv_heads, head_size, block_size, codes=codes)

    def make(rng: np.random.Generator, storage: np.dtype) -> Call:
        a = make_attention(rng, storage).arguments
        num_tokens, half = len(a["q"]), head_size // 2
        slots, stored = [], np.zeros(a["key_cache"].shape, bool)
        for b, (queries, kv_len) in enumerate(sequences):
            for position in range(kv_len):
                block, row = a["block_tables"][b, position // block_size], position % block_size
                stored[block, :, row] = True
                if position >= kv_len - queries:
                    slots.append(block * block_size + row)
                    for name in ("key", "value"):
                        cache, scales = a[f"{name}_cache"], a[f"{name}_scales"]
                        cache[block, :, row] = CODES[codes][1] if codes else np.nan
                        if codes:
                            scales[block, :, row] = np.nan
        angles = rng.uniform(0, 2 * np.pi, (num_tokens, half))
        arguments = {
            "qkv": _normal(rng, (num_tokens, (heads + 2 * kv_heads) * head_size), storage),
            "q_norm": _norm_weight(rng, head_size, storage) if "q" in norms else None,
            "k_norm": _norm_weight(rng, head_size, storage) if "k" in norms else None,
            "eps": 1e-6,
            "rope": (1.25 * np.stack([np.cos(angles), np.sin(angles)], 1)).astype(np.float32),
            "slots": _int32(slots),
            "key_cache": a["key_cache"],
            "value_cache": a["value_cache"],
            "key_scales": a["key_scales"],
            "value_scales": a["value_scales"],
            "query_starts": a["query_starts"],
            "kv_lens": a["kv_lens"],
            "block_tables": a["block_tables"],
            "scale": a["scale"],
            "max_queries": a["max_queries"],
            "max_kv_len": int(a["kv_lens"].max(initial=0)) if bounded else 0,
            "q_scratch": _nan((num_tokens, heads, head_size), storage),
            "out": a["out"],
        }
        parts = "key_cache", "value_cache", *(("key_scales", "value_scales") if codes else ())
        ignored = {n: ~(stored[..., 0] if n.endswith("scales") else stored) for n in parts}
        ignored["q_scratch"] = np.ones((num_tokens, heads, head_size), bool)
        return Call(arguments, (*parts, "q_scratch", "out"), ignored)

    return make


# ------------------------------------------------------------------------------ sampling


def _penalize(entries: list[int], vocab: int) -> Callable[..., Call]:
    """`entries`: how many tokens of each row are touched."""

    def make(rng: np.random.Generator, storage: np.dtype) -> Call:
        rows, total = len(entries), sum(entries)
        ids = [rng.permutation(vocab)[:count] for count in entries]
        counts = rng.integers(0, 4, total)
        arguments = {
            "logits": _normal(rng, (rows, vocab), np.float32, 3.0),
            "entry_starts": _int32(np.cumsum([0, *entries])),
            "token_ids": _int32(np.concatenate([*ids, []])),
            "output_counts": _int32(counts),
            # What stands in the output stands in the context; some entries carry a bias alone.
            "in_context": (counts > 0) | (rng.random(total) < 0.5),
            "bias": np.where(rng.random(total) < 0.5, rng.normal(size=total) * 5, 0).astype("f4"),
            "repetition": rng.uniform(0.7, 1.8, rows).astype(np.float32),
            "presence": rng.uniform(-1, 2, rows).astype(np.float32),
            "frequency": rng.uniform(-0.5, 1, rows).astype(np.float32),
        }
        return Call(arguments, ("logits",))

    return make


def _sample(rows: int, vocab: int, **fixed: float) -> Callable[..., Call]:
    """Every row has parameters of its own, unless `fixed` names one for all."""

    def make(rng: np.random.Generator, storage: np.dtype) -> Call:
        logits = _normal(rng, (rows, vocab), np.float32, 2.0)
        if vocab > 8:
            logits[:, rng.integers(0, vocab, vocab // 8)] = -np.inf  # as a grammar masks
            logits[:, 3] = logits[:, 5]  # a tie, which top-k must keep whole
        parameters = {
            "temperature": rng.choice([0.0, 0.5, 1.0, 1.7], rows),
            "top_k": rng.choice([-1, 1, 2, 5, vocab, vocab + 7], rows),
            "top_p": rng.choice([1.0, 0.9, 0.5, 0.05], rows),
            "min_p": rng.choice([0.0, 0.05, 0.4, 1.0], rows),
        }
        for name, value in fixed.items():
            parameters[name] = np.full(rows, value)
        arguments = {
            "logits": logits,
            **{k: v.astype(np.int32 if k == "top_k" else "f4") for k, v in parameters.items()},
            "seeds": rng.integers(0, 2**64, rows, dtype=np.uint64),
            "counters": rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
            "out": np.full(rows, -1, np.int32),
        }
        return Call(arguments, ("out",))

    return make


# ------------------------------------------------------------------------------ the table


def _all() -> Iterator[tuple[str, str, Callable[..., Call]]]:
    for tokens, vocab, hidden in ((0, 5, 8), (1, 1, 1), (5, 11, 7), (19, 40, 64)):
        yield "embed", f"t{tokens}-d{hidden}", _embed(tokens, vocab, hidden)

    yield "rope_table", "empty", _rope_table([], 8)
    yield "rope_table", "d2", _rope_table([0, 1, 7], 2)
    yield "rope_table", "d80", _rope_table([5, 0, 4095, 131071], 80)
    yield "rope_table", "attention-factor", _rope_table([0, 3, 900], 16, attention=1.25)
    lens = [1, 31, 32, 33, 70, 71, 640]
    yield "rope_table", "dynamic", _rope_table([0, 30, 31, 5, 69, 70, 639], 24, lens)
    yield "rope_table", "dynamic-d2", _rope_table([3, 50], 2, [4, 60])
    for op in ("norm_linear", "linear_add", "norm_swiglu"):
        for tokens, inputs, outputs, bias in (
            (0, 16, 8, True),
            (1, 1, 1, False),
            (1, 33, 17, True),
            (3, 64, 5, False),
            (17, 7, 31, True),
        ):
            name = f"t{tokens}-{inputs}x{outputs}" + ("-bias" if bias else "")
            yield op, name, _product(op, tokens, inputs, outputs, bias)
        yield op, "wide-residual", _product(op, 4, 29, 12, True, wide=True)
        yield op, "large", _product(op, 2, 24, 9, x_scale=300.0)
        yield op, "tiny", _product(op, 2, 24, 9, True, x_scale=1e-4)

    yield "lm_head", "none", _lm_head(3, [], 16, 9)
    yield "lm_head", "one", _lm_head(1, [0], 1, 1)
    yield "lm_head", "shuffled", _lm_head(9, [7, 2, 3], 35, 41)
    yield "lm_head", "wide-residual", _lm_head(4, [3, 1], 48, 21, wide=True)
    for head in ("float32", "float16", "bfloat16"):
        yield "embed", f"table-{head}", _embed(5, 11, 40, head)
        yield "lm_head", f"few-{head}", _lm_head(5, [4, 1], 48, 21, head=head)
        yield "lm_head", f"some-{head}", _lm_head(13, list(range(12)), 48, 33, head=head)
        yield "lm_head", f"many-{head}", _lm_head(45, list(range(1, 42)), 40, 19, head=head)
    for heads, kv_heads, head_size in ((1, 1, 2), (3, 3, 64), (4, 1, 80), (8, 1, 96), (8, 2, 128)):
        for norms in ("", "qk"):
            name = f"h{heads}-g{kv_heads}-d{head_size}" + ("-norms" if norms else "")
            yield "rope_write_kv", name, _rope_write_kv(5, heads, kv_heads, head_size, norms=norms)
    yield "rope_write_kv", "d256", _rope_write_kv(2, 2, 1, 256, norms="qk")
    yield "rope_write_kv", "empty", _rope_write_kv(0, 4, 2, 8)
    yield "rope_write_kv", "padding", _rope_write_kv(7, 4, 2, 8, norms="qk", padding=3)
    yield "rope_write_kv", "many-blocks", _rope_write_kv(37, 2, 1, 6, block_size=4, norms="k")

    around = [(1, n) for n in (1, 15, 16, 17, 33, 70)]
    whole = [(n, n) for n in (1, 15, 16, 17, 35)]
    mixed = [(1, 17), (5, 5), (0, 12), (7, 40), (1, 1), (16, 48), (0, 0), (1, 31)]
    for heads, kv_heads in ((2, 2), (4, 1), (8, 1), (8, 2)):
        name = f"h{heads}-g{kv_heads}"
        yield "attention", f"decode-{name}", _attention(around, heads, kv_heads, 12)
        yield "attention", f"prefill-{name}", _attention(whole, heads, kv_heads, 10)
        yield "attention", f"mixed-{name}", _attention(mixed, heads, kv_heads, 6)
    for head_size in (2, 64, 80, 96, 128, 256):
        lens = [(1, 5), (3, 9), (1, 17)]
        yield "attention", f"d{head_size}", _attention(lens, 4, 2, head_size)
    for block_size in (1, 8, 32):
        yield "attention", f"block-{block_size}", _attention(mixed, 4, 2, 6, block_size)
    yield "attention", "blocks-in-a-row", _attention(mixed, 4, 2, 6, 4, shuffled=False)
    yield "attention", "alone", _attention([(1, 45)], 4, 1, 16)
    yield "attention", "many-blocks", _attention([(1, 203), (2, 150)], 2, 1, 4, 8)
    yield "attention", "peaked", _attention(around, 4, 2, 8, q_scale=30.0)
    yield "attention", "empty", _attention([], 4, 2, 8)
    yield "attention", "no-queries", _attention([(0, 9), (0, 3)], 4, 2, 8)
    for heads, kv_heads, head_size in ((2, 2, 64), (4, 1, 16), (7, 1, 64), (4, 2, 128), (2, 1, 80)):
        name = f"decode-h{heads}-g{kv_heads}-d{head_size}"
        yield "attend", name, _attend(around, heads, kv_heads, head_size, norms="qk")
    yield "attend", "decode-unbounded", _attend(around, 2, 1, 64, bounded=False)
    yield "attend", "decode-d12", _attend(around, 4, 2, 12, 8, norms="k")
    yield "attend", "decode-alone", _attend([(1, 150)], 4, 1, 32, 8)
    yield "attend", "some-without-queries", _attend([(1, 9), (0, 20), (1, 33)], 2, 2, 16)
    yield "attend", "mixed", _attend(mixed, 4, 2, 6, norms="q")
    yield "attend", "empty", _attend([], 4, 2, 16)
    for codes in CODES:
        more = {"codes": codes}
        for heads, kv_heads, head_size in ((3, 3, 64), (4, 1, 80), (8, 1, 96), (8, 2, 128)):
            name = f"{codes}-h{heads}-g{kv_heads}-d{head_size}"
            make = _rope_write_kv(5, heads, kv_heads, head_size, norms="q", **more)
            yield "rope_write_kv", name, make
        yield "rope_write_kv", f"{codes}-d256", _rope_write_kv(3, 2, 1, 256, norms="qk", **more)
        yield "rope_write_kv", f"{codes}-empty", _rope_write_kv(0, 4, 2, 8, **more)
        yield "rope_write_kv", f"{codes}-padding", _rope_write_kv(7, 4, 2, 8, padding=3, **more)
        many = _rope_write_kv(37, 2, 1, 6, block_size=4, norms="k", **more)
        yield "rope_write_kv", f"{codes}-many-blocks", many
        for heads, kv_heads in ((2, 2), (4, 1), (7, 1), (8, 1), (8, 2)):
            name = f"{codes}-mixed-h{heads}-g{kv_heads}"
            yield "attention", name, _attention(mixed, heads, kv_heads, 16, **more)
        yield "attention", f"{codes}-d6", _attention(mixed, 4, 2, 6, 5, **more)
        for head_size in (64, 80, 96, 128, 256):
            lens = [(1, 5), (3, 9), (1, 17)]
            yield "attention", f"{codes}-d{head_size}", _attention(lens, 4, 2, head_size, **more)
        yield "attention", f"{codes}-decode", _attention(around, 4, 1, 16, 8, **more)
        yield "attention", f"{codes}-empty", _attention([], 4, 2, 8, **more)
        yield "attend", f"{codes}-decode", _attend(around, 4, 2, 64, norms="k", **more)
        yield "attend", f"{codes}-mixed", _attend(mixed, 4, 2, 6, norms="q", **more)
    yield "penalize", "empty", _penalize([], 10)
    yield "penalize", "ragged", _penalize([0, 7, 1, 40, 0], 40)
    yield "penalize", "untouched", _penalize([0, 0], 5)
    yield "sample", "empty", _sample(0, 10)
    yield "sample", "one-token", _sample(4, 1)
    yield "sample", "mixed", _sample(120, 50)
    yield "sample", "plain", _sample(60, 33, temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0)
    yield "sample", "greedy", _sample(9, 33, temperature=0.0)
    yield "sample", "top-k", _sample(40, 64, temperature=1.5, top_k=5, top_p=1.0, min_p=0.0)
    yield "sample", "top-p", _sample(40, 64, temperature=1.5, top_k=-1, top_p=0.6, min_p=0.0)
    yield "sample", "min-p", _sample(40, 64, temperature=1.5, top_k=-1, top_p=1.0, min_p=0.2)


CASES: tuple[Case, ...] = tuple(Case(*parts) for parts in _all())
