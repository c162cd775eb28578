"""A GPU as the engine uses it: memory by plan, launches, copies, graphs, all on one stream.

`Device` is what the engine is written against; `CudaDevice` is the real one. The engine itself
imports no CuPy, so its tests run it on a device made of NumPy.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from copy import copy
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from nanocupy.cuda.arena import Arena, ArenaPlan, BufferSpec
from nanocupy.cuda.checks import LaunchLog, cuda_call
from nanocupy.ops.cuda_sizes import DeviceTraits


class Device(Protocol):
    """Everything is started on one stream, in order; nothing is waited for but in `synchronize` and
    `wait`."""

    name: str
    traits: DeviceTraits
    kernels: Any

    def free_bytes(self) -> int:
        """Memory that could be allocated now."""
        ...

    def allocate(self, plan: ArenaPlan) -> Any:
        """Buffers of a plan: an object with `view(name, shape, dtype)`, as `Arena`."""
        ...

    def pinned(self, num_bytes: int) -> np.ndarray:
        """Host memory uint8 [num_bytes] that copies may go to and from without waiting; freed with
        the last array of it, so whoever starts a copy keeps one until it is done."""
        ...

    def matmul(self, x: Any, w: Any, out: Any, beta: float = 0.0) -> None: ...

    def to_device(self, target: Any, source: np.ndarray) -> None:
        """Start a copy from pinned memory; it must stay as it is until the copy is done."""
        ...

    def to_host(self, target: np.ndarray, source: Any) -> None:
        """Start a copy into pinned memory."""
        ...

    def fill(self, array: Any, byte: int) -> None:
        """Set every byte of an array."""
        ...

    def address(self, array: Any) -> int:
        """Where an array of the device begins."""
        ...

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        """Do `body`, which only starts work: as a graph, from its second time under `key` on."""
        ...

    def eager(self, why: str, body: Callable[[], None]) -> None:
        """Do `body` as it is; `why` is counted."""
        ...

    def synchronize(self, what: str) -> None:
        """Wait for all that was started; an error in it is an error of `what`."""
        ...

    def second_stream(self) -> Device:
        """The same device, with another stream, graphs of its own, and its own memory for
        products."""
        ...

    def follow(self, other: Device) -> None:
        """What is started here from now on begins when all that `other` has so far has ended."""
        ...

    def current(self) -> AbstractContextManager[Any]:
        """Within it kernels are launched on this one's stream; `run` and `eager` see to it
        themselves."""
        ...

    def moment(self) -> Any:
        """The end of all that was started so far, for `wait`; good until a dozen later ones."""
        ...

    def wait(self, moment: Any, what: str) -> None:
        """Wait until then, and for nothing that was started later; an error so far is an error of
        `what`."""
        ...

    def mark(self) -> Any:
        """A moment of the stream's work, for `seconds`."""
        ...

    def seconds(self, mark: Any) -> float:
        """When that was, on one time line; the work up to it must have ended."""
        ...

    def uploader(
        self, total_bytes: int, progress: Callable[[int, int], None] | None
    ) -> AbstractContextManager[Any]:
        """An object with `upload(name, source, destination)`, as `cuda.upload.Uploader`."""
        ...


