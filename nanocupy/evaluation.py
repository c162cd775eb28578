"""How well a model holds a text: perplexity, and where two ways to run it choose other tokens.

Over `LLM` alone: what it measures is what everyone gets, by whatever kernels and types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanocupy.errors import RequestError
from nanocupy.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanocupy.llm import LLM

BATCH = 16  # windows given to the engine at once, so that progress shows

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class TextScore:
    """What a model says to each scored token of a text, all but the first.

    logprobs   natural logarithm of its probability
    best_ids   the most likely token in its place
    """

    logprobs: list[float]
    best_ids: list[int]

    @property
    def perplexity(self) -> float:
        """exp of the mean negative logprob; inf where a token was impossible."""
        mean = -math.fsum(self.logprobs) / len(self.logprobs)
        return math.exp(mean) if mean < 700 else math.inf

    def agreement(self, other: TextScore) -> float:
        """The share of places where both hold the same token most likely."""
        pairs = zip(self.best_ids, other.best_ids, strict=True)
        return sum(a == b for a, b in pairs) / len(self.best_ids)


def windows(num_tokens: int, window: int, overlap: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored) of parts of a text of that many tokens, which score each token but
    the first once, after at least `overlap` others where there are as many."""
    parts, scored = [], 1
    while scored < num_tokens:
        start = 0 if scored == 1 else scored - overlap
        end = min(num_tokens, start + window)
        parts.append((start, end, scored))
        scored = end
    return parts


def score_text(
    llm: LLM, token_ids: Sequence[int], window: int, overlap: int, report: Report | None = None
) -> TextScore:
    """Score a text in windows of so many tokens, each of which sees `overlap` tokens before those
    that it scores. report: called with tokens scored and in all.

    Raises RequestError for a text or windows that cannot be, CheckpointError where the model gives
    no numbers.
    """
    if len(token_ids) < 2:
        raise RequestError(f"the text has {len(token_ids)} tokens; two are the least to score")
    if not 2 <= window < llm.max_context:
        raise RequestError(
            f"window is {window}; it must be from 2 to {llm.max_context - 1}, what the context of "
            f"{llm.max_context} leaves"
        )
    if not 1 <= overlap < window:
        raise RequestError(f"overlap is {overlap}; it must be from 1 to {window - 1}")
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=1)
    parts = windows(len(token_ids), window, overlap)
    logprobs: list[float] = []
    best_ids: list[int] = []
    for first in range(0, len(parts), BATCH):
        batch = parts[first : first + BATCH]
        answers = llm.generate(
            [list(token_ids[start:end]) for start, end, _ in batch], params, progress=False
        )
        for (start, _, scored), answer in zip(batch, answers, strict=True):
            found = answer.prompt_logprobs
            if answer.finish_reason == "error" or found is None:
                raise llm.no_numbers()
            for token in found[scored - start :]:
                assert token is not None
                logprobs.append(token.logprob)
                best_ids.append(token.top[0][0])
        if report is not None:
            report(len(logprobs), len(token_ids) - 1)
    return TextScore(logprobs, best_ids)
