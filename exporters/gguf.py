"""What is particular to exporting GGUF files, which may hold any of the architectures."""

from __future__ import annotations

from nanocupy.checkpoint.base import Checkpoint
from nanocupy.errors import CheckpointError
from nanocupy.exporters import llama, qwen


def check_source(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless `checkpoint` is a GGUF file."""
    if checkpoint.format != "gguf":
        raise CheckpointError(
            f"{checkpoint.path}: not a GGUF file but {checkpoint.format}; use export-llama or "
            "export-qwen"
        )


def legacy_layout(checkpoint: Checkpoint, asked: str | None) -> str:
    """The legacy layout to write, by the architecture that the file holds."""
    family = qwen if checkpoint.config.architecture in qwen.ARCHITECTURES else llama
    return family.legacy_layout(checkpoint, asked)
