"""The small kernels against the NumPy ops in float64, over the cases that all backends share.

What cuBLAS does between them is done here by NumPy in float32, so that the unfused path as a whole
is held to the interface's rounding points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nanocupy.ops import launch_shapes, philox
from nanocupy.ops.launch_shapes import LaunchShape
from nanocupy.ops.numpy_ops import NumpyOps, kept_probabilities
from tests.kernels.backends import CODES, TOLERANCES, assert_close
from tests.ops.cases import CASES, DTYPES, Case

BLOCKS = (None, 32, 96, 256, 1024)  # None: what launch_shapes gives
F32 = np.float32
I32 = np.int32


def codes(storage: np.dtype, **others: np.dtype) -> dict[str, int]:
    """Macros: SCALAR, and those of `others` that differ from it."""
    named = {name: dtype for name, dtype in others.items() if dtype != storage}
    return {"SCALAR": CODES[storage.name], **{n: CODES[t.name] for n, t in named.items()}}


def sized(shape: LaunchShape, block: int | None) -> LaunchShape:
    """The same grid with another block."""
    return shape if block is None else LaunchShape(shape.grid, block, shape.shared_bytes)


# ------------------------------------------------------------------------------ ops by kernels


def run_embed(backend, storage, block, *, token_ids, table, out) -> None:
    shape = launch_shapes.embed_rows(len(token_ids), table.shape[1])
    backend.run(
        "embed.cu", "embed_rows", sized(shape, block),
        (token_ids, table, out, I32(table.shape[1])), (2,), **codes(storage, RESIDUAL=out.dtype),
    )  # fmt: skip


def run_rope_table(
    backend, storage, block, *, positions, rope_lens, inv_freq, ntk_factor, ntk_context,
    attention_factor, out,
) -> None:  # fmt: skip
    shape = launch_shapes.rope_table(len(positions), 2 * len(inv_freq))
    args = (
        positions, rope_lens, inv_freq, np.float64(ntk_factor), I32(ntk_context),
        F32(attention_factor), out, I32(len(inv_freq)),
    )  # fmt: skip
    backend.run("rope.cu", "rope_table", sized(shape, block), args, (6,), SCALAR=0)


def run_rope_write_kv(
    backend, storage, block, *, qkv, q_norm, k_norm, eps, rope, slots, key_cache, value_cache,
    q_out,
) -> None:  # fmt: skip
    num_tokens, heads, head_size = q_out.shape
    kv_heads, block_size = key_cache.shape[1:3]
    shape = launch_shapes.rope_write_kv(num_tokens, heads, kv_heads)
    if block is not None:
        shape = LaunchShape((num_tokens, -(-(heads + 2 * kv_heads) * 32 // block)), block)
    args = (
        qkv, q_norm, k_norm, F32(eps), rope, slots, key_cache, value_cache, q_out,
        I32(heads), I32(kv_heads), I32(block_size),
    )  # fmt: skip
    macros = codes(storage, CACHE=key_cache.dtype)
    # Padding tokens share the null block's slots: which of them stays there is left open.
    backend.run(
        "rope.cu", "rope_write_kv", shape, args, (6, 7, 8), {6: 1, 7: 1}, HEAD_SIZE=head_size,
        **macros,
    )  # fmt: skip


def run_norm(backend, storage, block, x, rows, weight, eps, out_dtype) -> np.ndarray:
    num_rows = len(x) if rows is None else len(rows)
    out = np.full((num_rows, x.shape[1]), np.nan).astype(out_dtype)
    shape = launch_shapes.rms_norm_rows(num_rows, x.shape[1])
    backend.run(
        "norm.cu", "rms_norm_rows", sized(shape, block),
        (x, rows, weight, F32(eps), out, I32(x.shape[1])), (4,),
        **codes(storage, RESIDUAL=x.dtype, NORMED=np.dtype(out_dtype)),
    )  # fmt: skip
    return out


def product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """As cuBLAS gives it into float32."""
    return x.astype(F32) @ weight.astype(F32).T


def run_norm_linear(backend, storage, block, *, x, norm_weight, eps, weight, bias, out) -> None:
    normed = run_norm(backend, storage, block, x, None, norm_weight, eps, storage)
    shape = launch_shapes.add_rows(*out.shape)
    backend.run(
        "activation.cu", "add_bias_rows", sized(shape, block),
        (product(normed, weight), bias, out, I32(out.shape[1])), (2,),
        **codes(storage, PRODUCT=DTYPES["float32"]),
    )  # fmt: skip


def run_linear_add(backend, storage, block, *, x, weight, bias, residual) -> None:
    shape = launch_shapes.add_rows(*residual.shape)
    backend.run(
        "activation.cu", "add_residual_rows", sized(shape, block),
        (product(x, weight), bias, residual, I32(residual.shape[1])), (2,),
        **codes(storage, PRODUCT=DTYPES["float32"], RESIDUAL=residual.dtype),
    )  # fmt: skip


def run_norm_swiglu(backend, storage, block, *, x, norm_weight, eps, weight, bias, out) -> None:
    normed = run_norm(backend, storage, block, x, None, norm_weight, eps, storage)
    gate_up = product(normed, weight)
    if bias is None:
        gate_up = gate_up.astype(storage)  # as the path without a bias has it
    shape = launch_shapes.swiglu_rows(*out.shape)
    backend.run(
        "activation.cu", "swiglu_rows", sized(shape, block),
        (gate_up, bias, out, I32(out.shape[1])), (2,), **codes(storage, PRODUCT=gate_up.dtype),
    )  # fmt: skip


def run_lm_head(backend, storage, block, *, x, rows, norm_weight, eps, weight, out) -> None:
    normed = run_norm(backend, storage, block, x, rows, norm_weight, eps, x.dtype)
    out[...] = product(normed, weight)


def run_penalize(
    backend, storage, block, *, logits, entry_starts, token_ids, output_counts, in_context, bias,
    repetition, presence, frequency,
) -> None:  # fmt: skip
    shape = launch_shapes.penalize_rows(len(logits), len(token_ids))
    args = (
        logits, entry_starts, token_ids, output_counts, in_context, bias, repetition, presence,
        frequency, I32(logits.shape[1]),
    )  # fmt: skip
    backend.run("sampling.cu", "penalize_rows", sized(shape, block), args, (0,), SCALAR=0)


def run_sample(
    backend, storage, block, *, logits, temperature, top_k, top_p, min_p, seeds, counters, out
) -> None:
    shape = launch_shapes.sample_rows(*logits.shape)
    args = (
        logits, temperature, top_k, top_p, min_p, seeds, counters, out, I32(logits.shape[1])
    )  # fmt: skip
    backend.run("sampling.cu", "sample_rows", sized(shape, block), args, (7,), SCALAR=0)


RUNNERS: dict[str, Callable[..., None]] = {
    name.removeprefix("run_"): run
    for name, run in list(globals().items())
    if name.startswith("run_") and name != "run_norm"
}
ROUNDS_INSIDE = ("norm_linear", "norm_swiglu")  # intermediate values get their output's dtype


def assert_same_tokens(got: np.ndarray, wanted: np.ndarray, arguments: dict[str, Any]) -> None:
    """Equal, or the draw or the edge of top-p falls within rounding of a boundary."""
    draws = philox.uniforms(arguments["seeds"], arguments["counters"])
    for s in np.flatnonzero(got != wanted):
        row = arguments["logits"][s]
        options = [float(arguments[n][s]) for n in ("temperature", "top_k", "top_p", "min_p")]
        assert options[0] > 0, f"row {s}: {got[s]} for the argmax {wanted[s]}"
        near = set()
        for edge in (-1e-6, 0, 1e-6):
            top_p = options[2] + edge if options[2] < 1 else options[2]
            kept = kept_probabilities(row, options[0], int(options[1]), top_p, options[3])
            cumulative = np.cumsum(kept)
            for shift in (-1e-6, 0, 1e-6):
                at = (draws[s] + shift) * cumulative[-1]
                pick = np.searchsorted(cumulative, at, side="right")
                near.add(int(min(pick, np.flatnonzero(kept)[-1])))
        assert int(got[s]) in near, f"row {s}: {got[s]} for {wanted[s]}, none of {near}"


def check_case(backend: Any, case: Case, storage: np.dtype, block: int | None = None) -> None:
    call = case.build(storage)
    wanted, got = dict(call.arguments), dict(call.arguments)
    for name in call.written:
        before = call.arguments[name]
        got[name] = before.copy()
        exact = case.op in ROUNDS_INSIDE or before.dtype.kind == "i"
        wanted[name] = before.copy() if exact else before.astype(np.float64)
    RUNNERS[case.op](backend, storage, block, **got)
    getattr(NumpyOps(np.float64), case.op)(**wanted)
    for name in call.written:
        if case.op == "sample":
            assert_same_tokens(got[name], wanted[name], call.arguments)
            continue
        # The normed row is rounded to the storage type, where it may fall to the other neighbour.
        limit = TOLERANCES[storage.name] if case.op == "lm_head" else None
        assert_close(got[name], wanted[name], f"{case} {name}", call.ignored.get(name), limit)


SMALL_CASES = [case for case in CASES if case.op in RUNNERS]
STORED = [case for case in SMALL_CASES if case.op not in ("rope_table", "penalize", "sample")]
FLOAT_ONLY = [case for case in SMALL_CASES if case not in STORED]


def test_every_op_but_attention_has_kernels_here() -> None:
    assert {case.op for case in CASES} - set(RUNNERS) == {"attention"}


@pytest.mark.parametrize("case", STORED, ids=str)
def test_shared_cases(backend, storage: np.dtype, case: Case) -> None:
    check_case(backend, case, storage)


@pytest.mark.parametrize("case", FLOAT_ONLY, ids=str)
def test_shared_cases_of_float_ops(backend, case: Case) -> None:
    check_case(backend, case, DTYPES["float32"])


@pytest.mark.parametrize("block", [b for b in BLOCKS if b])
def test_every_block_size(backend, block: int) -> None:
    """Every op's cases in bfloat16, with blocks that do not suit them."""
    for case in SMALL_CASES:
        if case.op != "rope_write_kv" or case.name in ("h8-g2-d128-norms", "padding"):
            check_case(backend, case, DTYPES["bfloat16"], block)


