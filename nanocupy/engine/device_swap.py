"""Copies of cache blocks between the device and pinned host memory: what a schedule's swaps are.

Blocks that lie in a row on both sides go in one copy. All copies are started in the order of the
step, on the device's stream, and nothing waits for them here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanocupy.cuda.device import Device
from nanocupy.engine.schedule import Schedule
from nanocupy.memory.host_pool import SwapCosts


class HostBlocks:
    """`num_blocks` blocks in pinned memory for each of `caches` [N, …], arrays of the device whose
    blocks are contiguous."""

    def __init__(self, device: Device, caches: Sequence[Any], num_blocks: int) -> None:
        self._device = device
        self._caches = list(caches) if num_blocks else []
        self._host: list[np.ndarray] = [
            device.pinned(num_blocks * (cache.nbytes // cache.shape[0]))
            .view(np.dtype(cache.dtype))
            .reshape(num_blocks, -1)
            for cache in self._caches
        ]

    def costs(self) -> SwapCosts | None:
        """Measured: a few blocks out to the host and back in again; None without host blocks."""
        num_blocks = min(8, len(self._host[0]), len(self._caches[0])) if self._host else 0
        if not num_blocks:
            return None
        pairs = tuple((i, i) for i in range(num_blocks))
        there_and_back = Schedule(swap_out=pairs, swap_in=pairs)
        took_s = []
        for _ in range(2):  # the first one warms up
            self._device.synchronize("measuring copies")
            start = time.perf_counter()
            self.copy(there_and_back)
            self._device.synchronize("measuring copies")
            took_s.append(time.perf_counter() - start)
        block_bytes = sum(cache.nbytes // cache.shape[0] for cache in self._caches)
        return SwapCosts(block_bytes, 2 * num_blocks * block_bytes / took_s[-1])

    def copy(self, schedule: Schedule) -> None:
        """Start the copies of a step: out first, then in."""
        for start, host_start, count in runs(schedule.swap_out):
            for cache, host in zip(self._caches, self._host, strict=True):
                target = host[host_start : host_start + count].reshape(-1)
                self._device.to_host(target, cache[start : start + count])
        for start, host_start, count in runs(schedule.swap_in):
            for cache, host in zip(self._caches, self._host, strict=True):
                source = host[host_start : host_start + count].reshape(-1)
                self._device.to_device(cache[start : start + count], source)


def runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Pairs of blocks as rows of neighbours: first of either side, and how many."""
    first = 0
    for i in range(1, len(pairs) + 1):
        steps = i - first
        ahead = (pairs[first][0] + steps, pairs[first][1] + steps)
        if i == len(pairs) or pairs[i] != ahead:
            yield *pairs[first], steps
            first = i
