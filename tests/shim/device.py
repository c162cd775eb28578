"""A device made of the shim: what `CudaOps` needs of a GPU, on NumPy arrays."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanocupy.cuda.arena import ArenaPlan, array_dtype
from nanocupy.cuda.upload import convert
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import DeviceTraits, OpSizes, workspace_plan
from tests.ops.cases import DTYPES
from tests.shim.driver import HostKernel, HostTensorMap, host_kernel

# A small card of each kind: few multiprocessors, so that work is cut as it is on a large one.
MODERN = DeviceTraits((9, 0), 6, 227 << 10)
OLD = DeviceTraits((7, 5), 4, 64 << 10, force_plain=True)


class ShimKernels:
    """Like cuda.kernels.KernelLoader; `launched` collects the entries' names."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def get(self, file: str, entry: str, **macros: int) -> _ShimKernel:
        return _ShimKernel(self, entry, host_kernel(file, entry, **macros))


class _ShimKernel:
    def __init__(self, owner: ShimKernels, entry: str, kernel: HostKernel) -> None:
        self._owner, self._entry, self._kernel = owner, entry, kernel

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        *,
        cluster: int = 1,
        overlap_previous: bool = False,
        resident: bool = False,
    ) -> None:
        for arg in args:
            if not (arg is None or isinstance(arg, np.ndarray | np.generic | HostTensorMap)):
                raise TypeError(f"{self._entry}: {arg!r} is no array and no scalar of NumPy")
            if isinstance(arg, np.ndarray) and not arg.flags.c_contiguous:
                raise TypeError(f"{self._entry}: an array has gaps, strides {arg.strides}")
        self._owner.launched.append(self._entry)
        self._kernel(
            grid, block, *args, shared_bytes=shared_bytes, cluster=cluster, resident=resident
        )


class ShimMaps:
    """In place of `ops.tensor_maps.TensorMaps`."""

    def matrix(self, matrix: np.ndarray, box: tuple[int, int]) -> HostTensorMap:
        return HostTensorMap(matrix, box, what="the map of a matrix")


def matmul(x: np.ndarray, w: np.ndarray, out: np.ndarray, beta: float = 0.0) -> None:
    """What cuBLAS does: out = x @ w.T + beta * out, summed in float32, rounded once."""
    product = x.astype(np.float32) @ w.astype(np.float32).T
    out[...] = product + beta * out.astype(np.float32) if beta else product


def shim_ops(sizes: OpSizes, traits: DeviceTraits, **tunings: Any) -> CudaOps:
    """CudaOps on the shim, every workspace in poison; `tunings` go to it."""
    workspaces = {}
    for name, (shape, dtype) in workspace_plan(sizes, traits).items():
        poison = np.full(int(np.prod(shape)) * 8, 0xFF, np.uint8)
        array = poison.view(DTYPES.get(dtype, np.dtype(dtype)))[: int(np.prod(shape))]
        workspaces[name] = np.zeros_like(array) if name == "counters" else array.copy()
    ops = CudaOps(ShimKernels(), matmul, workspaces, sizes, traits, **tunings)
    ops._made_maps = ShimMaps()  # type: ignore[assignment]
    return ops


class ShimArena:
    """Like cuda.arena.Arena, every buffer an array of its own, full of poison."""

    def __init__(self, plan: ArenaPlan) -> None:
        self._arrays = {}
        for name, spec in plan.specs.items():
            poison = np.full(spec.num_bytes, 0xFF, np.uint8)
            self._arrays[name] = poison.view(array_dtype(spec.dtype)).reshape(spec.shape)

    def view(self, name: str, shape: tuple[int, ...] | None = None, dtype: Any = None) -> Any:
        array = self._arrays[name]
        if dtype is not None:
            array = array.reshape(-1).view(np.dtype(dtype))
        return array if shape is None else array.reshape(-1)[: int(np.prod(shape))].reshape(shape)


@dataclass
class _Queue:
    """A stream: what was started and is not done, in order."""

    started: deque[Callable[[], None]] = field(default_factory=deque)
    num_done: int = 0

    @property
    def end(self) -> int:
        return self.num_done + len(self.started)

    def run_to(self, moment: int) -> None:
        while self.num_done < moment:
            self.num_done += 1
            self.started.popleft()()


@dataclass
class _Host:
    """What the streams of a device share. others_first: they run as far as they may before the one
    that is waited for."""

    others_first: bool
    streams: list[_Queue] = field(default_factory=list)
    current: ShimDevice | None = None  # whose stream kernels go to


