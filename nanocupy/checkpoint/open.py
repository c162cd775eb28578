"""Finds out what kind of checkpoint a path is, and opens it with that kind's reader."""

from __future__ import annotations

import os
from pathlib import Path

from nanocupy.checkpoint.base import Checkpoint
from nanocupy.errors import CheckpointError


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    legacy_format: str | None = None,
    legacy_kind: str | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Open a NanoInfer file (legacy or 2), a Hugging Face folder, or a GGUF file.

    The kind is told by content, never by the file's name. For legacy NanoInfer files, which carry
    so little: `legacy_format` ("A", "B", "C" or "D") settles a tie between layouts, `legacy_kind`
    ("llama2", "llama3" or "qwen3") names the family whose rotary base, epsilon and ids apply, and
    `tokenizer_path` is the tokenizer's file (SentencePiece .model, .tiktoken or tokenizer.json).

    Raises CheckpointError (a broken, hostile or unsupported file), ConfigError, TokenizerError.
    """
    path = Path(path)
    if path.is_dir():
        from nanocupy.checkpoint.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file or folder") from None
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror}") from exc
    magic = head[:8]
    if magic[:4] == b"GGUF":
        from nanocupy.checkpoint.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)

    from nanocupy.checkpoint.nanoinfer2 import MAGIC, NanoInfer2Checkpoint

    if magic == MAGIC:
        return NanoInfer2Checkpoint(path)

    if head[8:] == b"{" and int.from_bytes(magic, "little") < path.stat().st_size:
        raise CheckpointError(
            f"{path}: a safetensors file alone has no config; give the folder it lies in"
        )

    from nanocupy.checkpoint.nanoinfer_legacy import LegacyCheckpoint

    return LegacyCheckpoint(
        path, layout=legacy_format, kind=legacy_kind, tokenizer_path=tokenizer_path
    )
