"""Is there a GPU that nanocupy can use, and if not, what is missing and how is it mended?

It asks the driver through libcuda first (a tenth of a millisecond without a driver, and no context
is made), then the installed packages, and imports CuPy last, as that takes half a second. It must
not know backends, models or the command line.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanocupy.errors import DeviceError

MIN_COMPUTE_CAPABILITY = (7, 5)
INSTALL = "pip install 'nanocupy[cuda12]'"
INSTALL_BY_MAJOR = {12: INSTALL, 13: "pip install 'nanocupy[cuda13]'"}
MIN_CUDA_MAJOR = min(INSTALL_BY_MAJOR)

# cuda.h: CUdevice_attribute and the results of cuInit that have a mend of their own
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR, _MULTIPROCESSORS = 75, 76, 16
_NO_DEVICE = 100
_CU_INIT_MENDS = {
    34: "libcuda is the toolkit's stub; put the driver's libcuda.so.1 first in LD_LIBRARY_PATH",
    _NO_DEVICE: "check `nvidia-smi`; in a container start it with the GPU (--gpus all)",
    802: "the system is not ready; on machines with NVSwitch start nvidia-fabricmanager",
    803: "the driver's kernel module and library differ; reboot, or reinstall the driver",
    804: "forward compatibility is not possible on this GPU; remove the cuda-compat package",
}


@dataclass(frozen=True)
class CudaDevice:
    """A GPU as the driver describes it."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    num_multiprocessors: int

    @property
    def supported(self) -> bool:
        return self.compute_capability >= MIN_COMPUTE_CAPABILITY


@dataclass(frozen=True)
class Problem:
    """Why something cannot be used, and how to mend it."""

    reason: str
    mend: str


@dataclass(frozen=True)
class DriverStatus:
    """cuda_version is the newest CUDA the driver runs, (12, 8) for example; None without driver."""

    installed: bool
    cuda_version: tuple[int, int] | None = None
    devices: tuple[CudaDevice, ...] = ()
    problem: Problem | None = None


@dataclass(frozen=True)
class CupyStatus:
    """The CuPy that `import cupy` gives, versions as (major, minor); None where unknown."""

    distributions: tuple[tuple[str, str], ...] = ()  # (name, version) of every installed one
    imported: bool = False
    runtime_version: tuple[int, int] | None = None
    nvrtc_version: tuple[int, int] | None = None
    cublas_loaded: bool = False
    problem: Problem | None = None


@dataclass(frozen=True)
class CudaStatus:
    """What `--device auto` decides by. Where not usable, `reason` and `mend` are filled."""

    usable: bool
    reason: str
    mend: str
    driver: DriverStatus
    cupy: CupyStatus | None  # None where the driver already settled it

    @property
    def devices(self) -> tuple[CudaDevice, ...]:
        return self.driver.devices

    def require(self) -> None:
        """Raise DeviceError with the reason and the mend unless usable."""
        if not self.usable:
            raise DeviceError(f"CUDA was asked for, but {self.reason}; {self.mend}")


def find_cuda() -> CudaStatus:
    """Whether the GPU can be used by this process; imports CuPy only where all else is in place."""
    driver = probe_driver()
    if driver.problem is not None:
        return CudaStatus(False, driver.problem.reason, driver.problem.mend, driver, None)
    cupy = probe_cupy(driver)
    if cupy.problem is not None:
        return CudaStatus(False, cupy.problem.reason, cupy.problem.mend, driver, cupy)
    return CudaStatus(True, "", "", driver, cupy)


def load_libcuda() -> Any:
    """The driver's library. Raises OSError where there is none."""
    if sys.platform == "win32":
        return ctypes.WinDLL("nvcuda.dll")
    return ctypes.CDLL("libcuda.so.1")


def probe_driver(load: Callable[[], Any] = load_libcuda) -> DriverStatus:
    """Ask the driver for its version and its GPUs, without making a context."""
    try:
        lib = load()
    except OSError:
        return DriverStatus(
            installed=False,
            problem=Problem(
                "there is no NVIDIA driver (libcuda is not found)",
                "install NVIDIA's driver, or use the CPU with --device cpu",
            ),
        )
    number = ctypes.c_int(0)
    version = None
    if lib.cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value > 0:
        version = _version(number.value)
    result = lib.cuInit(0)
    if result == 0:
        result = lib.cuDeviceGetCount(ctypes.byref(number))
    if result not in (0, _NO_DEVICE):
        reason = f"the NVIDIA driver does not start (CUDA error {result})"
        mend = _CU_INIT_MENDS.get(result, "check `nvidia-smi`; a reboot often helps")
        return DriverStatus(True, version, (), Problem(reason, mend))
    count = number.value if result == 0 else 0
    devices = tuple(_describe_device(lib, index) for index in range(count))
    return DriverStatus(True, version, devices, _driver_problem(version, devices))


def _driver_problem(
    version: tuple[int, int] | None, devices: tuple[CudaDevice, ...]
) -> Problem | None:
    if not devices:
        import os

        if "CUDA_VISIBLE_DEVICES" in os.environ:
            value = os.environ["CUDA_VISIBLE_DEVICES"]
            reason = f"the driver shows no GPU, as CUDA_VISIBLE_DEVICES is {value!r}"
            return Problem(reason, "unset CUDA_VISIBLE_DEVICES")
        return Problem("the driver shows no GPU", _CU_INIT_MENDS[_NO_DEVICE])
    if not any(device.supported for device in devices):
        has = ", ".join(f"{d.name} has {dotted(d.compute_capability)}" for d in devices)
        return Problem(
            f"no GPU has compute capability {dotted(MIN_COMPUTE_CAPABILITY)} or newer ({has})",
            "use the CPU with --device cpu",
        )
    if version is not None and version[0] < MIN_CUDA_MAJOR:
        return Problem(
            f"the driver runs CUDA {dotted(version)} at most",
            f"update NVIDIA's driver to one for CUDA {MIN_CUDA_MAJOR} or newer",
        )
    return None


