"""The sampler's kernels draw what they should, and the very tokens that NumPy draws.

A token may differ from NumPy's only where the draw, or the edge of top-p, lies within float32
rounding of a boundary between tokens; the width of that is computed for each such row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from nanocupy.ops import philox
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.backends import ShimBackend
from tests.kernels.small_ops import run_penalize, run_sample
from tests.ops import sampling_oracle as oracle
from tests.ops.sampling_oracle import SETTINGS, Setting, p_value
from tests.ops.test_sampling_statistics import random_logits, random_options
from tests.shim import build

F32 = np.dtype(np.float32)
# On the shim a row takes 0.05 ms and more; that NumPy's 200,000 draws are right, and that these are
# NumPy's, is tested too.
SHIM_DRAWS, GPU_DRAWS = 10_000, 200_000
SMALLEST_P = 1e-8  # of 20 settings: a right sampler fails anywhere with a chance below 1e-6


@pytest.fixture(scope="module")
def once(backend: Any) -> Any:
    """The backend; on the shim with threads in one order, as orders are compared elsewhere."""
    return ShimBackend(orders=(0,)) if backend.name == "shim" else backend


def kernel_tokens(
    backend: Any,
    logits: np.ndarray,
    options: dict[str, np.ndarray],
    block: int | None = None,
    ranks: int = 1,
) -> np.ndarray:
    out = np.full(len(logits), -1, np.int32)
    run_sample(backend, F32, block, logits=logits, **options, out=out, ranks=ranks)
    return out


def numpy_tokens(logits: np.ndarray, options: dict[str, np.ndarray]) -> np.ndarray:
    out = np.full(len(logits), -1, np.int32)
    NumpyOps().sample(logits, **options, out=out)
    return out


# ------------------------------------------------------------------------------ statistics


def draw(backend: Any, settings: list[Setting], num_draws: int) -> np.ndarray:
    """How often each token of each setting comes; all have one vocabulary, their rows are mixed."""
    which = np.repeat(np.arange(len(settings)), num_draws)
    np.random.default_rng(len(settings)).shuffle(which)
    penalties, options, logits = oracle.mixed_batch(settings, which, seed=len(settings))
    run_penalize(backend, F32, 32, logits=logits, **penalties)
    counts = np.zeros((len(settings), settings[0].vocab), np.int64)
    np.add.at(counts, (which, kernel_tokens(backend, logits, options, block=32)), 1)
    return counts


@pytest.mark.parametrize("vocab", sorted({s.vocab for s in SETTINGS}))
def test_draws_follow_the_probabilities(once, vocab: int) -> None:
    """Penalties and sampling, rows of all settings of a vocabulary mixed."""
    num_draws = SHIM_DRAWS if once.name == "shim" else GPU_DRAWS
    group = [s for s in SETTINGS if s.vocab == vocab]
    counts = draw(once, group, num_draws)
    assert (counts.sum(axis=1) == num_draws).all()
    for setting, got in zip(group, counts, strict=True):
        p = oracle.probabilities(setting)
        assert p_value(got, p) > SMALLEST_P, setting.name


PLANTED = {
    "no top-p after top-k": (
        {"top_k": 20, "top_p": 0.85}, "if (limits_count && limits_weight)",
        "if (limits_weight && !limits_count)",
    ),
    "top-p before temperature": (
        {"top_p": 0.9, "temperature": 1.6}, "by_weight ? row.weight(x) : 1",
        "by_weight ? uint64_t(expf(x - row.top) * WEIGHT_ONE) : 1",
    ),
    "min-p before temperature": (
        {"min_p": 0.15, "temperature": 1.8}, "row.top + row.temperature * log(", "row.top + log(",
    ),
    "short draw": ({}, "uniform * static", "0.95 * uniform * static"),
    "position left out": ({}, "position = counters[2 * s], index", "position = 7, index"),
    "repetition divides negative logits": (
        {"repetition": 2.5}, "logit * repetition[s]", "logit / repetition[s]",
    ),
    "presence counts the prompt": (
        {"presence": 1.1}, "if (count > 0) logit", "if (in_context[e]) logit",
    ),
    "frequency once": (
        {"frequency": -1.5}, "static_cast<float>(count)", "(count > 0 ? 1.0f : 0.0f)",
    ),
}  # fmt: skip


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_wrong_kernel_shows(mistake: str) -> None:
    options, right, wrong = PLANTED[mistake]
    source = (build.KERNELS / "sampling.cu").read_text()
    assert source.count(right) == 1
    backend = ShimBackend(orders=(0,), changed={"sampling.cu": source.replace(right, wrong)})
    setting = Setting(mistake, 50, **options)
    counts = draw(backend, [setting], SHIM_DRAWS)
    assert p_value(counts[0], oracle.probabilities(setting)) < SMALLEST_P


# ------------------------------------------------------------------------------ the same tokens


def is_near_a_boundary(row: np.ndarray, options: dict[str, Any], draw: float, got: int) -> bool:
    """Whether weights with the rounding of float32 may make `draw` the token `got`.

    A weight is expf of a difference and a quotient in float32, cut to a multiple of 2^-40: off by
    at most 2^-23 |exponent| + 2^-22 of itself (expf errs by up to 2 units), and 2^-40.
    """
    z = (row.astype(np.float64) - row.max()) / float(options["temperature"])
    weights = np.exp(z)
    with np.errstate(invalid="ignore"):
        error = np.where(weights > 0, weights * (abs(z) * 2.0**-23 + 2.0**-22), 0) + 2.0**-40
    kept = np.ones(len(row), bool)
    if options["min_p"] > 0:
        floor = float(row.max()) + float(options["temperature"]) * math.log(options["min_p"])
        kept = row >= np.float64(min(floor, row.max()))
    if 0 < options["top_k"] < len(row):
        kept &= row >= np.sort(row)[-options["top_k"]]
    floors = [row[kept].min()]
    if options["top_p"] < 1:
        values = np.unique(row[kept])[::-1]
        level = np.searchsorted(-values, -row[kept])
        mass, slack = (np.bincount(level, x[kept]) for x in (weights, error))
        above = np.cumsum(mass) - mass
        target = float(options["top_p"]) * mass.sum()
        width = 2 * slack.sum()
        certain = np.flatnonzero(above < target - width)
        possible = np.flatnonzero(above < target + width)
        first = certain[-1] if len(certain) else 0
        floors = values[first : max(possible[-1] if len(possible) else 0, first) + 1]
    for floor in floors:
        inside = kept & (row >= floor)
        if not inside[got]:
            continue
        cumulative = np.cumsum(np.where(inside, weights, 0))
        at = draw * cumulative[-1]
        width = 2 * error[inside].sum()
        if cumulative[got] - weights[got] - width <= at <= cumulative[got] + width:
            return True
    return False


def differing(
    got: np.ndarray, wanted: np.ndarray, logits: np.ndarray, options: dict[str, np.ndarray]
) -> int:
    """How many tokens differ, each of them for a reason."""
    draws = philox.uniforms(options["seeds"], options["counters"])
    rows = np.flatnonzero(got != wanted)
    for s in rows:
        own = {name: values[s] for name, values in options.items()}
        assert own["temperature"] > 0, f"row {s}: {got[s]} for the argmax {wanted[s]}"
        assert is_near_a_boundary(logits[s], own, draws[s], got[s]), (
            f"row {s} at {own}: {got[s]} for {wanted[s]}, and no boundary is near"
        )
    return len(rows)


@pytest.mark.parametrize(
    ("rows", "vocab", "most"),
    [(9000, 50, 1), (6000, 400, 1), (4000, 5000, 2), (700, 32_000, 2), (300, 151_936, 4)],
)
def test_the_same_seed_gives_numpys_token(once, rows: int, vocab: int, most: int) -> None:
    """20,000 rows, each with parameters of its own; so many at `most` may differ. (On the shim
    none does: rounding errors even out over a sum, far below the bound.)"""
    rng = np.random.default_rng(vocab)
    num_differing = 0
    for start in range(0, rows, 300):
        count = min(300, rows - start)
        logits, options = random_logits(rng, count, vocab), random_options(rng, count, vocab)
        block = None if once.name != "shim" else 32 if vocab < 2000 else 256
        got = kernel_tokens(once, logits, options, block)
        num_differing += differing(got, numpy_tokens(logits, options), logits, options)
    assert num_differing <= most


def test_the_check_of_differing_tokens_is_not_lenient() -> None:
    """It takes the neighbour of a token only where the draw is within rounding of their boundary,
    and a token that top-p leaves out only at top-p's edge."""
    rng = np.random.default_rng(8)
    row = rng.normal(0, 2, 60).astype(np.float32)
    plain = {"temperature": 0.8, "top_k": -1, "top_p": 1.0, "min_p": 0.0}
    weights = np.exp((row.astype(np.float64) - row.max()) / 0.8)
    cumulative = np.cumsum(weights) / weights.sum()
    for token in range(59):
        for offset, near in ((1e-8, True), (1e-4, False)):
            draw = cumulative[token] + min(offset, (cumulative[token + 1] - cumulative[token]) / 2)
            assert is_near_a_boundary(row, plain, draw, token + 1)
            if not near and draw - cumulative[token] < 1e-5:
                continue  # a token too unlikely to draw its middle
            assert is_near_a_boundary(row, plain, draw, token) == near
    order = np.argsort(-row)
    share = np.cumsum(weights[order]) / weights.sum()
    for count in (1, 5, 20):
        left_out = order[count]
        for offset, near in ((1e-9, True), (-1e-9, True), (-1e-4, False)):
            cut = plain | {"top_p": share[count - 1] + offset}
            inside = np.where(np.isin(np.arange(60), order[: count + 1]), weights, 0)
            draw = (np.cumsum(inside) / inside.sum())[left_out] - 1e-6
            assert is_near_a_boundary(row, cut, draw, left_out) == near


