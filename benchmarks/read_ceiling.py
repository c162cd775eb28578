"""How fast the card reads: the ceiling of kernels that read more than they compute.

Owns the timing of captured launches too, which benches of such kernels share.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NUM_BYTES = 2 << 30


def graph_times_ms(body: Callable[[Any], None], runs: int = 9, stream: Any = None) -> list[float]:
    """Milliseconds of each replay of what `body` launches on the stream it is given: `stream`, or
    a new one."""
    import cupy

    stream = stream or cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        body(stream)
        graph = stream.end_capture()
    times = []
    for _ in range(3 + runs):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return times[3:]


def read_ceiling(loader: Any) -> float:
    """GB/s of a kernel that reads and does nothing else, the best of some grids."""
    import cupy

    from nanocupy.cuda.compiler import Compiler, Sources
    from nanocupy.cuda.kernels import KernelLoader

    sources = Sources(Path(__file__).parent / "kernels")
    kernel = KernelLoader(loader.device, Compiler(sources)).get("stream_read.cu", "stream_read")
    count = NUM_BYTES // 16
    data = cupy.random.standard_normal(count * 4, dtype=np.float32)
    out = cupy.zeros(1, np.uint32)
    best = 0.0
    for blocks in (2, 4, 8, 16):
        launch = kernel.prepare(
            (loader.num_multiprocessors * blocks,), (512,), [data, out, np.int64(count)]
        )
        times = graph_times_ms(lambda stream, launch=launch: kernel.start(launch, stream))
        best = max(best, NUM_BYTES / statistics.median(times) / 1e6)
    return best
