"""Arena, graphs, pinned memory, uploads and timing on a GPU."""

from __future__ import annotations

import gc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nanocupy.errors import CapacityError, CudaError
from tests.cuda.gpu_record import alone_on_the_device

pytestmark = pytest.mark.gpu

ADD = r"""
extern "C" __global__ void add(float* x, float by, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += by;
}
"""


def specs() -> list[Any]:
    from nanocupy.cuda.arena import BufferSpec

    return [
        BufferSpec("w", (1000, 33), "bfloat16", "weights"),
        BufferSpec("norm", (33,), "float32", "weights"),
        BufferSpec("keys", (7, 2, 16, 64), "float8_e4m3fn", "kv cache"),
        BufferSpec("empty", (0, 5), "float32", "workspace"),
        BufferSpec("ids", (13,), "int32", "workspace"),
    ]


@pytest.mark.parametrize("separate", [False, True])
def test_the_arena_holds_what_is_written(stream: Any, separate: bool) -> None:
    import cupy

    from nanocupy.cuda.arena import Arena, ArenaPlan

    arena = Arena(ArenaPlan(specs(), separate=separate))
    arena.fill(0xFF, stream)
    stream.synchronize()
    assert np.isnan(cupy.asnumpy(arena.view("norm"))).all()
    rng = np.random.default_rng(0)
    contents = {}
    for spec in specs():
        view = arena.view(spec.name)
        contents[spec.name] = (rng.standard_normal(spec.shape) * 50).astype(view.dtype)
        view.set(contents[spec.name])
        assert view.data.ptr % 256 == 0
    for name, content in contents.items():
        assert cupy.asnumpy(arena.view(name)).tobytes() == content.tobytes()
    view = arena.view("w", (10, 33))
    arena.close()
    assert cupy.asnumpy(view).tobytes() == contents["w"][:10].tobytes()  # views keep the memory


@alone_on_the_device
def test_the_arena_gives_its_memory_back() -> None:
    from cupy.cuda import runtime

    from nanocupy.cuda.arena import Arena, ArenaPlan, BufferSpec

    size = 256 << 20
    before = runtime.memGetInfo()[0]
    arena = Arena(ArenaPlan([BufferSpec("a", (size,), "uint8", "o")]))
    assert before - runtime.memGetInfo()[0] >= size
    arena.close()
    del arena
    gc.collect()
    assert before - runtime.memGetInfo()[0] < size // 2


@alone_on_the_device
def test_an_arena_larger_than_the_device() -> None:
    from cupy.cuda import runtime

    from nanocupy.cuda.arena import Arena, ArenaPlan, BufferSpec

    free = runtime.memGetInfo()[0]
    table = [BufferSpec("a", (1 << 20,), "uint8", "weights"),
             BufferSpec("b", (4 * free,), "uint8", "kv cache")]  # fmt: skip
    with pytest.raises(
        CapacityError, match=r"no device memory for kv cache: .* the GPU has .* free"
    ):
        Arena(ArenaPlan(table))
    assert free - runtime.memGetInfo()[0] < 64 << 20


@alone_on_the_device
def test_allocations_are_counted() -> None:
    import cupy
    from cupy.cuda import runtime

    from nanocupy.cuda.arena import device_allocations

    x = cupy.zeros(1000, np.float32)

    def fill() -> None:
        x.fill(3)
        x[10:20].fill(4)

    fill()  # loads kernels, for which the driver takes memory
    with device_allocations() as count:
        fill()
    assert count.nothing
    with device_allocations() as count:
        y = x + 1
    assert (count.pool_mallocs, count.pool_bytes) == (1, y.nbytes)
    assert not count.nothing
    size = 64 << 20
    with device_allocations() as count:
        pointer = runtime.malloc(size)
    runtime.free(pointer)
    assert count.pool_mallocs == 0
    assert count.driver_bytes >= size
    assert not count.nothing


# ------------------------------------------------------------------------------ graphs


