"""Prompt lookup against a search of the whole text."""

from __future__ import annotations

import random

import pytest

from nanocupy.engine.request import Request
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.ngram import LONGEST_MATCH, NgramIndex, NgramProposer


def searched(tokens: list[int], count: int) -> list[int]:
    """The tokens after the longest earlier match of the end, the newest of equally long ones."""
    for length in range(LONGEST_MATCH, 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                text, found = list(tokens), []
                while len(found) < count:
                    found.append(text[end + len(found)])
                    text.append(found[-1])
                return found
    return []


@pytest.mark.parametrize("vocab", [2, 4, 12])
def test_equal_to_a_search_of_the_text(vocab):
    """Few places of a pair here, so that the search is no wider than the index looks."""
    rng = random.Random(vocab)
    found = 0
    for _ in range(400):
        tokens = [rng.randrange(vocab) for _ in range(rng.randrange(0, 9 if vocab == 2 else 24))]
        index = NgramIndex()
        cut = rng.randint(0, len(tokens))
        index.extend(tokens[:cut])
        index.extend(tokens[cut:])
        for count in (1, 5):
            assert index.continuation(count) == searched(tokens, count)
        found += bool(index.continuation(1))
    assert 20 < found < 400


def test_text_that_repeats_goes_on_repeating():
    index = NgramIndex()
    index.extend([9, 1, 2, 3, 1, 2, 3, 1, 2])
    assert index.continuation(7) == [3, 1, 2, 3, 1, 2, 3]


def test_the_longest_match_wins_over_the_newest():
    index = NgramIndex()
    index.extend([5, 1, 2, 70, 6, 1, 2, 80, 5, 1, 2])
    assert index.continuation(1) == [70]


def test_the_index_follows_prompt_and_output():
    request = Request("a", [1, 2, 3, 1], SamplingParams(), 0, 50)
    proposer = NgramProposer()
    assert not proposer.is_promising(request)
    assert proposer.propose({request: 3}) == {}
    request.append(2)
    assert proposer.is_promising(request)
    assert proposer.propose({request: 3}) == {request: [3, 1, 2]}
    for token_id in (3, 7, 3):
        request.append(token_id)
    assert proposer.propose({request: 2}) == {}
    request.append(7)
    assert proposer.propose({request: 4}) == {request: [3, 7, 3, 7]}
    proposer.forget(request)
    assert proposer._indices == {}
