"""The NumPy ops against plain Python loops in float64, and against results found by hand.

In float64 storage op and loop must agree to rounding of float64; in the storage types, to a
rounding or two of the type.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from nanocupy.ops import numpy_ops, philox
from nanocupy.ops.interface import Ops
from nanocupy.ops.numpy_ops import NumpyOps
from tests.ops import loops
from tests.ops.cases import (
    CASES,
    DTYPES,
    Case,
    assert_codes_close,
    guarded,
    guards_intact,
    inner,
)

OP_NAMES = [name for name in vars(Ops) if not name.startswith("_")]

# |error| <= tolerance * (|reference| + rms of the row), by the dtype of the output.
TOLERANCES = {"float64": 1e-12, "float32": 4e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}


# --------------------------------------------------------------------------------- comparing


def call_both(case: Case, storage: np.dtype, compute: Any) -> dict[str, tuple]:
    """Run the op and its loop; gives output name -> (got, wanted, mask of ignored elements)."""
    call = case.build(storage)
    # The loop's outputs keep float64, so that only the op's own rounding is seen; but for the ops
    # whose intermediate values are rounded to their output's dtype.
    rounds = case.op in ("norm_linear", "norm_swiglu", "attend")
    expected = {}
    for name in call.written:
        before = call.arguments[name]
        keep = rounds or before.dtype.kind in "iu"
        expected[name] = before.copy() if keep else before.astype(np.float64)
    getattr(loops, "loop_" + case.op)(**(call.arguments | expected))

    buffers = {name: guarded(call.arguments[name]) for name in call.written}
    inputs = {
        name: (value, value.copy())
        for name, value in call.arguments.items()
        if isinstance(value, np.ndarray) and name not in call.written
    }
    outputs = {name: inner(whole) for name, whole in buffers.items()}
    getattr(NumpyOps(compute), case.op)(**(call.arguments | outputs))

    for name, whole in buffers.items():
        assert guards_intact(whole), f"{name}: written outside its rows"
    for name, (now, before) in inputs.items():
        assert now.tobytes() == before.tobytes(), f"{name}: an input was changed"
    return {name: (outputs[name], expected[name], call.ignored.get(name)) for name in call.written}


def check(case: Case, storage: np.dtype, compute: Any) -> None:
    for name, (got, wanted, ignored) in call_both(case, storage, compute).items():
        if got.dtype == np.int32:
            np.testing.assert_array_equal(got, wanted, err_msg=name)
            continue
        if got.dtype in (np.int8, np.uint8):
            # In float64 nothing differs but numbers that are a tie to within rounding.
            assert_codes_close(got, wanted, ignored)
            continue
        got_dtype = got.dtype
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        if ignored is not None:
            got, wanted = got[~ignored], wanted[~ignored]
        assert np.isfinite(wanted).all(), f"{name}: the case itself is not finite"
        rms = np.sqrt(np.mean(wanted**2, axis=-1, keepdims=True)) if wanted.size else 0
        error = abs(got - wanted)
        inside = got_dtype
        if compute != np.float64 and case.op == "lm_head":
            inside = case.build(storage).head_dtype
        tolerance = max(TOLERANCES[got_dtype.name], TOLERANCES[inside.name])
        bound = tolerance * (abs(wanted) + rms)
        if got_dtype == np.float16:
            bound = bound + 2.0**-24  # the spacing of its subnormal numbers
        assert (error <= bound).all(), (
            f"{name}: worst error is {np.max(error / bound):.3g} of the bound"
        )


def test_every_op_has_a_loop_and_cases() -> None:
    assert {case.op for case in CASES} == set(OP_NAMES)
    for name in OP_NAMES:
        parameters = list(inspect.signature(getattr(loops, "loop_" + name)).parameters)
        assert parameters == list(inspect.signature(getattr(Ops, name)).parameters)[1:]


def test_cases_name_every_argument_in_order() -> None:
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        parameters = list(inspect.signature(getattr(Ops, case.op)).parameters)[1:]
        assert list(case.build(DTYPES["float32"]).arguments) == parameters, str(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_equals_the_loops(case: Case) -> None:
    check(case, DTYPES["float64"], np.float64)


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_equals_the_loops(case: Case, storage: str) -> None:
    check(case, DTYPES[storage], np.float32)


@pytest.mark.parametrize("op", ["attention", "norm_swiglu", "lm_head", "linear_add"])
def test_float64_on_stored_bfloat16(op: str) -> None:
    for case in CASES:
        if case.op == op:
            check(case, DTYPES["bfloat16"], np.float64)


@pytest.mark.parametrize("max_scores", [1, 200, 1000])
def test_attention_in_tiles_of_queries(max_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_ops, "MAX_SCORE_ELEMENTS", max_scores)
    for case in CASES:
        if case.op == "attention" and case.name.startswith(("mixed", "prefill")):
            check(case, DTYPES["float64"], np.float64)


# --------------------------------------------------------------------------------- by hand


def test_philox_known_answers() -> None:
    """Random123's published vectors of philox4x32-10: counters, key, result."""
    known = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    counters = np.array([counter for counter, _, _ in known], np.uint32)
    seeds = [low | high << 32 for _, (low, high), _ in known]
    wanted = [words for _, _, words in known]
    assert philox.philox4x32(counters, np.array(seeds, np.uint64)).tolist() == wanted
    assert [
        loops.loop_philox(c, seed) for (c, _, _), seed in zip(known, seeds, strict=True)
    ] == wanted


