"""Reads `.tiktoken` files: a base64 token and its rank a line, as Qwen and LLaMA 3 publish them.

Owns the text format. Such a file names neither split pattern nor control tokens; they follow from
the family, which is told by the number of ranks.
"""

from __future__ import annotations

import binascii
import re

from nanocupy.errors import TokenizerError
from nanocupy.tokenizer.bpe import ByteLevelBPE
from nanocupy.tokenizer.patterns import (
    LLAMA3,
    LLAMA3_NUM_RANKS,
    QWEN2,
    QWEN_ADDED,
    QWEN_NUM_RANKS,
    llama3_specials,
)
from nanocupy.tokenizer.pieces import AddedToken

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]{1,9}\r?\n")


def is_tiktoken(data: bytes) -> bool:
    """Whether `data` starts like a `.tiktoken` file."""
    return _LINE.match(data[:4096]) is not None


def read_ranks(data: bytes) -> list[bytes]:
    """The tokens by rank. Ranks must be 0, 1, 2, … in any order, each once, each token once."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank_text = line.split()
            token, rank = binascii.a2b_base64(text, strict_mode=True), int(rank_text)
        except ValueError:
            raise TokenizerError(
                f".tiktoken file: line {number} is {line[:60]!r}, not a base64 token and its rank"
            ) from None
        if tokens.setdefault(rank, token) is not token or not token:
            raise TokenizerError(f".tiktoken file: line {number} gives rank {rank} again")
    count = len(tokens)
    if not count or min(tokens) != 0 or max(tokens) != count - 1:
        raise TokenizerError(
            f".tiktoken file: {count} tokens, but their ranks are not 0 to {count - 1}"
        )
    ranks = [tokens[rank] for rank in range(count)]
    if len(set(ranks)) != count:
        raise TokenizerError(".tiktoken file: the same token has two ranks")
    return ranks


def tokenizer_from_tiktoken(data: bytes) -> ByteLevelBPE:
    """Qwen's or LLaMA 3's tokenizer from the bytes of its rank file.

    Raises TokenizerError for a broken file, and for one of neither family.
    """
    ranks = read_ranks(data)
    ranked = [(token, rank) for rank, token in enumerate(ranks)]
    if len(ranks) == QWEN_NUM_RANKS:
        added = [
            AddedToken(QWEN_NUM_RANKS + i, text, special)
            for i, (text, special) in enumerate(QWEN_ADDED)
        ]
        ids = {token.text: token.id for token in added}
        return ByteLevelBPE(ranked, added, pattern=QWEN2, nfc=True, eos_id=ids["<|im_end|>"])
    if len(ranks) == LLAMA3_NUM_RANKS:
        specials = [
            AddedToken(LLAMA3_NUM_RANKS + i, text) for i, text in enumerate(llama3_specials())
        ]
        bos, eos = specials[0].id, specials[1].id
        return ByteLevelBPE(ranked, specials, pattern=LLAMA3, bos_id=bos, eos_id=eos, add_bos=True)
    raise TokenizerError(
        f".tiktoken file: {len(ranks)} ranks are neither Qwen's ({QWEN_NUM_RANKS}) nor LLaMA 3's "
        f"({LLAMA3_NUM_RANKS}), and the file does not say how text is split; use tokenizer.json"
    )