# ------------------------------------------------------------------------------ wide rows


@pytest.mark.parametrize("width", [8, 64, 576, 2048, 2056, 2050])
@pytest.mark.parametrize("block", BLOCKS)
def test_norm_and_swiglu_of_wide_rows(backend, storage, width: int, block: int | None) -> None:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((5, width)).astype(storage)
    weight = rng.uniform(0.5, 1.5, width).astype(storage)
    rows = np.array([4, 0, 4], np.int32)
    oracle = NumpyOps(np.float64)
    for chosen in (None, rows):
        got = run_norm(backend, storage, block, x, chosen, weight, 1e-5, storage)
        source = x if chosen is None else x[chosen]
        assert_close(got, oracle._rms_norm(source, weight, 1e-5))
    wide = run_norm(backend, storage, block, x.astype(F32), None, weight, 1e-5, storage)
    assert_close(wide, oracle._rms_norm(x, weight, 1e-5))

    gate_up = rng.standard_normal((3, 2 * width)).astype(storage)
    gate_up[0, :3] = 80, -80, 0
    out = np.full((3, width), np.nan).astype(storage)
    shape = sized(launch_shapes.swiglu_rows(3, width), block)
    args = (gate_up, None, out, I32(width))
    backend.run("activation.cu", "swiglu_rows", shape, args, (2,), **codes(storage))
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    assert_close(out, gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_fill_bias_rows(backend, storage, width: int) -> None:
    bias = np.random.default_rng(width).standard_normal(width).astype(storage)
    out = np.full((3, width), np.nan).astype(storage)
    shape = launch_shapes.add_rows(3, width)
    args = (bias, out, I32(width))
    backend.run("activation.cu", "fill_bias_rows", shape, args, (1,), **codes(storage))
    assert (out == bias).all()


# ------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("vocab", [1, 31, 4097, 20000])
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_argmax(backend, vocab: int, parts: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.integers(-3, 4, (6, vocab)).astype(np.float32)  # ties everywhere
    logits[1] = -np.inf
    logits[2] = 0.0
    logits[2, ::2] = -0.0  # equal to 0: the lowest id wins
    logits[3] = -abs(rng.standard_normal(vocab)) - 1
    logits[4, vocab // 2 :] = np.nan
    logits[5, -1] = np.inf
    out = np.full(6, -1, np.int32)
    keys = np.zeros((6, parts), np.uint64) if parts > 1 else None
    shape = launch_shapes.argmax_rows(6, vocab, parts)
    backend.run(
        "sampling.cu", "argmax_rows", shape, (logits, keys, out, I32(vocab)), (1, 2), SCALAR=0
    )
    if parts > 1:
        backend.run(
            "sampling.cu", "argmax_merge_rows", launch_shapes.argmax_merge_rows(6),
            (keys, out, I32(parts)), (1,), SCALAR=0,
        )  # fmt: skip
    np.testing.assert_array_equal(out, logits.argmax(axis=1))


def sample(backend, logits: np.ndarray, seed: int = 0, block: int | None = None, **options):
    """Tokens of the kernel, and the arguments; options are one value for all rows."""
    rows = len(logits)
    given = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0} | options
    rng = np.random.default_rng(seed)
    arguments = {
        "logits": logits.astype(np.float32),
        **{k: np.full(rows, v, I32 if k == "top_k" else F32) for k, v in given.items()},
        "seeds": rng.integers(0, 2**64, rows, dtype=np.uint64),
        "counters": rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
    }
    out = np.full(rows, -1, np.int32)
    run_sample(backend, np.dtype(np.float32), block, **arguments, out=out)
    return out, arguments


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "top_p": 0.9},
        {"top_k": 40, "top_p": 0.95},
        {"temperature": 1.5, "top_k": 1000, "min_p": 0.02},
        {"temperature": 2.0, "top_p": 0.999},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"temperature": 1e-3},
    ],
    ids=str,
)
def test_sampling_a_large_vocabulary(backend, options: dict[str, float]) -> None:
    logits = np.random.default_rng(5).standard_normal((6, 9001)) * 3
    logits[3:] = np.round(logits[3:] * 2) / 2  # ties at every boundary
    got, arguments = sample(backend, logits, **options)
    wanted = np.full(6, -1, np.int32)
    NumpyOps(np.float64).sample(**arguments, out=wanted)
    assert_same_tokens(got, wanted, arguments)


