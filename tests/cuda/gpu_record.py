"""Pytest plugin of the GPU tests: why they are skipped, and the record of a run.

After `pytest -m gpu` over the whole suite, tests/gpu_record.json tells what ran where, on which
sources, and the worst error of each op. A run of a part leaves that file alone, unless
NANOCUPY_GPU_RECORD names another one to write. Tests that need the GPU alone skip where others run
beside them; with NANOCUPY_GPU_RECORD_ADD=1 a second run, of them by themselves, is added to the
record that NANOCUPY_GPU_RECORD names.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

# What the driver says is free is of the whole device, so other tests beside these would show in it.
alone_on_the_device = pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="tests run side by side; it needs the GPU alone"
)
ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "gpu_record.json"
_ERROR = "worst_error"


@cache
def why_no_gpu() -> str | None:
    """What keeps the GPU tests from running, in a line; None where they can."""
    from nanocupy.cuda.probe import find_cuda

    status = find_cuda()
    return None if status.usable else f"no usable GPU: {status.reason}; {status.mend}"


@pytest.fixture
def record_error(request: pytest.FixtureRequest) -> Callable[[str, str, float], None]:
    """record_error(op, dtype, error): the worst of each op and dtype goes to the record."""

    def record(op: str, dtype: Any, error: float) -> None:
        assert math.isfinite(error), f"{op} in {dtype}: an error of {error}"
        request.node.user_properties.append((_ERROR, [op, str(dtype), float(error)]))

    return record


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and (reason := why_no_gpu()) is not None:
        pytest.skip(reason)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Engines refer to themselves: without this, their memory would wait for Python's own time."""
    if item.get_closest_marker("gpu") is not None:
        gc.collect()


class Recorder:
    """Counts outcomes and collects errors; writes the record when all is done."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.outcomes: Counter[str] = Counter()
        self.worst: dict[str, dict[str, float]] = {}
        self.written: Path | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcomes["failed"] += 1  # also where only setup or teardown failed
        elif report.skipped:
            self.outcomes["skipped"] += 1
        elif report.when == "call":
            self.outcomes["passed"] += 1
        if report.when == "teardown":  # by then all is measured
            for name, value in report.user_properties:
                if name == _ERROR:
                    op, dtype, error = value
                    of_op = self.worst.setdefault(op, {})
                    of_op[dtype] = max(error, of_op.get(dtype, 0.0))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        path = record_path(self.config)
        if path is None or not self.outcomes["passed"] + self.outcomes["failed"]:
            return
        if why_no_gpu() is not None:
            return
        record = {
            **machine(),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "sources_sha256": sources_hash(),
            **{name: self.outcomes[name] for name in ("passed", "failed", "skipped")},
            _ERROR: {op: dict(sorted(of.items())) for op, of in sorted(self.worst.items())},
        }
        if os.environ.get("NANOCUPY_GPU_RECORD_ADD") and path.exists():
            record = joined(json.loads(path.read_text("utf-8")), record)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self.written = path

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.written is not None:
            terminalreporter.write_line(f"the record of the GPU tests is in {self.written}")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config), "gpu-recorder")


def joined(before: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """One record of two runs: the second ran some of what the first had to skip."""
    if before["sources_sha256"] != record["sources_sha256"]:
        raise pytest.UsageError("NANOCUPY_GPU_RECORD_ADD: the record there is of other sources")
    both = {name: before[name] + record[name] for name in ("passed", "failed")}
    worst = {op: dict(of) for op, of in before[_ERROR].items()}
    for op, of in record[_ERROR].items():
        for dtype, error in of.items():
            worst.setdefault(op, {})[dtype] = max(error, worst.get(op, {}).get(dtype, 0.0))
    skipped = before["skipped"] - record["passed"] - record["failed"]
    return {**record, **both, "skipped": skipped, _ERROR: worst}


def record_path(config: pytest.Config) -> Path | None:
    """Where to write the record; None for a run of a part of the GPU tests."""
    named = os.environ.get("NANOCUPY_GPU_RECORD")
    if named:
        return Path(named)
    option = config.option
    part = option.keyword or getattr(option, "lf", False) or getattr(option, "deselect", None)
    places = {Path(config.invocation_params.dir, str(arg)).resolve() for arg in config.args}
    return None if part or not places <= {ROOT, ROOT / "tests"} else RECORD


def machine() -> dict[str, str]:
    """Names and versions of what the tests ran on."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return {"device": name, "driver": driver_version(), "cupy": cupy.__version__}


def driver_version() -> str:
    """NVIDIA's own number ("580.95.05"), or else the CUDA version it is for."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() == 0:
            status = library.nvmlSystemGetDriverVersion(text, len(text))
            library.nvmlShutdown()
            if status == 0:
                return text.value.decode()
    except (OSError, AttributeError):
        pass
    import cupy

    number = cupy.cuda.runtime.driverGetVersion()
    return f"CUDA {number // 1000}.{number % 1000 // 10}"


def sources_hash() -> str:
    spec = spec_from_file_location("gpu_hash", ROOT / "scripts" / "gpu_hash.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.gpu_hash(ROOT)
