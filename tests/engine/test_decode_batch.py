"""The decode batch as the host knows it: the short ways to bring it up to date."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.engine.decode_state import DecodeState
from nanocupy.engine.request import Request
from nanocupy.sampling_params import SamplingParams

BLOCK, COLUMNS, PLACES = 4, 16, 4


def requests_of(count: int, rng: np.random.Generator) -> list[Request]:
    found = []
    for number in range(count):
        prompt = rng.integers(0, 90, int(rng.integers(1, 12))).tolist()
        params = SamplingParams(temperature=0.5, top_k=7, top_p=0.75, seed=number)
        request = Request(str(number), prompt, params, number, COLUMNS * BLOCK)
        request.num_computed_tokens = len(prompt) - 1
        found.append(request)
    return found


def grow(request: Request, blocks) -> None:
    while len(request.block_ids) * BLOCK <= request.num_computed_tokens:
        request.block_ids.append(next(blocks))


def go_on(request: Request, rng: np.random.Generator) -> None:
    """Some tokens more or, of one whose tokens were guesses, others in the place of the last."""
    if request.output_ids and rng.random() < 0.4:
        kept = int(rng.integers(0, len(request.output_ids)))
        request.num_rewinds += 1
        request.output_ids[kept:] = rng.integers(0, 90, int(rng.integers(1, 4))).tolist()
    else:
        request.output_ids += rng.integers(0, 90, int(rng.integers(0, 4))).tolist()
    request.num_tokens = request.num_known_tokens
    request.num_computed_tokens = request.num_tokens - 1


def decode(requests: list[Request], state: DecodeState, device: np.ndarray) -> None:
    """What a decode step does to the device's words, which has drawn the tokens that stand last."""
    state.advance()
    device[:] = state.words
    token_ids = state.view(device, "token_ids", PLACES)
    for request in requests:
        token_ids[state.place_of(request)] = request.output_ids[-1]


def put(device: np.ndarray, updates: np.ndarray) -> None:
    device[updates[:, 0]] = updates[:, 1]


@pytest.mark.parametrize("seed", range(40))
def test_catching_up_is_an_update_of_the_same_batch(seed):
    """Whatever requests did meanwhile, of which the host knows all tokens: both ways the device
    gets the same words."""
    rng = np.random.default_rng(seed)
    requests = requests_of(int(rng.integers(1, PLACES + 1)), rng)
    blocks = iter(range(1, 1000))
    long, short = (DecodeState(PLACES, COLUMNS, BLOCK) for _ in range(2))
    by_long, by_short = long.words.copy(), short.words.copy()
    for request in requests:
        grow(request, blocks)
    for state, device in ((long, by_long), (short, by_short)):
        put(device, state.updates(requests))
    for _ in range(10):
        if rng.random() < 0.5:
            for request in requests:
                request.append(int(rng.integers(0, 90)))
                request.num_computed_tokens = request.num_tokens - 1
                grow(request, blocks)
            decode(requests, long, by_long)
            decode(requests, short, by_short)
        for request in requests:
            if rng.random() < 0.5:
                go_on(request, rng)
            grow(request, blocks)
        order = [requests[i] for i in rng.permutation(len(requests))]
        put(by_long, long.updates(order))
        updates = short.caught_up(order)
        assert updates is not None
        put(by_short, updates)
        np.testing.assert_array_equal(by_short, by_long)
        for request in requests:
            token_ids = short.view(by_short, "token_ids", PLACES)
            last = (request.output_ids or request.prompt_ids)[-1]
            assert token_ids[short.place_of(request)] == last


@pytest.mark.parametrize("why", ["another", "one more", "one less", "preempted", "a token unread"])
def test_another_batch_is_not_caught_up_with(why):
    rng = np.random.default_rng(3)
    requests = requests_of(3, rng)
    blocks = iter(range(1, 1000))
    for request in requests:
        grow(request, blocks)
    state = DecodeState(PLACES, COLUMNS, BLOCK)
    state.updates(requests[:2])
    batch = {
        "another": requests[1:], "one more": requests, "one less": requests[:1],
        "preempted": requests[:2], "a token unread": requests[:2],
    }[why]  # fmt: skip
    requests[0].num_rewinds += 1
    requests[1].num_preemptions += why == "preempted"
    requests[1].num_tokens += why == "a token unread"
    words = state.words.copy()
    assert state.caught_up(batch) is None
    np.testing.assert_array_equal(state.words, words)
    requests[1].num_preemptions = 0
    requests[1].num_tokens = requests[1].num_known_tokens
    assert len(state.caught_up(requests[:2])), "the token of one with rewinds is sent"
