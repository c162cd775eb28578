"""A file mapped read-only, given out in bounded views.

Owns the mapping and the bounds; knows no format. Every offset and length is checked in Python's
unbounded integers against the file's size before anything is touched, so that no number read from
a hostile file can overflow, reach beyond the file or cause an allocation.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanocupy.errors import CheckpointError


class MappedFile:
    """Read-only views of one file's bytes.

    path   the file, as it was given
    size   its length in bytes when it was opened
    Raises CheckpointError where the path is no readable, non-empty regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if self.path.exists() and not self.path.is_file():
                # A pipe or device would block or never end.
                raise CheckpointError(f"{self.path}: not a regular file")
            with self.path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise CheckpointError(f"{self.path}: the file is empty")
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.size = len(self._map)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: no such file") from None
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise CheckpointError(f"{self.path}: cannot be read: {reason}") from exc

    def bytes(self, offset: int, length: int, what: str) -> memoryview:
        """`length` bytes from `offset`, read-only and not copied; `what` names them in errors."""
        if self._map is None:
            raise CheckpointError(f"{self.path}: {what} was asked for after the file was closed")
        # int(): NumPy integers would wrap where Python's do not.
        offset, length = int(offset), int(length)
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(
                f"{self.path}: {what}: {length} bytes at offset {offset} do not lie within "
                f"the file's {self.size} bytes; it is truncated or damaged"
            )
        return memoryview(self._map)[offset : offset + length]

    def array(
        self, offset: int, dtype: npt.DTypeLike, shape: tuple[int, ...], what: str
    ) -> np.ndarray:
        """A read-only array over the file's bytes at `offset`; it need not be aligned."""
        dtype = np.dtype(dtype)
        length = dtype.itemsize
        for dimension in shape:
            if int(dimension) < 1:
                raise CheckpointError(
                    f"{self.path}: {what}: shape {list(shape)} has a dimension below 1"
                )
            length *= int(dimension)
        return np.frombuffer(self.bytes(offset, length, what), dtype).reshape(shape)

    def close(self) -> None:
        """Unmap the file. While arrays given out still live, the mapping lives on with them."""
        mapping, self._map = self._map, None
        if mapping is not None:
            # BufferError: a view is still held; the last one to go unmaps the file.
            with contextlib.suppress(BufferError):
                mapping.close()
