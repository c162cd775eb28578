"""What may be handed to a kernel, checked: the compiler does not see the two sides together.

A kernel ignores strides, takes a Python float as float64, and runs one block where zero were asked
for. All of that is refused here, before a launch, with the kernel's name. Needs no GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanocupy.errors import CudaError

Dim = tuple[int, ...]

_SCALARS = (
    *(np.bool_, np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64, np.float16, np.float32, np.float64),
)
_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024
_NULL = np.uint64(0)


class TensorMap:
    """A descriptor of a tensor for the bulk copy engine: CUtensorMap, 128 opaque bytes.

    `array` is the tensor it describes, kept alive with it. A kernel takes it by value, as a
    `const __grid_constant__` parameter.
    """

    SIZE_BYTES = 128
    ALIGNMENT_BYTES = 128  # cuda.h asks for 64

    def __init__(self, array: Any) -> None:
        self.array = array
        self._memory = ctypes.create_string_buffer(self.SIZE_BYTES + self.ALIGNMENT_BYTES)
        start = ctypes.addressof(self._memory)
        self.address = start + -start % self.ALIGNMENT_BYTES

    def tobytes(self) -> bytes:
        return ctypes.string_at(self.address, self.SIZE_BYTES)


def checked_arguments(kernel: str, args: Sequence[Any]) -> list[Any]:
    """`args` as a launch takes them: arrays, numpy scalars, tensor maps; None is a null pointer.

    Raises CudaError for a bare Python number, an array on the host, or one with gaps.
    """
    import cupy

    checked = []
    for index, arg in enumerate(args):
        if isinstance(arg, cupy.ndarray):
            if not arg.flags.c_contiguous:
                raise CudaError(
                    f"kernel {kernel}: argument {index} {arg.dtype}{list(arg.shape)} has strides "
                    f"{arg.strides}, but kernels read arrays without gaps"
                )
            checked.append(arg)
        elif arg is None:
            checked.append(_NULL)
        elif isinstance(arg, _SCALARS) or type(arg) is TensorMap:
            checked.append(arg)
        else:
            raise CudaError(
                f"kernel {kernel}: argument {index} is {_named(arg)}; give an array of the device, "
                "a scalar of an explicit type such as np.int32(…), or None for a null pointer"
            )
    return checked


def _named(arg: Any) -> str:
    if isinstance(arg, np.ndarray):
        return f"an array on the host, {arg.dtype}{list(arg.shape)}"
    return f"the {type(arg).__name__} {arg!r}"[:80]


def checked_dims(kernel: str, grid: Dim, block: Dim) -> tuple[Dim, Dim] | None:
    """(grid, block) with three numbers each, or None where the grid is empty: launch nothing.

    Raises CudaError for sizes that no GPU launches.
    """
    grid, block = _three(kernel, "grid", grid), _three(kernel, "block", block)
    if any(n < 0 or n > most for n, most in zip(grid, _MAX_GRID, strict=True)):
        raise CudaError(
            f"kernel {kernel}: a grid of {grid} cannot be launched, at most {_MAX_GRID}"
        )
    if any(n < 1 or n > most for n, most in zip(block, _MAX_BLOCK, strict=True)) or (
        block[0] * block[1] * block[2] > MAX_THREADS
    ):
        raise CudaError(
            f"kernel {kernel}: a block of {block} cannot be launched, it has 1 to {MAX_THREADS} "
            "threads"
        )
    return None if 0 in grid else (grid, block)


def _three(kernel: str, what: str, dims: Dim) -> Dim:
    try:
        numbers = tuple(int(n) for n in dims) if all(int(n) == n for n in dims) else ()
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if not 1 <= len(numbers) <= 3:
        raise CudaError(f"kernel {kernel}: {what} is {dims!r}, not one to three whole numbers")
    return (*numbers, 1, 1)[:3]


class PackedArguments:
    """Arguments laid out once for the driver: an array of pointers to their values.

    The layout is made of host memory that lives as long as this object, which keeps the arrays too.
    """

    def __init__(self, args: Sequence[Any]) -> None:
        """args: as `checked_arguments` gives them."""
        self.args = tuple(args)
        values = [_value_bytes(arg) for arg in args]
        offsets, size = [], 0
        for value in values:
            offsets.append(size)
            size += -(-max(len(value), 1) // 16) * 16
        self._values = ctypes.create_string_buffer(b"", max(size, 1))
        start = ctypes.addressof(self._values)
        for offset, value in zip(offsets, values, strict=True):
            ctypes.memmove(start + offset, value, len(value))
        self.pointers = (ctypes.c_void_p * max(len(values), 1))(*(start + o for o in offsets))


def _value_bytes(arg: Any) -> bytes:
    if isinstance(arg, np.generic | TensorMap):
        return arg.tobytes()
    return bytes(ctypes.c_uint64(arg.data.ptr))
