"""What choosing tokens adds to a decode step: microseconds, by rows and by how they are sampled.

    python -m benchmarks.bench_sampling [--record] [--variants] [--rows 1,8] [--vocab 151936]

A captured graph of many launches, each of them overlapping the one before as in the engine, and
each moving a decode batch on. Logits are where the product in front leaves them: in L2, as far as
they fit. Beside it, the time to read them once, by a kernel that does nothing else, in the same
graph form. `--variants` gives each number of blocks a row, and of threads a block. Kinds whose name
ends with "flat" have logits of standard deviation 0.6, as random weights make; the others 3.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.read_ceiling import graph_times_ms
from benchmarks.records import write_record
from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.launch_shapes import LaunchShape

FILE = "sampling.cu"
ROWS = (1, 8, 32, 128, 256)
BLOCK_SIZE, TABLE_WIDTH = 16, 512  # the decode batch has room for all launches
GRAPH_US = 1500.0  # of work in a graph, about


@dataclass(frozen=True)
class Kind:
    """How all rows are sampled; by_turns: row s is as kind number s of these."""

    temperature: float = 0.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    deviation: float = 3.0
    by_turns: tuple[str, ...] = ()


KINDS = {
    "greedy": Kind(),
    "t0.6": Kind(0.6),
    "t0.6-flat": Kind(0.6, deviation=0.6),
    "t0.6-k20-p0.95": Kind(0.6, 20, 0.95),
    "t0.6-p0.9": Kind(0.6, top_p=0.9),
    "t1-p0.95-flat": Kind(1.0, top_p=0.95, deviation=0.6),
    "t1-m0.05": Kind(1.0, min_p=0.05),
    "mixed": Kind(by_turns=("t0.6", "t0.6-k20-p0.95", "t0.6-p0.9", "t1-m0.05")),
}


class Bench:
    """Logits of the most rows, a decode batch, and the kernels that choose."""

    def __init__(self, max_rows: int, vocab: int) -> None:
        import cupy

        from nanocupy.cuda.compiler import Compiler, Sources
        from nanocupy.cuda.kernels import KernelLoader

        self.cupy, self.vocab = cupy, vocab
        self.loader = KernelLoader(0)
        self.name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        cupy.random.seed(1)
        self._normal = cupy.random.standard_normal((max_rows, vocab), dtype=np.float32)
        self._logits: dict[float, Any] = {}
        self.overlap = self.loader.compute_capability >= (9, 0)
        folder = Path(__file__).parent / "kernels"
        reader = KernelLoader(0, Compiler(Sources(folder)))
        self._read = reader.get("stream_read.cu", "stream_read")
        self._sample = self.loader.get(FILE, "sample_rows", SCALAR=0)
        self._argmax = self.loader.get(FILE, "argmax_rows", SCALAR=0)
        self._bits = cupy.zeros(1, np.uint32)
        self.keys = cupy.zeros(max_rows * 1024, np.uint64)
        self.arrivals = cupy.zeros(max_rows, np.uint32)

    def logits(self, rows: int, deviation: float) -> Any:
        if deviation not in self._logits:
            self._logits = {deviation: self._normal * np.float32(deviation)}  # one at a time
        return self._logits[deviation][:rows]

    def read_us(self, rows: int) -> list[float]:
        """Of the logits once, by the best of some grids."""
        logits, count = self.logits(rows, 3.0), rows * self.vocab // 4
        best: list[float] = []
        for blocks in (1, 2, 4):
            grid = (self.loader.num_multiprocessors * blocks,)
            args = (logits, self._bits, np.int64(count))
            times = self._us(lambda a=args, g=grid: self._read.launch(g, (512,), a))
            best = min(best or times, times, key=statistics.median)
        return best

    def default_launch(self, rows: int) -> LaunchShape:
        loader = self.loader
        multiprocessors, shared = loader.num_multiprocessors, loader.max_shared_bytes
        return shapes.sample_rows(rows, self.vocab, multiprocessors, shared, self.overlap)

    def sampled_us(self, rows: int, kind: Kind, launch: LaunchShape | None = None) -> list[float]:
        """Of one launch of `sample_rows`; its tokens are checked to have a weight."""
        cupy = self.cupy
        launch = launch or self.default_launch(rows)
        turns = [KINDS[name] for name in kind.by_turns] or [kind]
        of_row = [turns[s % len(turns)] for s in range(rows)]

        def each(name: str, dtype: type) -> Any:
            return cupy.asarray(np.array([getattr(k, name) for k in of_row], dtype))

        out = cupy.full(rows, -7, np.int32)
        args = (
            self.logits(rows, kind.deviation), each("temperature", np.float32),
            each("top_k", np.int32), each("top_p", np.float32), each("min_p", np.float32),
            cupy.arange(rows, dtype=np.uint64), out, np.int32(self.vocab),
            np.int32(shapes.keeps_logits(launch)), *self._places(rows),
        )  # fmt: skip
        times = self._us(lambda: self._start(self._sample, launch, args))
        logits, temperature = args[0], args[1]
        picked = logits[cupy.arange(rows), out]
        assert (picked >= logits.max(axis=1) - 28 * temperature).all()
        return times

    def greedy_us(
        self, rows: int, parts: int | None = None, block: int | None = None
    ) -> list[float]:
        multiprocessors = self.loader.num_multiprocessors
        parts = parts or shapes.argmax_parts(rows, self.vocab, multiprocessors)
        launch = shapes.argmax_rows(rows, self.vocab, parts)
        launch = replace(launch, block=block or launch.block)
        out = self.cupy.full(rows, -7, np.int32)
        logits = self.logits(rows, 3.0)
        keys, arrivals = (self.keys, self.arrivals) if parts > 1 else (None, None)
        args = (logits, keys, arrivals, out, np.int32(self.vocab), *self._places(rows))
        times = self._us(lambda: self._start(self._argmax, launch, args))
        assert (out == logits.argmax(axis=1)).all()
        return times

    def _start(self, kernel: Any, shape: LaunchShape, args: tuple[Any, ...]) -> None:
        kernel.launch(
            shape.grid, (shape.block,), args, shape.shared_bytes, cluster=shape.cluster,
            overlap_previous=self.overlap,
        )  # fmt: skip

    def _places(self, rows: int) -> tuple[Any, ...]:
        """A decode batch of one position a sequence."""
        cupy = self.cupy
        table = cupy.arange(rows * TABLE_WIDTH, dtype=np.int32).reshape(rows, TABLE_WIDTH)
        zeros = [cupy.zeros(rows, np.int32) for _ in range(4)]
        token_ids, positions, slots, rope_lens = zeros
        kv_lens, counters = cupy.ones(rows, np.int32), cupy.zeros((rows, 2), np.uint32)
        sizes = np.int32(TABLE_WIDTH), np.int32(BLOCK_SIZE)
        return table, token_ids, positions, kv_lens, slots, rope_lens, counters, *sizes

    def _us(self, start: Any) -> list[float]:
        """Of one launch, as each replay of a graph of many has it."""
        self.cupy.cuda.Device().synchronize()  # arguments are made on another stream

        def times(count: int, runs: int) -> list[float]:
            def body(stream: Any) -> None:
                for _ in range(count):
                    start()

            found = graph_times_ms(body, runs, self.stream)
            return [1e3 * t / count for t in found]

        with self.stream:
            start()  # loaded before the capture
            self.stream.synchronize()
        guess = statistics.median(times(4, 3))
        return times(int(min(100, max(4, GRAPH_US / guess))), 9)


def main_table(bench: Bench, rows_list: list[int], record: bool) -> None:
    print(f"{bench.name}, {bench.vocab} logits a row; microseconds a launch")
    print(f"{'kind':16s}" + "".join(f"{f'b{rows}':>9s}" for rows in rows_list))
    reads = {rows: bench.read_us(rows) for rows in rows_list}
    shown = "".join(f"{statistics.median(reads[rows]):9.2f}" for rows in rows_list)
    print(f"{'read once':16s}{shown}", flush=True)
    for name, kind in sorted(KINDS.items(), key=lambda item: item[1].deviation, reverse=True):
        print(f"{name:16s}", end="")
        for rows in rows_list:
            times = bench.greedy_us(rows) if name == "greedy" else bench.sampled_us(rows, kind)
            us, read = statistics.median(times), statistics.median(reads[rows])
            print(f"{us:9.2f}", end="", flush=True)
            if record:
                write_record(
                    "sampling", f"sampling/{bench.vocab}/b{rows}/{name}", times, "us",
                    device=bench.name, dtype="float32", bytes=4 * rows * bench.vocab,
                    ceiling=round(read, 4), share=round(read / us, 4),
                )  # fmt: skip
        print()


def variants_table(bench: Bench, rows_list: list[int]) -> None:
    loader = bench.loader
    for rows in rows_list:
        print(f"\nb{rows}: sample_rows by blocks a row and threads a block (* the default)")
        default = bench.default_launch(rows)
        for name in ("t0.6", "t0.6-k20-p0.95", "t0.6-p0.9"):
            print(f"{name:16s}", end="")
            for ranks in (1, 2, 4, 8) if bench.overlap else (1,):
                launch = shapes.sample_rows(
                    rows, bench.vocab, loader.num_multiprocessors, loader.max_shared_bytes,
                    bench.overlap, ranks,
                )  # fmt: skip
                for block in (256, 512, 1024):
                    launch = replace(launch, block=block)
                    us = statistics.median(bench.sampled_us(rows, KINDS[name], launch))
                    mark = "*" if launch == default else " "
                    print(f"  {ranks}x{block} {us:.2f}{mark}", end="", flush=True)
            print()
        chosen = shapes.argmax_parts(rows, bench.vocab, loader.num_multiprocessors)
        print(f"argmax_rows by parts a row ({chosen} by default) and threads")
        for parts in sorted({1, 8, 18, 37, 74, 132, chosen}):
            for block in (128, 256, 512):
                us = statistics.median(bench.greedy_us(rows, parts, block))
                print(f"  {parts}x{block} {us:.2f}", end="", flush=True)
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append to benchmarks/records")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--rows", default=",".join(str(rows) for rows in ROWS))
    parser.add_argument("--vocab", type=int, default=151_936)
    args = parser.parse_args()
    rows_list = [int(part) for part in args.rows.split(",")]
    bench = Bench(max(rows_list), args.vocab)
    main_table(bench, rows_list, args.record)
    if args.variants:
        variants_table(bench, rows_list)


if __name__ == "__main__":
    main()
