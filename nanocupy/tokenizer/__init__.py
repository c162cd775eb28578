"""Text to token ids and back: byte-level BPE and SentencePiece, from every file that carries one.

`Tokenizer` and `StreamDecoder` are the contract (`base`); the functions here build them. Nothing
heavy is imported before it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from nanocupy.tokenizer.base import StreamDecoder, Tokenizer

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer_file",
    "stream_decoder",
    "tokenizer_from_bytes",
    "tokenizer_from_gguf",
    "tokenizer_from_hf_folder",
]


def load_tokenizer_file(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a file: SentencePiece `.model`, `.tiktoken`, tokenizer.json, vocab.json
    (with merges.txt beside it) or our own serialisation, told by content. Raises TokenizerError."""
    from pathlib import Path

    from nanocupy.tokenizer.hf_folder import load_tokenizer_file

    return load_tokenizer_file(Path(path))


def tokenizer_from_hf_folder(path: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, None where it holds none. Raises TokenizerError."""
    from pathlib import Path

    from nanocupy.tokenizer.hf_folder import tokenizer_from_hf_folder

    return tokenizer_from_hf_folder(Path(path))


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that GGUF metadata (arrays as lists) describes, None where there is none.
    Raises TokenizerError."""
    from nanocupy.tokenizer.gguf import tokenizer_from_gguf

    return tokenizer_from_gguf(metadata)


def tokenizer_from_bytes(data: bytes | bytearray | memoryview) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_bytes` serialised; TokenizerError for anything else."""
    from nanocupy.tokenizer.serialize import tokenizer_from_bytes

    return tokenizer_from_bytes(data)


def stream_decoder(
    tokenizer: Tokenizer, *, skip_special: bool = True, continuing: bool = False
) -> StreamDecoder:
    """A decoder of ids one at a time. `continuing`: the ids follow a text that was already shown,
    so a SentencePiece model's first space is kept; without it the text is that of `decode`."""
    from nanocupy.tokenizer.stream import TextStream

    return TextStream(tokenizer, skip_special=skip_special, continuing=continuing)
