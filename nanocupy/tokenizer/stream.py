"""Streaming decode: ids in one at a time, whole characters out.

Owns the bytes of an unfinished character and nothing else; any `Tokenizer` will do.
"""

from __future__ import annotations

import codecs

from nanocupy.tokenizer.base import StreamDecoder, Tokenizer
from nanocupy.tokenizer.pieces import PieceTokenizer


class TextStream(StreamDecoder):
    """Pushes + finish give exactly `tokenizer.decode(ids, skip_special=skip_special)`.

    With `continuing` the ids follow a text already shown, so that SentencePiece's rule of dropping
    the first space of a text does not apply.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, continuing: bool = False
    ) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._hidden = frozenset(tokenizer.special_tokens.values()) if skip_special else frozenset()
        self._first_bytes = None
        if isinstance(tokenizer, PieceTokenizer) and tokenizer.strips_leading_space:
            self._first_bytes = None if continuing else tokenizer.first_bytes
        # Python's incremental decoder replaces invalid bytes at the same places as bytes.decode.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        piece = self._bytes_of(token_id)
        if self._first_bytes is not None and piece:
            piece = self._first_bytes(token_id)
            self._first_bytes = None
        return self._decoder.decode(piece)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
