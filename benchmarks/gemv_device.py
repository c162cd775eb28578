"""What the benches of small-batch products share: models, and the device's side of a product.

Owns the pool of weights, the launches, the check against float64 and the timing; prints nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanocupy.ops.launch_gemv import GemvTuning, plan_gemv
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
            weight_bytes=dtype.itemsize, norm=product.op != "linear_add", pairs=product.pairs,
            tuning=tuning, max_shared_bytes=self.loader.max_shared_bytes, k_splits=k_splits,
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
