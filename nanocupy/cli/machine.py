"""What this computer has, apart from CUDA: processor, memory, BLAS, disk. Facts only, no judgement.

Each function answers with what can be found out and never raises.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def cpu_name() -> str:
    """The processor's name and the vector instructions that matter for matrix products."""
    info = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    shown = [flag for flag in _CPU_FLAGS if flag in known]
    label = name[1].strip() if name else platform.processor() or platform.machine() or "unknown"
    return f"{label} ({', '.join(shown)})" if shown else label


def num_cpus() -> int:
    """CPUs this process may use, a container's quota included."""
    count = os.cpu_count() or 1
    with suppress(AttributeError, OSError):
        count = len(os.sched_getaffinity(0))
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
        count = min(count, max(1, round(int(quota[0]) / int(quota[1]))))
    return count


def memory_bytes() -> tuple[int, int] | None:
    """(total, available) of the machine, or of the container where that is less."""
    info = _read("/proc/meminfo")
    found = [
        re.search(rf"^{key}:\s*(\d+) kB", info, re.MULTILINE)
        for key in ("MemTotal", "MemAvailable")
    ]
    if not all(found):
        return None
    total, available = (int(match[1]) * 1024 for match in found if match)
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        used = _read("/sys/fs/cgroup/memory.current").strip()
        total = int(limit)
        available = min(available, max(0, total - (int(used) if used.isdigit() else 0)))
    return total, available


def blas_name() -> str:
    """The library behind NumPy's matrix products, from NumPy's build record."""
    import numpy as np

    try:
        config = np.show_config(mode="dicts")
        blas = config["Build Dependencies"]["blas"]  # type: ignore[index]
        return f"{blas['name']} {blas['version']}".strip()
    except Exception:  # the record's form is NumPy's own affair
        return "unknown BLAS"


def blas_threads() -> int | None:
    """Threads OpenBLAS will use, asked from the library NumPy loaded; None if it is another."""
    import numpy as np

    np.ones((2, 2)) @ np.ones((2, 2))  # have it loaded
    libraries = set(re.findall(r"(/\S*openblas\S*\.so\S*)", _read("/proc/self/maps")))
    for library in sorted(libraries):
        with suppress(OSError):
            handle = ctypes.CDLL(library)
            for prefix in ("scipy_openblas", "openblas"):
                for suffix in ("64_", ""):
                    ask = getattr(handle, f"{prefix}_get_num_threads{suffix}", None)
                    if ask is not None:
                        return int(ask())
    return None


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def can_write(folder: Path) -> str | None:
    """None where a file can be made in `folder` (or its nearest existing parent), else why not."""
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)):
            return None
    except OSError as exc:
        return exc.strerror or str(exc)


def free_disk_bytes(folder: Path) -> int | None:
    """Room on the disk that `folder` is or would be on."""
    with suppress(OSError):
        return shutil.disk_usage(nearest_existing(folder)).free
    return None


def kernel_driver() -> str | None:
    """NVIDIA's kernel module, "580.95.05" for example; None where it is not loaded."""
    match = re.search(r"\s(\d{3}(?:\.\d+)+)\s", _read("/proc/driver/nvidia/version"))
    return match[1] if match else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
