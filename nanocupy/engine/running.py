"""The running requests, of which those that decode move in lockstep. Pure Python.

Who decodes computes its last token in every step and gets another. So it is known beforehand in
which step one begins a block and which is its last, and a step asks nothing of every request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nanocupy.engine.request import Request
from nanocupy.engine.schedule import Schedule, ScheduledRequest


def decodes(request: Request) -> bool:
    """Whether a step with one token of it, its last, gives it another."""
    return request.num_uncomputed_tokens == 1


class DecodingSet:
    """Requests for which `decodes` holds, in the order in which they came."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._clock = 0  # steps made
        self._items: dict[Request, ScheduledRequest] = {}
        # By the residue of the clock at which they begin a block, and by the clock of their end.
        self._by_border: list[dict[Request, None]] = [{} for _ in range(block_size)]
        self._by_end: dict[int, dict[Request, None]] = {}
        self._places: dict[Request, tuple[int, int]] = {}
        self._schedule: Schedule | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, request: Request) -> bool:
        return request in self._items

    def __iter__(self) -> Iterator[Request]:
        return iter(self._items)

    def join(self, request: Request) -> None:
        border = (self._clock - request.num_computed_tokens) % self._block_size
        end = self._clock + request.max_total_tokens - request.num_tokens
        self._items[request] = ScheduledRequest(request, 1, True)
        self._by_border[border][request] = None
        self._by_end.setdefault(end, {})[request] = None
        self._places[request] = border, end
        self._schedule = None

    def leave(self, request: Request) -> bool:
        """Take a request out; False where it is not here."""
        place = self._places.pop(request, None)
        if place is None:
            return False
        border, end = place
        del self._items[request], self._by_border[border][request], self._by_end[end][request]
        if not self._by_end[end]:
            del self._by_end[end]
        self._schedule = None
        return True

    def clear(self) -> None:
        for request in list(self._items):
            self.leave(request)

    @property
    def schedule(self) -> Schedule:
        """The step in which these and no others run; the same object until one comes or goes."""
        if self._schedule is None:
            self._schedule = Schedule(tuple(self._items.values()))
        return self._schedule

    def renew_schedule(self) -> None:
        """Give another object next time: these took part in a step with others, or in none."""
        self._schedule = None

    def at_border(self) -> Iterable[Request]:
        """Those of which all tokens in the cache fill whole blocks."""
        return self._by_border[self._clock % self._block_size]

    def advance(self) -> None:
        """All have made a step. Who has no other to make leaves."""
        for request in self._items:
            request.num_computed_tokens += 1
            request.num_tokens += 1
        self._clock += 1
        for request in list(self._by_end.get(self._clock, ())):
            self.leave(request)

    def check_integrity(self) -> None:
        """Assert that everyone is where its counts say."""
        assert sum(map(len, self._by_border)) == len(self._items) == len(self._places)
        assert sum(map(len, self._by_end.values())) == len(self._items)
        at_border = {r for r in self._items if r.num_computed_tokens % self._block_size == 0}
        assert set(self.at_border()) == at_border, "a block's begin is at another step"
        for request, (_, end) in self._places.items():
            assert decodes(request), "a request that does not decode is among those that do"
            assert end - self._clock == request.max_total_tokens - request.num_tokens


class RunningSet:
    """All that run, in the order in which they were admitted. Of those: `decoding`; and `others`,
    who have more to catch up on, or no token to come, or whom a step with too little room for all
    has left behind."""

    def __init__(self, block_size: int) -> None:
        self.decoding = DecodingSet(block_size)
        self.others: list[Request] = []
        self.num_needing_ids = 0  # who need the ids of all their tokens before a step
        self._all: list[Request] = []

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._all)

    def seat(self, request: Request) -> None:
        self._all.append(request)
        self.others.append(request)
        self.num_needing_ids += request.needs_token_ids

    def unseat(self, request: Request) -> None:
        self._all.remove(request)
        if not self.decoding.leave(request):
            self.others.remove(request)
        self.num_needing_ids -= request.needs_token_ids

    def set_apart(self, request: Request) -> None:
        """One that decodes is to do more than the others in the next step."""
        if self.decoding.leave(request):
            self.others.append(request)

    def sort_in(self, request: Request) -> None:
        """One of the others has made a step: it decodes from now on, if it has caught up."""
        if decodes(request):
            self.others.remove(request)
            self.decoding.join(request)

    def advance(self) -> None:
        """All that decode have made a step."""
        before = len(self.decoding)
        self.decoding.advance()
        if len(self.decoding) < before:
            self.others = [request for request in self._all if request not in self.decoding]

    def dissolve(self) -> None:
        """Nobody goes in lockstep for now."""
        self.decoding.clear()
        self.others = list(self._all)

    def check_integrity(self) -> None:
        """Assert that everyone is in one place, and the counts are right."""
        self.decoding.check_integrity()
        assert len(self.decoding) + len(self.others) == len(self._all)
        assert {*self.decoding, *self.others} == set(self._all), "a request runs nowhere"
        assert self.num_needing_ids == sum(r.needs_token_ids for r in self._all)