def test_graphs_replay_on_new_contents(make_loader: Any, stream: Any) -> None:
    import cupy

    from nanocupy.cuda.arena import device_allocations
    from nanocupy.cuda.graphs import GraphCache

    loader = make_loader(ADD)
    kernel = loader.get("test.cu", "add")
    with stream:
        x = cupy.zeros(100, np.float32)
    graphs = GraphCache(stream, log=loader.log)

    def body() -> None:
        for by in (1, 2, 3):
            kernel.launch((1,), (128,), (x, np.float32(by), np.int32(100)))

    for _ in range(2):
        graphs.run("b1", body)
    with device_allocations() as count:
        for _ in range(20):
            graphs.run("b1", body)
        stream.synchronize()
    assert count.nothing, count
    assert (cupy.asnumpy(x) == 6 * 22).all()
    assert graphs.counters.summary() == "captured 1, replayed 21, eager 1 (first of its shape 1)"
    assert loader.log.names()[-1] == "graph b1"
    off = GraphCache(stream, enabled=False)
    off.run("b1", body)
    off.run("b1", body)
    assert off.counters.summary() == "captured 0, replayed 0, eager 2 (graphs are off 2)"
    graphs.clear()
    assert "b1" not in graphs


def test_a_graph_keeps_what_it_uses(make_loader: Any, stream: Any) -> None:
    import cupy

    from nanocupy.cuda.graphs import capture

    kernel = make_loader(ADD).get("test.cu", "add")

    def captured() -> tuple[Any, int]:
        with stream:
            x = cupy.zeros(1 << 20, np.float32)
        stream.synchronize()

        def body() -> None:
            kernel.launch((1 << 12,), (256,), (x, np.float32(1), np.int32(1 << 20)))

        return capture("adds", stream, body), x.data.ptr

    graph, pointer = captured()
    gc.collect()
    with stream:
        others = [cupy.zeros(1 << 20, np.float32) for _ in range(4)]
    assert pointer not in {other.data.ptr for other in others}
    graph.graph.launch(stream)
    stream.synchronize()
    assert all((cupy.asnumpy(other) == 0).all() for other in others)


def test_what_cannot_be_captured_is_named_and_the_stream_works_on(
    make_loader: Any, stream: Any
) -> None:
    import cupy

    from nanocupy.cuda.graphs import capture

    kernel = make_loader(ADD).get("test.cu", "add")
    with stream:
        x = cupy.zeros(100, np.float32)
    stream.synchronize()

    def allocates() -> None:
        cupy.zeros(12345, np.uint8)

    with pytest.raises(CudaError, match="capturing decode b8: 12345 bytes of device memory were"):
        capture("decode b8", stream, allocates)

    def waits() -> None:
        stream.synchronize()

    with pytest.raises(CudaError, match=r"^capturing decode b8"):
        capture("decode b8", stream, waits)

    def fails() -> None:
        raise ZeroDivisionError("of the body's own")

    with pytest.raises(CudaError, match="capturing decode b8 failed: of the body's own"):
        capture("decode b8", stream, fails)

    def stops() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture("decode b8", stream, stops)

    def works() -> None:
        kernel.launch((1,), (128,), (x, np.float32(1), np.int32(100)))

    assert not stream.is_capturing()
    graph = capture("decode b8", stream, works)
    assert (cupy.asnumpy(x) == 0).all()  # recorded, not run
    graph.graph.launch(stream)
    stream.synchronize()
    assert (cupy.asnumpy(x) == 1).all()


def test_two_streams_in_one_graph(make_loader: Any, stream: Any) -> None:
    import cupy

    from nanocupy.cuda.graphs import GraphCache
    from nanocupy.cuda.streams import follow, new_event, new_stream

    kernel = make_loader(ADD).get("test.cu", "add")
    side = new_stream(high_priority=True)
    fork, join = new_event(), new_event()
    with stream:
        x, y = cupy.zeros(100, np.float32), cupy.zeros(100, np.float32)
    stream.synchronize()

    def body() -> None:
        kernel.launch((1,), (128,), (x, np.float32(1), np.int32(100)), stream=stream)
        follow(side, stream, fork)
        kernel.launch((1,), (128,), (y, np.float32(2), np.int32(100)), stream=side)
        follow(stream, side, join)
        kernel.launch((1,), (128,), (y, np.float32(3), np.int32(100)), stream=stream)

    graphs = GraphCache(stream)
    for _ in range(5):
        graphs.run("two", body)
    stream.synchronize()
    assert (cupy.asnumpy(x) == 5).all()
    assert (cupy.asnumpy(y) == 25).all()


# ------------------------------------------------------------------------------ copies


