"""Builds a kernel file with g++ into a library that runs on the CPU, cached by content.

Owns the compiler's command line and the cache; knows nothing of arrays or launches.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SHIM = Path(__file__).parent
KERNELS = SHIM.parents[1] / "kernels_cu"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti",
         "-fstack-clash-protection", "-ffp-contract=off", "-fno-strict-aliasing", "-w")  # fmt: skip
MISSING = "g++ is not installed, so the kernels cannot be run on the CPU (Debian: apt install g++)"

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(
    r'extern\s+"C"\s+__global__\s+(?:void\s+)?(?:__launch_bounds__\s*\([^)]*\)\s*)?(?:void\s+)?'
    r"(\w+)\s*\("
)


class BuildError(Exception):
    """g++ refused the source; the message is what it said."""


def compiler() -> str | None:
    """The path of g++, None where there is none."""
    return shutil.which("g++")


def entries(source: str) -> list[str]:
    """Names of the kernels of a source text, in its order: all are built, under any macros."""
    return _ENTRY.findall(_COMMENT.sub(" ", source))


@functools.cache
def _common_text() -> str:
    version = subprocess.run(
        [compiler(), "-dumpfullversion", "-dumpmachine"], capture_output=True, text=True, check=True
    ).stdout
    headers = sorted([*KERNELS.glob("*.cuh"), *SHIM.glob("*.h")])
    return version + " ".join(FLAGS) + "".join(path.read_text() for path in headers)


def cache_folder() -> Path:
    """A folder that only this user can write: what lies in it is loaded as code."""
    named = os.environ.get("NANOCUPY_HOST_KERNELS")
    folder = Path(named or Path(tempfile.gettempdir()) / f"nanocupy-host-kernels-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(f"{folder}: not this user's alone; remove it, or name another folder")
    return folder


def build(source: str, macros: dict[str, int], includes: tuple[Path, ...] = ()) -> Path:
    """The library of `source` under `macros`. Raises BuildError with the compiler's first lines."""
    defines = [f"-D{name}={value}" for name, value in sorted(macros.items())]
    text = "\0".join([_common_text(), source, *defines])
    folder = cache_folder()
    library = folder / (hashlib.sha256(text.encode()).hexdigest()[:32] + ".so")
    if library.exists():
        return library
    # In an unnamed namespace no function of one library can stand in for another's.
    unit = "\n".join(
        ["#define HOST_SHIM 1", '#include "host_cuda.h"', "namespace {", source, "}"]
        + [f"SHIM_ENTRY({name})" for name in entries(source)]
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "kernel.so"
        folders = [f"-I{path}" for path in (SHIM, KERNELS, *includes)]
        done = subprocess.run(
            [compiler(), *FLAGS, *defines, *folders, "-x", "c++", "-", "-o", str(made)],
            input=unit, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise BuildError("\n".join(done.stderr.splitlines()[:25]))
        made.replace(library)
    return library
