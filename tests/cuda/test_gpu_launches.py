"""Launches on a GPU: plain and prepared, with every attribute, and what goes wrong with them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanocupy.cuda.driver import LaunchOptions
from nanocupy.errors import CudaError
from nanocupy.ops.launch_decode_step import pace_cycles

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
SOURCE = r"""
extern "C" __global__ void scale(float* x, const float* by, float plus, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = x[i] * (by ? by[i] : 2.0f) + plus;
}
extern "C" __global__ void reverse(int* x, int n) {  // through dynamic shared memory
    extern __shared__ int held[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) held[i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = held[n - 1 - i];
}
extern "C" __global__ void scalars(double* out, bool a, signed char b, short c, int d, long long e,
                                   unsigned long long f, float g, double h) {
    out[0] = a; out[1] = b; out[2] = c; out[3] = d; out[4] = e; out[5] = f; out[6] = g; out[7] = h;
}
extern "C" __global__ void __launch_bounds__(64) small_blocks(int* x) { x[threadIdx.x] = 1; }
extern "C" __global__ void add_one_late(float* x, int n) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += 1.0f;
}
extern "C" __global__ void cluster_ranks(unsigned* out) {
#if __CUDA_ARCH__ >= 900
    unsigned rank, count;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
    out[2 * blockIdx.x] = rank;
    out[2 * blockIdx.x + 1] = count;
#endif
}
extern "C" __global__ void meet(unsigned* arrived, unsigned* out) {  // all blocks wait for all
    if (threadIdx.x == 0) {
        atomicAdd(arrived, 1u);
        while (*reinterpret_cast<volatile unsigned*>(arrived) < gridDim.x) {}
        out[blockIdx.x] = 1;
    }
}
struct alignas(64) TensorMap { unsigned long long data[16]; };
extern "C" __global__ void copy_box(
    const __grid_constant__ TensorMap map, float* out, int column, int row) {  // [8, 32]
#if __CUDA_ARCH__ >= 900
    __shared__ alignas(128) float box[8 * 32];
    __shared__ alignas(8) unsigned long long barrier;
    const unsigned at = (unsigned)__cvta_generic_to_shared(&barrier);
    const unsigned to = (unsigned)__cvta_generic_to_shared(box);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile(
            "{ .reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1; }" ::"r"(at),
            "r"(8 * 32 * 4) : "memory");
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(at)
            : "memory");
    }
    __syncthreads();
    unsigned done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; "
                     "selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(at) : "memory");
    for (int i = threadIdx.x; i < 8 * 32; i += blockDim.x) out[i] = box[i];
