"""Speculators for tests: proposers that are right as often as is wanted, and policies that never
stop."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from nanocupy.engine.request import Request
from nanocupy.speculation.ngram import NgramProposer
from nanocupy.speculation.policy import DraftPolicy
from nanocupy.speculation.proposer import Proposer
from nanocupy.speculation.speculator import Speculator

MAX_DRAFTS = 7


class GuessingProposer(Proposer):
    """Knows what comes, by `answer` (request -> all of its output), and says so with probability
    `right` for each token; else another id below vocab_size. Gives fewer than asked now and then,
    and sometimes none."""

    name = "guessing"

    def __init__(
        self,
        answer: Callable[[Request], Sequence[int]],
        right: float,
        vocab_size: int,
        seed: int = 0,
    ) -> None:
        self._answer = answer
        self._right = right
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self.forgotten: set[Request] = set()

    def is_promising(self, request: Request) -> bool:
        return self._random.random() < 0.9

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, Sequence[int]]:
        rng, found = self._random, {}
        for request, count in wanted.items():
            assert count > 0
            assert not request.num_pending_tokens, "asked before all ids are known"
            if rng.random() < 0.1:
                continue
            answer = self._answer(request)[len(request.output_ids) :]
            drafts = list(answer[: rng.randint(1, count)])
            found[request] = [
                token_id if rng.random() < self._right else self._another(token_id)
                for token_id in drafts
            ]
        return {request: drafts for request, drafts in found.items() if drafts}

    def _another(self, token_id: int) -> int:
        return (token_id + self._random.randrange(1, self._vocab_size)) % self._vocab_size

    def forget(self, request: Request) -> None:
        self.forgotten.add(request)


def ngram_speculator(num_drafts: int = MAX_DRAFTS) -> Speculator:
    return Speculator(NgramProposer(), DraftPolicy(num_drafts))
