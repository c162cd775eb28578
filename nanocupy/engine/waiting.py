"""The requests that wait, by policy. Pure Python."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from nanocupy.engine.policy import Policy
from nanocupy.engine.request import Request

# key, arrival number, and a number of its own: a request that left may come again with the same key
_Entry = tuple[float, int, int, Request]


class WaitingQueue:
    """Requests in the order of `policy`. Keys that time does not change stay in a heap; those of
    requests with deadlines are computed anew at every `refresh`, once a step."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._now = 0.0
        self._entries: dict[int, _Entry] = {}  # those alive, by arrival number
        self._steady: list[_Entry] = []
        self._urgent: list[_Entry] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        """In no order."""
        return (entry[-1] for entry in self._entries.values())

    def push(self, request: Request) -> None:
        entry = self._entry(request)
        self._entries[request.arrival_number] = entry
        urgent = self.policy.changes_with_time(request)
        heapq.heappush(self._urgent if urgent else self._steady, entry)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it stands."""
        del self._entries[request.arrival_number]
        if len(self._steady) > 2 * len(self._entries) + 64:
            self._steady = [e for e in self._steady if self._is_alive(e)]
            heapq.heapify(self._steady)

    def refresh(self, now: float) -> None:
        """Move the queue's time on; seconds."""
        self._now = now
        self._urgent = [self._entry(e[-1]) for e in self._urgent if self._is_alive(e)]
        self._entries.update((entry[1], entry) for entry in self._urgent)
        heapq.heapify(self._urgent)

    def peek(self) -> Request:
        """Who is next; the queue must not be empty."""
        heads = []
        for heap in (self._steady, self._urgent):
            while heap and not self._is_alive(heap[0]):
                heapq.heappop(heap)
            heads += heap[:1]
        return min(heads)[-1]

    def _entry(self, request: Request) -> _Entry:
        return (*self.policy.key(request, self._now), next(self._numbers), request)

    def _is_alive(self, entry: _Entry) -> bool:
        return self._entries.get(entry[1]) is entry
