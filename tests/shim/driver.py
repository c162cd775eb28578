"""Runs kernels built by `build` on NumPy arrays: checks the arguments, guards their memory.

Every array is copied to pages of its own, its end against a page that cannot be touched; arrays
that the kernel takes as const cannot be written. What lies around it is a pattern that must stay.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.shim import build

_PAGE = mmap.PAGESIZE
_PATTERN = 0xFF  # reads as NaN
_NO_ACCESS = 0  # PROT_NONE, which `mmap` does not name
_NO_RESERVE = 0x4000  # MAP_NORESERVE
MAX_SHARED_BYTES = 227 << 10  # that a block of any card can ask for
_STACK_BYTES = 128 << 10  # as in host_fibers.h
_ADDRESS = re.compile(r"at address (0x[0-9a-f]+)")


class KernelFault(Exception):
    """A kernel misbehaved: out of bounds, a divergent barrier, a deadlock, a wrong mask…"""


class _Shape(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint), ("shared_bytes", ctypes.c_uint),
        ("order", ctypes.c_uint), ("resident", ctypes.c_uint), ("cluster", ctypes.c_uint),
        ("stacks", ctypes.c_void_p),
    )  # fmt: skip


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


_LIBC = _libc()


@functools.cache
def _stacks(num_threads: int) -> int:
    """Memory for the stacks of the threads, kept and shared by all kernels: each guard page costs
    one of the 65530 mappings that a process may have, so that only the first stacks have one."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    base = _LIBC.mmap(None, num_threads * _STACK_BYTES, protection, flags, -1, 0)
    if base in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"no memory for the stacks of {num_threads} threads")
    for i in range(min(num_threads, 1024)):
        _LIBC.mprotect(base + i * _STACK_BYTES, _PAGE, _NO_ACCESS)
    return base


class HostTensorMap:
    """What a kernel on the shim takes for a tensor map of a matrix of 16-bit values: as
    `cuda.driver.Driver.tensor_map` makes it, with the rules of HostMap in host_bulk_copy.h."""

    _MAGIC = 0x2D70616D2D324478

    def __init__(self, array: np.ndarray, box: Sequence[int], *, what: str = "") -> None:
        rows, columns = array.shape
        if array.itemsize != 2 or not array.flags.c_contiguous or columns % 8:
            raise TypeError(f"{what}: {array.dtype}{list(array.shape)} has no map here")
        if not (1 <= box[0] <= 256 and box[1] == 64):
            raise TypeError(f"{what}: a box of {list(box)}")
        self.array, self._numbers = array, (rows, columns, 2 * columns, box[0], box[1])

    def at(self, address: int) -> Any:
        """128 bytes, aligned to 64, of the array where it lies at `address`."""
        memory = (ctypes.c_ubyte * 192)()
        aligned = (ctypes.c_ubyte * 128).from_buffer(memory, -ctypes.addressof(memory) % 64)
        packed = struct.pack("=QQqqqii", self._MAGIC, address, *self._numbers)
        ctypes.memmove(aligned, packed, len(packed))
        return aligned


