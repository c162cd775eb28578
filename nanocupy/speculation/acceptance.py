"""Which drafts count. The rule keeps the model's own output, token for token.

A step with drafts d1 … dK chooses a token after the request's last token (t0) and one after each
draft (t1 … tK), every one from the model's own logits there, by the request's own parameters, and
with the random number that belongs to its position. d1 is right where it is t0, d2 where it is t1
too, and so on; the request gets t0 … ta, a being how many were right.

So a request gets the very tokens that it would get without drafts, whatever the drafts were: they
decide how many forwards it takes, never what comes. As rejection sampling (Leviathan et al. 2023,
Chen et al. 2023) this is the case of a proposal that is certain of one token: d is kept with the
probability p(d), and what stands in for a rejected one is distributed as p without d. A draft model
draws with the same random number (see `draft_model`), which makes it agree more often than its
likeliest token would, and always where it has the model's own distribution (Daliri, Musco, Suresh
2024, "Coupling without communication and drafter-invariant speculative decoding").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# (drafts, what was chosen before, after and between them) -> how many of the first drafts are right
CountRight = Callable[[Sequence[int], Sequence[int]], int]


def count_right(drafts: Sequence[int], chosen: Sequence[int]) -> int:
    """How many of the first drafts are what was chosen in their places; chosen has one more."""
    for number, (draft, token_id) in enumerate(zip(drafts, chosen, strict=False)):
        if draft != token_id:
            return number
    return len(drafts)
