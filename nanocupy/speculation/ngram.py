"""Prompt lookup: what followed the last tokens where they stood before, in prompt or output.

Costs no forward, and is right where a text repeats itself: summaries, edits, code, quotations.
Source: prompt lookup decoding (Saxena 2023). Pure Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nanocupy.engine.request import Request
from nanocupy.speculation.proposer import Proposer

LONGEST_MATCH = 8  # tokens that are compared; a longer match says no more
MOST_PLACES = 8  # of the last two tokens that are compared, the newest ones


class NgramIndex:
    """The tokens of one request, and where each pair of neighbours stands."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}  # of a pair's second token, rising

    def extend(self, token_ids: Sequence[int]) -> None:
        """More tokens, behind those that are there."""
        tokens, places = self.tokens, self._places
        for token_id in token_ids:
            if tokens:
                places.setdefault((tokens[-1], token_id), []).append(len(tokens))
            tokens.append(token_id)

    def find(self) -> int | None:
        """The place of the token after the best earlier match of the last tokens: the longest, of
        equally long ones the newest. None where not even two tokens match."""
        tokens = self.tokens
        if len(tokens) < 2:
            return None
        places = self._places[tokens[-2], tokens[-1]]
        best, longest = None, 1
        for place in reversed(places[-1 - MOST_PLACES : -1]):
            length = 2
            while length < min(LONGEST_MATCH, place + 1):
                if tokens[place - length] != tokens[-1 - length]:
                    break
                length += 1
            if length > longest:
                best, longest = place + 1, length
                if length == LONGEST_MATCH:
                    break
        return best

    def continuation(self, count: int) -> list[int]:
        """The `count` tokens after the match; where it reaches the end of the text, the text goes
        on with what was found. Empty where nothing matches."""
        start = self.find()
        if start is None:
            return []
        known = self.tokens[start : start + count]
        period = len(known)
        return [known[i % period] for i in range(count)]


class NgramProposer(Proposer):
    """An index for every request that was asked for."""

    name = "ngram"

    def __init__(self) -> None:
        self._indices: dict[Request, NgramIndex] = {}

    def is_promising(self, request: Request) -> bool:
        return self._index(request).find() is not None

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, Sequence[int]]:
        found = {r: self._index(r).continuation(count) for r, count in wanted.items()}
        return {request: ids for request, ids in found.items() if ids}

    def forget(self, request: Request) -> None:
        self._indices.pop(request, None)

    def _index(self, request: Request) -> NgramIndex:
        """Of all tokens that are known now."""
        index = self._indices.get(request)
        if index is None:
            index = self._indices[request] = NgramIndex()
        count = len(index.tokens)
        if count < request.num_known_tokens:
            num_prompt = request.num_prompt_tokens
            index.extend(request.prompt_ids[count:])
            index.extend(request.output_ids[max(count - num_prompt, 0) :])
        return index