class _Region:
    """Pages that hold one array; the pages before and behind cannot be touched."""

    def __init__(self, array: np.ndarray, writable: bool, name: str) -> None:
        self.array, self.writable, self.name = array, writable, name
        room = -(-array.nbytes // 16) * 16
        self._inner = -(-room // _PAGE) * _PAGE
        self._bytes = self._inner + 2 * _PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._base = _LIBC.mmap(None, self._bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if self._base in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"{name}: no memory for {array.nbytes} bytes")
        self._start = self._inner - room  # of the array in the inner pages
        self.address = self._base + _PAGE + self._start
        inner = (ctypes.c_ubyte * self._inner).from_address(self._base + _PAGE)
        self._memory = np.frombuffer(inner, np.uint8) if self._inner else np.empty(0, np.uint8)
        self._memory[:] = _PATTERN
        self._values()[:] = np.frombuffer(array.tobytes(), np.uint8)
        _LIBC.mprotect(self._base, _PAGE, _NO_ACCESS)
        _LIBC.mprotect(self._base + _PAGE + self._inner, _PAGE, _NO_ACCESS)
        if not writable:
            _LIBC.mprotect(self._base + _PAGE, self._inner, mmap.PROT_READ)

    def _values(self) -> np.ndarray:
        return self._memory[self._start : self._start + self.array.nbytes]

    def covers(self, address: int) -> bool:
        return self._base <= address < self._base + self._bytes

    def give_back(self) -> None:
        """Copy what the kernel wrote into the array; raise KernelFault for writes around it."""
        if not self.writable:
            return
        end = self._start + self.array.nbytes
        around = np.concatenate([self._memory[: self._start], self._memory[end:]])
        if (around != _PATTERN).any():
            raise KernelFault(f"{self.name}: written outside the array")
        values = self._values().view(self.array.dtype) if self.array.size else self._values()
        if self.array.size:
            self.array[...] = values.reshape(self.array.shape)

    def close(self) -> None:
        self._memory = np.empty(0, np.uint8)
        _LIBC.munmap(self._base, self._bytes)


@dataclass(frozen=True)
class _Parameter:
    dtype: str
    pointer: bool
    const: bool


class HostKernel:
    """One entry of a library. `order`, unless a call gives one: see `host_fibers.h`."""

    def __init__(self, library: Path, entry: str) -> None:
        self.entry = entry
        loaded = _load(library)
        describe = getattr(loaded, f"shim_describe_{entry}")
        describe.restype = ctypes.c_char_p
        self.parameters = [
            _Parameter(text.removeprefix("const ").rstrip("*"), "*" in text, "const" in text)
            for text in describe().decode().split(";")[:-1]
        ]
        self._launch = getattr(loaded, f"shim_launch_{entry}")
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = [ctypes.POINTER(_Shape), ctypes.POINTER(ctypes.c_void_p)]

    def __call__(
        self,
        grid: Sequence[int] | int,
        block: Sequence[int] | int,
        *args: Any,
        shared_bytes: int = 0,
        order: int = 0,
        resident: bool = False,
        cluster: int = 1,
    ) -> None:
        """Run the grid. Arrays and NumPy scalars must have exactly the parameters' types (an array
        may be None: a null pointer); Python numbers are converted. Arrays are updated in place.

        order: 0 threads forward, 1 reversed, else the seed of a shuffle, and from 1000 on
        asynchronous copies that land together land in reverse; resident: all blocks at
        once, as a cooperative launch has them; cluster: blocks along x that make a cluster.
        Raises KernelFault, TypeError.
        """
        if len(args) != len(self.parameters):
            raise TypeError(
                f"{self.entry} takes {len(self.parameters)} arguments, {len(args)} were given"
            )
        if shared_bytes > MAX_SHARED_BYTES:
            raise KernelFault(
                f"{self.entry}: {shared_bytes} bytes of dynamic shared memory; no card gives a "
                f"block more than {MAX_SHARED_BYTES}"
            )
        dims = (grid,) if isinstance(grid, int) else tuple(grid)
        dims = tuple(int(n) for n in dims) + (1,) * (3 - len(dims))
        threads = block if isinstance(block, int) else int(np.prod(block))
        regions: dict[tuple[int, int, str], _Region] = {}
        try:
            values = self._pack(args, regions)
            pointers = (ctypes.c_void_p * max(1, len(values)))(
                *[ctypes.addressof(value) for value in values]
            )
            num_threads = max(1024, (int(np.prod(dims)) if resident else cluster) * threads)
            stacks = _stacks(1 << max(10, (num_threads - 1).bit_length()))
            shape = _Shape(
                (ctypes.c_uint * 3)(*dims), threads, shared_bytes, order, int(resident), cluster,
                stacks,
            )  # fmt: skip
            problem = self._launch(ctypes.byref(shape), pointers)
            if problem is not None:
                raise KernelFault(_explained(problem.decode(), list(regions.values())))
            for region in regions.values():
                region.give_back()
        finally:
            for region in regions.values():
                region.close()

    def _pack(self, args: Sequence[Any], regions: dict[tuple[int, int, str], _Region]) -> list[Any]:
        written = {
            _key(value)
            for value, parameter in zip(args, self.parameters, strict=True)
            if isinstance(value, np.ndarray) and not parameter.const
        }
        values: list[Any] = []
        for i, (value, parameter) in enumerate(zip(args, self.parameters, strict=True)):
            name = f"{self.entry}, argument {i}"
            if parameter.dtype == "tensor map":
                if not isinstance(value, HostTensorMap):
                    raise TypeError(f"{name}: a tensor map is wanted, not {type(value).__name__}")
                values.append(value.at(self._place(value.array, regions, written, name)))
                continue
            if not parameter.pointer:
                values.append(_scalar(value, parameter.dtype, name))
            elif value is None:
                values.append(ctypes.c_void_p(0))
            else:
                if not isinstance(value, np.ndarray):
                    raise TypeError(f"{name}: an array is wanted, not {type(value).__name__}")
                if parameter.dtype not in ("any", value.dtype.name):
                    raise TypeError(f"{name}: {value.dtype} was given for {parameter.dtype}")
                if not value.flags.c_contiguous:
                    raise TypeError(f"{name}: the array is not contiguous")
                values.append(ctypes.c_void_p(self._place(value, regions, written, name)))
        return values

    @staticmethod
    def _place(
        array: np.ndarray, regions: dict[tuple[int, int, str], _Region], written: set[Any],
        name: str,
    ) -> int:  # fmt: skip
        """The address of the pages that hold the array."""
        key = _key(array)
        if key not in regions:
            regions[key] = _Region(array, key in written, name)
        return regions[key].address


def host_kernel(
    file: str | Path, entry: str, *, source: str | None = None, **macros: int
) -> HostKernel:
    """The kernel `entry` of `file` (in kernels_cu, or a path), or of a changed text of it."""
    path = build.KERNELS / file  # an absolute path stays as it is
    text = path.read_text() if source is None else source
    if entry not in build.entries(text):
        raise KeyError(f"{path.name} has no kernel {entry}")
    return HostKernel(build.build(text, macros, (path.parent,)), entry)


@functools.cache
def _load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _key(array: np.ndarray) -> tuple[int, int, str]:
    return array.__array_interface__["data"][0], array.nbytes, array.dtype.name


def _scalar(value: Any, dtype: str, name: str) -> Any:
    if isinstance(value, np.generic) and value.dtype.name != dtype:
        raise TypeError(f"{name}: a scalar {value.dtype} was given for {dtype}")
    converted = np.dtype(dtype).type(value)
    return (ctypes.c_ubyte * converted.nbytes).from_buffer_copy(converted.tobytes())


def _explained(problem: str, regions: list[_Region]) -> str:
    found = _ADDRESS.search(problem)
    if found:
        address = int(found[1], 16)
        for region in regions:
            if region.covers(address):
                element = (address - region.address) // max(1, region.array.dtype.itemsize)
                how = "" if region.writable else " (const)"
                return (
                    f"{problem}: element {element} of {region.name}{how}, "
                    f"{region.array.dtype}{list(region.array.shape)}"
                )
    return problem
