"""Log-probabilities against plain loops in float64, and what they must not depend on."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from nanocupy.ops import logprobs
from nanocupy.ops.logprobs import token_logprobs


def loop_logprobs(row: np.ndarray) -> list[float]:
    values = [float(x) for x in row]
    top = max(values)
    total = math.fsum(math.exp(x - top) for x in values)
    return [x - top - math.log(total) for x in values]


def rows_of(vocab: int) -> np.ndarray:
    rng = np.random.default_rng(vocab)
    bell = rng.standard_normal((7, vocab)) * 3
    bell[1] = np.round(bell[1])  # ties
    bell[2] += 1e4
    bell[3] = np.where(rng.random(vocab) < 0.7, -np.inf, bell[3])
    bell[3, vocab // 2] = 1.0
    bell[4] = 0.0
    bell[5] = -300.0
    bell[5, -1] = 400.0  # the others' logarithms are finite, their probabilities are not float32
    bell[6, ::2] = -0.0
    return bell.astype(np.float32)


@pytest.mark.parametrize("vocab", [1, 2, 50, 3000])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_against_loops(vocab: int, num_top: int) -> None:
    logits = rows_of(vocab)
    before = logits.copy()
    ids = np.random.default_rng(1).integers(0, vocab, len(logits)).astype(np.int32)
    found = token_logprobs(logits, ids, num_top)
    assert logits.tobytes() == before.tobytes()
    count = min(num_top, vocab)
    assert found.top_ids.shape == found.top_logprobs.shape == (len(logits), count)
    for s, row in enumerate(logits):
        wanted = loop_logprobs(row)
        assert found.logprobs[s] == pytest.approx(wanted[ids[s]], rel=1e-6, abs=1e-7)
        assert found.ranks[s] == 1 + sum(x > row[ids[s]] for x in row)
        order = sorted(range(vocab), key=lambda i: (-row[i], i))[:count]
        assert found.top_ids[s].tolist() == order
        np.testing.assert_allclose(
            found.top_logprobs[s], np.take(wanted, order), rtol=1e-6, atol=1e-7
        )


def test_a_real_vocabulary_sums_to_one_and_ranks_the_argmax_first() -> None:
    vocab = 151_936
    logits = (np.random.default_rng(0).standard_normal((3, vocab)) * [[0.1], [3], [20]]).astype(
        "f4"
    )
    ids = logits.argmax(axis=1).astype(np.int32)
    found = token_logprobs(logits, ids, vocab)
    np.testing.assert_allclose(np.exp(found.top_logprobs.astype(float)).sum(axis=1), 1, rtol=1e-6)
    assert found.ranks.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(found.top_ids[:, 0], ids)
    np.testing.assert_array_equal(found.top_logprobs[:, 0], found.logprobs)
    assert (np.diff(found.top_logprobs, axis=1) <= 0).all()


def test_a_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = rows_of(90)
    ids = np.arange(len(logits), dtype=np.int32)
    whole = token_logprobs(logits, ids, 4)
    monkeypatch.setattr(logprobs, "MAX_TILE_ELEMENTS", 200)  # two rows a tile
    for s in range(len(logits)):
        alone = token_logprobs(logits[s : s + 1], ids[s : s + 1], 4)
        for name, values in vars(whole).items():
            np.testing.assert_array_equal(values[s], getattr(alone, name)[0])
    tiled = token_logprobs(logits, ids, 4)
    for name, values in vars(whole).items():
        np.testing.assert_array_equal(values, getattr(tiled, name))


def test_the_chosen_token_is_in_its_place_among_the_top() -> None:
    """Rank r <= K and no tie: it is top token r, with the same number."""
    logits = np.random.default_rng(2).standard_normal((200, 30)).astype(np.float32)
    ids = np.random.default_rng(3).integers(0, 30, 200).astype(np.int32)
    found = token_logprobs(logits, ids, 10)
    for s in range(200):
        rank = found.ranks[s]
        if rank <= 10:
            assert found.top_ids[s, rank - 1] == ids[s]
            assert found.top_logprobs[s, rank - 1] == found.logprobs[s]
        else:
            assert ids[s] not in found.top_ids[s]
            assert found.logprobs[s] <= found.top_logprobs[s, -1]


@pytest.mark.parametrize("num_top", [0, 3])
def test_no_rows(num_top: int) -> None:
    found = token_logprobs(np.empty((0, 9), np.float32), np.empty(0, np.int32), num_top)
    assert found.logprobs.shape == found.ranks.shape == (0,)
    assert found.top_ids.shape == found.top_logprobs.shape == (0, num_top)


def test_rows_without_a_distribution_are_nan_and_harm_nobody() -> None:
    logits = np.random.default_rng(4).standard_normal((5, 12)).astype(np.float32)
    logits[1, 3] = np.nan
    logits[2, 4] = np.inf
    logits[3] = -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = token_logprobs(logits, np.full(5, 2, np.int32), 12)
    for s in (1, 2, 3):
        assert np.isnan(found.logprobs[s])
        assert np.isnan(found.top_logprobs[s]).all()
        assert sorted(found.top_ids[s]) == list(range(12))
    for s in (0, 4):
        assert np.isfinite(found.top_logprobs[s]).all()
        assert found.logprobs[s] == pytest.approx(loop_logprobs(logits[s])[2], rel=1e-6)
