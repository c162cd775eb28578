"""What all tokenizers share: the id → bytes table, whole-string tokens, decoding.

Owns how a text is cut at special and added tokens, and how ids become text again. Knows no file
format and no merge algorithm: a subclass encodes one ordinary stretch of text at a time.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from nanocupy.errors import TokenizerError
from nanocupy.tokenizer.base import Tokenizer

# Unicode White_Space, as the Rust and SentencePiece world has it; Python's \s also takes U+001C-1F.
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LEADING_SPACE = re.compile(f"[{WHITESPACE}]+")
_TRAILING_SPACE = re.compile(f"[{WHITESPACE}]+\\Z")
MAX_VOCAB = 1 << 22
_MAX_GAP = 4096


@dataclass(frozen=True, order=True)
class AddedToken:
    """A token matched as a whole string. `special`: a control token, matched only where asked for.

    `lstrip`/`rstrip`: the whitespace on that side belongs to it; `normalized`: it is looked for
    in the normalised text. Names and meaning as in Hugging Face's `added_tokens`.
    """

    id: int
    text: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class PieceTokenizer(Tokenizer):
    """A tokenizer over a table of byte strings; see the subclasses for how text is cut into them.

    table  id → bytes of ordinary tokens; ids without one hold b"" (added tokens are filled in here)
    """

    strips_leading_space = False
    nfc = False

    def __init__(
        self,
        table: list[bytes],
        added: Iterable[AddedToken],
        *,
        bos_id: int | None,
        eos_id: int | None,
        add_bos: bool,
    ) -> None:
        self.added = tuple(sorted(added))
        seen: dict[str, int] = {}
        taken: dict[int, str] = {}
        for token in self.added:
            # Ids may leave gaps (padded vocabularies), but no file explains a table of holes.
            limit = len(table) + len(self.added) + _MAX_GAP
            check_id(token.id, limit, f"added token {token.text!r}")
            if not token.text:
                raise TokenizerError(f"added token {token.id} has an empty text")
            if seen.setdefault(token.text, token.id) != token.id:
                raise TokenizerError(
                    f"added token {token.text!r} has two ids, {seen[token.text]} and {token.id}"
                )
            if taken.setdefault(token.id, token.text) != token.text:
                raise TokenizerError(
                    f"token id {token.id} has two texts, {taken[token.id]!r} and {token.text!r}"
                )
            if token.id >= len(table):
                table.extend([b""] * (token.id + 1 - len(table)))
            table[token.id] = utf8(token.text)
        self._table = table
        self.vocab_size = len(table)
        self.special_tokens = {t.text: t.id for t in self.added if t.special}
        self.added_tokens = {t.text: t.id for t in self.added if not t.special}
        self._special_ids = frozenset(self.special_tokens.values())
        self._by_text = {t.text: t for t in self.added}
        for name, value in (("bos", bos_id), ("eos", eos_id)):
            if value is not None:
                check_id(value, self.vocab_size, name)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.add_bos = add_bos and bos_id is not None

    # --- text to ids

    def _encode_ordinary(self, text: str, previous: AddedToken | None, first: bool) -> list[int]:
        """Ids of one ordinary stretch of text; `previous` is the added token just before it."""
        raise NotImplementedError

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        return self.encode_parts(self.split(text, parse_special=parse_special))

    def split(self, text: str, *, parse_special: bool) -> list[str | AddedToken]:
        """`text` cut at the added tokens it spells (at special ones only with `parse_special`)."""
        utf8(text)
        raw, normalized = self._splitters[parse_special]
        parts = self._cut(text, raw) if raw else [text]
        if normalized is None:
            return parts
        cut: list[str | AddedToken] = []
        for part in parts:
            if isinstance(part, str):
                part = unicodedata.normalize("NFC", part) if self.nfc else part
                cut.extend(self._cut(part, normalized))
            else:
                cut.append(part)
        return cut

    def encode_parts(self, parts: Sequence[str | AddedToken]) -> list[int]:
        """Ids of `split`'s parts: strings are ordinary text whatever they spell."""
        ids: list[int] = []
        previous: AddedToken | None = None
        first = True
        for part in parts:
            if isinstance(part, AddedToken):
                ids.append(part.id)
                previous = part
            elif part:
                utf8(part)
                ids.extend(self._encode_ordinary(part, previous, first))
            else:
                continue
            first = False
        return ids

    @cached_property
    def _splitters(self) -> dict[bool, tuple[re.Pattern[str] | None, re.Pattern[str] | None]]:
        def pattern(special: bool, normalized: bool) -> re.Pattern[str] | None:
            texts = [
                t.text
                for t in self.added
                if (special or not t.special) and (t.normalized and self.nfc) == normalized
            ]
            # Longest first: an alternation takes the first that fits, and the longest must win.
            texts.sort(key=len, reverse=True)
            return re.compile("|".join(map(re.escape, texts))) if texts else None

        return {special: (pattern(special, False), pattern(special, True)) for special in (0, 1)}

    def _cut(self, text: str, splitter: re.Pattern[str]) -> list[str | AddedToken]:
        parts: list[str | AddedToken] = []
        end = 0
        for match in splitter.finditer(text):
            token = self._by_text[match.group()]
            before = text[end : match.start()]
            if token.lstrip and (space := _TRAILING_SPACE.search(before)):
                before = before[: space.start()]
            if before:
                parts.append(before)
            parts.append(token)
            end = match.end()
            if token.rstrip and (space := _LEADING_SPACE.match(text, end)):
                end = space.end()
        if end < len(text):
            parts.append(text[end:])
        return parts

    # --- ids to text

    def token_bytes(self, token_id: int) -> bytes:
        return self._table[token_id] if 0 <= token_id < self.vocab_size else b""

    def first_bytes(self, token_id: int) -> bytes:
        """`token_bytes` of the first visible id of a text (SentencePiece drops a space there)."""
        return self.token_bytes(token_id)

    def find(self, text: str) -> int | None:
        """The id of the token spelled exactly `text`, added or ordinary; None if there is none."""
        if text in self._by_text:
            return self._by_text[text].id
        try:
            return self._table.index(utf8(text))
        except ValueError:
            return None

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        table, size = self._table, self.vocab_size
        pieces = [table[i] if 0 <= i < size else b"" for i in ids]
        if self.strips_leading_space:
            for index, piece in enumerate(pieces):
                if piece:
                    pieces[index] = self.first_bytes(ids[index])
                    break
        return b"".join(pieces).decode("utf-8", "replace")

    def to_bytes(self) -> bytes:
        from nanocupy.tokenizer.serialize import to_bytes

        return to_bytes(self)


def utf8(text: str) -> bytes:
    """`text` in UTF-8; a lone surrogate, which no UTF-8 can express, raises TokenizerError."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise TokenizerError(
            f"the text holds a lone surrogate U+{ord(text[exc.start]):04X} at character "
            f"{exc.start}; it is not valid Unicode"
        ) from None


def check_id(value: object, limit: int, what: str) -> int:
    """`value` as a token id in [0, limit); raises TokenizerError naming `what`."""
    if type(value) is not int or not 0 <= value < min(limit, MAX_VOCAB):
        raise TokenizerError(f"{what}: the id {value!r} is not within the {limit} tokens there are")
    return value