# ------------------------------------------------------------------------------ edges

CUTS = {
    "cold": {"temperature": 1e-6},
    "hot": {"temperature": 100.0},
    "hot and cut": {"temperature": 100.0, "top_k": 9, "top_p": 0.6, "min_p": 0.5},
    "top-k of 1": {"top_k": 1},
    "top-k of ties": {"top_k": 3},
    "top-k of all but one": {"top_k": -2},
    "tiny top-p": {"top_p": 1e-6},
    "top-p of ties": {"top_p": 0.5},
    "top-p of nearly all": {"top_p": 1 - 2.0**-24},
    "min-p of 1": {"min_p": 1.0},
    "min-p of little": {"min_p": 1e-30},
    "greedy": {"temperature": 0.0, "top_k": 2, "top_p": 0.3},
}


def edge_rows(vocab: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(vocab)
    bell = rng.standard_normal(vocab).astype(np.float32)
    banned = np.where(np.arange(vocab) % 3 == 1, -np.inf, bell)
    banned[0] = 0.5
    single = np.full(vocab, -np.inf)
    single[vocab // 2] = -3.0
    two = single.copy()
    two[-1] = -3.0
    return {
        "bell": bell,
        "equal": np.zeros(vocab),
        "equal and low": np.full(vocab, -1e30),
        "zeros of both signs": np.where(np.arange(vocab) % 2, 0.0, -0.0),
        "rounded": np.round(bell),
        "banned": banned,
        "one finite": single,
        "two equal": two,
        "far apart": np.where(np.arange(vocab) == vocab - 1, 3e38, -3e38),
        "one ulp apart": 1 + np.arange(vocab) % 4 * 2.0**-23,
        "lowest numbers": np.arange(vocab) % 5 * 1.4e-45,
    }


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("vocab", [1, 2, 33, 700, 151_936])
def test_backends_agree_at_the_edges(once, cut: str, vocab: int) -> None:
    """At most draws of every cut, also 0 and the highest there is: same tokens, none of them cut,
    none banned."""
    rows = edge_rows(vocab)
    logits = np.stack(list(rows.values())).astype(np.float32)
    count = len(logits)
    options: dict[str, Any] = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0}
    options |= CUTS[cut]
    if options["top_k"] == -2:
        options["top_k"] = max(1, vocab - 1)
    arrays = {
        name: np.full(count, value, np.int32 if name == "top_k" else np.float32)
        for name, value in options.items()
    }
    rng = np.random.default_rng([vocab, len(cut)])
    arrays["seeds"] = rng.integers(0, 2**64, count, dtype=np.uint64)
    arrays["counters"] = rng.integers(0, 2**32, (count, 2), dtype=np.uint32)
    got, wanted = kernel_tokens(once, logits, arrays), numpy_tokens(logits, arrays)
    shared = kernel_tokens(once, logits, arrays, block=256, ranks=8)
    np.testing.assert_array_equal(shared, got, "as many blocks as may share a row")
    assert differing(got, wanted, logits, arrays) <= (1 if vocab > 1000 else 0)
    picked = logits[np.arange(count), got]
    assert np.isfinite(picked).all()
    if cut in ("top-k of 1", "tiny top-p", "min-p of 1", "greedy"):
        np.testing.assert_array_equal(picked, logits.max(axis=1))
    if cut == "greedy":
        np.testing.assert_array_equal(got, logits.argmax(axis=1))


@pytest.mark.parametrize("vocab", [1, 40, 5000])
@pytest.mark.parametrize("cut", ["hot and cut", "top-p of ties", "min-p of 1", "greedy"])
def test_backends_agree_on_rows_that_are_no_numbers(once, cut: str, vocab: int) -> None:
    """No token, whatever NaN or infinity the row has, or where all are banned."""
    logits = np.random.default_rng(0).standard_normal((6, vocab)).astype(np.float32)
    at = vocab // 3
    logits[0, at:] = np.nan
    logits[1, at], logits[1, -1] = np.inf, np.inf
    logits[2] = -np.inf
    logits[3] = np.inf
    logits[4, at], logits[4, -1] = np.inf, np.nan
    logits[5, at] = -np.nan
    options = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0} | CUTS[cut]
    arrays = {n: np.full(6, v, "i4" if n == "top_k" else "f4") for n, v in options.items()}
    arrays["seeds"] = np.arange(6, dtype=np.uint64)
    arrays["counters"] = np.zeros((6, 2), np.uint32)
    wanted = [-1] * 6
    np.testing.assert_array_equal(numpy_tokens(logits, arrays), wanted)
    for ranks in (1, 8):
        np.testing.assert_array_equal(kernel_tokens(once, logits, arrays, ranks=ranks), wanted)


def test_ties_at_the_kth_logit_all_stay(once) -> None:
    """Top-k of 3 over 5, 4, 4, 4, 4, 1…: five tokens are drawn, in their shares."""
    row = np.array([1, 4, 0, 4, 5, 4, 1, 4], np.float32)
    rows = 4000
    options = {
        "temperature": np.ones(rows, np.float32),
        "top_k": np.full(rows, 3, np.int32),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "seeds": np.full(rows, 11, np.uint64),
        "counters": np.stack([np.arange(rows), np.zeros(rows)], 1).astype(np.uint32),
    }
    logits = np.tile(row, (rows, 1))
    e = np.exp(-1.0)
    p = np.array([0, e, 0, e, 1, e, 0, e]) / (1 + 4 * e)
    for tokens in (kernel_tokens(once, logits, options), numpy_tokens(logits, options)):
        assert p_value(np.bincount(tokens, minlength=8), p) > SMALLEST_P
