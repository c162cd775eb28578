"""Finds and reads the tokenizer of a Hugging Face folder, and tells single tokenizer files apart.

Owns which of a folder's files counts (tokenizer.json, then tokenizer.model, `.tiktoken`, vocab.json
with merges.txt) and what tokenizer_config.json, special_tokens_map.json and added_tokens.json add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanocupy.errors import TokenizerError
from nanocupy.strict_json import parse_object, read_small_file
from nanocupy.tokenizer import byte_text, patterns
from nanocupy.tokenizer.base import Tokenizer
from nanocupy.tokenizer.hf_json import added_tokens, check_vocab, tokenizer_from_json
from nanocupy.tokenizer.pieces import AddedToken, PieceTokenizer

MAX_FILE_BYTES = 256 << 20
# Classes that put bos first unless told otherwise, and take `add_bos_token` for it.
_ADDS_BOS = ("Llama", "CodeLlama", "Gemma")
_BYTE_LEVEL_CLASSES = {
    "Qwen2Tokenizer": (patterns.QWEN2, True),
    "GPT2Tokenizer": (patterns.GPT2, False),
}


def read_file(path: Path) -> bytes:
    """The file's bytes; TokenizerError if it is missing, unreadable or absurdly large."""
    data = read_small_file(path, MAX_FILE_BYTES, error=TokenizerError)
    if data is None:
        raise TokenizerError(f"{path}: no such file")
    return data


def _object(data: bytes, where: str) -> dict[str, Any]:
    return parse_object(data, where, MAX_FILE_BYTES, error=TokenizerError)


def load_tokenizer_file(path: Path) -> Tokenizer:
    """See `nanocupy.tokenizer.load_tokenizer_file`."""
    if path.is_dir():
        tokenizer = tokenizer_from_hf_folder(path)
        if tokenizer is None:
            raise TokenizerError(f"{path}: the folder holds no tokenizer")
        return tokenizer
    data = read_file(path)
    try:
        return _from_content(path, data)
    except TokenizerError as exc:
        raise TokenizerError(f"{path}: {exc}") from None


def _from_content(path: Path, data: bytes) -> Tokenizer:
    from nanocupy.tokenizer.serialize import MAGIC, tokenizer_from_bytes
    from nanocupy.tokenizer.tiktoken_file import is_tiktoken, tokenizer_from_tiktoken

    if data.startswith(MAGIC[:-1]):
        return tokenizer_from_bytes(data)
    if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        fields = _object(data, path.name)
        if isinstance(fields.get("model"), dict):
            return tokenizer_from_json(fields)
        if fields and all(type(value) is int for value in fields.values()):
            return _from_vocab_json(path.parent, fields, _Settings.read(path.parent))
        raise TokenizerError("a JSON file that is neither tokenizer.json nor vocab.json")
    if is_tiktoken(data):
        return tokenizer_from_tiktoken(data)
    if data.startswith(b"\n"):  # the tag of ModelProto's first piece
        return _from_sentencepiece(data, _Settings())
    raise TokenizerError(
        "not a tokenizer that nanocupy knows (SentencePiece .model, .tiktoken, tokenizer.json, "
        "vocab.json)"
    )


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the small files beside the vocabulary say."""

    class_name: str = ""
    added: Sequence[AddedToken] = ()
    named: Mapping[str, str | None] = dataclasses.field(default_factory=dict)  # bos_token → text
    add_bos: bool | None = None
    legacy: bool = True

    @staticmethod
    def read(folder: Path) -> _Settings:
        def load(name: str) -> dict[str, Any]:
            path = folder / name
            return _object(read_file(path), name) if path.is_file() else {}

        config = load("tokenizer_config.json")
        named: dict[str, str | None] = {}
        for source in (load("special_tokens_map.json"), config):
            for key in ("bos_token", "eos_token", "unk_token"):
                if key in source:
                    value = source[key]
                    value = value.get("content") if isinstance(value, dict) else value
                    if value is not None and not isinstance(value, str):
                        raise TokenizerError(f"tokenizer_config.json: {key} is {value!r}")
                    named[key] = value
        decoder = config.get("added_tokens_decoder", {})
        if not isinstance(decoder, dict):
            raise TokenizerError("tokenizer_config.json: added_tokens_decoder is not an object")
        where = "tokenizer_config.json: added_tokens_decoder"
        entries = []
        for key, entry in decoder.items():
            if not (key.isascii() and key.isdigit() and len(key) < 8 and isinstance(entry, dict)):
                raise TokenizerError(f"{where}: {key[:40]!r} is not an id with a token")
            entries.append({**entry, "id": int(key)})
        tokens = {token.text: token for token in added_tokens(entries, where)}
        for text, token_id in check_vocab(load("added_tokens.json"), "added_tokens.json").items():
            special = text in named.values()
            tokens.setdefault(text, AddedToken(token_id, text, special=special))
        add_bos = config.get("add_bos_token")
        class_name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
        if not isinstance(add_bos, bool) or class_name == "PreTrainedTokenizer":
            add_bos = None  # the post-processor says
        return _Settings(
            class_name, list(tokens.values()), named, add_bos, config.get("legacy") is not False
        )


def tokenizer_from_hf_folder(path: Path) -> Tokenizer | None:
    """See `nanocupy.tokenizer.tokenizer_from_hf_folder`."""
    try:
        return _from_folder(path)
    except TokenizerError as exc:
        raise TokenizerError(f"{path}: {exc}") from None


def _from_folder(path: Path) -> Tokenizer | None:
    from nanocupy.tokenizer.tiktoken_file import is_tiktoken, tokenizer_from_tiktoken

    settings = _Settings.read(path)
    if (path / "tokenizer.json").is_file():
        fields = _object(read_file(path / "tokenizer.json"), "tokenizer.json")
        return _with_names(
            tokenizer_from_json(fields, extra=settings.added, add_bos=None), settings
        )
    if (path / "tokenizer.model").is_file():
        data = read_file(path / "tokenizer.model")
        if is_tiktoken(data):
            return _with_names(tokenizer_from_tiktoken(data), settings)
        return _with_names(_from_sentencepiece(data, settings), settings)
    ranks = sorted(path.glob("*.tiktoken"))
    if len(ranks) > 1:
        raise TokenizerError(f"{len(ranks)} .tiktoken files; leave the one that counts")
    if ranks:
        return _with_names(tokenizer_from_tiktoken(read_file(ranks[0])), settings)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        vocab = _object(read_file(path / "vocab.json"), "vocab.json")
        return _with_names(_from_vocab_json(path, vocab, settings), settings)
    return None


def _with_names(tokenizer: Tokenizer, settings: _Settings) -> Tokenizer:
    """`tokenizer` with the bos and eos that the settings name, which override the vocabulary's."""
    assert isinstance(tokenizer, PieceTokenizer)
    for attribute, key in (("bos_id", "bos_token"), ("eos_id", "eos_token")):
        if key not in settings.named:
            continue
        text = settings.named[key]
        token = None if text is None else tokenizer.find(text)
        if text is not None and token is None:
            raise TokenizerError(f"tokenizer_config.json: {key} {text!r} is not in the vocabulary")
        setattr(tokenizer, attribute, token)
    add_bos = tokenizer.add_bos
    if settings.add_bos is not None:
        add_bos = settings.add_bos
    tokenizer.add_bos = add_bos and tokenizer.bos_id is not None
    return tokenizer


