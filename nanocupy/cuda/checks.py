"""Turns what CUDA reports into one line that names the call, the kernel and what ran before it.

Errors of a kernel arrive later than its launch, at some call that waits. So the launches made last
are noted, and named with such an error. It must not know kernels or memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from nanocupy.errors import CapacityError, CudaError, NanocupyError

# driver_types.h: after these every call of the process fails, until it ends
_CONTEXT_LOST = {
    214: "the GPU's memory failed (ECC)",
    700: "a kernel read or wrote outside its memory",
    702: "a kernel ran into the driver's time limit",
    709: "the GPU's context is gone",
    710: "a kernel's assertion failed",
    714: "the GPU's hardware stack failed",
    715: "a kernel met an instruction that the GPU does not have",
    716: "a kernel read or wrote at an address that is not aligned",
    717: "a kernel used an address in the wrong address space",
    718: "a kernel jumped outside its program",
    719: "a kernel failed",
}
_OUT_OF_MEMORY = 2
_CAPTURE_ERRORS = range(900, 909)


class ContextLostError(CudaError):
    """A fault after which CUDA serves this process no more: the engine has to end."""


class LaunchLog:
    """The names of the last launches; their faults show only at a later call."""

    def __init__(self, length: int = 8) -> None:
        self._names: deque[str] = deque(maxlen=length)

    def note(self, name: str) -> None:
        self._names.append(name)

    def names(self) -> list[str]:
        """Oldest first."""
        return list(self._names)


def cuda_error(what: str, exc: BaseException, log: LaunchLog | None = None) -> NanocupyError:
    """The error to raise where `what`, a call or a launch by its name, raised `exc`."""
    if isinstance(exc, NanocupyError):
        return exc
    status = getattr(exc, "status", None)
    kind = type(exc).__name__
    text = " ".join(f"{exc}".split())[:300] or kind
    if kind == "OutOfMemoryError" or (status == _OUT_OF_MEMORY and kind.startswith("CUDA")):
        return CapacityError(
            f"{what}: the GPU's memory is full ({text}); close other programs on it, or lower "
            "gpu_memory_utilization or the context length"
        )
    recent = f"; launched last: {', '.join(log.names())}" if log and log.names() else ""
    if status in _CONTEXT_LOST:
        return ContextLostError(f"{what}: {_CONTEXT_LOST[status]} ({text}){recent}")
    if status in _CAPTURE_ERRORS:
        return CudaError(f"{what}: not allowed while a graph is captured ({text})")
    return CudaError(f"{what} failed: {text}{recent}")


@contextmanager
def cuda_call(what: str, log: LaunchLog | None = None) -> Iterator[None]:
    """Errors that CuPy raises in the block become `cuda_error`s of `what`; others pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as exc:  # CuPy's are all derived from these
        raise cuda_error(what, exc, log) from exc