def test_uniforms_lie_in_the_unit_interval_and_are_even() -> None:
    counters = np.stack([np.arange(20000), np.zeros(20000)], 1).astype(np.uint32)
    draws = philox.uniforms(np.full(20000, 7, np.uint64), counters)
    assert draws.min() >= 0
    assert draws.max() < 1
    shares = np.histogram(draws, 10, (0, 1))[0] / 20000
    assert abs(shares - 0.1).max() < 0.01


def test_sampled_shares_are_the_softmax() -> None:
    rows, probabilities = 20000, np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.tile(np.log(probabilities), (rows, 1)).astype(np.float32)
    out = np.full(rows, -1, np.int32)
    NumpyOps().sample(
        logits,
        np.ones(rows, np.float32),
        np.full(rows, -1, np.int32),
        np.ones(rows, np.float32),
        np.zeros(rows, np.float32),
        np.full(rows, 3, np.uint64),
        np.stack([np.arange(rows), np.zeros(rows)], 1).astype(np.uint32),
        out,
    )
    assert abs(np.bincount(out, minlength=4) / rows - probabilities).max() < 0.015


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2.0**-53])
def test_no_draw_yields_a_masked_token(draw: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "uniforms", lambda seeds, counters: np.full(len(seeds), draw))
    logits = np.array([[-np.inf, 1, -np.inf, 1, -np.inf]], np.float32)
    out = np.full(1, -1, np.int32)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    counters = np.zeros((1, 2), np.uint32)
    top_k = np.array([-1], np.int32)
    NumpyOps().sample(logits, one, top_k, one, zero, np.zeros(1, np.uint64), counters, out)
    assert out[0] == (1 if draw < 0.5 else 3)  # half the mass each: 0.5 is the second's first draw


def test_rotation_by_a_quarter_turn() -> None:
    """Position pi/2 at frequency 1: the first half takes minus the second, and the other way."""
    qkv = np.array([[1, 2, 3, 4, 5, 6]], np.float32)  # one head each, d = 2
    rope = np.array([[[0.0], [1.0]]], np.float32)
    caches = np.zeros((2, 2, 1, 2, 2), np.float32)
    q_out = np.empty((1, 1, 2), np.float32)
    NumpyOps().rope_write_kv(
        qkv,
        None,
        None,
        0.0,
        rope,
        np.array([3], np.int32),
        caches[0],
        caches[1],
        None,
        None,
        q_out,
    )
    assert q_out.tolist() == [[[-2, 1]]]
    assert caches[0, 1, 0, 1].tolist() == [-4, 3]
    assert caches[1, 1, 0, 1].tolist() == [5, 6]
    assert np.count_nonzero(caches) == 4


def test_attention_of_equal_keys_is_the_mean_of_what_came_before() -> None:
    keys = np.zeros((3, 1, 2, 2), np.float32)
    values = np.full((3, 1, 2, 2), np.nan, np.float32)
    values[2, 0] = [[1, 10], [3, 30]]  # positions 0, 1 lie in block 2
    values[1, 0, 0] = [8, 80]  # position 2 in block 1
    out = np.full((3, 1, 2), np.nan, np.float32)
    keys[1, 0, 1] = np.nan
    NumpyOps().attention(
        np.ones((3, 1, 2), np.float32), keys, values, None, None, np.array([0, 3], np.int32),
        np.array([3], np.int32), np.array([[2, 1]], np.int32), 1.0, 3, out,
    )  # fmt: skip
    np.testing.assert_allclose(out[:, 0], [[1, 10], [2, 20], [4, 40]], rtol=1e-6)


