"""The record of the GPU tests: what is counted, and when the file is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cuda import gpu_record
from tests.cuda.gpu_record import RECORD, ROOT, Recorder, record_path


def config(args: tuple[str, ...] = ("tests",), **options: Any) -> Any:
    option = SimpleNamespace(keyword="", lf=False, deselect=None, **options)
    return SimpleNamespace(
        args=list(args), option=option, invocation_params=SimpleNamespace(dir=ROOT)
    )


def report(when: str, outcome: str, *errors: Any) -> Any:
    flags = {name: outcome == name for name in ("passed", "failed", "skipped")}
    return SimpleNamespace(
        when=when, user_properties=[("worst_error", list(e)) for e in errors], **flags
    )


def test_the_record_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    monkeypatch.setenv("NANOCUPY_GPU_RECORD", str(path))
    machine = {"device": "Some GPU", "driver": "580.1", "cupy": "14.2.0"}
    monkeypatch.setattr(gpu_record, "machine", lambda: machine)
    monkeypatch.setattr(gpu_record, "why_no_gpu", lambda: None)
    recorder = Recorder(config())
    session: Any = None
    recorder.pytest_sessionfinish(session)
    assert not path.exists()  # nothing ran
    for each in (
        report("setup", "passed"),
        report("call", "passed", ("matmul", "float32", 5.0)),  # not all is measured yet
        report("teardown", "passed", ("matmul", "float32", 1e-7), ("matmul", "float16", 1e-3)),
        report("call", "passed"),
        report("teardown", "passed", ("matmul", "float32", 3e-7), ("embed", "float32", 0.0)),
        report("call", "failed"),
        report("teardown", "passed", ("matmul", "float32", 2e-7)),
        report("setup", "failed"),
        report("setup", "skipped"),
    ):
        recorder.pytest_runtest_logreport(each)
    recorder.pytest_sessionfinish(session)
    record = json.loads(path.read_text())
    assert list(record) == [
        "device", "driver", "cupy", "date", "sources_sha256", "passed", "failed", "skipped",
        "worst_error",
    ]  # fmt: skip
    assert record["worst_error"] == {
        "embed": {"float32": 0.0}, "matmul": {"float16": 1e-3, "float32": 3e-7},
    }  # fmt: skip
    assert (record["passed"], record["failed"], record["skipped"]) == (2, 2, 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", record["date"])
    assert re.fullmatch(r"[0-9a-f]{64}", record["sources_sha256"])


def test_a_part_of_the_tests_leaves_the_record_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCUPY_GPU_RECORD", raising=False)
    assert record_path(config()) == RECORD
    assert record_path(config((str(ROOT),))) == RECORD
    assert record_path(config(("tests/cuda",))) is None
    chosen = config()
    chosen.option.keyword = "matmul"
    assert record_path(chosen) is None
