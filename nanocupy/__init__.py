"""nanocupy: a from-scratch LLM inference runtime in Python on CuPy.

The public names are imported when they are first used, so that `import nanocupy` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanocupy.async_llm import AsyncLLMEngine
    from nanocupy.checkpoint import open_checkpoint
    from nanocupy.engine.config import EngineConfig
    from nanocupy.engine.request import RequestPriority
    from nanocupy.errors import NanocupyError
    from nanocupy.llm import LLM, Completion, TextChunk
    from nanocupy.sampling_params import SamplingParams

__version__ = "0.1.0"  # the one place: pyproject.toml and `nanocupy --version` read it here

__all__ = [
    "LLM",
    "AsyncLLMEngine",
    "Completion",
    "EngineConfig",
    "NanocupyError",
    "RequestPriority",
    "SamplingParams",
    "TextChunk",
    "open_checkpoint",
]

_HOMES = {
    "LLM": "nanocupy.llm",
    "AsyncLLMEngine": "nanocupy.async_llm",
    "RequestPriority": "nanocupy.engine.request",
    "Completion": "nanocupy.llm",
    "TextChunk": "nanocupy.llm",
    "EngineConfig": "nanocupy.engine.config",
    "SamplingParams": "nanocupy.sampling_params",
    "NanocupyError": "nanocupy.errors",
    "open_checkpoint": "nanocupy.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nanocupy' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
