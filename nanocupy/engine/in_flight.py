"""Steps that were launched and are not read, and what must stay until they are. Pure Python."""

from __future__ import annotations

from collections import deque

from nanocupy.engine.request import Request
from nanocupy.engine.schedule import Schedule
from nanocupy.memory.kv_memory import KVMemory


class StepsInFlight:
    """A step may still write the blocks of a request that has ended, and read the host blocks of
    one that comes back: both are free when it is over."""

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory
        self._steps: deque[tuple[Schedule, list[int]]] = deque()  # with host blocks to free
        self.ending: list[Request] = []  # who has ended, but for such a step

    def launched(self, schedule: Schedule, host_block_ids: list[int]) -> None:
        self._steps.append((schedule, host_block_ids))

    def landed(self) -> bool:
        """The oldest step is over. Returns whether any request of it may have ended meanwhile."""
        _, host_block_ids = self._steps.popleft()
        self._memory.host_pool.free(host_block_ids)
        if not self.ending:
            return False
        for request in [r for r in self.ending if not self._has(r)]:
            self.ending.remove(request)
            self._memory.drop(request)
        return True

    def drop(self, request: Request) -> None:
        """Free the blocks of a request that has ended, as soon as may be."""
        if self._has(request):
            self.ending.append(request)
        else:
            self._memory.drop(request)

    @property
    def host_block_ids(self) -> list[int]:
        """Blocks of the host that are nobody's and not free yet."""
        return [block_id for _, block_ids in self._steps for block_id in block_ids]

    def _has(self, request: Request) -> bool:
        return any(request in schedule.members for schedule, _ in self._steps)
