"""Finds out what kind of checkpoint a path is, and opens it with that kind's reader."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from nanocupy.checkpoint.base import Checkpoint
from nanocupy.config import RopeScaling
from nanocupy.errors import CheckpointError, ConfigError


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    legacy_format: str | None = None,
    legacy_kind: str | None = None,
    rope_scaling: RopeScaling | str | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Open a NanoInfer file (legacy or 2), a Hugging Face folder, or a GGUF file.

    The kind is told by content, never by the file's name. For legacy NanoInfer files, which carry
    so little: `legacy_format` ("A", "B", "C" or "D") settles a tie between layouts, `legacy_kind`
    ("llama2", "llama3" or "qwen3") names the family whose rotary base, epsilon and ids apply,
    `rope_scaling` replaces the family's ("none", "linear:FACTOR" or "llama3:FACTOR"), and
    `tokenizer_path` is the tokenizer's file (SentencePiece .model, .tiktoken or tokenizer.json).

    Raises CheckpointError (a broken, hostile or unsupported file), ConfigError, TokenizerError.
    """
    path = Path(path)
    of_legacy = {
        "--format (legacy_format)": legacy_format,
        "--kind (legacy_kind)": legacy_kind,
        "--rope-scaling (rope_scaling)": rope_scaling,
        "--tokenizer (tokenizer_path)": tokenizer_path,
    }
    given = [name for name, value in of_legacy.items() if value is not None]
    reader = _reader(path)
    if reader is None:
        from nanocupy.checkpoint.legacy_layouts import parse_rope_scaling
        from nanocupy.checkpoint.nanoinfer_legacy import LegacyCheckpoint

        if isinstance(rope_scaling, str):
            rope_scaling = parse_rope_scaling(rope_scaling)
        checkpoint = LegacyCheckpoint(
            path, layout=legacy_format, kind=legacy_kind, tokenizer_path=tokenizer_path
        )
        if rope_scaling is not None:
            checkpoint.config = checkpoint.config.with_(rope_scaling=rope_scaling)
        return checkpoint
    if given:
        raise ConfigError(
            f"{given[0]} is for a legacy NanoInfer file; {path} is not one and says this itself; "
            "leave it out"
        )
    return reader(path)


def _reader(path: Path) -> Callable[[Path], Checkpoint] | None:
    """The reader of what `path` holds; None for what can only be a legacy NanoInfer file."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            from nanocupy.checkpoint.huggingface import HuggingFaceCheckpoint

            return HuggingFaceCheckpoint
        if not stat.S_ISREG(mode):  # reading a pipe or a device could wait for ever
            raise CheckpointError(f"{path}: not a file or a folder")
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file or folder") from None
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror}") from exc
    magic = head[:8]
    if magic[:4] == b"GGUF":
        from nanocupy.checkpoint.gguf import GGUFCheckpoint

        return GGUFCheckpoint

    from nanocupy.checkpoint.nanoinfer2 import MAGIC, NanoInfer2Checkpoint

    if magic == MAGIC:
        return NanoInfer2Checkpoint
    if head[8:] == b"{" and int.from_bytes(magic, "little") < path.stat().st_size:
        raise CheckpointError(
            f"{path}: a safetensors file alone has no config; give the folder it lies in"
        )
    return None