def test_dynamic_ntk_is_a_larger_base() -> None:
    """s raises the base to base * s ** (d / (d - 2)), as the method was first described."""
    d, base, factor, context, length = 16, 10000.0, 4.0, 32, 70
    inv_freq = (base ** (-np.arange(0, d, 2) / d)).astype(np.float32)
    out = np.empty((1, 2, d // 2), np.float32)
    NumpyOps().rope_table(
        np.array([69], np.int32), np.array([length], np.int32), inv_freq, factor, context, 1.0, out
    )
    stretched = base * (factor * length / context - (factor - 1)) ** (d / (d - 2))
    angles = 69 * stretched ** (-np.arange(0, d, 2) / d)
    np.testing.assert_allclose(out[0], [np.cos(angles), np.sin(angles)], atol=2e-5)


# Where values are rounded: with bfloat16 (spacing 2**-7 above 1, 2**-8 below) the difference of two
# nearly equal numbers, blown up by a product, shows whether a rounding took place.
BF16 = DTYPES["bfloat16"]


def test_norm_linear_rounds_the_normed_input() -> None:
    x = np.array([[1, 1 + 2**-7]]).astype(BF16)  # normed: 0.99611, 1.00389 -> 0.99609375, 1.0
    ones, weight = np.ones(2).astype(BF16), np.array([[256, -256]]).astype(BF16)
    out = np.empty((1, 1), BF16)
    NumpyOps().norm_linear(x, ones, 0.0, weight, None, out)
    assert float(out[0, 0]) == -1.0  # -256 / 256; unrounded it is -1.99
    logits = np.empty((1, 1), np.float32)
    rows = np.zeros(1, np.int32)
    NumpyOps().lm_head(x, rows, ones, 0.0, weight, logits)
    assert float(logits[0, 0]) == -1.0
    wide = x.astype(np.float32)
    NumpyOps().lm_head(wide, rows, ones, 0.0, weight, logits)  # the head's dtype decides, not x's
    assert float(logits[0, 0]) == -1.0
    ones = ones.astype(np.float32)
    NumpyOps().lm_head(x, rows, ones, 0.0, weight.astype(np.float32), logits)
    assert float(logits[0, 0]) == pytest.approx(-1.992, abs=2e-3)


def test_norm_swiglu_rounds_gate_and_up() -> None:
    x, ones = np.ones((1, 1)).astype(BF16), np.ones(1).astype(BF16)
    weight, bias = np.array([[96], [256]]).astype(BF16), np.array([0, 1]).astype(BF16)
    out = np.empty((1, 1), BF16)
    NumpyOps().norm_swiglu(x, ones, 0.0, weight, bias, out)
    # up = 257, a tie, is rounded to 256; 96 * 257 = 24672 would be stored as 24704.
    assert float(out[0, 0]) == 96 * 256


def test_linear_add_rounds_once() -> None:
    residual = np.array([[256]]).astype(BF16)
    x, weight, bias = (np.array(v).astype(BF16) for v in ([[1]], [[0.75]], [0.75]))
    NumpyOps().linear_add(x, weight, bias, residual)
    assert float(residual[0, 0]) == 258.0  # 256 + 0.75 alone, rounded, would stay 256


def test_rope_write_kv_rounds_nothing_between_norm_and_store() -> None:
    qkv = np.array([[1, 1 + 2**-7] * 3]).astype(BF16)
    rope = np.array([[[256.0], [256.0]]], np.float32)
    caches, q_out = np.zeros((2, 1, 1, 1, 2), BF16), np.empty((1, 1, 2), BF16)
    ones = np.ones(2).astype(BF16)
    NumpyOps().rope_write_kv(
        qkv,
        ones,
        ones,
        0.0,
        rope,
        np.zeros(1, np.int32),
        caches[0],
        caches[1],
        None,
        None,
        q_out,
    )
    assert float(q_out[0, 0, 0]) == pytest.approx(-1.992, abs=1e-2)  # rounded norms give -1
