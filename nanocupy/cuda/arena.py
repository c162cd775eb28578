"""The device memory of a run: planned from a table at start, taken once, handed out as views.

The plan is plain arithmetic and needs no GPU. Addresses never change, which captured graphs need,
and a step takes nothing more: `device_allocations` counts, so that a test can tell. It knows names
and sizes, not what the buffers are for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanocupy.cuda.checks import cuda_call
from nanocupy.errors import CapacityError, CudaError
from nanocupy.progress import human_bytes

ALIGNMENT_BYTES = 256  # of cudaMalloc itself, and what every vector load or copy engine asks for

_ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip
_MAX_BYTES = 1 << 48  # no GPU addresses more


def array_dtype(name: str) -> np.dtype:
    """The dtype of the arrays for `name`. CuPy takes bfloat16 through ml_dtypes, but computes with
    no 8-bit floats: these are uint8. Raises CudaError for a name without one."""
    if name not in _ITEM_BYTES:
        raise CudaError(f"{name!r} is no dtype of a buffer; there are {', '.join(_ITEM_BYTES)}")
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(np.uint8 if name.startswith("float8") else name)


@dataclass(frozen=True)
class BufferSpec:
    """A row of the plan: `owner` is who it is for, such as "weights", "kv cache", "workspace"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    owner: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Placement:
    """Where a buffer lies: `offset_bytes` into the allocation of that name."""

    allocation: str
    offset_bytes: int


class ArenaPlan:
    """The table of all buffers and where each will lie.

    The buffers of an owner share an allocation; with `separate` each has one of its own, so that
    compute-sanitizer sees a read or write past its end.
    """

    def __init__(self, specs: Iterable[BufferSpec], *, separate: bool = False) -> None:
        """Raises CudaError for a name given twice, an unknown dtype, or a size that is none."""
        self.specs: dict[str, BufferSpec] = {}
        self.placements: dict[str, Placement] = {}
        self.allocation_bytes: dict[str, int] = {}
        for spec in specs:
            _check(spec)
            if spec.name in self.specs:
                raise CudaError(f"the arena's plan has two buffers named {spec.name!r}")
            self.specs[spec.name] = spec
            allocation = f"{spec.owner}/{spec.name}" if separate else spec.owner
            end = self.allocation_bytes.get(allocation, 0)
            offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            self.placements[spec.name] = Placement(allocation, offset)
            self.allocation_bytes[allocation] = offset + spec.num_bytes
        if self.total_bytes > _MAX_BYTES:
            raise CudaError(f"the arena's plan comes to {human_bytes(self.total_bytes)}")

    @property
    def total_bytes(self) -> int:
        """What all allocations take together, gaps for alignment included."""
        return sum(self.allocation_bytes.values())

    def bytes_by_owner(self) -> dict[str, int]:
        """Bytes of each owner's buffers, without gaps, in the order of the table."""
        totals: dict[str, int] = {}
        for spec in self.specs.values():
            totals[spec.owner] = totals.get(spec.owner, 0) + spec.num_bytes
        return totals

    def table(self, max_rows_each: int = 8) -> str:
        """The plan for people: a line an owner, below it its largest buffers."""
        lines = []
        for owner, total in self.bytes_by_owner().items():
            specs = [spec for spec in self.specs.values() if spec.owner == owner]
            specs.sort(key=lambda spec: -spec.num_bytes)
            lines.append(f"{owner:<24} {human_bytes(total):>10}  in {len(specs)} buffers")
            for spec in specs[:max_rows_each]:
                what = f"{spec.dtype}{list(spec.shape)}"
                lines.append(f"  {spec.name:<30} {human_bytes(spec.num_bytes):>10}  {what}")
            if len(specs) > max_rows_each:
                lines.append(f"  … and {len(specs) - max_rows_each} smaller ones")
        lines.append(f"{'in all':<24} {human_bytes(self.total_bytes):>10}")
        return "\n".join(lines)


def _check(spec: BufferSpec) -> None:
    array_dtype(spec.dtype)
    if not all(type(n) is int and n >= 0 for n in spec.shape) or spec.num_bytes > _MAX_BYTES:
        raise CudaError(f"buffer {spec.name!r} has the shape {spec.shape}")


def device_memory(num_bytes: int) -> Any:
    """Memory straight from the driver, freed with the last reference. CuPy's pool is passed by, as
    it keeps what is given back."""
    import cupy

    return cupy.cuda.Memory(num_bytes)


