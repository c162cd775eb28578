"""The CUDA probe against drivers that never were, and what the doctor makes of machines."""

from __future__ import annotations

import ctypes
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nanocupy import cli
from nanocupy.cli import doctor, machine
from nanocupy.cuda import probe
from nanocupy.errors import DeviceError


@dataclass
class FakeLibcuda:
    """The driver calls the probe makes, answering from plain fields. A device: (name, compute
    capability, bytes)."""

    version: int = 12080
    init: int = 0
    devices: list[tuple[str, tuple[int, int], int]] = field(default_factory=list)

    def cuDriverGetVersion(self, out: object) -> int:
        out._obj.value = self.version  # type: ignore[attr-defined]
        return 0

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, out: object) -> int:
        out._obj.value = len(self.devices)  # type: ignore[attr-defined]
        return 0

    def cuDeviceGet(self, out: object, index: int) -> int:
        out._obj.value = index  # type: ignore[attr-defined]
        return 0

    def cuDeviceGetName(self, name: ctypes.Array, size: int, device: ctypes.c_int) -> int:
        name.value = self.devices[device.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, out: object, device: ctypes.c_int) -> int:
        out._obj.value = self.devices[device.value][2]  # type: ignore[attr-defined]
        return 0

    def cuDeviceGetAttribute(self, out: object, which: int, device: ctypes.c_int) -> int:
        capability = self.devices[device.value][1]
        values = {75: capability[0], 76: capability[1], 16: 132}  # as cuda.h numbers them
        out._obj.value = values[which]  # type: ignore[attr-defined]
        return 0


H100 = ("NVIDIA H100", (9, 0), 80 << 30)
P100 = ("Tesla P100", (6, 0), 16 << 30)


def no_library() -> object:
    raise OSError("libcuda.so.1: cannot open shared object file")


