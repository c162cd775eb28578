"""What is particular to exporting models of LLaMA's architecture (Mistral, SmolLM2 and others)."""

from __future__ import annotations

from nanocupy.checkpoint.base import Checkpoint
from nanocupy.errors import CheckpointError

ARCHITECTURES = ("llama",)


def check_source(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless `checkpoint` is a LLaMA-type model."""
    architecture = checkpoint.config.architecture
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{checkpoint.path}: architecture is {architecture}, not LLaMA's; use export-qwen"
        )


def legacy_layout(checkpoint: Checkpoint, asked: str | None) -> str:
    """The legacy layout to write: the one that was asked for, else A, which loses nothing.
    B, D1 and D2 are for those who name them."""
    return asked or "A"
