"""Chains of a decode layer's four products, as a step runs them: bench_gemv --layer.

Each line is a build: the layers of a model in one captured graph, every product launched so that it
may start before the one before has ended, each reading what that one wrote. Printed are µs a layer,
the rate of the weights, and its share of the streaming read rate of the same run; and the same
without overlap. Before it is timed, a layer is checked against float64 product by product, and the
overlapped graph must give the same bits as single launches.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.gemv_device import CODES, EPS, FILE, MODELS, Bench, Product, products_of
from nanocupy.cuda.driver import LaunchOptions
from nanocupy.errors import CudaError
from nanocupy.ops.launch_gemv import GemvTuning, plan_gemv

LAYERS = {"qwen3-0.6b": 28, "llama-3.2-1b": 16, "llama-3.1-8b": 8}  # the last has 32 alike
RUNS = 15


class Layers:
    """What the products of all layers work on, for one batch: `weights` [layer][product], and
    (input, output) of each product in `buffers`, every one reading what the one before wrote."""

    def __init__(self, bench: Bench, model: str, rows: int) -> None:
        self.bench, self.rows = bench, rows
        self.products = products_of(model)[:4]
        hidden, queries, keys, ffn, _ = MODELS[model]
        sizes = [product.weight_rows * product.inputs for product in self.products]
        step = sum(sizes)  # multiples of 128 weights, as the shapes are
        self.num_layers = LAYERS[model]
        self.bytes_per_layer = step * bench.dtype.itemsize
        places = max(1, min(self.num_layers, bench.pool.size // step))
        cupy, rng = bench.cupy, bench.rng

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(bench.dtype)

        self.start_residual = cupy.asarray(normal(rows, hidden))
        self.residual = self.start_residual.copy()
        self.norm_host = rng.uniform(0.5, 1.5, hidden).astype(bench.dtype)
        self.norm = cupy.asarray(self.norm_host)
        qkv = cupy.asarray(normal(rows, queries + 2 * keys))
        hidden_ffn = cupy.asarray(normal(rows, ffn))
        attended = qkv.reshape(-1)[: rows * queries].reshape(rows, queries)
        self.buffers = [
            (self.residual, qkv), (attended, self.residual), (self.residual, hidden_ffn),
            (hidden_ffn, self.residual),
        ]  # fmt: skip
        self.weights = []
        for layer in range(self.num_layers):
            at = layer % places * step
            parts = []
            for product, size in zip(self.products, sizes, strict=True):
                shape = (product.weight_rows, product.inputs)
                parts.append(bench.pool[at : at + size].reshape(shape))
                at += size
            self.weights.append(parts)
        cupy.cuda.Device().synchronize()  # the bench's stream does not wait for the default one

    def reset(self) -> None:
        with self.bench.stream:
            self.residual[...] = self.start_residual
        self.bench.stream.synchronize()

    def capture(self, run: Callable[[], None]) -> Any:
        """A graph of what `run` starts."""
        stream = self.bench.stream
        with stream:
            stream.begin_capture()
            run()
            return stream.end_capture()

    def check_overlap(self, run: Callable[[], None], graph: Any) -> None:
        """Raises RuntimeError where the graph of `run`, whose launches may overlap, gives other
        bits than single launches."""
        stream = self.bench.stream
        self.reset()
        with stream:
            run()
        stream.synchronize()
        wanted = self.residual.get().tobytes()
        for _ in range(3):
            self.reset()
            graph.launch(stream)
            stream.synchronize()
            if self.residual.get().tobytes() != wanted:
                raise RuntimeError("overlapped launches give another result than single ones")

    def graph_us(self, graph: Any) -> float:
        """Microseconds of a layer."""
        cupy, stream = self.bench.cupy, self.bench.stream
        times = []
        for run in range(RUNS + 3):
            before, after = cupy.cuda.Event(), cupy.cuda.Event()
            before.record(stream)
            graph.launch(stream)
            after.record(stream)
            after.synchronize()
            if run >= 3:
                times.append(cupy.cuda.get_elapsed_time(before, after) * 1e3 / self.num_layers)
        return statistics.median(times)


class Chain(Layers):
    """The products of a build, laid out to be started."""

    def __init__(self, bench: Bench, model: str, rows: int, tuning: GemvTuning) -> None:
        super().__init__(bench, model, rows)
        macros = {"SCALAR": CODES[bench.dtype.name], **tuning.macros(rows)}
        self.kernels = [bench.loader.get(FILE, f"{p.op}_rows", **macros) for p in self.products]
        self.plans = [
            plan_gemv(
                p.outputs, p.inputs, rows, bench.loader.num_multiprocessors,
                weight_bytes=bench.dtype.itemsize, norm=p.op != "linear_add", pairs=p.pairs,
                tuning=tuning, max_shared_bytes=bench.loader.max_shared_bytes,
            )
            for p in self.products
        ]  # fmt: skip

    def prepare(self, overlap: bool) -> list[tuple[Any, Any]]:
        """(kernel, launch) of every product of every layer."""
        options = LaunchOptions(overlap_previous=overlap)
        launches = []
        for weights in self.weights:
            for i, product in enumerate(self.products):
                source, target = self.buffers[i]
                norm = () if product.op == "linear_add" else (self.norm, np.float32(EPS))
                plan = self.plans[i]
                sizes = (product.outputs, product.inputs, plan.k_tile, plan.k_splits)
                args = [source, *norm, weights[i], None, target, *map(np.int32, sizes)]
                kernel = self.kernels[i]
                launch = kernel.prepare(plan.grid, (plan.block,), args, plan.shared_bytes, options)
                launches.append((kernel, launch))
        return launches

    def run(self, launches: list[tuple[Any, Any]]) -> None:
        for kernel, launch in launches:
            kernel.start(launch, self.bench.stream)

    def check(self) -> None:
        """Raises RuntimeError where a product is wrong, or overlap changes anything."""
        stream, plain = self.bench.stream, self.prepare(False)
        self.reset()
        for i, (kernel, launch) in enumerate(plain[: len(self.products)]):
            source, target = self.buffers[i]
            x, before = source.get(), target.get()
            kernel.start(launch, stream)
            stream.synchronize()
            product: Product = self.products[i]
            if product.op != "linear_add":
                before = np.full(before.shape, np.nan).astype(before.dtype)
            weight = self.weights[0][i]
            self.bench.check(product, x, self.norm_host, before, weight, target.get())
        overlapped = self.prepare(True)
        graph = self.capture(lambda: self.run(overlapped))
        self.check_overlap(lambda: self.run(plain), graph)

    def microseconds(self, overlap: bool) -> float:
        """Of a layer."""
        launches = self.prepare(overlap)
        return self.graph_us(self.capture(lambda: self.run(launches)))

    def resident(self) -> str:
        """Registers a thread, and blocks that fit on a multiprocessor, of the four products."""
        registers = max(kernel.num_registers for kernel in self.kernels)
        spilled = max(kernel.local_bytes for kernel in self.kernels)
        fits = [
            str(kernel.blocks_per_multiprocessor(plan.block, plan.shared_bytes))
            for kernel, plan in zip(self.kernels, self.plans, strict=True)
        ]
        return f"{registers:4d} {spilled:5d} {'/'.join(fits):>9s}"


def layers_table(
    bench: Bench, models: list[str], rows_list: list[int], tunings: Mapping[str, GemvTuning]
) -> None:
    """Print the table; a build that fails says why in its line, and the others go on."""
    ceiling = bench.pool.nbytes / bench.read_us(bench.pool.nbytes) / 1e3
    print(f"{bench.name}, {bench.dtype.name}, streaming read {ceiling:.0f} GB/s")
    for model in models:
        for rows in rows_list:
            floor: float | None = None
            print(
                f"{model}, m = {rows}\n{'build':10s} {'us/layer':>8s} {'GB/s':>6s} {'share':>6s}"
                f" {'plain us':>8s} {'regs':>4s} {'local':>5s} {'resident':>9s}"
            )
            for name, tuning in tunings.items():
                try:
                    chain = Chain(bench, model, rows, tuning)
                    chain.check()
                    us, plain_us = chain.microseconds(True), chain.microseconds(False)
                    rate = chain.bytes_per_layer / us / 1e3
                    floor = chain.bytes_per_layer / ceiling / 1e3
                    print(
                        f"{name:10s} {us:8.2f} {rate:6.0f} {rate / ceiling:6.1%} {plain_us:8.2f}"
                        f" {chain.resident()}",
                        flush=True,
                    )
                except (CudaError, RuntimeError, ValueError) as exc:
                    print(f"{name:10s} failed: {str(exc).splitlines()[0][:120]}", flush=True)
            if floor is not None:
                print(f"{'read alone':10s} {floor:8.2f}", flush=True)
