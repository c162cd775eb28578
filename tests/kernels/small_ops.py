"""The ops by the small kernels, launched as `launch_shapes` says, and the check of a shared case.

What cuBLAS does between kernels is done here by NumPy in float32, so that the unfused path as a
whole is held to the interface's rounding points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from nanocupy.ops import launch_shapes, philox
from nanocupy.ops.launch_shapes import LaunchShape
from nanocupy.ops.numpy_ops import NumpyOps, kept_probabilities
from tests.kernels.backends import CODES, TOLERANCES, assert_close
from tests.ops.cases import DTYPES, Case, assert_codes_close

F32 = np.float32
I32 = np.int32


def codes(storage: np.dtype, **others: np.dtype) -> dict[str, int]:
    """Macros: SCALAR, and those of `others` that differ from it."""
    named = {name: dtype for name, dtype in others.items() if dtype != storage}
    return {"SCALAR": CODES[storage.name], **{n: CODES[t.name] for n, t in named.items()}}


def sized(shape: LaunchShape, block: int | None) -> LaunchShape:
    """The same grid with another block."""
    return shape if block is None else replace(shape, block=block)


# ------------------------------------------------------------------------------ ops by kernels


def run_embed(backend, storage, block, *, token_ids, table, out) -> None:
    shape = launch_shapes.embed_rows(len(token_ids), table.shape[1])
    backend.run(
        "embed.cu", "embed_rows", sized(shape, block),
        (token_ids, table, out, I32(table.shape[1])), (2,),
        **codes(table.dtype, RESIDUAL=out.dtype),
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
    key_scales, value_scales, q_out,
) -> None:  # fmt: skip
    num_tokens, heads, head_size = q_out.shape
    kv_heads, block_size = key_cache.shape[1:3]
    shape = launch_shapes.rope_write_kv(num_tokens, heads, kv_heads)
    if block is not None:
        shape = LaunchShape((num_tokens, -(-(heads + 2 * kv_heads) * 32 // block)), block)
    args = (
        qkv, q_norm, k_norm, F32(eps), rope, slots, key_cache, value_cache, key_scales,
        value_scales, q_out, I32(heads), I32(kv_heads), I32(block_size),
    )  # fmt: skip
    macros = codes(storage, CACHE=key_cache.dtype)
    # Padding tokens share the null block's slots: which of them stays there is left open.
    open_rows = {i: 1 for i in (6, 7, 8, 9) if args[i] is not None}
    backend.run(
        "rope.cu", "rope_write_kv", shape, args, (6, 7, 8, 9, 10), open_rows,
        HEAD_SIZE=head_size, **macros,
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
    own = norm_weight.dtype
    normed = run_norm(backend, own, block, x, rows, norm_weight, eps, own)
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
    backend, storage, block, *, logits, temperature, top_k, top_p, min_p, seeds, counters, out,
    ranks=1, shared=227 << 10, places=None,
) -> None:  # fmt: skip
    """ranks: blocks of a row; shared: what a block may have; places: see `place_arguments`."""
    shape = launch_shapes.sample_rows(*logits.shape, 132, shared, True, ranks)
    args = (
        logits, temperature, top_k, top_p, min_p, seeds, out, I32(logits.shape[1]),
        I32(launch_shapes.keeps_logits(shape)), *(places or place_arguments(counters=counters)),
    )  # fmt: skip
    written = (6, *range(10, 16)) if places else (6,)  # all of a place but its table
    backend.run("sampling.cu", "sample_rows", sized(shape, block), args, written, SCALAR=0)


def run_argmax(backend, logits: np.ndarray, parts: int, places=None) -> np.ndarray:
    """Tokens int32 [S]; places: see `place_arguments`."""
    rows, vocab = logits.shape
    out = np.full(rows, -7, np.int32)
    keys = np.zeros((rows, parts), np.uint64) if parts > 1 else None
    arrivals = np.zeros(rows, np.uint32) if parts > 1 else None
    args = (logits, keys, arrivals, out, I32(vocab), *(places or place_arguments()))
    written = (1, 2, 3, *range(6, 12)) if places else (1, 2, 3)
    shape = launch_shapes.argmax_rows(rows, vocab, parts)
    backend.run("sampling.cu", "argmax_rows", shape, args, written, SCALAR=0)
    assert parts == 1 or not arrivals.any()  # ready for the next launch
    return out


def place_arguments(
    block_tables=None, token_ids=None, positions=None, kv_lens=None, slots=None, rope_lens=None,
    counters=None, block_size=0,
) -> tuple[Any, ...]:  # fmt: skip
    """Of kernels_cu/decode_state.cuh; without kv_lens nothing moves on."""
    width = 0 if block_tables is None else block_tables.shape[1]
    arrays = block_tables, token_ids, positions, kv_lens, slots, rope_lens, counters
    return (*arrays, I32(width), I32(block_size))


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
        exact = case.op in ROUNDS_INSIDE or before.dtype.kind in "iu"
        wanted[name] = before.copy() if exact else before.astype(np.float64)
    RUNNERS[case.op](backend, storage, block, **got)
    getattr(NumpyOps(np.float64), case.op)(**wanted)
    for name in call.written:
        if case.op == "sample":
            assert_same_tokens(got[name], wanted[name], call.arguments)
            continue
        if got[name].dtype in (np.int8, np.uint8):
            assert_codes_close(got[name], wanted[name], call.ignored.get(name))
            continue
        # The normed row is rounded to the head's type, where it may fall to the other neighbour.
        limit = TOLERANCES[call.head_dtype.name] if call.head_dtype is not None else None
        assert_close(got[name], wanted[name], f"{case} {name}", call.ignored.get(name), limit)
