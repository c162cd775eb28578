"""The sampler's kernels on vocabularies of real size, ties, and rows that are no numbers."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.ops import launch_shapes, philox
from nanocupy.ops.numpy_ops import NumpyOps, kept_probabilities
from tests.kernels.small_ops import (
    F32,
    I32,
    assert_same_tokens,
    run_argmax,
    run_sample,
)


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
    wanted = logits.argmax(axis=1)
    wanted[[1, 4, 5]] = -1  # no numbers
    np.testing.assert_array_equal(run_argmax(backend, logits, parts), wanted)


def sample(
    backend, logits: np.ndarray, seed: int = 0, block: int | None = None, ranks: int = 1, **options
):
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
    run_sample(backend, np.dtype(np.float32), block, **arguments, out=out, ranks=ranks)
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
@pytest.mark.parametrize("ranks", [1, 8])
def test_sampling_a_large_vocabulary(backend, ranks: int, options: dict[str, float]) -> None:
    logits = np.random.default_rng(5).standard_normal((6, 9001)) * 3
    logits[3:] = np.round(logits[3:] * 2) / 2  # ties at every boundary
    got, arguments = sample(backend, logits, ranks=ranks, block=256, **options)
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


@pytest.mark.parametrize("vocab", [1, 3, 29, 700, 5001, 20000])
def test_blocks_of_a_row_change_no_token(backend, vocab: int) -> None:
    """However many share a row, wherever they keep it: the same token, alone or in a batch, for
    all mixtures of options, where few tokens are left (one block ends alone) and where many are."""
    rows = 24
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((rows, vocab)).astype(F32)
    logits[::3] *= 4
    logits[1::6] = np.round(logits[1::6])
    logits[2, vocab // 2 + 1 :] = -np.inf
    arguments = {
        "temperature": rng.choice([0.0, 0.5, 1.0, 3.0, 300.0], rows, p=[0.1, 0.3, 0.3, 0.2, 0.1]),
        "top_k": rng.choice([-1, 1, 20, 3000], rows),
        "top_p": rng.choice([1.0, 0.5, 0.95, 0.9999], rows),
        "min_p": rng.choice([0.0, 0.0, 0.02], rows),
        "seeds": rng.integers(0, 2**64, rows, dtype=np.uint64),
        "counters": rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
    }
    floats = ("temperature", "top_p", "min_p")
    arguments |= {name: arguments[name].astype(F32) for name in floats}
    arguments |= {"logits": logits, "top_k": arguments["top_k"].astype(I32)}

    def tokens(chosen: slice, block: int, **launch: int) -> np.ndarray:
        some = {name: np.ascontiguousarray(values[chosen]) for name, values in arguments.items()}
        out = np.full(len(some["logits"]), -9, I32)
        run_sample(backend, np.dtype(F32), block, **some, out=out, **launch)
        return out

    first = tokens(slice(None), 256)
    assert first.min() >= 0
    assert first.max() < vocab
    wanted = np.full(rows, -1, I32)
    NumpyOps(np.float64).sample(**arguments, out=wanted)
    assert_same_tokens(first, wanted, arguments)
    for ranks in (2, 4, 8):
        np.testing.assert_array_equal(tokens(slice(None), 64, ranks=ranks), first)
    np.testing.assert_array_equal(tokens(slice(None), 512, shared=20 << 10), first)
    np.testing.assert_array_equal(tokens(slice(None), 96, ranks=8, shared=20 << 10), first)
    for row in (0, 7):
        alone = slice(row, row + 1)
        np.testing.assert_array_equal(tokens(alone, 128, ranks=8), first[alone])


def test_how_many_blocks_share_a_row() -> None:
    """All multiprocessors, while a block has enough; with many rows, two blocks on one."""

    def launch(rows: int, vocab: int, clusters: bool = True) -> launch_shapes.LaunchShape:
        return launch_shapes.sample_rows(rows, vocab, 132, 227 << 10, clusters)

    assert [launch(n, 151_936).cluster for n in (1, 16, 17, 256)] == [8, 8, 8, 8]
    assert [launch(n, 32_000).cluster for n in (1, 16, 17, 40, 256)] == [8, 8, 4, 2, 2]
    assert [launch(1, n).cluster for n in (1, 4095, 4096, 8192)] == [1, 1, 2, 4]
    assert launch(5, 151_936, clusters=False).grid == (5,)
    assert launch_shapes.keeps_logits(launch(256, 151_936))
    assert not launch_shapes.keeps_logits(launch(1, 151_936, clusters=False))
    for rows, vocab in ((1, 151_936), (40, 32_000), (300, 262_144), (3, 600_000)):
        shape = launch(rows, vocab)
        assert shape.shared_bytes + launch_shapes.SAMPLE_STATIC_BYTES <= 227 << 10
        assert shape.grid == (rows * shape.cluster,)
    assert launch(0, 100).grid == (0,)


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_no_numbers_give_none(backend, bad: float, ranks: int) -> None:
    logits = np.random.default_rng(1).standard_normal((3, 70))
    logits[1, 5:] = bad
    logits[2] = bad
    got, _ = sample(backend, logits, top_p=0.5, top_k=3, ranks=ranks)
    assert 0 <= got[0] < 70
    assert (got[1] == -1) == (bad != -np.inf)  # the first five are numbers
    assert got[2] == -1


@pytest.mark.parametrize("ranks", [1, 4])
def test_philox_is_the_hosts(backend, ranks: int) -> None:
    """One draw over 2^16 even weights gives back the leading bits of the uniform number."""
    rows, vocab = 8, 1 << 16
    got, arguments = sample(backend, np.zeros((rows, vocab)), seed=9, block=512, ranks=ranks)
    draws = philox.uniforms(arguments["seeds"], arguments["counters"])
    np.testing.assert_array_equal(got, (draws * vocab).astype(np.int32))
