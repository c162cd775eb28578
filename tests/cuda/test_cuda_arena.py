"""The arena's plan and its views, over host memory."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nanocupy.cuda.arena import ALIGNMENT_BYTES, Arena, ArenaPlan, BufferSpec, array_dtype
from nanocupy.errors import CapacityError, CudaError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

DTYPES = ("float32", "float16", "bfloat16", "int32", "uint8", "int64", "float8_e4m3fn", "bool")


def host_memory(num_bytes: int) -> Any:
    """As `device_memory`, on the host; at an aligned address, as cudaMalloc's are."""
    cupy = pytest.importorskip("cupy")
    memory = np.full(num_bytes + 512, 0xAB, np.uint8)
    start = memory.ctypes.data + -memory.ctypes.data % 256
    return cupy.cuda.UnownedMemory(start, num_bytes, memory, 0)


@st.composite
def tables(draw: Any) -> list[BufferSpec]:
    count = draw(st.integers(0, 12))
    return [
        BufferSpec(
            f"buffer{i}",
            tuple(draw(st.lists(st.integers(0, 40), max_size=4))),
            draw(st.sampled_from(DTYPES)),
            draw(st.sampled_from(("weights", "kv", "workspace"))),
        )
        for i in range(count)
    ]


@hypothesis.given(tables(), st.booleans())
def test_buffers_are_aligned_within_bounds_and_apart(
    specs: list[BufferSpec], separate: bool
) -> None:
    plan = ArenaPlan(specs, separate=separate)
    for allocation, size in plan.allocation_bytes.items():
        inside = [s for s in specs if plan.placements[s.name].allocation == allocation]
        spans = sorted(
            (plan.placements[s.name].offset_bytes, s.num_bytes) for s in inside if s.num_bytes
        )
        assert all(offset % ALIGNMENT_BYTES == 0 for offset, _ in spans)
        assert all(offset + length <= size for offset, length in spans)
        for (offset, length), (after, _) in pairwise(spans):
            assert offset + length <= after
        if separate:
            assert len(inside) == 1
    payload = sum(s.num_bytes for s in specs)
    assert payload <= plan.total_bytes <= payload + ALIGNMENT_BYTES * len(specs)
    assert sum(plan.bytes_by_owner().values()) == payload


@hypothesis.given(tables(), st.booleans())
@hypothesis.settings(max_examples=40)
def test_views_are_where_the_plan_says(specs: list[BufferSpec], separate: bool) -> None:
    pytest.importorskip("cupy")
    arena = Arena(ArenaPlan(specs, separate=separate), host_memory)
    for spec in specs:
        view = arena.view(spec.name)
        assert view.shape == spec.shape
        assert view.dtype == array_dtype(spec.dtype)
        assert view.nbytes == spec.num_bytes
        assert view.flags.c_contiguous
        place = arena.plan.placements[spec.name]
        assert view.data.ptr == arena._memory[place.allocation].ptr + place.offset_bytes
        assert arena.view(spec.name, (math.prod(spec.shape),)).data.ptr == view.data.ptr


def spec(name: str = "a", shape: Any = (2, 3), dtype: str = "float32", owner: str = "o") -> Any:
    return BufferSpec(name, shape, dtype, owner)


def test_views_in_another_shape_or_dtype() -> None:
    pytest.importorskip("cupy")
    specs = [spec(shape=(4, 8), dtype="bfloat16"), spec("f", (16,), "float8_e5m2")]
    arena = Arena(ArenaPlan(specs), host_memory)
    assert arena.view("a").dtype == ml_dtypes.bfloat16
    assert arena.view("f").dtype == np.uint8
    assert arena.view("a", (3, 5)).shape == (3, 5)
    assert arena.view("a", (16,), "float32").dtype == np.float32
    assert arena.view("a", (0, 99999)).size == 0
    for shape, dtype in (((33,), None), ((17,), "float32"), ((-1, 2), None), ((65,), np.uint8)):
        with pytest.raises(CudaError, match=r"buffer 'a' is bfloat16\[4, 8\], too small for"):
            arena.view("a", shape, dtype)
    with pytest.raises(CudaError, match="the arena has no buffer 'b'"):
        arena.view("b")
    arena.close()
    with pytest.raises(CudaError, match="buffer 'a': the arena is closed"):
        arena.view("a")


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        ([spec(), spec()], "two buffers named 'a'"),
        ([spec(dtype="float128")], "'float128' is no dtype of a buffer; there are float64"),
        ([spec(shape=(-1, 2))], "buffer 'a' has the shape"),
        ([spec(shape=(1.5,))], "buffer 'a' has the shape"),
        ([spec(shape=(True,))], "buffer 'a' has the shape"),
        ([spec(shape=(2**40, 2**40))], "buffer 'a' has the shape"),
        ([spec(str(i), (2**45,)) for i in range(4)], "the arena's plan comes to"),
    ],
)
def test_bad_plans(specs: list[BufferSpec], says: str) -> None:
    with pytest.raises(CudaError, match=says):
        ArenaPlan(specs)


def test_too_little_memory_says_who_needs_what() -> None:
    pytest.importorskip("cupy")

    def allocate(num_bytes: int) -> Any:
        if num_bytes > 1000:
            raise MemoryError("out of it")
        return host_memory(num_bytes)

    class OutOfMemoryError(MemoryError):
        pass

    def allocate_as_cupy(num_bytes: int) -> Any:
        if num_bytes > 1000:
            raise OutOfMemoryError("Out of memory allocating")
        return host_memory(num_bytes)

    plan = ArenaPlan([spec("w", (10,), owner="weights"), spec("k", (9000,), owner="kv cache")])
    with pytest.raises(CapacityError) as caught:
        Arena(plan, allocate_as_cupy)
    message = str(caught.value)
    assert message.startswith("no device memory for kv cache: 36.0 kB are needed in all (weights ")
    assert "weights 40 B, kv cache 36.0 kB" in message
    assert "gpu_memory_utilization" in message
    with pytest.raises(CudaError, match="cudaMalloc of 36000 bytes for kv cache failed: out of it"):
        Arena(plan, allocate)


def test_the_table_names_owners_and_their_largest() -> None:
    specs = [spec(f"w{i}", (i, 1000), owner="weights") for i in range(12)]
    table = ArenaPlan([*specs, spec("k", (50,), owner="kv")]).table(max_rows_each=2)
    lines = table.splitlines()
    assert lines[0].split()[:4] == ["weights", "264.0", "kB", "in"]
    assert [line.split()[0] for line in lines[1:3]] == ["w11", "w10"]
    assert lines[3] == "  … and 10 smaller ones"
    assert lines[-1].startswith("in all")
