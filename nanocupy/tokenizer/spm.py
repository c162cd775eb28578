"""SentencePiece tokenizers on the `sentencepiece` library: LLaMA 1/2, Mistral, TinyLlama.

Owns the tokenizer object. The library sees ordinary text only: control tokens and other
whole-string tokens are cut out before, so that none of them can be spelled by a user.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from nanocupy.errors import TokenizerError
from nanocupy.tokenizer.pieces import AddedToken, PieceTokenizer
from nanocupy.tokenizer.spm_proto import (
    BYTE,
    CONTROL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Pieces,
    byte_value,
    write_model,
)

# Where a stretch of ordinary text gets the space that SentencePiece puts before a text:
PREFIXES = (
    "never",
    "first",  # only where nothing precedes it
    "special",  # at the start and after a control token, but not after other whole-string tokens
    "always",
)


class SentencePieceTokenizer(PieceTokenizer):
    """pieces  the vocabulary; its control and user-defined pieces join `added`
    prefix     one of PREFIXES
    prefix_once  no space is added where the text starts with one (Hugging Face's Metaspace)
    strips_leading_space  whether decoding drops the space a text's first piece starts with

    decode(encode(s)) == s for models with byte fallback and a prefix, whose normaliser leaves white
    space alone, for text without "▁" (which is SentencePiece's space).
    """

    def __init__(
        self,
        pieces: Pieces,
        added: Iterable[AddedToken] = (),
        *,
        prefix: str = "special",
        prefix_once: bool = False,
        strips_leading_space: bool | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        add_bos: bool = False,
    ) -> None:
        if prefix not in PREFIXES:
            raise TokenizerError(f"unknown prefix rule {prefix!r}")
        self.pieces = pieces
        self.prefix = prefix
        self.prefix_once = prefix_once
        self.strips_leading_space = (
            prefix != "never" if strips_leading_space is None else strips_leading_space
        )
        tokens = {token.id: token for token in added}
        table: list[bytes] = []
        bytes_ids = set()
        for index, (text, kind) in enumerate(zip(pieces.texts, pieces.types, strict=True)):
            if kind == BYTE:
                table.append(bytes([byte_value(text)]))
                bytes_ids.add(index)
            elif kind in (CONTROL, UNKNOWN):
                tokens.setdefault(index, AddedToken(index, text))
                table.append(b"")
            elif kind == USER_DEFINED and SPACE not in text:
                tokens.setdefault(index, AddedToken(index, text, special=False))
                table.append(b"")
            else:
                table.append(text.replace(SPACE, " ").encode())
        self._byte_ids = frozenset(bytes_ids)
        self._processors: dict[bool, Any] = {}
        super().__init__(table, tokens.values(), bos_id=bos_id, eos_id=eos_id, add_bos=add_bos)

    def _encode_ordinary(self, text: str, previous: AddedToken | None, first: bool) -> list[int]:
        if self.prefix == "never":
            add_space = False
        elif self.prefix == "always" or first:
            add_space = True
        else:
            add_space = self.prefix == "special" and previous is not None and previous.special
        if self.prefix_once and text[0] in (" ", SPACE):
            add_space = False
        return self._processor(add_space).encode(text)

    def _processor(self, add_space: bool) -> Any:
        """The library's encoder, with or without the space before the text; built when needed."""
        processor = self._processors.get(add_space)
        if processor is None:
            from sentencepiece import SentencePieceProcessor

            try:
                processor = SentencePieceProcessor(
                    model_proto=write_model(self.pieces, add_dummy_prefix=add_space)
                )
            except RuntimeError as exc:
                reason = " ".join(str(exc).split())
                raise TokenizerError(f"SentencePiece refuses the vocabulary: {reason}") from None
            self._processors[add_space] = processor
        return processor

    def first_bytes(self, token_id: int) -> bytes:
        piece = self.token_bytes(token_id)
        if token_id in self._byte_ids or token_id in self._added_ids:
            return piece
        return piece.removeprefix(b" ")

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self.added)