#endif
}
"""


@pytest.fixture
def loader(make_loader: Any) -> Any:
    return make_loader(SOURCE)


def needs(loader: Any, major: int) -> None:
    if loader.compute_capability < (major, 0):
        pytest.skip(f"needs compute capability {major}.0, the GPU has {loader.compute_capability}")


def test_a_launch_and_a_prepared_one_do_the_same(loader: Any, stream: Any) -> None:
    import cupy

    kernel = loader.get("test.cu", "scale")
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    with stream:
        first, second, by = cupy.asarray(x), cupy.asarray(x), cupy.asarray(x[::-1].copy())
        args = (by, np.float32(0.5), np.int32(1000))
        kernel.launch((8,), (128,), (first, *args), stream=stream)
        kernel.launch((8,), (128,), (first, None, *args[1:]))  # on the current stream
        for pointer in (by, None):
            prepared = kernel.prepare((8,), (128,), (second, pointer, *args[1:]))
            kernel.start(prepared, stream)
    stream.synchronize()
    wanted = ((x * x[::-1] + np.float32(0.5)) * 2 + np.float32(0.5)).astype(np.float32)
    np.testing.assert_allclose(cupy.asnumpy(first), wanted, rtol=1e-6, atol=1e-6)
    assert cupy.asnumpy(first).tobytes() == cupy.asnumpy(second).tobytes()
    assert loader.log.names()[-4:] == ["scale"] * 4


def test_scalars_arrive_as_they_are(loader: Any, stream: Any) -> None:
    import cupy

    kernel = loader.get("test.cu", "scalars")
    values = [np.bool_(True), np.int8(-7), np.int16(-300), np.int32(-70000), np.int64(-(2**40)),
              np.uint64(2**52), np.float32(0.1), np.float64(0.1)]  # fmt: skip
    with stream:
        one, other = cupy.zeros(8), cupy.zeros(8)
        kernel.launch((1,), (1,), (one, *values))
        kernel.start(kernel.prepare((1,), (1,), (other, *values)))
    stream.synchronize()
    wanted = [float(value) for value in values]
    assert cupy.asnumpy(one).tolist() == wanted
    assert cupy.asnumpy(other).tolist() == wanted


def test_an_empty_grid_runs_nothing(loader: Any) -> None:
    import cupy

    kernel = loader.get("test.cu", "scale")
    x = cupy.ones(4, np.float32)
    args = (x, None, np.float32(1), np.int32(4))
    kernel.launch((0,), (128,), args)
    kernel.launch((1, 0), (128,), args)
    assert kernel.prepare((0,), (128,), args) is None
    kernel.start(None)
    assert cupy.asnumpy(x).tolist() == [1, 1, 1, 1]


def test_a_kernel_is_loaded_once_and_known_to_errors(loader: Any) -> None:
    kernel = loader.get("test.cu", "scale", N=1)
    assert loader.get("test.cu", "scale", N=1) is kernel
    assert loader.get("test.cu", "scale", N=2) is not kernel
    assert kernel.num_registers > 0
    assert kernel.local_bytes == 0
    assert kernel.blocks_per_multiprocessor(128) >= 8
    loader.prefetch([("test.cu", {"N": n}) for n in range(3, 6)])
    assert loader.get("test.cu", "scale", N=4) is not kernel
    with pytest.raises(CudaError, match=r"test\.cu \(N=1\) for sm_\d+a? has no kernel 'nothing'"):
        loader.get("test.cu", "nothing", N=1)


def test_without_a_cache_kernels_load_too(tmp_path: Path) -> None:
    from nanocupy.cuda.compiler import Compiler, Sources
    from nanocupy.cuda.kernels import KernelLoader

    (tmp_path / "test.cu").write_text(SOURCE)
    loader = KernelLoader(0, Compiler(Sources(tmp_path), None))
    assert loader.get("test.cu", "scale").name == "scale"
    assert loader.get("test.cu", "scale", N=1).name == "scale"


def test_dynamic_shared_memory_up_to_what_the_device_has(loader: Any) -> None:
    import cupy

    kernel = loader.get("test.cu", "reverse")
    for num_bytes in (4, 48 << 10, (48 << 10) + 4, kernel.max_shared_bytes, 1024):
        n = num_bytes // 4
        for prepared in (False, True):
            x = cupy.arange(n, dtype=np.int32)
            args = (x, np.int32(n))
            if prepared:
                kernel.start(kernel.prepare((1,), (256,), args, num_bytes))
            else:
                kernel.launch((1,), (256,), args, num_bytes)
            assert np.array_equal(cupy.asnumpy(x), np.arange(n)[::-1])
    assert kernel.max_shared_bytes > 48 << 10
    too_much = kernel.max_shared_bytes + 4
    with pytest.raises(CudaError, match=f"kernel reverse of test.cu .*: {too_much} bytes of dyn"):
        kernel.launch((1,), (256,), (x, np.int32(1)), too_much)


def test_what_the_memory_gives_in_a_cycle(loader: Any) -> None:
    import cupy

    card = cupy.cuda.Device(loader.device).attributes
    bits_per_ms = 2 * card["MemoryClockRate"] * card["GlobalMemoryBusWidth"]
    assert loader.memory_bytes_per_cycle == pytest.approx(bits_per_ms / card["ClockRate"] / 8)
    paces = {"NVIDIA H100 80GB HBM3": 1200, "NVIDIA H200": 750}
    name = cupy.cuda.runtime.getDeviceProperties(loader.device)["name"].decode()
    if name in paces:
        pace = pace_cycles(loader.num_multiprocessors, loader.memory_bytes_per_cycle)
        assert pace == paces[name]


def test_launches_that_cannot_be_name_the_kernel(loader: Any) -> None:
    import cupy

    x = cupy.zeros(64, np.int32)
    small = loader.get("test.cu", "small_blocks")
    with pytest.raises(CudaError, match="kernel small_blocks: a block of 128 threads, but with"):
        small.launch((1,), (128,), (x,))
    with pytest.raises(CudaError, match="kernel small_blocks: argument 0 is the int 3"):
        small.launch((1,), (64,), (3,))
    with pytest.raises(CudaError, match=r"kernel small_blocks: argument 0 int32\[32\] has strides"):
        small.launch((1,), (64,), (x[::2],))
    small.launch((1,), (64,), (x,))
    assert cupy.asnumpy(x).tolist() == [1] * 64


def test_programmatic_overlap_keeps_the_order(loader: Any, stream: Any) -> None:
    import cupy

    needs(loader, 9)
    kernel = loader.get("test.cu", "add_one_late")
    n = 1 << 20
    with stream:
        x = cupy.zeros(n, np.float32)
        launch = kernel.prepare(
            (n // 256,), (256,), (x, np.int32(n)), options=LaunchOptions(overlap_previous=True)
        )
        for _ in range(50):
            kernel.start(launch, stream)
    stream.synchronize()
    assert (cupy.asnumpy(x) == 50).all()


def test_programmatic_overlap_is_captured(loader: Any, stream: Any) -> None:
    import cupy

    from nanocupy.cuda.graphs import GraphCache

    needs(loader, 9)
    kernel = loader.get("test.cu", "add_one_late")
    with stream:
        x = cupy.zeros(1000, np.float32)
    stream.synchronize()
    launch = kernel.prepare(
        (4,), (256,), (x, np.int32(1000)), options=LaunchOptions(overlap_previous=True)
    )
    graphs = GraphCache(stream)
    for _ in range(4):
        graphs.run("adds", lambda: [kernel.start(launch) for _ in range(10)])
    stream.synchronize()
    assert (cupy.asnumpy(x) == 40).all()
    assert (graphs.counters.captured, graphs.counters.replayed) == (1, 3)


def test_clusters(loader: Any) -> None:
    import cupy

    needs(loader, 9)
    kernel = loader.get("test.cu", "cluster_ranks")
    out = cupy.full(16, 99, np.uint32)
    kernel.start(kernel.prepare((8,), (32,), (out,), options=LaunchOptions(cluster=(4, 1, 1))))
    ranks = cupy.asnumpy(out).reshape(8, 2)
    assert ranks[:, 1].tolist() == [4] * 8
    assert sorted(ranks[:, 0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(
        CudaError, match="cuLaunchKernelEx of kernel cluster_ranks failed: CUDA_ERR"
    ):
        kernel.start(kernel.prepare((7,), (32,), (out,), options=LaunchOptions(cluster=(4, 1, 1))))


def test_a_cooperative_grid_is_resident_or_refused(loader: Any) -> None:
    import cupy

    kernel = loader.get("test.cu", "meet")
    fitting = kernel.blocks_per_multiprocessor(32) * loader.num_multiprocessors
    arrived, out = cupy.zeros(1, np.uint32), cupy.zeros(fitting, np.uint32)
    options = LaunchOptions(cooperative=True)
    kernel.start(kernel.prepare((fitting,), (32,), (arrived, out), options=options))
    assert cupy.asnumpy(out).all()
    too_many = kernel.prepare((fitting + 1,), (32,), (arrived, out), options=options)
    with pytest.raises(CudaError, match="kernel meet failed: CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LA"):
        kernel.start(too_many)


@pytest.mark.parametrize(("column", "row"), [(0, 0), (32, 8), (40, 30), (96, 45), (16, -3)])
def test_a_tensor_map_brings_its_box(loader: Any, column: int, row: int) -> None:
    """Outside the matrix there are zeros; swizzling is off, so that the box is row by row."""
    import cupy

    needs(loader, 9)
    matrix = np.random.default_rng(1).standard_normal((50, 104)).astype(np.float32)
    device = cupy.asarray(matrix)[:, :100]  # rows with gaps
    tensor_map = loader.driver.tensor_map(device, (8, 32), swizzle_bytes=0)
    kernel = loader.get("test.cu", "copy_box")
    out = cupy.full((8, 32), np.nan, np.float32)
    args = (tensor_map, out, np.int32(column), np.int32(row))
    kernel.start(kernel.prepare((1,), (64,), args))
    padded = np.zeros((80, 160), np.float32)
    padded[8:58, :100] = matrix[:, :100]
    assert np.array_equal(cupy.asnumpy(out), padded[row + 8 : row + 16, column : column + 32])


@pytest.mark.parametrize("check", [True, False])
def test_a_fault_names_the_kernel(tmp_path: Path, check: bool) -> None:
    """In a process of its own, as nothing works after it."""
    (tmp_path / "test.cu").write_text(
        'extern "C" __global__ void good(int* x) { x[0] = 1; }\n'
        'extern "C" __global__ void bad(int* x) { *(int*)(16) = 1; }\n'
    )
    script = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        import cupy
        from nanocupy.cuda.checks import ContextLostError
        from nanocupy.cuda.compiler import Compiler, Sources
        from nanocupy.cuda.kernels import KernelLoader
        from nanocupy.cuda.streams import new_stream, synchronize

        folder = Path({str(tmp_path)!r})
        compiler = Compiler(Sources(folder), None)
        loader = KernelLoader(0, compiler, check_each_launch={check})
        stream = new_stream()
        x = cupy.zeros(4, "int32")
        cupy.cuda.Device().synchronize()
        try:
            loader.get("test.cu", "good").launch((1,), (1,), (x,), stream=stream)
            loader.get("test.cu", "bad").launch((1,), (1,), (x,), stream=stream)
            synchronize(stream, "waiting for step 3", loader.log)
        except ContextLostError as exc:
            print("LOST", exc, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "LOST" in result.stdout, result.stderr[-2000:]
    line = result.stdout[result.stdout.index("LOST") :].splitlines()[0]
    if check:
        assert line.startswith("LOST kernel bad of test.cu for sm_"), line
    else:
        assert line.startswith("LOST waiting for step 3: a kernel "), line
        assert line.endswith("launched last: good, bad"), line