def test_draws_follow_the_probabilities(backend) -> None:
    """2000 rows of one distribution: each kept token's share is within four standard errors."""
    row = np.array([1.0, 0.0, 2.0, -np.inf, 1.5, 2.0, -4.0, 0.5])
    got, _ = sample(backend, np.tile(row, (2000, 1)), top_k=4, temperature=0.8)
    kept = kept_probabilities(row.astype(F32), 0.8, 4, 1.0, 0.0)
    share = kept / kept.sum()
    counts = np.bincount(got, minlength=8)
    assert (counts[share == 0] == 0).all()
    assert (abs(counts - 2000 * share) <= 4 * np.sqrt(2000 * share * (1 - share))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_no_numbers_give_a_token(backend, bad: float) -> None:
    logits = np.random.default_rng(1).standard_normal((3, 70))
    logits[1, 5:] = bad
    logits[2] = bad
    got, _ = sample(backend, logits, top_p=0.5, top_k=3)
    assert ((got >= 0) & (got < 70)).all()


def test_philox_is_the_hosts(backend) -> None:
    """One draw over 2^16 even weights gives back the leading bits of the uniform number."""
    rows, vocab = 8, 1 << 16
    got, arguments = sample(backend, np.zeros((rows, vocab)), seed=9, block=1024)
    draws = philox.uniforms(arguments["seeds"], arguments["counters"])
    np.testing.assert_array_equal(got, (draws * vocab).astype(np.int32))


# ------------------------------------------------------------------------------ blocks, state


@pytest.mark.parametrize("block_bytes", [4, 24, 160, 8192 + 16, 4098])
@pytest.mark.parametrize("block", [None, 32])
def test_copy_blocks(backend, block_bytes: int, block: int | None) -> None:
    rng = np.random.default_rng(block_bytes)
    source = rng.integers(0, 256, (2, 7, block_bytes), dtype=np.uint8)
    target = rng.integers(0, 256, (2, 9, block_bytes), dtype=np.uint8)
    pairs = np.array([[3, 8], [6, 1], [0, 4], [3, 2]], np.int32)
    wanted = target.copy()
    wanted[:, pairs[:, 1]] = source[:, pairs[:, 0]]
    shape = sized(launch_shapes.copy_blocks(len(pairs), 2, block_bytes), block)
    strides = [np.int64(array.shape[1] * block_bytes) for array in (source, target)]
    args = (source, target, pairs, np.int64(block_bytes), *strides)
    backend.run("blocks.cu", "copy_blocks", shape, args, (1,), SCALAR=0)
    np.testing.assert_array_equal(target, wanted)


def test_advance_decode_state(backend) -> None:
    """Many steps of ragged sequences, beside a plain loop; free places and full tables stay."""
    rng = np.random.default_rng(2)
    num, columns, size = 200, 3, 4
    tables = rng.permutation(np.arange(1, num * columns + 1)).astype(np.int32).reshape(num, columns)
    kv_lens = rng.integers(0, columns * size + 1, num).astype(np.int32)
    kv_lens[:3] = 0, columns * size, columns * size - 1
    state = {
        "token_ids": rng.integers(0, 99, num).astype(np.int32),
        "positions": np.maximum(kv_lens - 1, 0).astype(np.int32),
        "kv_lens": kv_lens,
        "slots": np.zeros(num, np.int32),
        "rope_lens": rng.integers(1, 20, num).astype(np.int32),
        "counters": np.stack([kv_lens, np.arange(num)], 1).astype(np.uint32),
    }
    for _ in range(5):
        sampled = rng.integers(0, 99, num).astype(np.int32)
        wanted = {name: array.copy() for name, array in state.items()}
        for b in np.flatnonzero(wanted["kv_lens"]):
            wanted["token_ids"][b] = sampled[b]
            position = int(wanted["positions"][b]) + 1
            if position == columns * size:
                wanted["slots"][b] = position % size
                continue
            wanted["positions"][b], wanted["kv_lens"][b] = position, position + 1
            wanted["slots"][b] = tables[b, position // size] * size + position % size
            wanted["rope_lens"][b] = max(wanted["rope_lens"][b], position + 1)
            wanted["counters"][b, 0] += 1
        args = (sampled, tables, *state.values(), I32(num), I32(columns), I32(size))
        shape = launch_shapes.advance_decode_state(num)
        backend.run("decode_state.cu", "advance_decode_state", shape, args, range(2, 8), SCALAR=0)
        for name, array in state.items():
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)
