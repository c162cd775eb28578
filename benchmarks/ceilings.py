"""What a card does at best, measured in the run that the results are of: reads, and products."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.read_ceiling import graph_times_ms, read_ceiling

PRODUCT_SIZE = 8192  # rows and columns of the matrices


@dataclass(frozen=True)
class Ceilings:
    """bytes a second of plain reads; operations a second of a large cuBLAS product."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, num_bytes: int, num_flops: int) -> float:
        """The least time of work that overlaps its reads and its arithmetic perfectly."""
        return max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)


def measure_ceilings(dtype: str) -> Ceilings:
    """Of GPU 0, products of `dtype`. Takes 2 GiB for a while. Raises CudaError."""
    import cupy

    from nanocupy.cuda.kernels import KernelLoader

    cupy.cuda.Device(0).use()
    bytes_per_s = 1e9 * read_ceiling(KernelLoader(0))
    flops_per_s = product_ceiling(dtype)
    # What CuPy keeps for later would be missing from the engine's memory.
    cupy.get_default_memory_pool().free_all_blocks()
    return Ceilings(bytes_per_s, flops_per_s)


def device_name() -> str:
    """Of GPU 0."""
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()


def product_ceiling(dtype: str) -> float:
    """Operations a second of cuBLAS on square matrices of normal random values."""
    import cupy
    import numpy as np

    from nanocupy.cuda.arena import array_dtype
    from nanocupy.cuda.cublas import Cublas

    n, values = PRODUCT_SIZE, array_dtype(dtype)
    bits = np.dtype(f"uint{8 * values.itemsize}")  # CuPy copies them without arithmetic
    rng = np.random.default_rng(0)

    def matrix() -> object:
        """The same rows again and again: the card's clock depends on values, not on rows."""
        rows = rng.standard_normal((n // 16, n), dtype=np.float32).astype(values)
        return cupy.tile(cupy.asarray(rows.view(bits)), (16, 1)).view(values)

    x, w, out = matrix(), matrix(), cupy.empty((n, n), values)
    stream = cupy.cuda.Stream(non_blocking=True)
    cublas = Cublas(stream, cupy.empty(32 << 20, np.uint8))
    cupy.cuda.Device().synchronize()
    cublas.matmul(x, w, out)  # so that its kernel is loaded before it is captured
    stream.synchronize()

    def body(capturing: object) -> None:
        cublas.set_stream(capturing)
        for _ in range(5):
            cublas.matmul(x, w, out)

    return 5 * 2 * n**3 / (statistics.median(graph_times_ms(body)) / 1e3)
