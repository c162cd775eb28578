"""How long work takes on the GPU: by events, after a warm-up, as the median of many runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanocupy.cuda.checks import cuda_call
from nanocupy.cuda.streams import new_event

COLD_BYTES = 256 << 20  # more than any GPU's L2 holds


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run; spread is that between the 10th and the 90th percentile."""

    median_ms: float
    spread_ms: float
    num_runs: int

    def gigabytes_per_second(self, num_bytes: float) -> float:
        return num_bytes / self.median_ms / 1e6

    def teraflops(self, num_flops: float) -> float:
        return num_flops / self.median_ms / 1e9


def summarize(times_ms: Sequence[float]) -> Timing:
    """Median and spread of single measurements, of which there is at least one."""
    ordered = sorted(times_ms)
    last = len(ordered) - 1
    spread = ordered[round(0.9 * last)] - ordered[round(0.1 * last)]
    return Timing(statistics.median(ordered), spread, len(ordered))


def time_on_gpu(
    run: Callable[[int], None],
    stream: Any,
    *,
    num_runs: int = 50,
    num_warmup: int = 5,
    runs_each: int = 1,
) -> Timing:
    """Time `run(i)`, which starts its work on `stream`; i counts up, to rotate buffers by.

    runs_each: how many runs lie between two events, for work so short that launching it is longer
    (better: replay a graph of many).
    """
    index = 0
    with stream, cuda_call("timing"):
        for _ in range(num_warmup):
            run(index)
            index += 1
        pairs = [(new_event(timing=True), new_event(timing=True)) for _ in range(num_runs)]
        for start, end in pairs:
            start.record(stream)
            for _ in range(runs_each):
                run(index)
                index += 1
            end.record(stream)
        stream.synchronize()
        return summarize([_elapsed_ms(start, end) / runs_each for start, end in pairs])


def num_rotating(bytes_each: int, cold_bytes: int = COLD_BYTES) -> int:
    """How many copies of a buffer to take turns with, so that none is in the L2 when its turn
    comes again."""
    return max(2, -(-cold_bytes // max(bytes_each, 1)) + 1)


def _elapsed_ms(start: Any, end: Any) -> float:
    import cupy

    return cupy.cuda.get_elapsed_time(start, end)
