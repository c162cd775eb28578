"""A model file for benches that need one: random weights in a public shape, and a tokenizer that is
as large as the model's own, so that opening it costs what opening a real one does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from nanocupy.bench.shapes import random_checkpoint
from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.progress import Report
from nanocupy.tokenizer import tokenizer_from_gguf
from nanocupy.tokenizer.byte_text import BYTE_TO_CHAR

if TYPE_CHECKING:
    from nanocupy.tokenizer.base import Tokenizer

_MAX_TOKEN_BYTES = 12


def write_random_model(shape: str, dtype: str, path: Path, progress: Report | None = None) -> None:
    """Write a NanoInfer 2 file. Raises ConfigError for an unknown shape, CheckpointError where the
    file cannot be written."""
    write_nanoinfer2(_WithTokenizer(random_checkpoint(shape, dtype)), path, progress=progress)


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` ids (256 or more): every byte, then pairs of what is there
    already, drawn at random; any text can be said with it."""
    rng = random.Random(0)
    tokens = [BYTE_TO_CHAR[byte] for byte in range(256)]
    known, merges = set(tokens), []
    while len(tokens) < vocab_size:
        left, right = (tokens[int(len(tokens) * rng.random() ** 2)] for _ in range(2))
        token = left + right
        if token not in known and len(token) <= _MAX_TOKEN_BYTES:
            known.add(token)
            tokens.append(token)
            merges.append(f"{left} {right}")
    tokenizer = tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges,
        }
    )
    assert tokenizer is not None
    return tokenizer


class _WithTokenizer(RandomCheckpoint):
    def __init__(self, random_weights: RandomCheckpoint) -> None:
        self.__dict__.update(random_weights.__dict__)

    def _load_tokenizer(self) -> Tokenizer | None:
        return made_up_tokenizer(self.config.vocab_size)
