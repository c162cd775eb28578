"""Checkpoint files of every supported kind, read through one door: `open_checkpoint`."""

from nanocupy.checkpoint.base import Checkpoint, GenerationDefaults, GroupedInt8, TensorInfo
from nanocupy.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "GenerationDefaults", "GroupedInt8", "TensorInfo", "open_checkpoint"]
