"""What a decode step's attention adds to a layer: microseconds, in one launch and in two.

    python -m benchmarks.bench_attend [--variants] [--record] [--batch 1,8] [--shape qwen3-0.6b]

A captured graph of layers: QKV product, attention, output product, each overlapping the one before
as in the engine; weights and caches of several layers, more than the L2 holds. The time of a graph
with the products alone is taken off. Every launch's result is compared with the two kernels' first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.read_ceiling import graph_times_ms
from benchmarks.records import write_record
from nanocupy.bench.shapes import SHAPES
from nanocupy.config import ModelConfig
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import TYPE_CODES, OpSizes, workspace_plan
from nanocupy.ops.launch_attention_fused import (
    ENTRY,
    FILE,
    FusedTuning,
    fused_contexts,
    launch_attention_fused,
)

DTYPE = "bfloat16"
BLOCK_SIZE = 16
NUM_LAYERS = 16
CONTEXTS = {1: (16, 250, 512, 1024, 2048, 4096, 8192), 8: (128, 250, 512, 1024, 2048, 4096),
            32: (128, 250, 512, 1024, 2048), 128: (128, 250, 512, 1024)}  # fmt: skip
TUNINGS = {
    "default": FusedTuning(),
    **{
        f"{c} x {w} warps, {s} stages": FusedTuning(cluster=c, warps=w, stages=s)
        for c, w, s in (
            (1, 8, 2), (1, 4, 1), (1, 4, 2), (1, 4, 3), (2, 8, 2), (2, 8, 1), (2, 4, 2), (4, 8, 2),
            (4, 4, 2), (4, 4, 1), (8, 4, 2), (8, 4, 1),
        )
    },
    "nothing early": FusedTuning(read_early=False),
}  # fmt: skip
TOLERANCE = 3.2e-2  # of the row's rms: both results are rounded to bfloat16


class Layers:
    """Weights, caches and the ops of some layers, for a batch of equal contexts."""

    def __init__(self, device: Any, config: ModelConfig, num_seqs: int, context: int) -> None:
        import cupy

        self.device, self.config, self.num_seqs, self.context = device, config, num_seqs, context
        c, columns = config, -(-context // BLOCK_SIZE)
        self.sizes = OpSizes(
            max_tokens=num_seqs, max_num_seqs=num_seqs, max_rows=num_seqs, max_context=131072,
            hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, vocab_size=1024,
            num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_size=c.head_size, dtype=DTYPE,
            residual_dtype=DTYPE, cache_dtype=DTYPE,
        )  # fmt: skip

        def empty(shape: tuple[int, ...], dtype: str = DTYPE) -> Any:
            return cupy.zeros(shape, np.dtype(dtype) if dtype != DTYPE else _bfloat16())

        plan = workspace_plan(self.sizes, device.traits)
        workspaces = {name: empty(shape, dtype) for name, (shape, dtype) in plan.items()}
        self.ops = CudaOps(device.kernels, device.matmul, workspaces, self.sizes, device.traits)
        self.seed = 0

        def normal(*shape: int, std: float = 1.0) -> Any:
            array = empty(shape)
            self.seed += 1
            self.ops.fill_normal(array, std, self.seed)
            return array

        width = c.q_size + 2 * c.kv_size
        cache = (num_seqs * columns + 1, c.num_kv_heads, BLOCK_SIZE, c.head_size)
        self.caches = [(normal(*cache), normal(*cache)) for _ in range(NUM_LAYERS)]
        std = c.hidden_size**-0.5
        self.weights = [
            (normal(width, c.hidden_size, std=std), normal(c.hidden_size, c.q_size, std=0.1 * std))
            for _ in range(NUM_LAYERS)
        ]
        self.norm = normal(c.hidden_size)
        self.head_norm = normal(c.head_size) if c.has_qk_norm else None
        self.x, self.qkv = normal(num_seqs, c.hidden_size), normal(num_seqs, width)
        self.scratch = normal(num_seqs, c.num_heads, c.head_size)
        self.out = normal(num_seqs, c.num_heads, c.head_size)
        rng = np.random.default_rng(0)
        tables = (1 + rng.permutation(num_seqs * columns)).astype(np.int32)
        tables = tables.reshape(num_seqs, columns)
        slots = tables[:, (context - 1) // BLOCK_SIZE] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        self.tables, self.slots = cupy.asarray(tables), cupy.asarray(slots.astype(np.int32))
        self.starts = cupy.arange(num_seqs + 1, dtype=np.int32)
        self.lens = cupy.full(num_seqs, context, np.int32)
        angles = rng.uniform(0, 6, (num_seqs, c.head_size // 2))
        angles = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        self.rope = cupy.asarray(angles)

    def two_launches(self, layer: int) -> None:
        self.ops.attend(
            self.qkv, self.head_norm, self.head_norm, 1e-6, self.rope, self.slots,
            *self.caches[layer], None, None, self.starts, self.lens, self.tables,
            self.config.head_size**-0.5, 1, 0, self.scratch, self.out,
        )  # fmt: skip

    def macros(self, tuning: FusedTuning) -> dict[str, int]:
        return {"SCALAR": TYPE_CODES[DTYPE], "HEAD_SIZE": self.config.head_size,
                **self.launch(tuning).macros}  # fmt: skip

    def launch(self, tuning: FusedTuning) -> Any:
        c = self.config
        return launch_attention_fused(
            self.num_seqs, c.num_heads, c.num_kv_heads, c.head_size, max_kv_len=self.context,
            num_multiprocessors=self.device.traits.num_multiprocessors,
            max_shared_bytes=self.device.traits.max_shared_bytes, tuning=tuning,
        )  # fmt: skip

    def one_launch(self, tuning: FusedTuning) -> Callable[[int], None]:
        launch, c = self.launch(tuning), self.config
        kernel = self.device.kernels.get(FILE, ENTRY, **self.macros(tuning))
        numbers = (c.num_kv_heads, c.num_heads // c.num_kv_heads, BLOCK_SIZE, self.tables.shape[1])

        def run(layer: int) -> None:
            kernel.launch(
                launch.grid, (launch.block,),
                (
                    self.qkv, self.head_norm, self.head_norm, np.float32(1e-6), self.rope,
                    self.slots, *self.caches[layer], None, None, self.starts, self.lens,
                    self.tables, np.float32(c.head_size**-0.5), self.out, *map(np.int32, numbers),
                ),
                launch.shared_bytes, cluster=launch.cluster, overlap_previous=True,
            )  # fmt: skip

        return run

    def check(self, attend: Callable[[int], None], what: str) -> None:
        """Raises RuntimeError where `attend` does not do what the two kernels do."""
        self.device.synchronize("starting")
        results = []
        for run in (self.two_launches, attend):
            self.out.view(np.uint16).fill(0xFFFF)
            self.ops.norm_linear(self.x, self.norm, 1e-6, self.weights[0][0], None, self.qkv)
            run(0)
            self.device.synchronize(what)
            cache = self.caches[0][0].view(np.uint16)[self.slots // BLOCK_SIZE].get()
            results.append((self.out.get().astype(np.float32), cache))
        (wanted, keys), (got, own_keys) = results
        rms = np.sqrt(np.mean(wanted**2, axis=-1, keepdims=True))
        error = float((abs(got - wanted) / (abs(wanted) + rms)).max())
        if not error <= TOLERANCE or not (keys == own_keys).all():
            raise RuntimeError(f"{what}: error {error:.3g}, keys equal {(keys == own_keys).all()}")

    def times_us(self, attend: Callable[[int], None] | None) -> list[float]:
        """Of a layer, in each replay of a graph."""

        def body(_: Any) -> None:
            for layer, (qkv, o) in enumerate(self.weights):
                self.ops.norm_linear(self.x, self.norm, 1e-6, qkv, None, self.qkv)
                if attend is not None:
                    attend(layer)
                flat = self.out.reshape(self.num_seqs, -1)
                self.ops.linear_add(flat, o, None, self.x)

        body(None)  # what is to be captured must be loaded
        self.device.synchronize("a first run")
        return [ms * 1e3 / NUM_LAYERS for ms in graph_times_ms(body, stream=self.device.stream)]


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def bench(device: Any, shape: str, num_seqs: int, context: int, variants: bool) -> list[Any]:
    """(name, microseconds of each run that it adds to a layer), and prints them."""
    layers = Layers(device, SHAPES[shape], num_seqs, context)
    alone = statistics.median(layers.times_us(None))
    ways: dict[str, Callable[[int], None]] = {"two launches": layers.two_launches}
    for name, tuning in TUNINGS.items():
        launch = layers.launch(tuning)
        if name == "default" or (variants and launch != layers.launch(FusedTuning())):
            ways[name] = layers.one_launch(tuning)
    found, cells = [], []
    for name, attend in ways.items():
        try:
            layers.check(attend, name)
            times = [us - alone for us in layers.times_us(attend)]
        except Exception as exc:
            cells.append(f"{name} {type(exc).__name__}: {exc}"[:100])
            continue
        found.append((name, times))
        cells.append(f"{name} {statistics.median(times):.2f}")
    c = layers.config
    mega = 4 * num_seqs * context * c.kv_size / 1e6
    longest = fused_contexts(
        num_seqs, c.num_heads, c.num_kv_heads, c.head_size, device.traits.num_multiprocessors
    )[-1]
    print(f"{shape} b{num_seqs} t{context} ({mega:.1f} MB, {mega / 3.05:.2f} us; products "
          f"{alone:.2f}; fused up to {longest}): " + ", ".join(cells), flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append to benchmarks/records")
    parser.add_argument("--variants", action="store_true", help="time other launches too")
    parser.add_argument("--compile", action="store_true", help="only compile what --variants needs")
    parser.add_argument("--batch", default="1,8,32,128")
    parser.add_argument("--context", default="", help="some lengths instead of the table's")
    parser.add_argument("--shape", default="qwen3-0.6b")
    args = parser.parse_args()
    from nanocupy.cuda.device import CudaDevice

    device = CudaDevice()
    if args.compile:
        sizes = {SHAPES[shape].head_size for shape in args.shape.split(",")}
        traits = device.traits
        macros = [
            launch_attention_fused(
                1, 16, 8, 128, max_kv_len=1, num_multiprocessors=traits.num_multiprocessors,
                max_shared_bytes=traits.max_shared_bytes, tuning=tuning,
            ).macros
            for tuning in TUNINGS.values()
        ]  # fmt: skip
        device.kernels.prefetch(
            (FILE, {"SCALAR": TYPE_CODES[DTYPE], "HEAD_SIZE": size, **m})
            for size in sizes for m in macros
        )  # fmt: skip
        return
    for shape in args.shape.split(","):
        for num_seqs in map(int, args.batch.split(",")):
            contexts = tuple(map(int, args.context.split(","))) if args.context else ()
            for context in contexts or CONTEXTS.get(num_seqs, CONTEXTS[8]):
                for name, times in bench(device, shape, num_seqs, context, args.variants):
                    if args.record and name in ("default", "two launches"):
                        kind = "fused" if name == "default" else "split"
                        write_record(
                            "attention-decode", f"attend/{shape}/{kind}/b{num_seqs}/t{context}",
                            times, "us", device=device.name, dtype=DTYPE,
                        )  # fmt: skip


if __name__ == "__main__":
    main()