def fake_cupy(
    monkeypatch: pytest.MonkeyPatch,
    *distributions: str,
    runtime: int = 12090,
    nvrtc: tuple[int, int] = (12, 9),
    cublas: bool = True,
    fails: Exception | None = None,
) -> None:
    """Installs a CuPy of that description for the length of a test."""
    monkeypatch.setattr(
        probe, "cupy_distributions", lambda: tuple((name, "14.2.0") for name in distributions)
    )
    for name in [m for m in sys.modules if m.split(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    package, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    cuda.runtime = types.SimpleNamespace(runtimeGetVersion=lambda: runtime)  # type: ignore[attr-defined]
    cuda.nvrtc = types.SimpleNamespace(getVersion=lambda: nvrtc)  # type: ignore[attr-defined]
    if cublas:
        cuda.cublas = types.SimpleNamespace(getVersion=lambda handle: 120901)  # type: ignore[attr-defined]
    package.cuda = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setitem(sys.modules, "cupy", package)
    if fails is not None:

        class Finder:
            @staticmethod
            def find_spec(name: str, path: object = None, target: object = None) -> None:
                if name == "cupy":
                    raise fails

        monkeypatch.delitem(sys.modules, "cupy")
        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch):
    """Gives a function that puts a driver (None: no driver) into the machine."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(lib: FakeLibcuda | None) -> None:
        real = probe.probe_driver
        load = no_library if lib is None else lambda: lib
        for module in (probe, doctor):
            monkeypatch.setattr(module, "probe_driver", lambda: real(load))

    return install


def test_no_driver(driver) -> None:
    driver(None)
    status = probe.find_cuda()
    assert not status.usable
    assert "no NVIDIA driver" in status.reason
    assert status.cupy is None
    with pytest.raises(DeviceError, match="--device cpu"):
        status.require()


def test_reads_what_the_driver_says(driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(FakeLibcuda(devices=[P100, H100]))
    fake_cupy(monkeypatch, "cupy-cuda12x")
    status = probe.find_cuda()
    assert status.usable
    status.require()
    assert status.driver.cuda_version == (12, 8)
    assert [d.name for d in status.devices] == ["Tesla P100", "NVIDIA H100"]
    assert [d.supported for d in status.devices] == [False, True]
    assert status.devices[1] == probe.CudaDevice(1, "NVIDIA H100", (9, 0), 80 << 30, 132)


@pytest.mark.parametrize(
    ("lib", "reason", "mend"),
    [
        (FakeLibcuda(init=100), "shows no GPU", "nvidia-smi"),
        (FakeLibcuda(), "shows no GPU", "nvidia-smi"),
        (FakeLibcuda(init=803, devices=[H100]), "CUDA error 803", "reboot"),
        (FakeLibcuda(init=999, devices=[H100]), "CUDA error 999", "nvidia-smi"),
        (FakeLibcuda(devices=[P100]), "Tesla P100 has 6.0", "--device cpu"),
        (FakeLibcuda(version=11040, devices=[H100]), "CUDA 11.4 at most", "update"),
    ],
)
def test_drivers_that_do_not_do(driver, lib: FakeLibcuda, reason: str, mend: str) -> None:
    driver(lib)
    status = probe.find_cuda()
    assert not status.usable
    assert reason in status.reason
    assert mend in status.mend


def test_hidden_gpus_are_named(driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(FakeLibcuda(init=100))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert probe.find_cuda().mend == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("names", "options", "reason", "mend"),
    [
        ((), {}, "CuPy is not installed", "pip install 'nanocupy[cuda12]'"),
        (
            ("cupy", "cupy-cuda12x"),
            {},
            "several CuPys",
            "pip uninstall -y cupy cupy-cuda12x && pip",
        ),
        (("cupy-cuda13x",), {"runtime": 13000}, "is for CUDA 13", "nanocupy[cuda12]"),
        (("cupy-cuda12x",), {"nvrtc": (11, 8)}, "loads NVRTC 11.8", "CUDA_PATH"),
        (("cupy-cuda12x",), {"cublas": False}, "cuBLAS is not found", "nanocupy[cuda12]"),
        (
            ("cupy-cuda12x",),
            {"fails": ImportError("no\nlib")},
            "(ImportError: no lib)",
            "uninstall",
        ),
        (("cupy-cuda12x",), {"fails": OSError("read-only")}, "OSError", "CUPY_CACHE_DIR"),
    ],
)
def test_cupys_that_do_not_do(
    driver, monkeypatch: pytest.MonkeyPatch, names, options, reason: str, mend: str
) -> None:
    driver(FakeLibcuda(devices=[H100]))
    fake_cupy(monkeypatch, *names, **options)
    status = probe.find_cuda()
    assert not status.usable
    assert reason in status.reason
    assert mend in status.mend


def run_doctor(capfd: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    code = cli.main(["doctor", "--json"])
    report = json.loads(capfd.readouterr().out)
    assert report["ok"] is (code == 0)
    return code, {f["name"]: f for f in report["findings"]}


@pytest.fixture
def plain_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOCUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "kernel_driver", lambda: None)


@pytest.mark.usefixtures("plain_machine")
def test_a_machine_without_a_gpu_is_coherent(driver, monkeypatch, capfd) -> None:
    driver(None)
    fake_cupy(monkeypatch)
    code, findings = run_doctor(capfd)
    assert code == 0
    assert findings["driver"]["state"] == findings["cupy"]["state"] == "missing"
    assert findings["packages"]["state"] == "ok"
    assert "numpy" in findings["packages"]["detail"]
    assert not (Path(findings["cache"]["detail"])).exists()  # looking makes no folders


@pytest.mark.usefixtures("plain_machine")
def test_a_gpu_without_cupy_gets_the_command(driver, monkeypatch, capfd) -> None:
    driver(FakeLibcuda(devices=[H100]))
    fake_cupy(monkeypatch)
    code, findings = run_doctor(capfd)
    assert code == 0
    assert findings["gpu 0"]["detail"].startswith("NVIDIA H100, compute capability 9.0, 80 GiB")
    assert findings["cupy"]["mend"] == "pip install 'nanocupy[cuda12]'"


@pytest.mark.usefixtures("plain_machine")
def test_two_cupys_are_broken(driver, monkeypatch, capfd) -> None:
    driver(FakeLibcuda(devices=[H100]))
    fake_cupy(monkeypatch, "cupy-cuda12x", "cupy-cuda13x")
    code, findings = run_doctor(capfd)
    assert code == 1
    assert findings["cupy"]["state"] == "broken"
    assert cli.main(["doctor"]) == 1
    assert "pip uninstall -y cupy-cuda12x" in " ".join(capfd.readouterr().out.split())


@pytest.mark.usefixtures("plain_machine")
def test_a_cache_that_cannot_be_written_is_broken(driver, monkeypatch, capfd, tmp_path) -> None:
    driver(None)
    fake_cupy(monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCUPY_CACHE_DIR", str(tmp_path / "file" / "below"))
    code, findings = run_doctor(capfd)
    assert code == 1
    assert findings["cache"]["state"] == "broken"


def test_the_machine_is_described_by_facts() -> None:
    assert machine.num_cpus() >= 1
    memory = machine.memory_bytes()
    assert memory is None or 0 <= memory[1] <= memory[0]
    threads = machine.blas_threads()
    assert threads is None or threads >= 1
    assert machine.can_write(Path("/proc/nowhere")) is not None


@pytest.mark.gpu
def test_the_probe_on_a_real_gpu() -> None:
    status = probe.find_cuda()
    assert status.usable, f"{status.reason}; {status.mend}"
    assert status.cupy is not None
    assert status.cupy.nvrtc_version is not None
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    device = status.devices[0]
    assert device.name == properties["name"].decode()
    assert device.compute_capability == (properties["major"], properties["minor"])
    assert device.memory_bytes == properties["totalGlobalMem"]
    assert device.num_multiprocessors == properties["multiProcessorCount"]
