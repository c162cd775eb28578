"""Byte-level BPE on tiktoken: text is cut into words by a pattern, words are merged by rank.

Owns the tokenizer object; where its parts come from (files, GGUF metadata) is the readers' affair,
and why rank merging gives the right ids is in `merges`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

from nanocupy.errors import TokenizerError
from nanocupy.tokenizer.merges import rank_vocabulary
from nanocupy.tokenizer.patterns import MAX_PATTERN_CHARS
from nanocupy.tokenizer.pieces import MAX_VOCAB, WHITESPACE, AddedToken, PieceTokenizer, utf8

# tiktoken's regex engine overflows its stack (and prints a panic) on white space runs of about a
# third of a million; shorter ones are safe, longer ones go through the slower engine.
_SAFE_RUN = 100_000


class ByteLevelBPE(PieceTokenizer):
    """ranked  (bytes, id) by merge rank; single bytes come first
    unmerged   (bytes, id) of tokens that decode but that no text encodes to
    pattern    the split pattern, which must match every character
    nfc        whether text is brought to Unicode's NFC first (Qwen): decode(encode(s)) is then the
               NFC form of s; without, it is s

    Bytes without a token of their own (SmolLM2 lacks some control characters) are left out of the
    text, as Hugging Face's BPE does where there is no unknown token.
    """

    def __init__(
        self,
        ranked: Sequence[tuple[bytes, int]],
        added: Iterable[AddedToken] = (),
        *,
        pattern: str,
        unmerged: Sequence[tuple[bytes, int]] = (),
        nfc: bool = False,
        bos_id: int | None = None,
        eos_id: int | None = None,
        add_bos: bool = False,
    ) -> None:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise TokenizerError(
                f"the split pattern has {len(pattern)} characters, at most {MAX_PATTERN_CHARS}"
            )
        self.pattern = pattern
        self.nfc = nfc
        self.ranked = ranked
        self.unmerged = unmerged
        self._ids = [token_id for _, token_id in ranked]
        self._identity = self._ids == list(range(len(ranked)))
        table = _table(ranked, unmerged, self._identity)
        super().__init__(table, added, bos_id=bos_id, eos_id=eos_id, add_bos=add_bos)

    def _encode_ordinary(self, text: str, previous: AddedToken | None, first: bool) -> list[int]:
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        encode, encode_word = self._merge
        drops = self._missing and (data := utf8(text)).translate(None, self._missing) != data
        if drops or (len(text) > _SAFE_RUN and _has_long_run(text)):
            ranks = self._encode_words(text, encode_word)
        else:
            try:
                ranks = encode(text)
            except BaseException as exc:  # a Rust panic is no Exception
                if type(exc).__name__ != "PanicException":
                    raise
                raise TokenizerError(
                    f"the tokenizer's split pattern gives up on this text of {len(text)} "
                    f"characters; split it into shorter prompts"
                ) from None
        if self._identity:
            return ranks
        ids = self._ids
        return [ids[rank] for rank in ranks]

    def _encode_words(self, text: str, encode_word: Callable[[bytes], list[int]]) -> list[int]:
        """The same ids by another engine, word by word, which lets bytes be dropped in a word."""
        words = _word_pattern(self.pattern).findall(text)
        missing = self._missing
        kept = (word.encode().translate(None, missing) for word in words)
        return list(chain.from_iterable(encode_word(word) for word in kept if word))

    @cached_property
    def _missing(self) -> bytes:
        """The bytes that have no token."""
        have = {token[0] for token, _ in self.ranked if len(token) == 1}
        return bytes(byte for byte in range(256) if byte not in have)

    @cached_property
    def _merge(self) -> tuple[Callable[[str], list[int]], Callable[[bytes], list[int]]]:
        """tiktoken's encoder of a text and that of a single word, both giving ranks."""
        from tiktoken import Encoding

        ranks = {token: rank for rank, (token, _) in enumerate(self.ranked)}
        if len(ranks) != len(self.ranked):
            raise TokenizerError("the vocabulary spells the same token twice")
        for byte in self._missing:  # tiktoken needs all 256; text with these never reaches it
            ranks[bytes([byte])] = len(ranks)
        try:
            encoding = Encoding(
                "nanocupy", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
            )
        except (ValueError, TypeError, AssertionError) as exc:
            reason = str(exc).strip().splitlines()[-1:]
            raise TokenizerError(
                f"the split pattern {self.pattern[:80]!r} cannot be used: {''.join(reason)}"
            ) from None
        return encoding.encode_ordinary, encoding._encode_single_piece


def build_from_merges(
    tokens: Iterable[tuple[bytes, int]],
    merges: Sequence[tuple[bytes, bytes]],
    added: Iterable[AddedToken],
    *,
    pattern: str,
    ignore_merges: bool,
    nfc: bool,
    bos_id: int | None = None,
    eos_id: int | None = None,
    add_bos: bool = False,
) -> ByteLevelBPE:
    """A tokenizer from (bytes, id) pairs and a merge list, best first, equal to Hugging Face's.

    Raises TokenizerError for a broken list or one that `merges` cannot turn into ranks.
    """
    ids: dict[bytes, int] = {}
    for token, token_id in tokens:
        if not token:
            raise TokenizerError(f"token {token_id} is empty")
        if ids.setdefault(token, token_id) != token_id:
            raise TokenizerError(f"token {token!r} has two ids, {ids[token]} and {token_id}")
    single = sorted((t for t in ids if len(t) == 1), key=ids.__getitem__)
    longer = [t for t in ids if len(t) > 1]
    vocab = rank_vocabulary(single, longer, merges, whole_words=ignore_merges)
    return ByteLevelBPE(
        [(token, ids[token]) for token in vocab.order],
        added,
        pattern=pattern,
        unmerged=[(token, ids[token]) for token in vocab.dropped],
        nfc=nfc,
        bos_id=bos_id,
        eos_id=eos_id,
        add_bos=add_bos,
    )


def _table(
    ranked: Sequence[tuple[bytes, int]], unmerged: Sequence[tuple[bytes, int]], identity: bool
) -> list[bytes]:
    if identity and not unmerged:
        return [token for token, _ in ranked]
    count = len(ranked) + len(unmerged)
    top = max((i for _, i in chain(ranked, unmerged)), default=-1)
    # Ids may leave gaps (control tokens stand in them), but no file explains a table of holes.
    if top >= min(2 * count + 4096, MAX_VOCAB):
        raise TokenizerError(f"token id {top} is out of proportion to the {count} tokens there are")
    table = [b""] * (top + 1)
    for token, token_id in chain(ranked, unmerged):
        if token_id < 0 or table[token_id]:
            raise TokenizerError(f"token id {token_id} is negative or given twice")
        table[token_id] = token
    return table


def _has_long_run(text: str) -> bool:
    import re

    runs = re.findall(f"[{WHITESPACE}]+", text)
    return max(map(len, runs), default=0) > _SAFE_RUN


@lru_cache(maxsize=16)
def _word_pattern(pattern: str) -> Any:
    import regex  # tiktoken brings it

    try:
        # Alternatives keep their order, and white space is Unicode's, as in tiktoken's engine.
        return regex.compile(f"(?V0)(?:{pattern})")
    except regex.error as exc:
        raise TokenizerError(f"the split pattern {pattern[:80]!r} cannot be used: {exc}") from None
