"""Log-probabilities of tokens: of the one that was chosen, and of the most likely ones.

They are the model's own: of the logits as the LM head gives them, before logit bias, penalties,
temperature and cuts. So they compare between requests however these are sampled, a prompt's and an
output's mean the same, and they must be taken before `penalize` changes the logits in place.
Knows nothing of requests or text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Logits worked on together: bounds the float64 copies a long prompt's rows make.
MAX_TILE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class TokenLogprobs:
    """Of S rows: natural logarithms, 0 at most; -inf for a token the model rules out.

    logprobs      float32 [S], of the row's own token
    ranks         int32 [S], 1 + how many tokens are more likely than it (ties share a rank)
    top_ids       int32 [S, K], the most likely tokens, falling; of a tie the lowest id first
    top_logprobs  float32 [S, K]
    """

    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def token_logprobs(logits: np.ndarray, token_ids: np.ndarray, num_top: int) -> TokenLogprobs:
    """Log-probabilities at each row of logits float32 [S, V], of token_ids int32 [S] (each in
    [0, V)) and of the K = min(num_top, V) most likely tokens; the logits stay as they are.

    For a sampled token the row is the one it was drawn from; for the prompt's token at position
    p > 0 it is that of position p - 1 (the first token has none). A row's result depends on the row
    alone. A row with a NaN or +inf, or of nothing but -inf, has no distribution: its
    log-probabilities are NaN.
    """
    num_rows, vocab = logits.shape
    num_top = min(num_top, vocab)
    out = TokenLogprobs(
        logprobs=np.empty(num_rows, np.float32),
        ranks=np.empty(num_rows, np.int32),
        top_ids=np.empty((num_rows, num_top), np.int32),
        top_logprobs=np.empty((num_rows, num_top), np.float32),
    )
    num_tile = max(1, MAX_TILE_ELEMENTS // vocab)
    for start in range(0, num_rows, num_tile):
        rows = slice(start, start + num_tile)
        tile = logits[rows]
        normalizers = _log_normalizers(tile)
        chosen = np.take_along_axis(tile, token_ids[rows, None], axis=1)
        out.ranks[rows] = 1 + np.count_nonzero(tile > chosen, axis=1)
        with np.errstate(invalid="ignore"):  # inf - inf, of rows without a distribution
            out.logprobs[rows] = chosen[:, 0] - normalizers
            if num_top:
                ids = np.stack([_top_ids(row, num_top) for row in tile])
                out.top_ids[rows] = ids
                top = np.take_along_axis(tile, ids, axis=1)
                out.top_logprobs[rows] = top - normalizers[:, None]
    return out


def _log_normalizers(logits: np.ndarray) -> np.ndarray:
    """float64 [S]: log(sum(exp(row))), NaN where that is no number or infinite."""
    top = logits.max(axis=1)
    top = np.where(np.isfinite(top), top, np.nan).astype(np.float64)
    weights = np.subtract(logits, top[:, None], dtype=np.float64)
    np.exp(weights, out=weights)
    return top + np.log(weights.sum(axis=1))


def _top_ids(row: np.ndarray, num_top: int) -> np.ndarray:
    """Ids of the largest logits of a row [V], falling, lowest id first among equals."""
    if np.isnan(row.max()):
        row = np.where(np.isnan(row), np.inf, row)  # so that they have a place in the order
    least = np.partition(row, -num_top)[-num_top]
    ids = np.flatnonzero(row >= least)
    return ids[np.argsort(-row[ids], kind="stable")][:num_top]
