"""Whether two tokenizers mean the same by their ids, as a model and its draft model must."""

from __future__ import annotations

from nanocupy.tokenizer.base import Tokenizer


def first_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """What the first id is that the two read differently, for people; None where there is none.

    Sizes are not compared: models pad the same vocabulary to different ones. An id that only one
    of them has is no difference where it stands for a special or added token, which the other
    never produces.
    """
    extra_one, extra_other = _named_ids(one), _named_ids(other)
    for token_id in range(max(one.vocab_size, other.vocab_size)):
        left, right = one.token_bytes(token_id), other.token_bytes(token_id)
        if left == right:
            continue
        if token_id in (extra_other if not left else extra_one if not right else ()):
            continue
        return f"id {token_id} is {_shown(left)} in the one and {_shown(right)} in the other"
    return None


def _named_ids(tokenizer: Tokenizer) -> set[int]:
    return {*tokenizer.special_tokens.values(), *tokenizer.added_tokens.values()}


def _shown(token: bytes) -> str:
    return repr(token.decode("utf-8", "replace")[:40]) if token else "nothing"
