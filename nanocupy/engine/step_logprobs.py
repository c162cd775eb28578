"""The log-probabilities of a step, from logits on the host. Shared by the runners; NumPy only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nanocupy.engine.request import Request
from nanocupy.engine.results import FAILED_TOKEN, TokenLogprob
from nanocupy.engine.schedule import ScheduledRequest
from nanocupy.ops.logprobs import token_logprobs


def asking_rows(requests: Sequence[Request]) -> list[int]:
    """Rows of the sampled requests whose logits must be kept as they are before `penalize`."""
    return [row for row, request in enumerate(requests) if request.num_logprobs is not None]


def sampled_logprobs(
    logits: np.ndarray, rows: Sequence[int], requests: Sequence[Request], token_ids: Sequence[int]
) -> list[TokenLogprob | None]:
    """For each of `requests`, with its sampled id; None where it does not ask, or failed.

    logits float32 [len(rows), V]: those of `asking_rows`, unchanged.
    """
    found: list[TokenLogprob | None] = [None] * len(requests)
    for kept, row in enumerate(rows):
        if token_ids[row] != FAILED_TOKEN:
            ids = np.array([token_ids[row]], np.int32)
            count = requests[row].num_logprobs
            assert count is not None
            (found[row],) = plain_logprobs(logits[kept : kept + 1], ids, count)
    return found


@dataclass(frozen=True)
class PromptRows:
    """Rows of a step's batch that tell of a prompt's tokens: the token after each of them.

    rows int32 [n], of the flat batch; token_ids int32 [n]
    """

    request: Request
    rows: np.ndarray
    token_ids: np.ndarray

    def split(self, max_rows: int) -> Iterator[PromptRows]:
        """In parts of at most `max_rows` rows."""
        for start in range(0, len(self.rows), max_rows):
            part = slice(start, start + max_rows)
            yield PromptRows(self.request, self.rows[part], self.token_ids[part])

    def logprobs(self, logits: np.ndarray) -> list[TokenLogprob]:
        """From the rows' logits, float32 [n, V]."""
        count = self.request.num_prompt_logprobs
        assert count is not None
        return plain_logprobs(logits, self.token_ids, count)


def prompt_rows(schedule: Iterable[ScheduledRequest]) -> list[PromptRows]:
    """Of the requests that ask for their prompt's, what this step's tokens tell and they lack."""
    found = []
    row = 0
    for item in schedule:
        request, start = item.request, item.request.num_computed_tokens
        if request.num_prompt_logprobs is not None:
            # The token at position p tells of that at p + 1; what was told is not told again.
            first = max(start, len(request.prompt_logprobs))
            stop = min(start + item.num_tokens, request.num_prompt_tokens - 1)
            if first < stop:
                rows = np.arange(first, stop, dtype=np.int32) + np.int32(row - start)
                ids = np.array(request.prompt_ids[first + 1 : stop + 1], np.int32)
                found.append(PromptRows(request, rows, ids))
        row += item.num_tokens
    return found


def plain_logprobs(logits: np.ndarray, token_ids: np.ndarray, count: int) -> list[TokenLogprob]:
    """`token_logprobs` of rows float32 [S, V], as plain data."""
    found = token_logprobs(logits, token_ids, count)
    tops = zip(found.top_ids.tolist(), found.top_logprobs.tolist(), strict=True)
    return [
        TokenLogprob(token_id, logprob, rank, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, rank, (ids, values) in zip(
            token_ids.tolist(), found.logprobs.tolist(), found.ranks.tolist(), tops, strict=True
        )
    ]