class Arena:
    """The allocations of a plan, and its buffers as CuPy arrays."""

    def __init__(self, plan: ArenaPlan, allocate: Callable[[int], Any] = device_memory) -> None:
        """allocate: bytes -> a cupy BaseMemory; for tests, as a plan may lie in host memory too.

        Raises CapacityError with the sizes where the device has not enough.
        """
        self.plan = plan
        self._memory: dict[str, Any] = {}
        for allocation, num_bytes in plan.allocation_bytes.items():
            try:
                with cuda_call(f"cudaMalloc of {num_bytes} bytes for {allocation}"):
                    self._memory[allocation] = allocate(max(num_bytes, 1))
            except CapacityError:
                self._memory.clear()
                raise _too_little(plan, allocation) from None

    def view(self, name: str, shape: tuple[int, ...] | None = None, dtype: Any = None) -> Any:
        """The buffer `name`, or its start in another shape or dtype, as a CuPy array.

        Nothing is cleared: what was never written may hold anything. Raises CudaError where the
        buffer does not exist or is too small.
        """
        import cupy

        spec = self.plan.specs.get(name)
        if spec is None:
            raise CudaError(f"the arena has no buffer {name!r}")
        if spec.name not in self.plan.placements or not self._memory:
            raise CudaError(f"buffer {name!r}: the arena is closed")
        shape = spec.shape if shape is None else tuple(int(n) for n in shape)
        if dtype is None or isinstance(dtype, str):
            dtype = array_dtype(dtype or spec.dtype)
        dtype = np.dtype(dtype)
        if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize > spec.num_bytes:
            raise CudaError(
                f"buffer {name!r} is {spec.dtype}{list(spec.shape)}, too small for "
                f"{dtype}{list(shape)}"
            )
        place = self.plan.placements[name]
        pointer = cupy.cuda.MemoryPointer(self._memory[place.allocation], place.offset_bytes)
        return cupy.ndarray(shape, dtype, memptr=pointer)

    def fill(self, byte: int, stream: Any) -> None:
        """Set every byte: 0xFF makes every float a NaN, so that reading what was never written
        shows."""
        from cupy.cuda import runtime

        for allocation, memory in self._memory.items():
            with cuda_call(f"cudaMemsetAsync of {allocation}"):
                size = self.plan.allocation_bytes[allocation]
                runtime.memsetAsync(memory.ptr, byte, size, stream.ptr)

    def close(self) -> None:
        """Let go of the memory; it is freed when the last view is gone."""
        self._memory.clear()


def _too_little(plan: ArenaPlan, allocation: str) -> CapacityError:
    owners = ", ".join(f"{owner} {human_bytes(n)}" for owner, n in plan.bytes_by_owner().items())
    try:
        from cupy.cuda import runtime

        free, total = runtime.memGetInfo()
        has = f"the GPU has {human_bytes(free)} free of {human_bytes(total)}"
    except Exception:  # the message matters more than this part of it
        has = "the GPU has less"
    return CapacityError(
        f"no device memory for {allocation}: {human_bytes(plan.total_bytes)} are needed in all "
        f"({owners}), {has}; close other programs on it, choose a smaller model or dtype, or lower "
        "the context length or gpu_memory_utilization"
    )


@dataclass
class AllocationCount:
    """What was taken from the device within a `device_allocations` block.

    pool_mallocs and pool_bytes: requests to CuPy's allocator, served from its pool or not.
    driver_bytes: by how much the driver's free memory shrank; other processes change it too.
    """

    pool_mallocs: int = 0
    pool_bytes: int = 0
    driver_bytes: int = 0

    @property
    def nothing(self) -> bool:
        return self.pool_mallocs == 0 and self.driver_bytes <= 0


@contextmanager
def device_allocations() -> Iterator[AllocationCount]:
    """Count the device memory that is taken in the block, in all threads, by CuPy's allocator and
    by the driver's own figure; the latter is known when the block has ended."""
    import cupy
    from cupy.cuda import runtime

    count = AllocationCount()
    allocator = cupy.cuda.get_allocator()

    def counting(num_bytes: int) -> Any:
        if num_bytes:
            count.pool_mallocs += 1
            count.pool_bytes += num_bytes
        return allocator(num_bytes)

    with cuda_call("cudaMemGetInfo"):
        free_before = runtime.memGetInfo()[0]
    cupy.cuda.set_allocator(counting)
    try:
        yield count
    finally:
        cupy.cuda.set_allocator(allocator)
        with cuda_call("cudaMemGetInfo"):
            count.driver_bytes = free_before - runtime.memGetInfo()[0]
