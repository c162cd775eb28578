"""Kernels of a device by file, entry and macros: compiled once, loaded once, launched with checks.

It knows how kernels are started and nothing of what they compute; the ops own their arguments.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nanocupy.cuda.arguments import Dim, TensorMap, checked_arguments, checked_dims
from nanocupy.cuda.checks import LaunchLog, cuda_call, cuda_error
from nanocupy.cuda.compiler import Compiler, Cubin, Macros, arch_for, describe
from nanocupy.cuda.driver import Driver, LaunchOptions, PreparedLaunch
from nanocupy.errors import CudaError

_PLAIN = LaunchOptions()
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # cudaDeviceAttr, without a name here


class Kernel:
    """One `__global__` function of a loaded module.

    name: the entry, as profilers show it; module: file and macros, for errors.
    """

    def __init__(
        self, raw: Any, name: str, module: str, loader: KernelLoader, max_shared_bytes: int
    ) -> None:
        """raw: a cupy.RawKernel; max_shared_bytes: what a block may have on the device at most."""
        self.name = name
        self.module = module
        self._raw = raw
        self._loader = loader
        with cuda_call(f"loading kernel {name} of {module}"):
            self._function = raw.kernel
            self.num_registers: int = raw.num_regs
            self.local_bytes: int = raw.local_size_bytes  # a thread's stack and spills
            self.static_shared_bytes: int = raw.shared_size_bytes
            self.max_block_threads: int = raw.max_threads_per_block
            self._allowed_shared_bytes: int = raw.max_dynamic_shared_size_bytes
        self.max_shared_bytes = max_shared_bytes - self.static_shared_bytes

    def launch(
        self,
        grid: Dim,
        block: Dim,
        args: Sequence[Any],
        shared_bytes: int = 0,
        stream: Any = None,
        *,
        cluster: int = 1,
        overlap_previous: bool = False,
        resident: bool = False,
    ) -> None:
        """Run on `grid` blocks of `block` threads; a grid with a zero in it runs nothing.

        args: arrays of the device without gaps, scalars of an explicit numpy type, tensor maps,
        None for a null pointer. shared_bytes: dynamic shared memory a block. stream: CuPy's current
        one if None. cluster: blocks of a cluster, along x. resident: a cooperative launch, and
        overlap_previous, see `LaunchOptions`; the latter is taken only within a capture, as the
        host starts single kernels too slowly for them to overlap. Raises CudaError
        with the kernel's name; faults of a kernel itself show later.
        """
        overlap = overlap_previous and _is_capturing(stream)
        if cluster > 1 or overlap or resident or any(isinstance(arg, TensorMap) for arg in args):
            options = LaunchOptions((cluster, 1, 1) if cluster > 1 else None, overlap, resident)
            self.start(self.prepare(grid, block, args, shared_bytes, options), stream)
            return
        dims = self._prepare(grid, block, shared_bytes)
        if dims is None:
            return
        values = checked_arguments(self.name, args)
        self._loader.log.note(self.name)
        try:
            self._function(*dims, values, shared_bytes, stream)
        except Exception as exc:
            raise cuda_error(f"launching kernel {self.name}", exc, self._loader.log) from exc
        if self._loader.check_each_launch:
            self._wait(stream)

    def prepare(
        self,
        grid: Dim,
        block: Dim,
        args: Sequence[Any],
        shared_bytes: int = 0,
        options: LaunchOptions = _PLAIN,
    ) -> PreparedLaunch | None:
        """The same launch, checked and laid out once, for `start`; None where the grid is empty.

        The only way to launch with clusters, programmatic overlap, a cooperative grid, or a
        `TensorMap` among the arguments.
        """
        dims = self._prepare(grid, block, shared_bytes)
        if dims is None:
            return None
        return PreparedLaunch(
            self.name,
            self._function.ptr,
            dims,
            checked_arguments(self.name, args),
            shared_bytes,
            options,
            keep=self._raw,
        )

    def start(self, launch: PreparedLaunch | None, stream: Any = None) -> None:
        """Run what `prepare` gave. stream: CuPy's current one if None."""
        if launch is None:
            return
        if stream is None:
            import cupy

            stream = cupy.cuda.get_current_stream()
        self._loader.log.note(self.name)
        self._loader.driver.launch(launch, stream.ptr)
        if self._loader.check_each_launch:
            self._wait(stream)

    def blocks_per_multiprocessor(self, num_threads: int, shared_bytes: int = 0) -> int:
        """How many blocks of this size one multiprocessor holds at once."""
        from cupy.cuda import driver

        self._allow_shared(shared_bytes)
        with cuda_call(f"occupancy of kernel {self.name}"):
            return driver.occupancyMaxActiveBlocksPerMultiprocessor(
                self._function.ptr, num_threads, shared_bytes
            )

    def _prepare(self, grid: Dim, block: Dim, shared_bytes: int) -> tuple[Dim, Dim] | None:
        dims = checked_dims(self.name, grid, block)
        if dims is None:
            return None
        threads = dims[1][0] * dims[1][1] * dims[1][2]
        if threads > self.max_block_threads:
            raise CudaError(
                f"kernel {self.name}: a block of {threads} threads, but with its "
                f"{self.num_registers} registers it runs {self.max_block_threads} at most"
            )
        if shared_bytes > self._allowed_shared_bytes:
            self._allow_shared(shared_bytes)
        return dims

    def _allow_shared(self, shared_bytes: int) -> None:
        """More than 48 KB of dynamic shared memory is given only to kernels that ask for it."""
        if shared_bytes <= self._allowed_shared_bytes:
            return
        if shared_bytes > self.max_shared_bytes:
            raise CudaError(
                f"kernel {self.name} of {self.module}: {shared_bytes} bytes of dynamic shared "
                f"memory, the device gives it {self.max_shared_bytes} at most"
            )
        with cuda_call(f"giving kernel {self.name} {shared_bytes} bytes of shared memory"):
            self._raw.max_dynamic_shared_size_bytes = shared_bytes
        self._allowed_shared_bytes = shared_bytes

    def _wait(self, stream: Any) -> None:
        """So that a fault names its kernel; not while capturing, where nothing has run."""
        import cupy

        stream = stream or cupy.cuda.get_current_stream()
        if not stream.is_capturing():
            with cuda_call(f"kernel {self.name} of {self.module}"):
                stream.synchronize()


