"""The host shim itself: does it compute what the hardware would, and does it find misuse?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.ops.cases import DTYPES
from tests.shim import build
from tests.shim.driver import MAX_SHARED_BYTES, HostKernel, KernelFault, host_kernel

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

GEMM = Path(build.SHIM / "gemm.cu")
CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
ORDERS = (0, 1, 7)  # forward, reversed, shuffled

PROBE = """
#include "types.cuh"
#include "reduce.cuh"
extern "C" __global__ void probe(const int32_t* in, int32_t* out, int32_t n) {
    const int i = threadIdx.x;
    BODY
}
"""


def probe(body: str) -> HostKernel:
    source = PROBE.replace("BODY", body)
    return host_kernel("embed.cu", "probe", source=source, SCALAR=0)


def run_probe(body: str, threads: int = 64, grid: int = 1, **options) -> np.ndarray:
    values = np.arange(threads, dtype=np.int32)
    out = np.full(threads, -1, np.int32)
    probe(body)(grid, threads, values, out, threads, **options)
    return out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(130, 100, 200), (1, 7, 8), (64, 64, 96)])
def test_tensor_core_product_equals_numpy(dtype: str, order: int, shape) -> None:
    rng = np.random.default_rng(order)
    m, n, k = shape
    a = rng.standard_normal((m, k)).astype(DTYPES[dtype])
    b = rng.standard_normal((n, k)).astype(DTYPES[dtype])
    c = np.full((m, n), np.nan, np.float32)
    kernel = host_kernel(GEMM, "tiled_gemm", SCALAR=CODES[dtype])
    kernel((-(-n // 64), -(-m // 64)), 128, a, b, c, m, n, k, shared_bytes=20480, order=order)
    np.testing.assert_allclose(c, a.astype(float) @ b.astype(float).T, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversions_round_as_numpy(dtype: str) -> None:
    """Every bit pattern of the upper half, with bits below that make ties and near ties."""
    source = """
    #include "types.cuh"
    extern "C" __global__ void convert(const float* in, scalar_t* out, float* back) {
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        out[i] = from_float<scalar_t>(in[i]);
        back[i] = to_float(out[i]);
    }"""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x8000, 0x8001], np.uint32)
    values = (high[:, None] | low).ravel().view(np.float32)
    values = values[~np.isnan(values)]
    values = np.resize(values, -(-len(values) // 1024) * 1024)
    out, back = np.empty(len(values), DTYPES[dtype]), np.empty(len(values), np.float32)
    kernel = host_kernel("embed.cu", "convert", source=source, SCALAR=CODES[dtype])
    kernel(len(values) // 1024, 1024, values, out, back)
    with np.errstate(over="ignore"):
        wanted = values.astype(DTYPES[dtype])
    assert out.tobytes() == wanted.tobytes()
    assert back.tobytes() == wanted.astype(np.float32).tobytes()


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_votes(order: int) -> None:
    values = np.arange(64)
    lane, base = values % 32, values // 32 * 32
    for body, wanted in {
        "out[i] = shuffle(in[i], 5)": base + 5,
        "out[i] = shuffle_xor(in[i], 3)": values ^ 3,
        "out[i] = shuffle_up(in[i], 4)": np.where(lane < 4, values, values - 4),
        "out[i] = shuffle_down(in[i], 4)": np.where(lane > 27, values, values + 4),
        "out[i] = int32_t(warp_ballot(i % 3 == 0) >> lane_id() & 1)": (values % 3 == 0),
        "out[i] = warp_prefix_sum(in[i])": np.cumsum(values) - (values >= 32) * np.arange(32).sum(),
    }.items():
        np.testing.assert_array_equal(run_probe(body + ";", order=order), wanted, err_msg=body)


def test_half_warps_shuffle_apart() -> None:
    body = """const uint32_t mask = i % 32 < 16 ? 0xffffu : 0xffff0000u;
    out[i] = shuffle_xor(in[i], 8, mask);"""
    np.testing.assert_array_equal(run_probe(body), np.arange(64) ^ 8)


def test_blocks_that_wait_for_one_another() -> None:
    body = """uint32_t* counter = reinterpret_cast<uint32_t*>(out);
    if (i == 0) {
        atomic_add(counter, 1u);
        while (load_acquire(counter) < gridDim.x) spin_pause();
    }
    block_sync();
    if (i == 1 && blockIdx.x == 0) out[1] = 7;"""
    out = np.zeros(32, np.int32)
    probe(body)(5, 32, np.zeros(32, np.int32), out, 32, resident=True)
    assert out[:2].tolist() == [5, 7]
    with pytest.raises(KernelFault, match=r"divergent barrier|deadlock"):
        probe(body)(5, 32, np.zeros(32, np.int32), np.zeros(32, np.int32), 32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (i < 40) block_sync();", r"block \(0, 0, 0\).*divergent barrier: thread 0 waits"),
        ("if (i < 32) block_sync();\nelse block_sync();", "divergent barrier: it came to line"),
        ("if (i % 32 < 31) out[i] = shuffle(in[i], 0);", "lanes that never come"),
        ("if (i % 2) out[i] = shuffle(in[i], 1, 0xffffu);", "lacks the lane|never come"),
        ("out[i] = shuffle(in[i], 20, i % 32 < 16 ? 0xffffu : 0xffff0000u);", "0000ffff lacks"),
        ("if (i % 32) warp_sync();\nelse out[i] = shuffle(in[i], 0);", "while lane"),
        ("while (load_acquire(reinterpret_cast<const uint32_t*>(in)) == 0) spin_pause();",
         "deadlock: thread 0 loops"),
        ("out[0] = in[n];\nout[1] = in[n + 4];", r"out of bounds .* element 64 .*argument 0"),
        ("out[n] = 1;", "out of bounds .*argument 1"),
        ("const_cast<int32_t*>(in)[3] = 1;", r"element 3 of probe, argument 0 \(const\)"),
        ("dynamic_shared()[128] = 1;", "out of bounds"),
        ("cp_async_16(out, in);", "not into shared memory"),
        ("out[i] = n / (in[i] - 3);", "thread 3: division by zero"),
        ("volatile char large[200000]; large[0] = 1; large[i] = 2;", "out of bounds"),
    ],
)  # fmt: skip
def test_misuse_is_found(body: str, message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        run_probe(body, shared_bytes=128)


def test_writes_just_beside_an_array_are_found() -> None:
    out = np.zeros(5, np.int32)  # 20 bytes: the page's end is 12 further
    with pytest.raises(KernelFault, match="argument 1: written outside"):
        probe("out[5] = 1;")(1, 32, np.zeros(1, np.int32), out, 0)
    with pytest.raises(KernelFault, match="argument 1: written outside"):
        probe("out[-1] = 1;")(1, 32, np.zeros(1, np.int32), out, 0)


def test_more_shared_memory_than_any_card_has_is_refused() -> None:
    run_probe("out[i] = 1;", shared_bytes=MAX_SHARED_BYTES)
    with pytest.raises(KernelFault, match="232464 bytes of dynamic shared memory"):
        run_probe("out[i] = 1;", shared_bytes=MAX_SHARED_BYTES + 16)


def test_shared_memory_starts_poisoned_in_every_block() -> None:
    body = """__shared__ int32_t kept[64];
    int32_t* dynamic = reinterpret_cast<int32_t*>(dynamic_shared());
    out[i] = kept[i] == -1 && dynamic[i] == -1;
    kept[i] = dynamic[i] = 5;"""
    assert run_probe(body, shared_bytes=256, grid=3).all()


def test_shared_memory_of_templates_is_poisoned_too() -> None:
    source = """
    #include "types.cuh"
    template <typename T>
    __device__ bool is_poisoned() {
        __shared__ T kept[5];
        const bool before = kept[3] == T(-1);
        kept[3] = 0;
        return before;
    }
    extern "C" __global__ void probe(int32_t* out) {
        if (threadIdx.x == 0) out[blockIdx.x] = is_poisoned<int32_t>() + is_poisoned<uint64_t>();
    }"""
    out = np.zeros(3, np.int32)
    host_kernel("embed.cu", "probe", source=source, SCALAR=0)(3, 32, out)
    assert out.tolist() == [2, 2, 2]


def test_copies_land_only_at_the_wait() -> None:
    body = """int32_t* shared = reinterpret_cast<int32_t*>(dynamic_shared());
    if (i < 2) {
        cp_async_16(shared + 8 * i, in);
        cp_async_commit();
        cp_async_16_or_zero(shared + 8 * i + 4, in, false);
        cp_async_commit();
        WAIT
        out[2 * i] = shared[8 * i + 1];
        out[2 * i + 1] = shared[8 * i + 5];
    }"""
    seen = {
        wait: run_probe(body.replace("WAIT", wait), shared_bytes=64)[:4].tolist()
        for wait in ("", "cp_async_wait<1>();", "cp_async_wait<0>();")
    }
    assert list(seen.values()) == [[-1, -1, -1, -1], [1, -1, 1, -1], [1, 0, 1, 0]]


def test_wrong_arguments_are_refused() -> None:
    kernel = probe("out[i] = n;")
    good = [np.zeros(32, np.int32), np.zeros(32, np.int32), np.int32(3)]
    with pytest.raises(TypeError, match="takes 3 arguments, 2"):
        kernel(1, 32, *good[:2])
    with pytest.raises(TypeError, match="argument 1: float32 was given for int32"):
        kernel(1, 32, good[0], np.zeros(32, np.float32), good[2])
    with pytest.raises(TypeError, match="argument 2: a scalar int64 was given for int32"):
        kernel(1, 32, *good[:2], np.int64(3))
    with pytest.raises(TypeError, match="not contiguous"):
        kernel(1, 32, good[0], np.zeros((32, 2), np.int32)[:, 0], good[2])
    for grid, block, message in ((0, 32, "empty grid"), (1, 33, "multiple of 32")):
        with pytest.raises(KernelFault, match=message):
            kernel(grid, block, *good)
    with pytest.raises(build.BuildError, match="nonsense"):
        probe("nonsense();")


@pytest.mark.parametrize("threads", [32, 64, 96, 256, 992, 1024])
@pytest.mark.parametrize("order", ORDERS)
def test_block_reductions(threads: int, order: int) -> None:
    body = """out[i] = block_sum(in[i]);
    const float largest = block_max(static_cast<float>(in[i] % 37 + in[i] / 40));
    out[i] = out[i] * 64 + static_cast<int32_t>(largest) + block_sum(0);"""
    out = run_probe(body, threads, order=order)
    values = np.arange(threads)
    assert (out == values.sum() * 64 + (values % 37 + values // 40).max()).all()
