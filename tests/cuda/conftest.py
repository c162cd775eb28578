"""Fixtures of the CUDA layer's tests, on a GPU and without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def nvrtc() -> tuple[int, int]:
    """NVRTC's version; skips with the reason where it cannot be used."""
    from nanocupy.cuda.libraries import nvrtc_version
    from nanocupy.errors import DeviceError

    try:
        return nvrtc_version()
    except DeviceError as exc:
        pytest.skip(f"no NVRTC: {exc}")


@pytest.fixture
def host_array() -> Callable[..., Any]:
    """host_array(shape, dtype): a CuPy array over host memory, for checks that need no GPU."""
    cupy = pytest.importorskip("cupy")

    def make(shape: tuple[int, ...], dtype: Any = np.float32, skip_bytes: int = 0) -> Any:
        itemsize = np.dtype(dtype).itemsize
        memory = np.zeros(int(np.prod(shape)) * itemsize + skip_bytes + 512, np.uint8)
        start = -memory.ctypes.data % 256 + skip_bytes
        owned = cupy.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, 0)
        return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(owned, start))

    return make


@pytest.fixture
def make_loader(tmp_path: Path) -> Callable[..., Any]:
    """make_loader(source, **options): a KernelLoader of one file, test.cu, on GPU 0."""

    def make(source: str, **options: Any) -> Any:
        from nanocupy.cuda.compiler import Compiler, Sources
        from nanocupy.cuda.kernels import KernelLoader

        (tmp_path / "test.cu").write_text(source)
        return KernelLoader(0, Compiler(Sources(tmp_path), tmp_path / "cubins"), **options)

    return make


@pytest.fixture
def stream() -> Any:
    """A stream of the test's own, done when the test is."""
    from nanocupy.cuda.streams import new_stream

    made = new_stream()
    yield made
    made.synchronize()
