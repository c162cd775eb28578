"""Small-batch products: GB/s of weights by matrix and batch, beside the read rate and cuBLAS.

    python -m benchmarks.bench_gemv [--record] [--variants] [--splits] [--rows 1,8] [--shape NAME]

Every time is of a captured graph of many launches, whose matrices take turns over a pool of random
values of a gigabyte, so that none is in L2. Bytes are the weights' alone. Every build is checked
against float64 on sampled outputs before it is timed. The ceiling is a plain streaming read of the
pool in the same run, and beside it one of as many bytes as the matrix has; the peer is cuBLAS,
which does the product alone. `--variants` times other builds, `--splits` other shares of the
inputs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.records import write_record
from nanocupy.ops.launch_gemv import DEFAULT_TUNING, GemvTuning, plan_gemv
from nanocupy.ops.numpy_ops import NumpyOps

FILE = "gemv.cu"
CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
POOL_BYTES = 1100 << 20
ROTATED_BYTES = 256 << 20
GRAPH_US = 1500.0  # of work in a graph
MAX_LAUNCHES = 200
RUNS = 9
EPS = 1e-5

# hidden, width of queries, of keys, feed-forward, vocabulary
MODELS = {
    "qwen3-0.6b": (1024, 2048, 1024, 3072, 151936),
    "llama-3.2-1b": (2048, 2048, 512, 8192, 128256),
    "llama-3.1-8b": (4096, 4096, 1024, 14336, 128256),
}

VARIANTS = {
    "default": DEFAULT_TUNING,
    "w16 x1": GemvTuning(warps=16, blocks_per_multiprocessor=1),
    "w4 x4": GemvTuning(warps=4, blocks_per_multiprocessor=4),
    "w8 x3": GemvTuning(blocks_per_multiprocessor=3),
    "1 row u8": GemvTuning(rows_per_warp=1, unroll=8),
    "4 rows u2": GemvTuning(rows_per_warp=4, unroll=2),
    "lanes": GemvTuning(tensor=False),
    "tensor": GemvTuning(tensor=True),
    "ahead 0": GemvTuning(prefetch=0),
    "ahead 4": GemvTuning(prefetch=4),
}

READ_SOURCE = r"""
extern "C" __global__ void read_all(const uint4* p, long long n, unsigned* out) {
    const long long step = (long long)gridDim.x * blockDim.x;
    unsigned sum = 0;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < n; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v[u].x), "=r"(v[u].y), "=r"(v[u].z), "=r"(v[u].w)
                         : "l"(p + i + u * step));
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    for (; i < n; i += step) sum ^= p[i].x ^ p[i].y ^ p[i].z ^ p[i].w;
    if (sum == 0x12345678u) out[0] = sum;
}
"""


@dataclass(frozen=True)
class Product:
    """One op of a model: `outputs` of the op, `inputs`; weights have twice the rows with pairs."""

    op: str
    outputs: int
    inputs: int

    @property
    def pairs(self) -> bool:
        return self.op == "norm_swiglu"

    @property
    def weight_rows(self) -> int:
        return self.outputs * (2 if self.pairs else 1)

    @property
    def label(self) -> str:
        return f"{self.op.removeprefix('norm_')} {self.weight_rows}x{self.inputs}"


def products_of(model: str) -> list[Product]:
    hidden, queries, keys, ffn, vocab = MODELS[model]
    return [
        Product("norm_linear", queries + 2 * keys, hidden),
        Product("linear_add", hidden, queries),
        Product("norm_swiglu", ffn, hidden),
        Product("linear_add", hidden, ffn),
        Product("lm_head", vocab, hidden),
    ]


class Bench:
    """The device: its kernels, a stream, the pool that all matrices are cut from, and cuBLAS."""

    def __init__(self, dtype: str, seed: int = 0) -> None:
        import cupy
        import ml_dtypes

        from nanocupy.cuda.cublas import Cublas
        from nanocupy.cuda.kernels import KernelLoader

        self.cupy = cupy
        self.loader = KernelLoader(0)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        names = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
        self.dtype = names.get(dtype) or np.dtype(dtype)
        self.name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        self.rng = np.random.default_rng(seed)
        # Random values of the size of weights, repeated: the memory does not see that.
        part = (self.rng.standard_normal(16 << 20, dtype=np.float32) * 0.03).astype(self.dtype)
        count = POOL_BYTES // self.dtype.itemsize // 128 * 128
        self.bits = np.dtype(f"uint{8 * self.dtype.itemsize}")  # copies need no arithmetic
        device_part = cupy.asarray(part.view(self.bits))
        pool = cupy.empty(count, self.bits)
        for start in range(0, count, part.size):
            size = min(part.size, count - start)
            pool[start : start + size] = device_part[:size]
        self.pool = pool.view(self.dtype)
        cupy.cuda.Device().synchronize()
        self.cublas = Cublas(self.stream, cupy.empty(32 << 20, np.uint8))
        self.read_kernel = cupy.RawKernel(READ_SOURCE, "read_all", options=("-std=c++17",))
        self.read_out = cupy.zeros(1, np.uint32)

    def matrices(self, product: Product) -> list[Any]:
        """As many matrices of this shape as take turns; their starts are multiples of 256 bytes."""
        size = product.weight_rows * product.inputs
        step = -(-size // 128) * 128
        count = max(
            1, min(self.pool.size // step, -(-ROTATED_BYTES // (size * self.dtype.itemsize)))
        )
        shape = (product.weight_rows, product.inputs)
        return [self.pool[i * step : i * step + size].reshape(shape) for i in range(count)]

    # --------------------------------------------------------------- timing

    def microseconds(self, start: Callable[[int], None], guess_us: float) -> list[float]:
        """Of one call of `start(i)`, as medians over runs of a graph of many."""
        cupy, stream = self.cupy, self.stream
        launches = int(min(MAX_LAUNCHES, max(4, GRAPH_US / guess_us)))
        with stream:
            start(0)
            stream.synchronize()
            stream.begin_capture()
            for i in range(launches):
                start(i)
            graph = stream.end_capture()
            times = []
            for run in range(RUNS + 2):
                before, after = cupy.cuda.Event(), cupy.cuda.Event()
                before.record(stream)
                graph.launch(stream)
                after.record(stream)
                after.synchronize()
                if run >= 2:
                    times.append(cupy.cuda.get_elapsed_time(before, after) * 1e3 / launches)
        return times

    def read_us(self, num_bytes: int) -> float:
        """A streaming read of so many bytes, in places that take turns."""
        num_bytes = min(num_bytes, self.pool.nbytes) // 256 * 256
        places = max(1, min(self.pool.nbytes, ROTATED_BYTES + num_bytes) // num_bytes)
        base = self.pool.view(np.uint8)
        blocks = min(8 * self.loader.num_multiprocessors, -(-num_bytes // (512 * 16)))

        def start(i: int) -> None:
            first = i % places * num_bytes
            part = base[first : first + num_bytes]
            self.read_kernel((blocks,), (512,), (part, np.int64(num_bytes // 16), self.read_out))

        return statistics.median(self.microseconds(start, 2 + num_bytes / 3e6))

    def cublas_us(self, product: Product, rows: int) -> float:
        cupy = self.cupy
        x = cupy.asarray(self.rng.standard_normal((rows, product.inputs)).astype(self.dtype))
        out = cupy.empty((rows, product.weight_rows), self.dtype)
        matrices = self.matrices(product)

        def start(i: int) -> None:
            self.cublas.matmul(x, matrices[i % len(matrices)], out)

        return statistics.median(self.microseconds(start, 3 + matrices[0].nbytes / 2e6))

    # --------------------------------------------------------------- our kernels

    def ours_us(
        self,
        product: Product,
        rows: int,
        tuning: GemvTuning,
        *,
        overlap: bool = False,
        k_splits: int | None = None,
    ) -> list[float]:
        """Raises RuntimeError where the result is wrong."""
        from nanocupy.cuda.driver import LaunchOptions

        cupy, dtype = self.cupy, self.dtype
        macros = {"SCALAR": CODES[dtype.name], **tuning.macros(rows)}
        kernel = self.loader.get(FILE, f"{product.op}_rows", **macros)
        plan = plan_gemv(
            product.outputs, product.inputs, rows, self.loader.num_multiprocessors,
            weight_bytes=dtype.itemsize, pairs=product.pairs, tuning=tuning, k_splits=k_splits,
        )  # fmt: skip
        # Small inputs for the sum that goes on over all launches.
        scale = 1e-2 if product.op == "linear_add" else 1.0
        x = (self.rng.standard_normal((rows, product.inputs)) * scale).astype(dtype)
        norm_weight = self.rng.uniform(0.5, 1.5, product.inputs).astype(dtype)
        out_dtype = np.dtype(np.float32) if product.op == "lm_head" else dtype
        before = np.full((rows, product.outputs), np.nan).astype(out_dtype)
        if product.op == "linear_add":
            before = (self.rng.standard_normal(before.shape) * 1e-2).astype(dtype)
        device_x, device_norm, out = (cupy.asarray(array) for array in (x, norm_weight, before))
        chosen = np.arange(rows, dtype=np.int32)
        device_rows = cupy.asarray(chosen)
        sizes = (product.outputs, product.inputs, plan.k_tile, plan.k_splits)
        numbers = [np.int32(size) for size in sizes]
        options = LaunchOptions(overlap_previous=overlap)

        def prepare(weight: Any) -> Any:
            args = {
                "norm_linear": (device_x, device_norm, np.float32(EPS), weight, None, out),
                "norm_swiglu": (device_x, device_norm, np.float32(EPS), weight, None, out),
                "linear_add": (device_x, weight, None, out),
                "lm_head": (device_x, device_rows, device_norm, np.float32(EPS), weight, out),
            }[product.op]
            return kernel.prepare(
                plan.grid, (plan.block,), [*args, *numbers], plan.shared_bytes, options
            )

        matrices = self.matrices(product)
        launches = [prepare(weight) for weight in matrices]
        cupy.cuda.Device().synchronize()
        kernel.start(launches[0], self.stream)
        self.stream.synchronize()
        self.check(product, x, norm_weight, before, matrices[0], out.get())

        def start(i: int) -> None:
            kernel.start(launches[i % len(launches)], self.stream)

        return self.microseconds(start, 2 + matrices[0].nbytes / 3e6)

    def check(
        self, product: Product, x: Any, norm_weight: Any, before: Any, weight: Any, got: np.ndarray
    ) -> None:
        """Sampled outputs against the reference in float64; all must have been written."""
        if np.isnan(got.astype(np.float32)).any():
            raise RuntimeError(f"{product.label}: NaN, or outputs that were never written")
        last = product.outputs - 1
        index = np.unique([0, 1, last - 1, last, *self.rng.integers(0, last, 60)])
        rows = np.concatenate([index, product.outputs + index]) if product.pairs else index
        part = weight.view(self.bits)[self.cupy.asarray(rows)].get().view(self.dtype)
        wanted = before[:, index].astype(np.float64)
        reference = NumpyOps(np.float64)
        if product.op == "linear_add":
            reference.linear_add(x, part, None, wanted)
        elif product.op == "lm_head":
            chosen = np.arange(len(x), dtype=np.int32)
            reference.lm_head(x, chosen, norm_weight, EPS, part, wanted)
        else:
            rounded = before[:, index].copy()
            getattr(reference, product.op)(x, norm_weight, EPS, part, None, rounded)
            wanted = rounded.astype(np.float64)
        rms = np.sqrt(np.mean(wanted**2, axis=1, keepdims=True))
        error = abs(got[:, index].astype(np.float64) - wanted) / (abs(wanted) + rms)
        if not error.max() <= TOLERANCES[self.dtype.name]:
            raise RuntimeError(f"{product.label}: error {error.max():.3g}")


# ------------------------------------------------------------------------------ tables


def main_table(bench: Bench, products: list[Product], rows_list: list[int], record: bool) -> None:
    ceiling = bench.pool.nbytes / bench.read_us(bench.pool.nbytes) / 1e3
    print(f"{bench.name}, {bench.dtype.name}")
    print(f"streaming read of {POOL_BYTES >> 20} MB: {ceiling:.0f} GB/s")
    print(
        f"{'m':>2s} {'weights':28s} {'MB':>7s} {'us':>8s} {'overlap':>8s} {'GB/s':>6s}"
        f" {'share':>6s} {'read us':>8s} {'cublas':>8s}"
    )
    for rows in rows_list:
        for product in products:
            num_bytes = product.weight_rows * product.inputs * bench.dtype.itemsize
            times = bench.ours_us(product, rows, DEFAULT_TUNING)
            overlapped = bench.ours_us(product, rows, DEFAULT_TUNING, overlap=True)
            read, peer = bench.read_us(num_bytes), bench.cublas_us(product, rows)
            us, overlap_us = statistics.median(times), statistics.median(overlapped)
            rate = num_bytes / us / 1e3
            print(
                f"{rows:2d} {product.label:28s} {num_bytes / 1e6:7.1f} {us:8.2f} {overlap_us:8.2f}"
                f" {rate:6.0f} {rate / ceiling:6.1%} {read:8.2f} {peer:8.2f}",
                flush=True,
            )
            if record:
                name = f"gemv/{product.weight_rows}x{product.inputs}/{bench.dtype.name}"
                write_record(
                    "gemv", name if rows == 1 else f"{name}/m{rows}",
                    [num_bytes / t / 1e3 for t in times], "GB/s", device=bench.name,
                    dtype=bench.dtype.name, bytes=num_bytes,
                    flops=2 * rows * product.weight_rows * product.inputs,
                    ceiling=round(ceiling, 1), share=round(rate / ceiling, 4), peer="cuBLAS",
                    peer_value=round(num_bytes / peer / 1e3, 1), op=product.op,
                    overlapped=round(num_bytes / overlap_us / 1e3, 1),
                    read_of_as_many_bytes=round(num_bytes / read / 1e3, 1),
                )  # fmt: skip


def matrix_of_times(
    title: str,
    names: list[str],
    products: list[Product],
    rows_list: list[int],
    time: Callable[[str, Product, int], float],
) -> None:
    """A table of µs, products down and `names` across; * marks a line's best."""
    for rows in rows_list:
        print(f"{title}, m = {rows}, us")
        print(f"{'':28s}" + "".join(f"{name:>11s}" for name in names))
        for product in products:
            times = [time(name, product, rows) for name in names]
            best = min(times)
            shown = "".join(f"{t:10.2f}{'*' if t == best else ' '}" for t in times)
            print(f"{product.label:28s}{shown}", flush=True)


