"""Prints the SHA-256 over every source that the GPU path depends on.

The record of a GPU test run carries this hash, so that a change of kernels or of what drives them
without a new run is seen. It depends on the files' names and contents alone: not on time stamps,
line order of a listing, or what else lies in the folders.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels_cu", "nanocupy/cuda", "nanocupy/ops", "nanocupy/model")
PATTERNS = (  # of the engine, what drives the device
    "nanocupy/engine/device_*", "nanocupy/engine/runner*", "nanocupy/engine/decode_state*",
    "nanocupy/engine/step_*",
)  # fmt: skip
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".hpp")


def gpu_sources(root: Path = ROOT) -> list[Path]:
    """Every source file of the GPU path, sorted by its POSIX path below `root`."""
    starts = [root / folder for folder in FOLDERS]
    starts += [match for pattern in PATTERNS for match in root.glob(pattern)]
    found = {start for start in starts if start.is_file()}
    found.update(path for start in starts for path in start.rglob("*") if path.is_file())
    sources = [path for path in found if path.suffix in SUFFIXES]
    return sorted(sources, key=lambda path: path.relative_to(root).as_posix())


def gpu_hash(root: Path = ROOT) -> str:
    """SHA-256, in hex, over (name, length, content) of `gpu_sources`; line ends count as LF."""
    digest = hashlib.sha256()
    for path in gpu_sources(root):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        name = path.relative_to(root).as_posix()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


if __name__ == "__main__":
    if "--list" in sys.argv[1:]:
        print("\n".join(path.relative_to(ROOT).as_posix() for path in gpu_sources()))
    else:
        print(gpu_hash())
