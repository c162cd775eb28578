"""`tokenizer.json` of LLaMA 1/2, Mistral and their like: SentencePiece's BPE in other words.

Owns the translation into a SentencePiece vocabulary: the merge list becomes scores, white space
handling becomes a prefix rule. What SentencePiece cannot do the same way is refused by name.
"""

from __future__ import annotations

from typing import Any

from nanocupy.errors import TokenizerError
from nanocupy.tokenizer import byte_text, hf_json
from nanocupy.tokenizer.base import Tokenizer
from nanocupy.tokenizer.merges import rank_vocabulary
from nanocupy.tokenizer.pieces import MAX_VOCAB, AddedToken, utf8
from nanocupy.tokenizer.spm_proto import (
    BYTE,
    CONTROL,
    DECODE_ONLY,
    NORMAL,
    SPACE,
    UNKNOWN,
    Pieces,
    byte_value,
    check_pieces,
)

_WHERE = hf_json.WHERE


def sentencepiece_kind(
    fields: dict[str, Any],
    model: dict[str, Any],
    vocab: dict[str, int],
    stages: list[dict[str, Any]],
    added: list[AddedToken],
    options: dict[str, Any],
) -> Tokenizer:
    """The tokenizer; arguments as in `hf_json.tokenizer_from_json`, already taken apart."""
    from nanocupy.tokenizer.spm import SentencePieceTokenizer

    if not model.get("byte_fallback"):
        raise TokenizerError(
            f"{_WHERE}: BPE without ByteLevel or byte_fallback (a vocabulary of whole characters) "
            f"is not supported"
        )
    if model.get("ignore_merges"):
        raise TokenizerError(f"{_WHERE}: ignore_merges with byte_fallback is not supported")
    prefix, once = _prefix(hf_json.flatten(fields.get("normalizer"), "normalizers"), stages)
    strips = _strips(hf_json.flatten(fields.get("decoder"), "decoders"))
    pieces = _pieces(model, vocab, {token.id for token in added})
    return SentencePieceTokenizer(
        pieces, added, prefix=prefix, prefix_once=once, strips_leading_space=strips, **options
    )


def _prefix(steps: list[dict[str, Any]], stages: list[dict[str, Any]]) -> tuple[str, bool]:
    """(prefix rule, whether only where the text does not start with a space)."""
    replaced = prefixed = False
    for step in steps:
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE and not prefixed:
            prefixed = True
        elif hf_json.is_space_replacement(step, " ", SPACE):
            replaced = True
        else:
            raise hf_json.unsupported("normalizer", step)
    if not stages:
        if not replaced:
            raise TokenizerError(f"{_WHERE}: no stage turns spaces into {SPACE!r}: not supported")
        return ("always" if prefixed else "never"), False
    stage = stages[0]
    scheme = stage.get(
        "prepend_scheme", "always" if stage.get("add_prefix_space", True) else "never"
    )
    if (
        len(stages) > 1
        or stage.get("type") != "Metaspace"
        or stage.get("replacement", SPACE) != SPACE
        or stage.get("split", True)
        or scheme not in ("always", "first", "never")
        or prefixed
    ):
        raise hf_json.unsupported("pre_tokenizer", stage)
    return scheme, True


def _strips(steps: list[dict[str, Any]]) -> bool:
    """Whether decoding drops the space that a text starts with."""
    strips = False
    for step in steps:
        kind = step.get("type")
        if kind == "Metaspace":
            strips = step.get("prepend_scheme", "always") != "never"
        elif kind == "Strip" and step.get("content") == " " and not step.get("stop"):
            if step.get("start") != 1:
                raise hf_json.unsupported("decoder", step)
            strips = True
        elif kind not in ("ByteFallback", "Fuse") and not hf_json.is_space_replacement(
            step, SPACE, " "
        ):
            raise hf_json.unsupported("decoder", step)
    return strips


def _pieces(model: dict[str, Any], vocab: dict[str, int], taken: set[int]) -> Pieces:
    """The vocabulary by id, its merges as scores; ids of added tokens are control pieces."""
    top = max(vocab.values())
    if top >= min(2 * len(vocab) + 4096, MAX_VOCAB):
        raise TokenizerError(
            f"{_WHERE}: id {top} is out of proportion to the {len(vocab)} tokens there are"
        )
    unknown = model.get("unk_token")
    texts = [f"<added {i}>" for i in range(top + 1)]
    types = [CONTROL] * (top + 1)
    gaps = set(range(top + 1)) - set(vocab.values()) - taken
    if gaps:
        raise TokenizerError(f"{_WHERE}: no token has the id {min(gaps)}")
    for text, token_id in vocab.items():
        utf8(text)
        texts[token_id] = text
        if text == unknown:
            types[token_id] = UNKNOWN
        elif token_id in taken:
            types[token_id] = CONTROL
        else:
            types[token_id] = NORMAL if byte_value(text) is None else BYTE
    if not isinstance(unknown, str) or unknown not in vocab:
        # SentencePiece insists on one; with byte fallback it never comes up.
        texts.append("<unk>" if "<unk>" not in vocab else "<unknown>")
        types.append(UNKNOWN)
    normal = [text for text, kind in zip(texts, types, strict=True) if kind == NORMAL]
    ranked = rank_vocabulary(
        [text for text in normal if len(text) == 1],
        [text for text in normal if len(text) > 1],
        byte_text.text_pairs(model.get("merges"), f"{_WHERE}: merges"),
        whole_words=False,
        takes_words_whole=False,
    )
    score = {text: -float(rank) for rank, text in enumerate(ranked.order)}
    for text in ranked.dropped:
        types[vocab[text]] = DECODE_ONLY
    return check_pieces(Pieces(texts, [score.get(text, 0.0) for text in texts], types))
