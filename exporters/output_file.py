"""Files that appear whole or not at all, and never over their own source.

Owns the temporary file, fsync, rename and clean-up. Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from nanocupy.checkpoint.base import Checkpoint
from nanocupy.errors import CheckpointError


@contextlib.contextmanager
def output_file(out: Path, checkpoint: Checkpoint) -> Iterator[BinaryIO]:
    """A binary file to write and seek in, which takes the name `out` when the block ends well.

    Until then it is a hidden file beside `out`, removed on any failure, Ctrl-C and (where the
    signal raises, as in the command line) SIGTERM; an older file of that name is left alone. Data,
    then name, are forced to disk. Raises CheckpointError where `out` is part of `checkpoint`'s own
    files or no place for a file, and where writing fails (a full disk).
    """
    out = Path(out)
    try:
        _check_target(out, checkpoint)
    except OSError as exc:
        raise CheckpointError(f"{out}: cannot be written: {exc.strerror or exc}") from exc
    # Cut, so that a name as long as the disk allows has a temporary one, too.
    temporary = out.with_name(f".{out.name[:40]}.{secrets.token_hex(4)}.partial")
    try:
        # Not `tempfile`: the result shall have the permissions that the user's umask gives.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "r+b", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, out)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(out.parent)
    except OSError as exc:
        raise CheckpointError(
            f"{out}: cannot be written: {exc.strerror or exc}; nothing was left behind"
        ) from exc


def _check_target(out: Path, checkpoint: Checkpoint) -> None:
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: there is no folder {out.parent}; make it first")
    if not out.exists():
        return
    if not out.is_file():
        raise CheckpointError(f"{out}: exists and is not a regular file; name a file to write")
    source = checkpoint.path
    sources = [source]
    if source.is_dir():
        sources = [child for child in source.iterdir() if child != out or not _is_ours(out)]
    # Where a tokenizer was named on its own, it is a source as well.
    tokenizer_path = getattr(checkpoint, "tokenizer_path", None)
    if tokenizer_path is not None:
        sources.append(tokenizer_path)
    for path in sources:
        if path.exists() and path.samefile(out):
            raise CheckpointError(
                f"{out}: is what would be exported ({path}); write to another name"
            )


def _is_ours(path: Path) -> bool:
    """Whether `path` is an earlier export, which may lie in the source's folder."""
    from nanocupy.checkpoint.nanoinfer2 import MAGIC

    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _sync_folder(folder: Path) -> None:
    # The rename itself is only on disk when the folder is; not every file system can do it.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
