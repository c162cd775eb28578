"""What a step gives: plain data between runner, engine and who asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nanocupy.engine.request import Request

FAILED_TOKEN = -1  # in place of the id of a row whose logits are no numbers


class TokenLogprob(NamedTuple):
    """How likely the model held a token, by its own logits: before bias, penalties, temperature
    and cuts. Natural logarithms.

    token_id, logprob  the token that stands there, chosen or given
    rank               1 + how many tokens were more likely
    top                (id, logprob) of the most likely ones, falling
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class StepResult:
    """What a step gives where its schedule asks for more than ids (`Schedule.wants_logprobs`).

    token_ids        of the schedule's rows, in its order
    logprobs         of those ids, in the same order; None where not asked for, or failed
    prompt_logprobs  of the prompts' tokens that follow those computed in this step, by request, in
                     the order of positions, and none that the request has already
    """

    token_ids: list[int]
    logprobs: Sequence[TokenLogprob | None] = ()
    prompt_logprobs: Mapping[Request, list[TokenLogprob]] = field(default_factory=dict)


class StepOutput(NamedTuple):
    """One new token of one sample of a request.

    finish_reason    "stop" (end of text or a stop id: token_id is that id), "length", "error" (the
                     model gave no numbers for it, or for a token of a prompt whose
                     log-probabilities were asked for: token_id is FAILED_TOKEN), or None while it
                     goes on
    logprobs         of this token, where the request asks for them
    prompt_logprobs  with the first token, where the request asks for them: of each token of the
                     prompt but the first
    """

    request_id: str
    token_id: int
    finish_reason: str | None
    sample_index: int = 0
    logprobs: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
