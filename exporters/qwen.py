"""What is particular to exporting Qwen2, Qwen2.5 and Qwen3."""

from __future__ import annotations

from nanocupy.checkpoint.base import Checkpoint
from nanocupy.errors import CheckpointError

ARCHITECTURES = ("qwen2", "qwen3")


def check_source(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless `checkpoint` is a Qwen model."""
    architecture = checkpoint.config.architecture
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{checkpoint.path}: architecture is {architecture}, not Qwen; use export-llama"
        )


def legacy_layout(checkpoint: Checkpoint, asked: str | None) -> str:
    """The legacy layout to write: the one that was asked for, else C, the only one with q and k
    norms. Raises CheckpointError for Qwen2, whose QKV bias none of them holds."""
    if checkpoint.config.has_qkv_bias:
        raise CheckpointError(
            f"{checkpoint.path}: no legacy layout can hold this model: it has QKV bias, as Qwen2 "
            "and Qwen2.5 have; leave --legacy out to write a NanoInfer 2 file"
        )
    return asked or "C"
