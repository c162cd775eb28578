"""Brings weights from mapped files to the device, through two small pinned buffers.

While one buffer is being copied the other is filled, and values are converted as they are put in,
so that no tensor is ever held whole in the host's memory. It knows arrays, no checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from nanocupy.cuda.checks import cuda_call
from nanocupy.cuda.streams import PinnedBuffer, new_event
from nanocupy.errors import CudaError, beyond_float16

BUFFER_BYTES = 32 << 20
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_PIECE_BYTES = 1 << 20  # below this, another thread costs more than it gives


class Transfer(Protocol):
    """The way to the device: staging buffers that are taken in turns."""

    buffers: Sequence[np.ndarray]  # uint8, of one size

    def wait(self, index: int) -> None:
        """Until buffer `index` has been copied and may be filled again."""

    def send(self, index: int, num_bytes: int, destination: Any, offset_bytes: int) -> None:
        """Start to copy the first bytes of buffer `index` to `offset_bytes` of `destination`."""


class DeviceTransfer:
    """Two pinned buffers and a stream. `close` gives the buffers back."""

    def __init__(self, stream: Any, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._stream = stream
        self._pinned = [PinnedBuffer(buffer_bytes) for _ in range(2)]
        self._events = [new_event() for _ in self._pinned]
        self.buffers = [pinned.array((buffer_bytes,), np.uint8) for pinned in self._pinned]

    def wait(self, index: int) -> None:
        with cuda_call("uploading weights"):
            self._events[index].synchronize()

    def send(self, index: int, num_bytes: int, destination: Any, offset_bytes: int) -> None:
        from cupy.cuda import runtime

        with cuda_call("uploading weights (cudaMemcpyAsync)"):
            runtime.memcpyAsync(
                destination.data.ptr + offset_bytes,
                self._pinned[index].pointer,
                num_bytes,
                runtime.memcpyHostToDevice,
                self._stream.ptr,
            )
            self._events[index].record(self._stream)

    def close(self) -> None:
        for index in range(len(self._pinned)):
            self.wait(index)
        self.buffers = []
        for pinned in self._pinned:
            pinned.close()


class Uploader:
    """Copies tensors one after another. Use it in a `with`: leaving it waits for the last copies.

    progress: called with (done_bytes, total_bytes), in bytes on the device; total_bytes is what
    the caller says all its tensors come to.
    """

    def __init__(
        self,
        transfer: Transfer,
        total_bytes: int = 0,
        progress: Callable[[int, int], None] | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._transfer = transfer
        self._buffer_bytes = transfer.buffers[0].nbytes // 256 * 256
        self._next = 0
        self._in_use = [False] * len(transfer.buffers)
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._progress = progress
        self._num_threads = num_threads or max(1, min(8, os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(self._num_threads)

    def __enter__(self) -> Uploader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.finish()
        finally:
            self._pool.shutdown()

    def upload(self, name: str, source: np.ndarray, destination: Any) -> None:
        """Copy `source`, an array of the host, into `destination`, one of the device.

        Both of one shape; floats are converted to the destination's dtype, other dtypes must agree
        (8-bit types are copied as they are). The source is read before this returns; the copy may
        still be under way. Raises CudaError, and ConfigError where float16 is too narrow.
        """
        _check_pair(name, source, destination)
        itemsize = destination.dtype.itemsize
        done = 0
        for chunk in flat_chunks(source, self._buffer_bytes // itemsize):
            index, self._next = self._next, (self._next + 1) % len(self._in_use)
            if self._in_use[index]:
                self._transfer.wait(index)
            size = chunk.size * itemsize
            self._fill(name, chunk, self._transfer.buffers[index][:size].view(destination.dtype))
            self._transfer.send(index, size, destination, done)
            self._in_use[index] = True
            done += size
            self._done_bytes += size
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)

    def finish(self) -> None:
        """Wait until everything has arrived."""
        for index, in_use in enumerate(self._in_use):
            if in_use:
                self._transfer.wait(index)
                self._in_use[index] = False

    def _fill(self, name: str, chunk: np.ndarray, out: np.ndarray) -> None:
        """Pieces in parallel: pages of the file arrive, and are converted, on several cores."""
        num_pieces = max(1, min(self._num_threads, out.nbytes // _PIECE_BYTES))
        bounds = [out.size * i // num_pieces for i in range(num_pieces + 1)]
        pieces = [slice(*pair) for pair in pairwise(bounds)]
        for _ in self._pool.map(lambda piece: convert(name, chunk[piece], out[piece]), pieces):
            pass


def flat_chunks(source: np.ndarray, max_elements: int) -> Iterator[np.ndarray]:
    """The elements of `source` in C order, in one-dimensional parts of at most `max_elements`.

    A part is a view where the array has no gaps, and a copy of that part alone where it has.
    """
    if source.flags.c_contiguous:
        flat = source.reshape(-1)
        for start in range(0, flat.size, max_elements):
            yield flat[start : start + max_elements]
        return
    row_elements = source[0].size
    rows_each = max(1, max_elements // row_elements)
    for start in range(0, source.shape[0], rows_each):
        part = source[start : start + rows_each]
        if row_elements > max_elements:
            yield from flat_chunks(part[0], max_elements)
        else:
            yield np.ascontiguousarray(part).reshape(-1)


def convert(name: str, source: np.ndarray, out: np.ndarray) -> None:
    """out[i] = source[i], rounded to nearest where out is narrower.

    Raises ConfigError with `name` where a value is beyond float16.
    """
    if source.dtype == out.dtype or source.dtype.itemsize == out.dtype.itemsize == 1:
        np.copyto(out.view(np.uint8), source.view(np.uint8))  # bytes: runs without Python's lock
        return
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, source, casting="unsafe")
    if out.dtype == np.float16 and not np.isfinite(out).all():
        raise beyond_float16(name)


def _check_pair(name: str, source: np.ndarray, destination: Any) -> None:
    if source.shape != destination.shape:
        raise CudaError(
            f"tensor {name} is {list(source.shape)}, its place on the device "
            f"{list(destination.shape)}"
        )
    if not destination.flags.c_contiguous:
        raise CudaError(f"tensor {name}: its place on the device has gaps")
    one, other = source.dtype, destination.dtype
    if one != other and not (
        {one.name, other.name} <= _FLOATS or one.itemsize == other.itemsize == 1
    ):
        raise CudaError(f"tensor {name} is {one.name}, its place on the device {other.name}")
