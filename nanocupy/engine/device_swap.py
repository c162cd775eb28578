"""Copies of cache blocks between the device and pinned host memory: what a schedule's swaps are.

Blocks that lie in a row on both sides go in one copy. Copies have a stream of their own, in the
order in which they are started, and the host waits for none. They begin when what was started
before has ended, as that may still read or write the blocks. A step waits for the blocks that it
needs: those that come in, and of those that go out the ones it writes. The others go out beside it.

The host's memory is taken piece by piece, when a block goes there for the first time: to pin a
gigabyte takes tenths of a second, and most runs never preempt anybody.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from nanocupy.cuda.device import Device
from nanocupy.engine.schedule import Schedule
from nanocupy.errors import CapacityError
from nanocupy.memory.host_pool import SwapCosts

PIECE_BYTES = 64 << 20  # copies stay long, and pinning one takes no longer than a few steps
_MEASURED_BLOCKS = 8  # that `costs` copies


class HostBlocks:
    """`num_blocks` blocks in pinned memory for each of `caches` [N, …], arrays whose blocks are
    contiguous, which `device`'s stream reads and writes.

    Only the copies touch the host's blocks. So one can be given to another request while it is
    still copied.
    """

    def __init__(self, device: Device, caches: Sequence[Any], num_blocks: int) -> None:
        self._device = device
        self._copies = device.second_stream() if num_blocks else device
        self._is_settled = True  # whether the device's stream has waited for all copies
        self._caches = list(caches) if num_blocks else []
        self._num_blocks = num_blocks if self._caches else 0
        self._block_bytes = sum(cache.nbytes // cache.shape[0] for cache in self._caches)
        # Blocks of a piece, and the pieces there are: of each cache its blocks [blocks, …].
        self._piece_blocks = max(_MEASURED_BLOCKS, PIECE_BYTES // max(1, self._block_bytes))
        self._pieces: dict[int, list[np.ndarray]] = {}

    def costs(self) -> SwapCosts | None:
        """Measured: a few blocks out to the host and back in again; None without host blocks."""
        if not self._num_blocks:
            return None
        num_blocks = min(_MEASURED_BLOCKS, self._num_blocks, len(self._caches[0]))
        pairs = tuple((i, i) for i in range(num_blocks))
        took_s = []
        for _ in range(2):  # the first one warms up
            self._device.synchronize("measuring copies")
            start = time.perf_counter()
            self._start_out(pairs)
            self._start_in(pairs)
            self._copies.synchronize("measuring copies")
            took_s.append(time.perf_counter() - start)
        copied_bytes = 2 * num_blocks * self._block_bytes
        return SwapCosts(self._block_bytes, copied_bytes / took_s[-1])

    def copy(self, schedule: Schedule, written: Collection[int] = ()) -> None:
        """Start the copies of a step: out first, then in. written: blocks that the step writes.

        To be called before the step is started, and `settle` before the next one.
        """
        needed = {*written, *(block_id for block_id, _ in schedule.swap_in)}
        self._is_settled = False  # first, as what follows may be interrupted
        self._copies.follow(self._device)
        self._start_out([pair for pair in schedule.swap_out if pair[0] in needed])
        self._start_in(schedule.swap_in)
        self._device.follow(self._copies)
        self._start_out([pair for pair in schedule.swap_out if pair[0] not in needed])

    def settle(self) -> None:
        """What is started on the device's stream from now on waits for all copies."""
        if not self._is_settled:
            self._device.follow(self._copies)
            self._is_settled = True

    def _start_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        for start, host_start, count in runs(pairs, self._piece_blocks):
            for cache, host in zip(self._caches, self._host(host_start, count), strict=True):
                self._copies.to_host(host, cache[start : start + count])

    def _start_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        for start, host_start, count in runs(pairs, self._piece_blocks):
            for cache, host in zip(self._caches, self._host(host_start, count), strict=True):
                self._copies.to_device(cache[start : start + count], host)

    def _host(self, start: int, count: int) -> Iterator[np.ndarray]:
        """Of each cache, the host's memory of blocks that lie in one piece."""
        number, first = divmod(start, self._piece_blocks)
        if number not in self._pieces:
            self._pieces[number] = self._new_piece(number)
        return (blocks[first : first + count].reshape(-1) for blocks in self._pieces[number])

    def _new_piece(self, number: int) -> list[np.ndarray]:
        num_blocks = min(self._piece_blocks, self._num_blocks - number * self._piece_blocks)
        num_bytes = num_blocks * self._block_bytes
        try:
            memory = self._device.pinned(num_bytes)
        except CapacityError:
            # Copies wait for memory that is not pinned, which is slow but no reason to fail.
            memory = np.empty(num_bytes, np.uint8)
        blocks, end = [], 0
        for cache in self._caches:
            start, end = end, end + num_blocks * (cache.nbytes // cache.shape[0])
            part = memory[start:end].view(np.dtype(cache.dtype))
            blocks.append(part.reshape(num_blocks, -1))
        return blocks


def blocks_written(schedule: Schedule, block_size: int) -> set[int]:
    """The blocks that the step writes: of each request those from its first new token on."""
    return {
        block_id
        for item in schedule
        for block_id in item.request.block_ids[item.request.num_computed_tokens // block_size :]
    }


def runs(
    pairs: Sequence[tuple[int, int]], piece_blocks: int = sys.maxsize
) -> Iterator[tuple[int, int, int]]:
    """Pairs of blocks as rows of neighbours: first of either side, and how many. A row ends where a
    piece of the host's `piece_blocks` blocks does."""
    first = 0
    for i in range(1, len(pairs) + 1):
        steps = i - first
        ahead = (pairs[first][0] + steps, pairs[first][1] + steps)
        if i == len(pairs) or pairs[i] != ahead or ahead[1] % piece_blocks == 0:
            yield *pairs[first], steps
            first = i
