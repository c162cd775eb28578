"""The driver's start in a thread: what is held when, and that whatever fails there is harmless."""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from nanocupy import LLM
from nanocupy.bench.model_file import write_random_model
from nanocupy.bench.shapes import SHAPES
from nanocupy.cuda import probe
from nanocupy.cuda.driver_start import DriverStart
from nanocupy.engine import backend
from nanocupy.engine.config import EngineConfig
from nanocupy.errors import CheckpointError, DeviceError
from tests.checkpoint.tiny import tiny_config


class FakeDriver:
    """libcuda with two GPUs. `fails`: the call that returns an error; `gate` is waited for before
    a context is made."""

    def __init__(self, fails: str = "", gate: threading.Event | None = None) -> None:
        self.fails, self.gate = fails, gate
        self.calls: list[str] = []
        self.contexts = [0, 0]

    def _called(self, name: str) -> int:
        self.calls.append(name)
        return 100 if name == self.fails else 0

    def cuInit(self, flags: int) -> int:
        return self._called("cuInit")

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return self._called("cuDeviceGet")

    def cuDevicePrimaryCtxRetain(self, out: Any, device: Any) -> int:
        if self.gate is not None:
            assert self.gate.wait(10)
        result = self._called("cuDevicePrimaryCtxRetain")
        self.contexts[device.value] += result == 0
        return result

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:
        self.contexts[device.value] -= 1
        return 0


def install(monkeypatch: pytest.MonkeyPatch, driver: Any) -> None:
    monkeypatch.setattr(probe, "load_libcuda", lambda: driver)


def num_threads() -> int:
    return sum(thread.name == "nanocupy-driver-start" for thread in threading.enumerate())


def test_the_context_is_made_beside_the_rest_and_let_go_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = FakeDriver(gate=threading.Event())
    install(monkeypatch, driver)
    with DriverStart(1) as start:
        assert driver.contexts == [0, 0]  # the body runs while the context is made
        assert num_threads() == 1
        driver.gate.set()
        start._thread.join()
        assert driver.contexts == [0, 1]
    assert driver.contexts == [0, 0]
    assert num_threads() == 0


def test_an_error_of_the_body_waits_for_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(gate=threading.Event())
    install(monkeypatch, driver)
    threading.Timer(0.05, driver.gate.set).start()
    with pytest.raises(KeyError), DriverStart():
        raise KeyError
    assert driver.calls[-1] == "cuDevicePrimaryCtxRetain"
    assert driver.contexts == [0, 0]
    assert num_threads() == 0


@pytest.mark.parametrize("fails", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_what_fails_is_left_to_others(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(fails)
    install(monkeypatch, driver)
    with DriverStart():
        pass
    assert driver.calls[-1] == fails
    assert driver.contexts == [0, 0]


def test_no_driver_and_one_without_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> object:
        raise OSError("libcuda.so.1: cannot open shared object file")

    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    for load in (missing, object):
        monkeypatch.setattr(probe, "load_libcuda", load)
        with DriverStart():
            pass
    assert not failed


def test_who_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    for found, device, starts in (
        (True, "auto", True), (True, "cuda", True), (True, "cpu", False), (None, "auto", False),
        (None, "cuda", False),
    ):  # fmt: skip
        monkeypatch.setattr(backend, "find_spec", lambda name, found=found: found)
        manager = backend.starting_driver(EngineConfig(device=device))
        assert isinstance(manager, DriverStart if starts else nullcontext)


def test_a_gpu_that_cannot_be_used_is_told_as_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = FakeDriver()
    install(monkeypatch, driver)
    monkeypatch.setattr(backend, "find_spec", lambda name: True)
    problem = probe.Problem("the driver runs CUDA 11.4 at most", "update NVIDIA's driver")
    status = probe.DriverStatus(True, (11, 4), (), problem)
    monkeypatch.setattr(probe, "probe_driver", lambda: status)
    path = tmp_path / "tiny.nano"
    monkeypatch.setitem(SHAPES, "smollm2-135m", tiny_config(vocab_size=300, tied_lm_head=True))
    write_random_model("smollm2-135m", "float32", path)
    with pytest.raises(DeviceError) as raised:
        LLM(path, device="cuda")
    says = "CUDA was asked for, but the driver runs CUDA 11.4 at most; update NVIDIA's driver"
    assert str(raised.value) == says
    assert driver.contexts == [0, 0]
    assert LLM(path).device == "cpu"
    assert driver.contexts == [0, 0]
    assert driver.calls.count("cuDevicePrimaryCtxRetain") == 2


def test_a_model_that_cannot_be_opened_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = FakeDriver()
    install(monkeypatch, driver)
    monkeypatch.setattr(backend, "find_spec", lambda name: True)
    (tmp_path / "x.nano").write_bytes(b"no model")
    with pytest.raises(CheckpointError):
        LLM(tmp_path / "x.nano")
    assert driver.calls.count("cuDevicePrimaryCtxRetain") == 1
    assert driver.contexts == [0, 0]
    assert num_threads() == 0
