"""The cache folder: where it is, who may write a model in it now, and how one appears whole.

It knows folders and locks, nothing of hubs or models.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nanocupy.errors import CapacityError, ConfigError
from nanocupy.progress import human_bytes, say

_SCRATCH = ".scratch-"


def cache_dir() -> Path:
    """$NANOCUPY_CACHE_DIR, else $XDG_CACHE_HOME/nanocupy, else ~/.cache/nanocupy. Not created."""
    own = os.environ.get("NANOCUPY_CACHE_DIR")
    if own:
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg and os.path.isabs(xdg):  # the XDG specification: a relative value is to be ignored
        return Path(xdg) / "nanocupy"
    try:
        return Path.home() / ".cache" / "nanocupy"
    except RuntimeError:
        raise ConfigError(
            "no home folder is known to keep models in; set NANOCUPY_CACHE_DIR to a folder"
        ) from None


def make_folder(path: Path) -> Path:
    """Create `path` and its parents. Raises ConfigError where that is not allowed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(
            f"cache folder {path} cannot be made: {exc.strerror}; set NANOCUPY_CACHE_DIR to a "
            "folder you can write to"
        ) from exc
    return path


@contextmanager
def model_lock(name: str, *, progress: bool = True) -> Iterator[None]:
    """Hold the only right to write the model `name` in the cache, waiting for it if need be.

    The lock is the kernel's: it vanishes with its process, however that ends. Where the file system
    has no locks, two fetches of one model do the work twice and the last rename wins.
    """
    path = make_folder(cache_dir() / "locks") / (name.replace("/", "--") + ".lock")
    try:
        file = path.open("ab")
    except OSError as exc:
        raise ConfigError(
            f"cache folder: {path} cannot be written: {exc.strerror}; set NANOCUPY_CACHE_DIR to a "
            "folder you can write to"
        ) from exc
    with file:
        try:
            import fcntl
        except ImportError:
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is fetching {name}", progress)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as exc:
            if exc.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A temporary folder in `parent`, hence on the disk of the final file; call under the lock of
    `name`. Also removes what a killed fetch of the same name left there."""
    prefix = f"{_SCRATCH}{name}-"
    for left_over in make_folder(parent).glob(f"{prefix}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise CapacityError unless `folder`'s disk has room for `needed_bytes`."""
    with suppress(OSError):
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < needed_bytes:
            raise CapacityError(
                f"{what} needs {human_bytes(needed_bytes)} in {folder}, its disk has "
                f"{human_bytes(free_bytes)} free; make room, or set NANOCUPY_CACHE_DIR to a folder "
                "on another disk"
            )