def _from_sentencepiece(data: bytes, settings: _Settings) -> Tokenizer:
    from nanocupy.tokenizer.spm import SentencePieceTokenizer
    from nanocupy.tokenizer.spm_proto import read_model

    pieces = read_model(data)
    prefix = "never"
    if pieces.add_dummy_prefix:
        prefix = "special" if settings.legacy else "first"
    bos = None if pieces.bos_id < 0 else pieces.bos_id
    eos = None if pieces.eos_id < 0 else pieces.eos_id
    adds_bos = not settings.class_name or settings.class_name.startswith(_ADDS_BOS)
    return SentencePieceTokenizer(
        pieces, settings.added, prefix=prefix, bos_id=bos, eos_id=eos, add_bos=adds_bos
    )


def _from_vocab_json(folder: Path, vocab: dict[str, Any], settings: _Settings) -> Tokenizer:
    """GPT-2's and Qwen's older pair of files; which of them is told by class or size."""
    from nanocupy.tokenizer.bpe import build_from_merges

    vocab = check_vocab(vocab, "vocab.json")
    name = settings.class_name or (
        "Qwen2Tokenizer" if len(vocab) == patterns.QWEN_NUM_RANKS else "GPT2Tokenizer"
    )
    if name not in _BYTE_LEVEL_CLASSES:
        raise TokenizerError(
            f"tokenizer_config.json: tokenizer_class {name!r} with vocab.json is not supported "
            f"({', '.join(_BYTE_LEVEL_CLASSES)} are); provide tokenizer.json"
        )
    pattern, nfc = _BYTE_LEVEL_CLASSES[name]
    try:
        lines = read_file(folder / "merges.txt").decode().split("\n")
    except UnicodeDecodeError as exc:
        raise TokenizerError(f"merges.txt: byte {exc.start} is not UTF-8") from None
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    merges = byte_text.merge_pairs([line.rstrip("\r") for line in lines if line], "merges.txt")
    added = {token.id: token for token in settings.added}
    for text in (*settings.named.values(), "<|endoftext|>"):
        if text in vocab:
            added.setdefault(vocab[text], AddedToken(vocab[text], text))
    ordinary = [
        (byte_text.bytes_of(text, "vocab.json"), token_id)
        for text, token_id in vocab.items()
        if token_id not in added
    ]
    return build_from_merges(
        ordinary, merges, list(added.values()), pattern=pattern, ignore_merges=False, nfc=nfc
    )
