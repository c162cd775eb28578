"""The sampler's kernels on vocabularies of real size, ties, and rows that are no numbers."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.ops import launch_shapes, philox
from nanocupy.ops.numpy_ops import NumpyOps, kept_probabilities
from tests.kernels.small_ops import F32, I32, assert_same_tokens, run_sample


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
    out = np.full(6, -7, np.int32)
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
    wanted = logits.argmax(axis=1)
    wanted[[1, 4, 5]] = -1  # no numbers
    np.testing.assert_array_equal(out, wanted)


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
def test_rows_that_are_no_numbers_give_none(backend, bad: float) -> None:
    logits = np.random.default_rng(1).standard_normal((3, 70))
    logits[1, 5:] = bad
    logits[2] = bad
    got, _ = sample(backend, logits, top_p=0.5, top_k=3)
    assert 0 <= got[0] < 70
    assert (got[1] == -1) == (bad != -np.inf)  # the first five are numbers
    assert got[2] == -1


def test_philox_is_the_hosts(backend) -> None:
    """One draw over 2^16 even weights gives back the leading bits of the uniform number."""
    rows, vocab = 8, 1 << 16
    got, arguments = sample(backend, np.zeros((rows, vocab)), seed=9, block=1024)
    draws = philox.uniforms(arguments["seeds"], arguments["counters"])
    np.testing.assert_array_equal(got, (draws * vocab).astype(np.int32))
