"""What guesses the next tokens of requests. The engine knows proposers by this interface alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from nanocupy.engine.request import Request


class Proposer(ABC):
    """Guesses may be wrong, short, or none: they cost time, and never change what a request gets.
    Requests are only looked at."""

    name: str
    # Tokens of a step of the engine at most, which says how long others wait for one; None = any.
    max_step_tokens: int | None = None
    # Whether the last `propose` was at tokens that it had not read yet, so took longer than others.
    was_reading = False

    @abstractmethod
    def is_promising(self, request: Request) -> bool:
        """Whether a guess is likely to be found once all ids of the request are known; the newest
        may not be yet. Asked in every step, so it must be quick."""

    @abstractmethod
    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, Sequence[int]]:
        """At most so many next tokens for each request, the ids of all its tokens being known. Who
        gets none is left out; an empty guess says that there may be one next time, when more of the
        request's tokens are read."""

    @abstractmethod
    def forget(self, request: Request) -> None:
        """The request has ended; it may be one that was never asked for."""