def test_pinned_copies_are_captured(stream: Any) -> None:
    import cupy

    from nanocupy.cuda.graphs import GraphCache
    from nanocupy.cuda.streams import PinnedBuffer, copy_on_device, copy_to_device, copy_to_host

    buffer = PinnedBuffer(1000)
    there = buffer.array((50,), np.float32)
    back = buffer.array((50,), np.float32, offset_bytes=400)
    with stream:
        x, y = cupy.zeros(50, np.float32), cupy.zeros(50, np.float32)
    stream.synchronize()

    def body() -> None:
        copy_to_device(x, there, stream)
        copy_on_device(y, x, stream)
        copy_to_host(back, y, stream)

    graphs = GraphCache(stream)
    for step in range(4):
        there[:] = np.arange(50) + step
        back[:] = -1
        graphs.run("copies", body)
        stream.synchronize()
        assert np.array_equal(back, np.arange(50) + step)
    assert graphs.counters.replayed == 3
    with pytest.raises(CudaError, match="a copy between"):
        copy_to_device(x, there[:40], stream)
    with pytest.raises(CudaError, match="an array with gaps"):
        copy_to_host(there[:25], x[::2], stream)
    with pytest.raises(CudaError, match="lies outside a pinned buffer of 1000 bytes"):
        buffer.array((51,), np.float32, offset_bytes=800)
    buffer.close()
    with pytest.raises(CudaError, match="lies outside a pinned buffer of 0 bytes"):
        buffer.array((1,), np.uint8)


def test_a_pinned_array_keeps_its_buffer() -> None:
    from nanocupy.cuda.streams import PinnedBuffer

    array = PinnedBuffer(4096).array((4096,), np.uint8)
    gc.collect()
    array[:] = 7
    assert (array == 7).all()


def test_fill_bytes(stream: Any) -> None:
    import cupy

    from nanocupy.cuda.streams import fill_bytes

    with stream:
        x = cupy.zeros((4, 8), np.float32)
        fill_bytes(x[1:3], 0xFF, stream)
        fill_bytes(x[:0], 0xFF, stream)
    stream.synchronize()
    assert np.isnan(cupy.asnumpy(x)).sum(axis=1).tolist() == [0, 8, 8, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_uploads_arrive(stream: Any, dtype: Any) -> None:
    import cupy

    from nanocupy.cuda.upload import DeviceTransfer, Uploader

    rng = np.random.default_rng(0)
    sources = {
        "small": rng.standard_normal(3).astype(np.float32),
        "large": rng.standard_normal((1000, 777)).astype(np.float32),
        "permuted": rng.standard_normal((64, 5, 200)).astype(np.float32).transpose(1, 2, 0),
        "bfloat16": rng.standard_normal((513, 100)).astype(ml_dtypes.bfloat16),
    }
    device = {name: cupy.zeros(source.shape, dtype) for name, source in sources.items()}
    stacked = cupy.zeros((2000, 777), dtype)
    cupy.cuda.Device().synchronize()
    total = sum(array.nbytes for array in device.values()) + stacked.nbytes
    seen: list[tuple[int, int]] = []
    transfer = DeviceTransfer(stream, 1 << 18)
    with Uploader(transfer, total, lambda *pair: seen.append(pair)) as uploader:
        for name, source in sources.items():
            uploader.upload(name, source, device[name])
        for half in (0, 1):
            part = stacked[1000 * half : 1000 * (half + 1)]
            uploader.upload("half", sources["large"] + half, part)
    transfer.close()
    for name, source in sources.items():
        assert cupy.asnumpy(device[name]).tobytes() == source.astype(dtype).tobytes(), name
    wanted = np.concatenate([sources["large"], sources["large"] + 1]).astype(dtype)
    assert cupy.asnumpy(stacked).tobytes() == wanted.tobytes()
    assert seen[-1] == (total, total)


def test_timing_sees_what_takes_longer(stream: Any) -> None:
    import cupy

    from nanocupy.cuda.timing import time_on_gpu

    with stream:
        small, large = cupy.zeros(1 << 20, np.uint8), cupy.zeros(1 << 30, np.uint8)
    quick = time_on_gpu(lambda i: small.fill(i % 7), stream, num_runs=11)
    slow = time_on_gpu(lambda i: large.fill(i % 7), stream, num_runs=11)
    assert 0 < quick.median_ms < slow.median_ms
    assert slow.num_runs == 11
    assert 50 < slow.gigabytes_per_second(1 << 30) < 20000
