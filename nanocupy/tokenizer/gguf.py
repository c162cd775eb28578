"""Builds tokenizers from GGUF metadata (`tokenizer.ggml.*`), as llama.cpp's converters write it.

Owns the meaning of the keys; reading the file is the checkpoint reader's affair. Key names and
token types are those of the GGUF specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanocupy.errors import TokenizerError
from nanocupy.tokenizer import byte_text
from nanocupy.tokenizer.base import Tokenizer
from nanocupy.tokenizer.patterns import GGUF_PRE
from nanocupy.tokenizer.pieces import AddedToken, utf8
from nanocupy.tokenizer.spm_proto import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Pieces,
    check_pieces,
)

_PREFIX = "tokenizer.ggml."


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that GGUF metadata describes; None where there is none.

    metadata  keys as in the file, arrays as lists of str, int or float

    Raises TokenizerError for a kind or a pre-tokenizer that is not supported, and broken metadata.
    """
    kind = metadata.get(f"{_PREFIX}model")
    if kind is None or kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            f"GGUF {_PREFIX}model is {kind!r}; supported are 'gpt2' (byte-level BPE) and 'llama' "
            f"(SentencePiece)"
        )
    tokens = _array(metadata, "tokens", str, None)
    types = _array(metadata, "token_type", int, len(tokens), [NORMAL] * len(tokens))
    for index, token in enumerate(tokens):
        try:
            utf8(token)
        except TokenizerError:
            raise TokenizerError(f"GGUF {_PREFIX}tokens: token {index} is no text") from None
    build = _sentencepiece if kind == "llama" else _byte_level
    return build(metadata, tokens, types)


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    from nanocupy.tokenizer.bpe import build_from_merges

    pre = metadata.get(f"{_PREFIX}pre", "default")
    if not isinstance(pre, str) or pre not in GGUF_PRE:
        raise TokenizerError(
            f"GGUF {_PREFIX}pre is {str(pre)[:40]!r}, a way to split text that is not supported; "
            f"supported are {', '.join(sorted(GGUF_PRE))}"
        )
    pattern, nfc, ignore_merges, adds_bos = GGUF_PRE[pre]
    where = f"GGUF {_PREFIX}merges"
    merges = byte_text.merge_pairs(_array(metadata, "merges", str, None), where)
    added, ordinary = [], []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            added.append(AddedToken(index, token, special=kind != USER_DEFINED))
        elif kind != UNUSED:
            data = byte_text.to_bytes(token)
            if data is None:  # a whole-string token that its converter did not mark
                added.append(AddedToken(index, token, special=False))
            else:
                ordinary.append((data, index))
    return build_from_merges(
        ordinary,
        merges,
        added,
        pattern=pattern,
        ignore_merges=ignore_merges,
        nfc=nfc,
        bos_id=_id(metadata, "bos_token_id", tokens),
        eos_id=_id(metadata, "eos_token_id", tokens),
        add_bos=_flag(metadata, "add_bos_token", adds_bos),
    )


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    from nanocupy.tokenizer.spm import SentencePieceTokenizer

    scores = _array(metadata, "scores", float, len(tokens), [0.0] * len(tokens))
    if UNKNOWN not in types:
        unknown = _id(metadata, "unknown_token_id", tokens)
        if unknown is None:
            raise TokenizerError(f"GGUF {_PREFIX}token_type marks no unknown token")
        types[unknown] = UNKNOWN
    for index, kind in enumerate(types):
        if kind not in range(NORMAL, BYTE + 1):
            raise TokenizerError(f"GGUF {_PREFIX}token_type: token {index} has type {kind}")
    pieces = check_pieces(Pieces(tokens, [float(score) for score in scores], types))
    added = [
        AddedToken(i, text.replace(SPACE, " "), special=False)
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == USER_DEFINED and SPACE not in text
    ]
    prefixed = _flag(metadata, "add_space_prefix", True)
    return SentencePieceTokenizer(
        pieces,
        added,
        prefix="special" if prefixed else "never",
        bos_id=_id(metadata, "bos_token_id", tokens),
        eos_id=_id(metadata, "eos_token_id", tokens),
        add_bos=_flag(metadata, "add_bos_token", True),
    )


def _array(
    metadata: Mapping[str, Any],
    name: str,
    kind: type,
    length: int | None,
    default: list | None = None,
) -> list:
    value = metadata.get(_PREFIX + name, default)
    if value is None:
        raise TokenizerError(f"GGUF {_PREFIX}{name} is missing")
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, list) or any(type(item) not in allowed for item in value):
        raise TokenizerError(f"GGUF {_PREFIX}{name} is not a list of {kind.__name__}")
    if length is not None and len(value) != length:
        raise TokenizerError(f"GGUF {_PREFIX}{name} has {len(value)} entries for {length} tokens")
    return list(value)


def _id(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> int | None:
    value = metadata.get(_PREFIX + name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < len(tokens):
        raise TokenizerError(f"GGUF {_PREFIX}{name} is {value!r}, outside the {len(tokens)} tokens")
    return value


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if not isinstance(value, bool):
        raise TokenizerError(f"GGUF {_PREFIX}{name} is {value!r}, not true or false")
    return value
