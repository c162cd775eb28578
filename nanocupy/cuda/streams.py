"""Streams, events, pinned host memory and the copies between host and device.

Everything here but `synchronize` and `PinnedBuffer` may be used while a graph is captured. It knows
nothing of what is copied.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import numpy as np

from nanocupy.cuda.checks import LaunchLog, cuda_call
from nanocupy.errors import CudaError

_PORTABLE, _WRITE_COMBINED = 1, 4  # cudaHostAlloc's flags
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3  # cudaMemcpyKind


def new_stream(*, high_priority: bool = False) -> Any:
    """A stream that does not wait for the null stream, nor it for this one."""
    import cupy

    with cuda_call("cudaStreamCreateWithPriority"):
        # Lower numbers go first; the driver clamps what is below its range.
        return cupy.cuda.Stream(non_blocking=True, priority=-5 if high_priority else 0)


def new_event(*, timing: bool = False) -> Any:
    """An event; one that keeps no time costs less."""
    import cupy

    with cuda_call("cudaEventCreate"):
        return cupy.cuda.Event(disable_timing=not timing)


def follow(stream: Any, other: Any, event: Any) -> None:
    """What `stream` is given from now on starts when all that `other` has so far is done.

    In a capture this is how a second stream joins the graph, and how it has to come back.
    """
    with cuda_call("cudaStreamWaitEvent"):
        event.record(other)
        stream.wait_event(event)


def synchronize(stream: Any, what: str = "waiting for the stream", log: LaunchLog | None = None):
    """Wait until all of `stream` is done. Errors of its kernels show here, as errors of `what`."""
    with cuda_call(what, log):
        stream.synchronize()


class PinnedBuffer:
    """Page-locked host memory, which the GPU copies from and to while the host goes on.

    Exactly as large as asked for (CuPy's pinned pool rounds to powers of two). Lives until `close`,
    or until neither it nor any of its arrays is referred to.
    """

    def __init__(self, num_bytes: int, *, write_combined: bool = False) -> None:
        """write_combined: quicker for the GPU to read, very slow for the host to read.
        Raises CapacityError."""
        from cupy.cuda import runtime

        if num_bytes < 1:
            raise CudaError(f"a pinned buffer of {num_bytes} bytes was asked for")
        flags = _PORTABLE | (_WRITE_COMBINED if write_combined else 0)
        with cuda_call(f"cudaHostAlloc of {num_bytes} bytes of pinned host memory"):
            self.pointer: int = runtime.hostAlloc(num_bytes, flags)
        self.num_bytes = num_bytes
        memory = (ctypes.c_uint8 * num_bytes).from_address(self.pointer)
        # The finalizer hangs on the object that every array of the buffer has as its base.
        self._free = weakref.finalize(memory, runtime.freeHost, self.pointer)
        self._free.atexit = False  # the context may be gone by then
        self._bytes: np.ndarray | None = np.frombuffer(memory, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: Any, offset_bytes: int = 0) -> np.ndarray:
        """A part of the buffer as a NumPy array. Raises CudaError outside its bounds."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        if self._bytes is None or offset_bytes < 0 or offset_bytes + size > self.num_bytes:
            raise CudaError(
                f"{dtype}{list(shape)} at byte {offset_bytes} lies outside a pinned buffer of "
                f"{self.num_bytes if self._bytes is not None else 0} bytes"
            )
        return self._bytes[offset_bytes : offset_bytes + size].view(dtype).reshape(shape)

    def close(self) -> None:
        """Free the memory now; its arrays must not be used any more."""
        self._bytes = None
        self._free()


def copy_to_device(device_array: Any, host_array: np.ndarray, stream: Any) -> None:
    """Copy a pinned host array into one of the device, of equal bytes, without waiting for it.

    The host array must stay as it is until the stream has come past; a captured copy reads it anew
    with every replay. From memory that isn't pinned the copy is not asynchronous.
    """
    _check_pair(device_array, host_array)
    _copy(device_array.data.ptr, host_array.ctypes.data, host_array.nbytes, _HOST_TO_DEVICE, stream)


def copy_to_host(host_array: np.ndarray, device_array: Any, stream: Any) -> None:
    """Copy an array of the device into a pinned one of the host, without waiting for it."""
    _check_pair(device_array, host_array)
    _copy(host_array.ctypes.data, device_array.data.ptr, host_array.nbytes, _DEVICE_TO_HOST, stream)


def copy_on_device(to: Any, source: Any, stream: Any) -> None:
    """Copy one array of the device into another of equal bytes; they must not overlap."""
    _check_pair(to, source)
    _copy(to.data.ptr, source.data.ptr, to.nbytes, _DEVICE_TO_DEVICE, stream)


def fill_bytes(array: Any, byte: int, stream: Any) -> None:
    """Set every byte of an array of the device: 0 clears it, 0xFF makes every float a NaN."""
    from cupy.cuda import runtime

    if not array.flags.c_contiguous:
        raise CudaError("fill_bytes: the array has gaps")
    if array.nbytes:
        with cuda_call("cudaMemsetAsync"):
            runtime.memsetAsync(array.data.ptr, byte, array.nbytes, stream.ptr)


def _check_pair(one: Any, other: Any) -> None:
    if one.nbytes != other.nbytes or one.itemsize != other.itemsize:
        raise CudaError(
            f"a copy between {one.dtype}{list(one.shape)} and {other.dtype}{list(other.shape)}"
        )
    if not (one.flags.c_contiguous and other.flags.c_contiguous):
        raise CudaError("a copy of an array with gaps: its rows must follow each other in memory")


def _copy(to: int, source: int, num_bytes: int, kind: int, stream: Any) -> None:
    from cupy.cuda import runtime

    if num_bytes:
        with cuda_call("cudaMemcpyAsync"):
            runtime.memcpyAsync(to, source, num_bytes, kind, stream.ptr)
