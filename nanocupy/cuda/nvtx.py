"""Named ranges of time for NVIDIA's profilers (Nsight Systems, ncu), through CuPy's NVTX.

Without a profiler a range costs well under a microsecond; without this module nothing at all.
"""

from __future__ import annotations

from typing import Protocol

from nanocupy.errors import DeviceError


class Nvtx(Protocol):
    """Ranges: nested ones of this thread, and others that end in any order."""

    def push(self, name: str) -> None: ...

    def pop(self) -> None: ...

    def start(self, name: str) -> int:
        """Begin a range that `end` ends, by the number that this gives."""
        ...

    def end(self, number: int) -> None: ...


class CupyNvtx:
    """See `Nvtx`. Raises DeviceError where CuPy is missing or was built without it."""

    def __init__(self) -> None:
        try:
            from cupy.cuda import nvtx
        except ImportError as exc:
            reason = " ".join(str(exc).split())[:200]
            raise DeviceError(
                f"NVTX ranges need CuPy, which cannot be imported ({reason})"
            ) from None
        if not nvtx.available:
            raise DeviceError("NVTX ranges were asked for, and this CuPy was built without NVTX")
        self._nvtx = nvtx
        self.push, self.pop, self.end = nvtx.RangePush, nvtx.RangePop, nvtx.RangeEnd

    def start(self, name: str) -> int:
        return self._nvtx.RangeStart(name, 0)  # of the first of CuPy's colours
