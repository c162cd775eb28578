"""Where CUDA's own parts are: the headers that NVRTC includes, the libraries that CuPy loaded.

Wheels of CUDA 12 have a folder a library (nvidia/cuda_runtime), those of CUDA 13 one for all
(nvidia/cu13); a toolkit has its own. Taking a part of another CUDA version than the rest is the
commonest way to break all of them, so every part is chosen by its version. It must not know
kernels.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanocupy.cuda.probe import INSTALL, INSTALL_BY_MAJOR, dotted
from nanocupy.errors import CudaError, DeviceError

_VERSION_LINE = re.compile(rb"^\s*#\s*define\s+CUDA_VERSION\s+(\d{4,6})\b", re.MULTILINE)


def nvrtc_version() -> tuple[int, int]:
    """NVRTC's version, which must be of the CUDA major that CuPy is built for.

    Raises DeviceError with the mend where CuPy or NVRTC is missing, or their majors differ. Needs
    no GPU.
    """
    try:
        from cupy.cuda import nvrtc, runtime
    except ImportError as exc:
        reason = " ".join(str(exc).split())[:200]
        raise DeviceError(f"CuPy cannot be imported ({reason}); {INSTALL}") from None
    runtime_major = runtime.runtimeGetVersion() // 1000
    mend = INSTALL_BY_MAJOR.get(runtime_major, INSTALL)
    try:
        major, minor = nvrtc.getVersion()
    except Exception as exc:  # CuPy loads the library only now, and says so in several ways
        reason = " ".join(str(exc).split())[:200]
        raise DeviceError(f"NVRTC, the kernel compiler, does not load ({reason}); {mend}") from None
    if major != runtime_major:
        raise DeviceError(
            f"CuPy is built for CUDA {runtime_major} but loads NVRTC {dotted((major, minor))}; "
            f"{mend}, and take other CUDA versions out of LD_LIBRARY_PATH and CUDA_PATH"
        )
    return major, minor


def header_version(folder: Path) -> tuple[int, int] | None:
    """The CUDA version of the headers in `folder`; None where they are not all there."""
    if not (folder / "cuda_fp16.h").is_file():
        return None
    try:
        match = _VERSION_LINE.search((folder / "cuda.h").read_bytes())
    except OSError:
        return None
    if match is None:
        return None
    number = int(match[1])
    return number // 1000, number % 1000 // 10


def include_folder(version: tuple[int, int], candidates: list[Path] | None = None) -> Path:
    """The folder of cuda_fp16.h and its like that fits NVRTC `version`.

    The same minor version is preferred, the same major required. `candidates` replaces the places
    that are looked at. Raises DeviceError where there is none.
    """
    places = list(_include_candidates()) if candidates is None else candidates
    found = [(folder, header_version(folder)) for folder in places]
    fitting = [(folder, v) for folder, v in found if v is not None and v[0] == version[0]]
    for folder, folder_version in fitting:
        if folder_version == version:
            return folder
    if fitting:
        return fitting[0][0]
    others = ", ".join(f"{folder} has {dotted(v)}" for folder, v in found if v is not None)
    raise DeviceError(
        f"no CUDA {version[0]} headers (cuda_fp16.h) are found for NVRTC {dotted(version)}"
        + (f" ({others})" if others else "")
        + f"; {INSTALL_BY_MAJOR.get(version[0], INSTALL)}, or set CUDA_PATH to a CUDA toolkit"
    )


def _include_candidates() -> Iterator[Path]:
    spec = find_spec("nvidia")  # a namespace package that all of NVIDIA's wheels fill
    for location in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(header.parent for header in Path(location).glob("*/include/cuda_fp16.h"))
    roots = [os.environ[name] for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    for root in (*roots, "/usr/local/cuda"):
        yield from (Path(root) / "include", Path(root) / "targets/x86_64-linux/include")
    if os.environ.get("CONDA_PREFIX"):
        yield Path(os.environ["CONDA_PREFIX"]) / "targets/x86_64-linux/include"


def load_library(name: str) -> Any:
    """The very `lib<name>` ("cublas", "cublasLt") that CuPy uses, as a ctypes library.

    Raises DeviceError where it is missing, CudaError where it is of another CUDA major than CuPy.
    """
    from cupy.cuda import runtime

    major = runtime.runtimeGetVersion() // 1000
    mend = INSTALL_BY_MAJOR.get(major, INSTALL)
    try:
        from cupy.cuda import cublas

        cublas.getVersion(0)  # CuPy loads cuBLAS, and with it cublasLt, only when it is called
    except Exception as exc:
        if type(exc).__name__ != "CUBLASError":  # that would be an answer of the library itself
            reason = " ".join(str(exc).split())[:200]
            raise DeviceError(f"cuBLAS does not load ({reason}); {mend}") from None
    path = _loaded_path(name, major) or _pathfinder_path(name)
    if path is None:
        raise DeviceError(f"lib{name} of CUDA {major} is not found; {mend}")
    found = re.search(r"\.so\.(\d+)|_(\d+)\.dll$", path)
    if found and int(found[1] or found[2]) != major:
        raise CudaError(f"CuPy is built for CUDA {major} but {path} would be used; {mend}")
    try:
        return ctypes.CDLL(path)
    except OSError as exc:
        raise DeviceError(f"{path} does not load ({exc}); {mend}") from None


def _loaded_path(name: str, major: int) -> str | None:
    """The file of a library that this process has mapped already (Linux)."""
    pattern = re.compile(rf"/lib{name}\.so\.{major}(\.[\d.]+)?$")
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and pattern.search(fields[5]):
            return fields[5]
    return None


def _pathfinder_path(name: str) -> str | None:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return load_nvidia_dynamic_lib(name).abs_path
    except Exception:  # not installed, or the library is found nowhere
        return None