class CudaDevice:
    """GPU number `index`, through CuPy. See `Device`."""

    def __init__(
        self,
        index: int = 0,
        *,
        use_graphs: bool = True,
        whole_steps: bool = True,
        check_each_launch: bool = False,
        separate_buffers: bool = False,
        force_plain: bool = False,
    ) -> None:
        """whole_steps: a decode step of few sequences may be one launch;
        check_each_launch waits after every launch, so that a fault names its kernel;
        separate_buffers gives every buffer an allocation of its own, for memory checkers;
        force_plain runs the paths of older cards. Raises CudaError, DeviceError."""
        import cupy

        from nanocupy.cuda.graphs import GraphCache
        from nanocupy.cuda.kernels import KernelLoader
        from nanocupy.cuda.streams import new_stream

        gc.collect()  # memory of engines that are gone but refer to themselves
        self.index = index
        with cuda_call(f"selecting GPU {index}"):
            cupy.cuda.Device(index).use()
            properties = cupy.cuda.runtime.getDeviceProperties(index)
        self.name = properties["name"].decode()
        self.log = LaunchLog()
        self.kernels = KernelLoader(index, check_each_launch=check_each_launch, log=self.log)
        self.traits = DeviceTraits(
            self.kernels.compute_capability,
            self.kernels.num_multiprocessors,
            self.kernels.max_shared_bytes,
            force_plain,
            wgmma=self.kernels.arch == "sm_90a" and not force_plain,
            whole_steps=whole_steps,
            memory_bytes_per_cycle=self.kernels.memory_bytes_per_cycle,
        )
        self.stream = new_stream()
        self.graphs = GraphCache(self.stream, enabled=use_graphs, log=self.log)
        self._separate_buffers = separate_buffers
        self._first_mark: Any = None
        self._moments: deque[Any] = deque(maxlen=16)

    def free_bytes(self) -> int:
        from cupy.cuda import runtime

        with cuda_call("cudaMemGetInfo"):
            return runtime.memGetInfo()[0]

    def plan(self, specs: Iterable[BufferSpec]) -> ArenaPlan:
        return ArenaPlan(specs, separate=self._separate_buffers)

    def allocate(self, plan: ArenaPlan) -> Arena:
        return Arena(plan)

    def pinned(self, num_bytes: int) -> np.ndarray:
        from nanocupy.cuda.streams import PinnedBuffer

        return PinnedBuffer(num_bytes).array((num_bytes,), np.uint8)

    @cached_property
    def _cublas(self) -> Any:
        import cupy

        from nanocupy.cuda.cublas import Cublas, workspace_bytes

        memory = cupy.cuda.Memory(workspace_bytes(self.traits.compute_capability))
        pointer = cupy.cuda.MemoryPointer(memory, 0)
        workspace = cupy.ndarray((memory.size,), cupy.uint8, memptr=pointer)
        return Cublas(self.stream, workspace, log=self.log)

    def prepare_products(self) -> None:
        """Make cuBLAS' handle, else the first `matmul` does. For any thread, beside copies and
        kernels of others, but not beside a `matmul` or a capture of this device."""
        import cupy

        with cuda_call(f"selecting GPU {self.index}"):
            cupy.cuda.Device(self.index).use()  # of this thread
        _ = self._cublas

    def matmul(self, x: Any, w: Any, out: Any, beta: float = 0.0) -> None:
        self._cublas.matmul(x, w, out, beta)

    def to_device(self, target: Any, source: np.ndarray) -> None:
        from nanocupy.cuda.streams import copy_to_device

        copy_to_device(target, source, self.stream)

    def to_host(self, target: np.ndarray, source: Any) -> None:
        from nanocupy.cuda.streams import copy_to_host

        copy_to_host(target, source, self.stream)

    def address(self, array: Any) -> int:
        return array.data.ptr

    def fill(self, array: Any, byte: int) -> None:
        from nanocupy.cuda.streams import fill_bytes

        fill_bytes(array, byte, self.stream)

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        self.graphs.run(key, body)

    def eager(self, why: str, body: Callable[[], None]) -> None:
        self.graphs.eager(why, body)

    def synchronize(self, what: str) -> None:
        from nanocupy.cuda.streams import synchronize

        synchronize(self.stream, what, self.log)

    def second_stream(self) -> CudaDevice:
        from nanocupy.cuda.graphs import GraphCache
        from nanocupy.cuda.streams import new_stream

        other = copy(self)
        other.__dict__.pop("_cublas", None)
        other.stream = new_stream()
        other.graphs = GraphCache(
            other.stream, enabled=self.graphs.enabled, log=self.log, counters=self.graphs.counters
        )
        other._moments = deque(maxlen=self._moments.maxlen)
        return other

    def follow(self, other: CudaDevice) -> None:
        from nanocupy.cuda.streams import follow

        follow(self.stream, other.stream, other._next_event())

    def current(self) -> AbstractContextManager[Any]:
        return self.stream

    def moment(self) -> Any:
        event = self._next_event()
        with cuda_call("cudaEventRecord"):
            event.record(self.stream)
        return event

    def _next_event(self) -> Any:
        from nanocupy.cuda.streams import new_event

        full = len(self._moments) == self._moments.maxlen
        event = self._moments.popleft() if full else new_event()
        self._moments.append(event)
        return event

    def wait(self, moment: Any, what: str) -> None:
        with cuda_call(what, self.log):
            moment.synchronize()

    def mark(self) -> Any:
        """A moment on the stream: an event, with `seconds` its time on one time line."""
        from nanocupy.cuda.streams import new_event

        if self._first_mark is None:
            self._first_mark = new_event(timing=True)
            self._first_mark.record(self.stream)
        event = new_event(timing=True)
        event.record(self.stream)
        return event

    def seconds(self, mark: Any) -> float:
        """When the stream came past `mark`, which it has, since the first mark."""
        import cupy

        with cuda_call("cudaEventElapsedTime"):
            mark.synchronize()
            return cupy.cuda.get_elapsed_time(self._first_mark, mark) / 1e3

    def uploader(
        self, total_bytes: int, progress: Callable[[int, int], None] | None
    ) -> AbstractContextManager[Any]:
        from nanocupy.cuda.upload import DeviceTransfer, Uploader

        return Uploader(DeviceTransfer(self.stream), total_bytes, progress)