def _is_capturing(stream: Any) -> bool:
    if stream is None:
        import cupy

        stream = cupy.cuda.get_current_stream()
    return stream.is_capturing()


class KernelLoader:
    """The kernels of one device.

    check_each_launch waits after every launch, so that a fault names the kernel that made it.
    Loading happens on the device that is CuPy's current one, which must be `device`.
    """

    def __init__(
        self,
        device: int = 0,
        compiler: Compiler | None = None,
        *,
        arch: str | None = None,
        check_each_launch: bool = False,
        log: LaunchLog | None = None,
    ) -> None:
        """arch: another than the device's own, such as an older one whose fallbacks are tested."""
        from cupy.cuda import runtime

        self.device = device
        with cuda_call(f"asking GPU {device} for its properties"):
            self.compute_capability = (
                runtime.deviceGetAttribute(_COMPUTE_CAPABILITY_MAJOR, device),
                runtime.deviceGetAttribute(_COMPUTE_CAPABILITY_MINOR, device),
            )
            self.num_multiprocessors: int = runtime.deviceGetAttribute(
                runtime.cudaDevAttrMultiProcessorCount, device
            )
            self.max_shared_bytes: int = runtime.deviceGetAttribute(
                runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device
            )
            clock_khz = runtime.deviceGetAttribute(runtime.cudaDevAttrClockRate, device)
            memory_khz = runtime.deviceGetAttribute(runtime.cudaDevAttrMemoryClockRate, device)
            bus_bits = runtime.deviceGetAttribute(runtime.cudaDevAttrGlobalMemoryBusWidth, device)
        # Two transfers in a cycle of the memory. Some drivers know no clocks and say 0.
        self.memory_bytes_per_cycle = 2 * memory_khz * bus_bits / 8 / clock_khz if clock_khz else 0
        self.compiler = compiler or Compiler()
        self.arch = arch or arch_for(self.compute_capability)
        self.check_each_launch = check_each_launch
        self.log = log or LaunchLog()
        self._modules: dict[tuple[str, tuple[tuple[str, int | str], ...]], Any] = {}
        self._kernels: dict[tuple[Any, str], Kernel] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @cached_property
    def driver(self) -> Driver:
        return Driver()

    def get(self, file: str, entry: str, **macros: int | str) -> Kernel:
        """The kernel `entry` of `file` under `macros`; the first call compiles or loads its module.

        Raises CudaError where the file or entry is missing or the source does not compile.
        """
        key = (file, tuple(sorted(macros.items())))
        kernel = self._kernels.get((key, entry))
        if kernel is None:
            if key not in self._modules:
                self._load(self.compiler.compile(file, macros, arch=self.arch))
            name = describe(file, macros, self.arch)
            try:
                with cuda_call(f"loading kernel {entry} of {name}"):
                    raw = self._modules[key].get_function(entry)
                kernel = Kernel(raw, entry, name, self, self.max_shared_bytes)
            except CudaError as exc:
                if "NOT_FOUND" not in str(exc):
                    raise
                raise CudaError(f"{name} has no kernel {entry!r}") from None
            self._kernels[key, entry] = kernel
        return kernel

    def prefetch(self, variants: Iterable[tuple[str, Macros]]) -> None:
        """Compile modules that will be needed, all at once, and load them."""
        keys = {(file, tuple(sorted(macros.items()))) for file, macros in variants}
        missing = [(file, dict(macros)) for file, macros in keys - self._modules.keys()]
        self.load(self.compiler.compile_all(missing, arch=self.arch))

    def load(self, cubins: Iterable[Cubin]) -> None:
        """Load modules that the compiler gave."""
        for cubin in cubins:
            self._load(cubin)

    def _load(self, cubin: Cubin) -> None:
        import cupy

        with cuda_call(f"loading {describe(cubin.file, cubin.macros, cubin.arch)}"):
            module = cupy.RawModule(path=str(cubin.path or self._scratch_file(cubin)))
            _ = module.module  # CuPy loads the file only when it is asked for it
        self._modules[cubin.file, tuple(sorted(cubin.macros.items()))] = module

    def _scratch_file(self, cubin: Cubin) -> Path:
        """Where the cache cannot be written, CuPy still wants a file to load."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="nanocupy-")
        path = Path(self._scratch.name) / f"{len(self._modules)}.cubin"
        path.write_bytes(cubin.data)
        return path
