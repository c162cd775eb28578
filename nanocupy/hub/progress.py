"""The hub's name for `nanocupy.progress`."""

from nanocupy.progress import Report, byte_progress, human_bytes, say

__all__ = ["Report", "byte_progress", "human_bytes", "say"]
