"""The contract of every tokenizer: text to ids and back, with special tokens kept apart.

A tokenizer knows no model and no files once built. Special tokens are only ever produced where the
caller says so: `encode` treats its text as plain text, whatever it spells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence


class Tokenizer(ABC):
    """Attributes
    vocab_size       one above the highest id this tokenizer can produce
    special_tokens   text -> id of control tokens ("<|im_end|>", "<s>", …)
    added_tokens     text -> id of tokens matched as whole strings in text but not control tokens
                     ("<think>", "<tool_call>" in Qwen3)
    bos_id, eos_id   ids, or None
    add_bos          whether a plain prompt starts with bos_id
    """

    vocab_size: int
    special_tokens: Mapping[str, int]
    added_tokens: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    add_bos: bool

    @abstractmethod
    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of `text`, without bos. With `parse_special`, special tokens spelled in the text
        become their ids (a rendered chat template); without, they are plain text and can never
        yield a special id. Lone surrogates in `text` raise TokenizerError."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this id stands for in running text; for a special token the bytes of its name.
        Ids beyond the vocabulary give b"" (padded embeddings can sample them)."""

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD. With `skip_special`, control tokens vanish.
        decode(encode(s)) == s for byte-level BPE."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """A self-contained serialisation, read back by `nanocupy.tokenizer.tokenizer_from_bytes`.
        Deterministic, so that its hash is the tokenizer's fingerprint."""


class StreamDecoder(ABC):
    """Turns ids into text one at a time, holding back bytes until they are whole characters."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is unfinished."""

    @abstractmethod
    def finish(self) -> str:
        """What is left, invalid bytes as U+FFFD. All pushes + finish == decode of all ids."""
