"""Reads Hugging Face's `tokenizer.json`: byte-level BPE, and BPE of SentencePiece's kind.

Owns the meaning of that file. Every stage it names (normaliser, pre-tokeniser, model,
post-processor, decoder) is honoured or refused by name. Truncation and padding settings are left
to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanocupy.errors import TokenizerError
from nanocupy.tokenizer import byte_text, patterns
from nanocupy.tokenizer.base import Tokenizer
from nanocupy.tokenizer.pieces import AddedToken

WHERE = "tokenizer.json"


def tokenizer_from_json(
    fields: dict[str, Any],
    *,
    extra: Sequence[AddedToken] = (),
    bos_id: int | None = None,
    eos_id: int | None = None,
    add_bos: bool | None = None,
) -> Tokenizer:
    """The tokenizer that `tokenizer.json`'s parsed content describes.

    extra  added tokens named elsewhere (tokenizer_config.json); bos_id, eos_id, add_bos override
    what follows from the file: it knows bos only through its post-processor, and no eos.

    Raises TokenizerError naming the part that is broken or not supported.
    """
    model = _section(fields, "model")
    if model is None or model.get("type", "BPE") != "BPE":
        raise unsupported("model", model)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise TokenizerError(f"{WHERE}: model.{name} = {model[name]!r} is not supported")
    vocab = _vocab(model)
    added = {token.id: token for token in extra} | {
        token.id: token for token in added_tokens(fields.get("added_tokens") or [])
    }
    bos = _template_bos(_section(fields, "post_processor"), added)
    options = {
        "bos_id": bos if bos_id is None else bos_id,
        "eos_id": eos_id,
        "add_bos": (bos is not None) if add_bos is None else add_bos,
    }
    stages = flatten(_section(fields, "pre_tokenizer"), "pretokenizers")
    if any(stage.get("type") == "ByteLevel" for stage in stages):
        return _byte_level(fields, model, vocab, stages, list(added.values()), options)
    from nanocupy.tokenizer.hf_json_spm import sentencepiece_kind

    return sentencepiece_kind(fields, model, vocab, stages, list(added.values()), options)


def added_tokens(entries: Any, where: str = f"{WHERE}: added_tokens") -> list[AddedToken]:
    """Added tokens from their JSON form (a list of objects with `id` and `content`)."""
    if not isinstance(entries, list):
        raise TokenizerError(f"{where} is not a list")
    tokens = []
    for entry in entries:
        if not (
            isinstance(entry, dict)
            and type(entry.get("id")) is int
            and isinstance(entry.get("content"), str)
        ):
            raise TokenizerError(f"{where}: {str(entry)[:80]} has no id and content")
        if entry.get("single_word"):
            raise TokenizerError(f"{where}: {entry['content']!r} is single_word: not supported")
        flags = {
            name: bool(entry.get(name, False))
            for name in ("special", "lstrip", "rstrip", "normalized")
        }
        tokens.append(AddedToken(entry["id"], entry["content"], **flags))
    return tokens


def _byte_level(
    fields: dict[str, Any],
    model: dict[str, Any],
    vocab: dict[str, int],
    stages: list[dict[str, Any]],
    added: list[AddedToken],
    options: dict[str, Any],
) -> Tokenizer:
    from nanocupy.tokenizer.bpe import build_from_merges

    if model.get("byte_fallback"):
        raise TokenizerError(f"{WHERE}: byte_fallback with ByteLevel is not supported")
    normalizer = _section(fields, "normalizer")
    steps = flatten(normalizer, "normalizers")
    if any(step.get("type") != "NFC" for step in steps):
        raise unsupported("normalizer", normalizer)
    decoder = _section(fields, "decoder")
    if decoder is not None and decoder.get("type") != "ByteLevel":
        raise unsupported("decoder", decoder)
    taken = {token.id for token in added}
    ordinary = [
        (byte_text.bytes_of(text, f"{WHERE}: vocab"), token_id)
        for text, token_id in vocab.items()
        if token_id not in taken
    ]
    unknown = model.get("unk_token")
    if unknown is not None and len([t for t, _ in ordinary if len(t) == 1]) < 256:
        raise TokenizerError(
            f"{WHERE}: an unknown token ({unknown!r}) beside bytes without a token of their own is "
            f"not supported"
        )
    return build_from_merges(
        ordinary,
        byte_text.merge_pairs(model.get("merges"), f"{WHERE}: merges"),
        added,
        pattern=_pattern(stages),
        ignore_merges=bool(model.get("ignore_merges")),
        nfc=bool(steps),
        **options,
    )


def _pattern(stages: list[dict[str, Any]]) -> str:
    """The one expression that splits as the pre-tokenisers do."""
    last = stages[-1]
    if last.get("type") != "ByteLevel" or len(stages) > 2:
        raise unsupported("pre_tokenizer", {"type": [s.get("type") for s in stages]})
    if last.get("add_prefix_space"):
        raise TokenizerError(f"{WHERE}: ByteLevel with add_prefix_space is not supported")
    by_words = last.get("use_regex", True)
    if len(stages) == 1:
        return patterns.GPT2 if by_words else patterns.WHOLE
    first = stages[0]
    if first.get("type") == "Digits" and by_words:
        return patterns.SMOLLM if first.get("individual_digits") else patterns.DIGIT_RUNS
    if first.get("type") == "Split" and not by_words:
        source = first.get("pattern")
        source = source.get("Regex") if isinstance(source, dict) else None
        invert, behavior = bool(first.get("invert")), str(first.get("behavior")).lower()
        if isinstance(source, str) and len(source) <= patterns.MAX_PATTERN_CHARS // 3:
            if behavior == "isolated":
                return patterns.covering(source)
            if (behavior == "removed" and invert) and source in patterns.COVERING:
                return source
    raise unsupported("pre_tokenizer", first)


def _template_bos(processor: dict[str, Any] | None, added: dict[int, AddedToken]) -> int | None:
    """The id that the post-processor puts before a text, or None; refuses all else it may do."""
    bos: int | None = None
    for step in flatten(processor, "processors"):
        if step.get("type") == "ByteLevel":
            continue  # moves offsets, no ids
        single = step.get("single")
        if step.get("type") != "TemplateProcessing" or not isinstance(single, list):
            raise unsupported("post_processor", step)
        names = [
            (item.get("SpecialToken") or {}).get("id") if "SpecialToken" in item else None
            for item in single
            if isinstance(item, dict)
        ]
        if names == [None]:
            continue
        if len(single) != 2 or len(names) != 2 or names[0] is None or names[1] is not None:
            raise TokenizerError(
                f"{WHERE}: post_processor puts {names} around a text (None being the text); only "
                f"one token before it is supported"
            )
        bos = next((t.id for t in added.values() if t.text == names[0]), None)
        if bos is None:
            raise TokenizerError(f"{WHERE}: post_processor names the unknown token {names[0]!r}")
    return bos


def _vocab(model: dict[str, Any]) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"{WHERE}: model.vocab is not an object of tokens")
    return check_vocab(vocab, f"{WHERE}: model.vocab")


def check_vocab(vocab: dict[str, Any], where: str) -> dict[str, int]:
    """`vocab` if it maps each token to an id of its own; TokenizerError otherwise."""
    for text, token_id in vocab.items():
        if type(token_id) is not int or token_id < 0:
            raise TokenizerError(f"{where}: {text[:60]!r} has the id {token_id!r}")
    if len(set(vocab.values())) != len(vocab):
        raise TokenizerError(f"{where}: two tokens have the same id")
    return vocab


def _section(fields: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise TokenizerError(f"{WHERE}: {name} is a {type(value).__name__}, not an object")
    return value


def flatten(stage: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A stage as the list of its steps: none, one, or those of a Sequence."""
    if stage is None:
        return []
    if stage.get("type") != "Sequence":
        return [stage]
    steps = stage.get(key)
    if not isinstance(steps, list) or any(not isinstance(step, dict) for step in steps):
        raise unsupported(key, stage)
    return [inner for step in steps for inner in flatten(step, key)]


def unsupported(name: str, stage: dict[str, Any] | None) -> TokenizerError:
    import json

    text = json.dumps(stage, ensure_ascii=False, default=str)
    if len(text) > 160:
        text = f"{text[:160]}…"
    return TokenizerError(f"{WHERE}: {name} {text} is not supported")


def is_space_replacement(step: dict[str, Any], source: str, target: str) -> bool:
    """Whether a normaliser or decoder step replaces the string `source` by `target`."""
    return (
        step.get("type") == "Replace"
        and step.get("pattern") == {"String": source}
        and step.get("content") == target
    )