def _describe_device(lib: Any, index: int) -> CudaDevice:
    device = ctypes.c_int(0)
    lib.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    lib.cuDeviceGetName(name, len(name), device)
    memory = ctypes.c_size_t(0)
    lib.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(which: int) -> int:
        value = ctypes.c_int(0)
        lib.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    return CudaDevice(
        index=index,
        name=name.value.decode("utf-8", "replace"),
        compute_capability=(
            attribute(_COMPUTE_CAPABILITY_MAJOR),
            attribute(_COMPUTE_CAPABILITY_MINOR),
        ),
        memory_bytes=memory.value,
        num_multiprocessors=attribute(_MULTIPROCESSORS),
    )


def cupy_distributions() -> tuple[tuple[str, str], ...]:
    """(name, version) of every installed distribution that provides the module cupy."""
    from importlib.metadata import distributions

    found: dict[str, str] = {}
    for distribution in distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name == "cupy" or name.startswith(("cupy-cuda", "cupy-rocm")):
            found.setdefault(name, distribution.version)
    return tuple(sorted(found.items()))


def probe_cupy(driver: DriverStatus | None = None) -> CupyStatus:
    """What CuPy is installed, and whether its libraries load and fit each other and the driver.

    Imports CuPy (half a second) where exactly one is installed. Works without a GPU.
    """
    installed = cupy_distributions()
    cuda_version = driver.cuda_version if driver else None
    if not installed:
        return CupyStatus(problem=Problem("CuPy is not installed", install_command(cuda_version)))
    if len(installed) > 1:
        names = " ".join(name for name, _ in installed)
        return CupyStatus(
            installed,
            problem=Problem(
                f"several CuPys are installed ({names}) and break each other",
                f"pip uninstall -y {names} && {install_command(cuda_version)}",
            ),
        )
    try:
        import cupy
    except Exception as exc:  # a broken package can raise anything while it is imported
        return CupyStatus(installed, problem=_import_problem(exc, installed[0][0], cuda_version))
    runtime = _try_version(cupy.cuda.runtime.runtimeGetVersion)
    nvrtc = _try_version(_nvrtc_version)
    cublas = _cublas_loads()
    status = CupyStatus(installed, True, runtime, nvrtc, cublas)
    problem = _cupy_problem(status, cuda_version)
    return CupyStatus(installed, True, runtime, nvrtc, cublas, problem)


def _import_problem(exc: Exception, name: str, cuda_version: tuple[int, int] | None) -> Problem:
    text = " ".join(f"{type(exc).__name__}: {exc}".split())[:300]
    if isinstance(exc, OSError):
        mend = "set CUPY_CACHE_DIR to a folder you can write to"
    else:
        mend = f"pip uninstall -y {name} && {install_command(cuda_version)}"
    return Problem(f"{name} cannot be imported ({text})", mend)


def _cupy_problem(status: CupyStatus, cuda_version: tuple[int, int] | None) -> Problem | None:
    name = status.distributions[0][0]
    runtime, nvrtc = status.runtime_version, status.nvrtc_version
    if runtime is None:
        return Problem(f"{name} finds no CUDA runtime library", install_command(cuda_version))
    wanted = INSTALL_BY_MAJOR.get(runtime[0], INSTALL)
    if cuda_version is not None and runtime[0] > cuda_version[0]:
        return Problem(
            f"{name} is for CUDA {runtime[0]}, the driver runs CUDA {dotted(cuda_version)} at most",
            f"update NVIDIA's driver, or pip uninstall -y {name} && "
            f"{install_command(cuda_version)}",
        )
    if nvrtc is None:
        return Problem("NVRTC, the kernel compiler, is not found", wanted)
    if nvrtc[0] != runtime[0]:
        return Problem(
            f"{name} is for CUDA {runtime[0]} but loads NVRTC {dotted(nvrtc)}",
            f"{wanted}, and take other CUDA versions out of LD_LIBRARY_PATH and CUDA_PATH",
        )
    if not status.cublas_loaded:
        return Problem("cuBLAS is not found", wanted)
    return None


def install_command(cuda_version: tuple[int, int] | None) -> str:
    """The command that installs a CuPy which the driver runs; CUDA 12 unless it cannot."""
    if cuda_version is not None and cuda_version[0] < MIN_CUDA_MAJOR:
        return f"update NVIDIA's driver, then {INSTALL}"
    return INSTALL


def dotted(version: tuple[int, int]) -> str:
    """(12, 8) as "12.8"."""
    return f"{version[0]}.{version[1]}"


def _nvrtc_version() -> tuple[int, int]:
    from cupy.cuda import nvrtc

    return nvrtc.getVersion()


def _cublas_loads() -> bool:
    """Whether the library is really there: CuPy's own module may load it only when used."""
    try:
        from cupy.cuda import cublas
    except Exception:
        return False
    try:
        cublas.getVersion(0)  # no handle: the library answers with an error of its own
    except Exception as exc:
        return type(exc).__name__ == "CUBLASError"
    return True


def _try_version(get: Callable[[], Any]) -> tuple[int, int] | None:
    try:
        value = get()
    except Exception:  # the library is missing, or not a version we know how to ask
        return None
    return _version(value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _version(number: int) -> tuple[int, int]:
    """CUDA's 12080 as (12, 8)."""
    return number // 1000, number % 1000 // 10