class ShimDevice:
    """A `cuda.device.Device` on NumPy. A graph is the list of what was started while it was
    captured: replaying does the same with the same memory, whatever has become of the host's
    variables, as a real one does. And nothing is done before the host waits for it: what a copy
    reads then is what the staging memory holds by then. Two streams know of each other only what
    `follow` tells: the one that is waited for runs first, and the other as far as it must; or, with
    `others_first`, the other way round."""

    name = "host shim"

    def __init__(
        self,
        traits: DeviceTraits = MODERN,
        memory_bytes: int = 1 << 30,
        *,
        others_first: bool = False,
    ) -> None:
        self.traits = traits
        self._memory_bytes = memory_bytes
        self.kernels = _RecordingKernels(self)
        self._graphs: dict[Any, list[Callable[[], None]]] = {}
        self._seen: set[Any] = set()
        self._recording: list[Callable[[], None]] | None = None
        self._queue, self._host = _Queue(), _Host(others_first)
        self._host.streams.append(self._queue)
        self.counts: Counter[str] = Counter()

    def start(self, what: Callable[[], None]) -> None:
        (self._queue.started if self._recording is None else self._recording).append(what)

    def free_bytes(self) -> int:
        return self._memory_bytes

    def allocate(self, plan: ArenaPlan) -> ShimArena:
        assert plan.total_bytes <= self._memory_bytes
        return ShimArena(plan)

    def pinned(self, num_bytes: int) -> np.ndarray:
        return np.full(num_bytes, 0xAB, np.uint8)

    def matmul(self, x: Any, w: Any, out: Any, beta: float = 0.0) -> None:
        self.start(lambda: matmul(x, w, out, beta))

    def to_device(self, target: Any, source: np.ndarray) -> None:
        assert (target.nbytes, target.itemsize) == (source.nbytes, source.itemsize)
        self.counts["to_device"] += 1
        self.start(lambda: np.copyto(target, source.view(target.dtype).reshape(target.shape)))

    def to_host(self, target: np.ndarray, source: Any) -> None:
        assert (target.nbytes, target.itemsize) == (source.nbytes, source.itemsize)
        self.start(lambda: np.copyto(target, source.view(target.dtype).reshape(target.shape)))

    def address(self, array: Any) -> int:
        return array.ctypes.data

    def fill(self, array: Any, byte: int) -> None:
        self.start(lambda: array.reshape(-1).view(np.uint8).fill(byte))

    def run(self, key: Any, body: Callable[[], None]) -> None:
        if key not in self._graphs:
            if key not in self._seen:
                self._seen.add(key)
                self.eager("first", body)
                return
            self._recording = recorded = []
            try:
                with self.current():
                    body()
            finally:
                self._recording = None
            self._graphs[key] = recorded
            self.counts["captured"] += 1
        self._queue.started += self._graphs[key]
        self.counts["replayed"] += 1

    def eager(self, why: str, body: Callable[[], None]) -> None:
        with self.current():
            body()
        self.counts["eager"] += 1

    def second_stream(self) -> ShimDevice:
        other = copy(self)
        other._graphs, other._seen, other._queue = {}, set(), _Queue()
        other._host.streams.append(other._queue)
        other.kernels = _RecordingKernels(other)
        return other

    def follow(self, other: ShimDevice) -> None:
        self.counts["followed"] += 1
        moment = other._queue.end
        self.start(lambda: other._queue.run_to(moment))

    @contextmanager
    def current(self) -> Iterator[None]:
        """A kernel launched outside would go to whatever stream is CuPy's current one."""
        before, self._host.current = self._host.current, self
        try:
            yield
        finally:
            self._host.current = before

    def synchronize(self, what: str) -> None:
        self.wait(self.moment(), what)

    def moment(self) -> int:
        return self._queue.end

    def wait(self, moment: int, what: str) -> None:
        assert self._recording is None, "a graph cannot wait"
        if self._host.others_first:
            for other in self._host.streams:
                if other is not self._queue:
                    other.run_to(other.end)
        self._queue.run_to(moment)

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark

    def uploader(self, total_bytes: int, progress: Any) -> AbstractContextManager[Any]:
        return nullcontext(_ShimUploader())


class _ShimUploader:
    def upload(self, name: str, source: np.ndarray, destination: np.ndarray) -> None:
        assert source.shape == destination.shape
        convert(name, np.ascontiguousarray(source).reshape(-1), destination.reshape(-1))

    def finish(self) -> None:
        """All of it is there at once."""


class _RecordingKernels(ShimKernels):
    def __init__(self, device: ShimDevice) -> None:
        super().__init__()
        self._device = device

    def get(self, file: str, entry: str, **macros: int) -> Any:
        kernel = super().get(file, entry, **macros)
        device, start = self._device, self._device.start

        class Recorded:
            def launch(self, *args: Any, **options: Any) -> None:
                assert device._host.current is device, f"{entry} on another stream"
                start(lambda: kernel.launch(*args, **options))

        return Recorded()