def prefetch(bench: Bench, tunings: Iterable[GemvTuning], rows_list: list[int]) -> None:
    code = CODES[bench.dtype.name]
    builds = [(FILE, {"SCALAR": code, **t.macros(rows)}) for t in tunings for rows in rows_list]
    bench.loader.prefetch(builds)


def variants_table(bench: Bench, products: list[Product], rows_list: list[int]) -> None:
    prefetch(bench, VARIANTS.values(), rows_list)
    for rows in rows_list:
        for name, tuning in VARIANTS.items():
            macros = {"SCALAR": CODES[bench.dtype.name], **tuning.macros(rows)}
            kernel = bench.loader.get(FILE, "norm_linear_rows", **macros)
            print(
                f"m {rows} {name:10s} {kernel.num_registers} registers, {kernel.local_bytes} local"
            )
    matrix_of_times(
        "builds, overlapped", list(VARIANTS), products, rows_list,
        lambda name, product, rows: statistics.median(
            bench.ours_us(product, rows, VARIANTS[name], overlap=True)
        ),
    )  # fmt: skip


def splits_table(bench: Bench, products: list[Product], rows_list: list[int]) -> None:
    splits = {"planned": None, **{f"{s} splits": s for s in (1, 2, 4, 8)}}
    small = [p for p in products if p.weight_rows * p.inputs < 64 << 20]
    matrix_of_times(
        "warps that share a unit", list(splits), small, rows_list,
        lambda name, product, rows: statistics.median(
            bench.ours_us(product, rows, DEFAULT_TUNING, overlap=True, k_splits=splits[name])
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append to benchmarks/records")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--splits", action="store_true")
    parser.add_argument("--rows", default="1,4,8", help="batch sizes, 1 to 8")
    parser.add_argument("--shape", action="append", choices=sorted(MODELS))
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(CODES))
    args = parser.parse_args()
    rows_list = [int(text) for text in args.rows.split(",")]
    products: list[Product] = []
    for model in args.shape or MODELS:
        products += [p for p in products_of(model) if p not in products]
    bench = Bench(args.dtype)
    prefetch(bench, [DEFAULT_TUNING], rows_list)
    main_table(bench, products, rows_list, args.record)
    for wanted, table in ((args.variants, variants_table), (args.splits, splits_table)):
        if wanted:
            table(bench, products, rows_list)


if __name__ == "__main__":
    main()
