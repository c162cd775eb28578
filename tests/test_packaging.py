"""What a user installs: the wheel holds every tracked source, under one name, and runs."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import nanocupy

ROOT = Path(__file__).resolve().parents[1]
SOURCE_SUFFIXES = (".py", ".cu", ".cuh", ".html")


def tracked_files() -> list[str]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def packaged_name(tracked: str) -> str | None:
    """Where a tracked file lies in the wheel; None where it does not belong there."""
    top, _, rest = tracked.partition("/")
    if not tracked.endswith(SOURCE_SUFFIXES) or not rest:
        return None
    if top == "nanocupy":
        return tracked
    return f"nanocupy/{tracked}" if top in ("exporters", "kernels_cu") else None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tracked files alone, as a fresh clone would give it."""
    for module in ("setuptools", "wheel"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed; `pip install -e '.[dev]'` brings it")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in tracked_files():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--disable-pip-version-check", "--wheel-dir", str(out), str(checkout)],
        check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_what_is_tracked_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"nanocupy-{nanocupy.__version__}.dist-info/"
    assert {name.split("/")[0] for name in names} == {"nanocupy", info.rstrip("/")}
    expected = {packaged_name(name) for name in tracked_files()} - {None}
    assert {name for name in names if not name.startswith(info)} == expected
    assert "nanocupy/exporters/__init__.py" in expected
    assert "nanocupy/kernels_cu/__init__.py" in expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_metadata_is_what_users_rely_on(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"nanocupy-{nanocupy.__version__}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert metadata["Version"] == nanocupy.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = set(metadata.get_all("Provides-Extra", []))
    assert {"cuda12", "cuda13", "dev", "bench"} <= extras
    base = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert not any(r.startswith(("torch", "cupy", "transformers")) for r in base)
    assert archive.read(f"{info}/entry_points.txt").split() == [
        b"[console_scripts]", b"nanocupy", b"=", b"nanocupy.cli:main",
    ]  # fmt: skip


def test_the_installed_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own: only `nanocupy` appears, and every part is importable."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    installed = {p.name for p in site.iterdir()} - {"__pycache__"}
    assert installed == {"nanocupy", f"nanocupy-{nanocupy.__version__}.dist-info"}

    # The dependencies come from the environment that runs the tests, the package does not.
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    for path in {Path(find_spec(name).origin).parent for name in ("click", "numpy")}:  # type: ignore[union-attr,arg-type]
        (dependencies / path.name).symlink_to(path)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(dependencies), "HOME": str(tmp_path)}
    program = tmp_path / "env" / "bin" / "nanocupy"
    shown = subprocess.run([program, "--help"], capture_output=True, text=True, cwd="/", env=env)
    assert shown.returncode == 0, shown.stderr
    assert "generate" in shown.stdout
    code = (
        "import nanocupy, nanocupy.exporters, nanocupy.kernels_cu, nanocupy.hub;"
        "from importlib.resources import files;"
        "print(nanocupy.__file__, files('nanocupy.kernels_cu').is_dir())"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/", env=env)
    assert found.stdout.split() == [str(site / "nanocupy" / "__init__.py"), "True"], found.stderr
