"""Real vocabularies against independent implementations, on strings made to break tokenizers.

Oracles: `tokenizers` built from the same vocabulary with a merge list (derived here from the ranks
where the file has ranks), and the `sentencepiece` library on the unmodified model file.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanocupy.tokenizer import (
    Tokenizer,
    byte_text,
    load_tokenizer_file,
    stream_decoder,
    tokenizer_from_bytes,
    tokenizer_from_gguf,
)
from nanocupy.tokenizer.tiktoken_file import read_ranks
from tests.tokenizer.nasty import nasty_strings
from tests.tokenizer.vocabularies import every_cut, read_gguf_metadata, resource, split_by_rank

tokenizers = pytest.importorskip("tokenizers")

# As the models' authors published them; spelled out again so that a slip in ours shows.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = ("qwen", "llama3", "mistral", "smollm2")


@dataclass
class Case:
    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    json: str | None  # the oracle as tokenizer.json
    added: dict[str, int]


def _split_oracle(pattern: str, ranks: tuple[bytes, ...], merges: Any, **options: Any) -> Any:
    vocab = {byte_text.to_text(token): rank for rank, token in enumerate(ranks)}
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, list(merges), **options))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    oracle.decoder = tokenizers.decoders.ByteLevel()
    return oracle


def _case(name: str, request: pytest.FixtureRequest) -> Case:
    if name == "mistral":
        sentencepiece = pytest.importorskip("sentencepiece")
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(resource(name)))
        return Case(load_tokenizer_file(resource(name)), oracle.encode, oracle.decode, None, {})
    if name == "smollm2":
        metadata = read_gguf_metadata(request.getfixturevalue("demo_gguf"))
        tokens = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        vocab = {token: index for index, token in enumerate(tokens)}
        oracle = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
        pre = tokenizers.pre_tokenizers
        oracle.pre_tokenizer = pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        )
        oracle.decoder = tokenizers.decoders.ByteLevel()
        tokenizer = tokenizer_from_gguf(metadata)
    else:
        ranks = tuple(read_ranks(resource(name).read_bytes()))
        if name == "qwen":
            oracle = _split_oracle(QWEN_PATTERN, ranks, split_by_rank(ranks))
            oracle.normalizer = tokenizers.normalizers.NFC()
        else:
            oracle = _split_oracle(LLAMA3_PATTERN, ranks, every_cut(ranks), ignore_merges=True)
        tokenizer = load_tokenizer_file(resource(name))
        # Strings matched in any text; control tokens stay unknown to the oracle, so that it, too,
        # takes them for plain text.
        oracle.add_tokens(
            [tokenizers.AddedToken(text, normalized=False) for text in tokenizer.added_tokens]
        )
    added = {text: oracle.token_to_id(text) for text in tokenizer.added_tokens}
    return Case(
        tokenizer,
        lambda text: oracle.encode(text, add_special_tokens=False).ids,
        lambda ids: oracle.decode(ids, skip_special_tokens=False),
        oracle.to_str(),
        added,
    )


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return _case(request.param, request)


def _encode_like(case: Case, text: str) -> list[int]:
    """The oracle's ids; it numbers added tokens after the ranks, in an order of its own."""
    ours = {theirs: case.tokenizer.added_tokens[text] for text, theirs in case.added.items()}
    return [ours.get(token_id, token_id) for token_id in case.encode(text)]


def test_ids_equal_the_oracles(case: Case) -> None:
    strings = nasty_strings()
    assert len(set(strings)) > 1900
    wrong = [s for s in strings if case.tokenizer.encode(s) != _encode_like(case, s)]
    assert not wrong, f"{len(wrong)} of {len(strings)}, first {wrong[0]!a}"


def test_plain_text_never_yields_control_tokens(case: Case) -> None:
    special = set(case.tokenizer.special_tokens.values())
    for name in case.tokenizer.special_tokens:
        for text in (name, f"a{name}", f"{name}{name}", f" {name}\n"):
            ids = case.tokenizer.encode(text)
            assert not special & set(ids)
            assert case.tokenizer.decode(ids) == text
    for text in nasty_strings():
        assert not special & set(case.tokenizer.encode(text))


def test_parse_special_yields_the_ids_of_spelled_tokens(case: Case) -> None:
    for text, token_id in list(case.tokenizer.special_tokens.items())[:40]:
        ids = case.tokenizer.encode(f"{text}x{text}", parse_special=True)
        assert ids[0] == ids[-1] == token_id
        assert case.tokenizer.token_bytes(token_id) == text.encode()
        assert case.tokenizer.decode([token_id]) == ""
        assert case.tokenizer.decode([token_id], skip_special=False) == text


def test_decode_gives_the_text_back(case: Case) -> None:
    """All of it for byte-level BPE, after NFC for Qwen, without the bytes that SmolLM2 has no
    token for, and with SentencePiece's own space character as the space it stands for."""
    missing = dict.fromkeys([0x4, 0x6, 0x13, 0x14, 0x16, 0x1D])
    for text in nasty_strings():
        expected = text
        if getattr(case.tokenizer, "nfc", False):
            expected = unicodedata.normalize("NFC", text)
        elif getattr(case.tokenizer, "_missing", b""):
            expected = text.translate(missing)
        elif not hasattr(case.tokenizer, "pattern"):
            expected = text.replace("▁", " ")
        assert case.tokenizer.decode(case.tokenizer.encode(text)) == expected


def test_decode_equals_the_oracle_on_any_ids(case: Case) -> None:
    """Ids in any order make broken UTF-8; the replacement characters must come at the same places.
    (SentencePiece has its own idea of those, so it is compared on whole characters.)"""
    import random

    rng = random.Random(5)
    limit = min(case.tokenizer.vocab_size, 32000 if case.json is None else 49152)
    avoid = set(case.tokenizer.special_tokens.values()) | set(case.tokenizer.added_tokens.values())
    ordinary = [i for i in range(limit) if i not in avoid]
    for _ in range(400):
        ids = rng.choices(ordinary[:400] if rng.random() < 0.5 else ordinary, k=rng.randint(1, 9))
        expected = case.decode(ids)
        if case.json is None and "\ufffd" in expected:
            continue
        assert case.tokenizer.decode(ids) == expected


def test_stream_equals_whole_decode(case: Case) -> None:
    import random

    rng = random.Random(6)
    tokenizer = case.tokenizer
    batches = [tokenizer.encode(text) for text in nasty_strings()[:300]]
    batches += [rng.choices(range(tokenizer.vocab_size + 5), k=12) for _ in range(300)]
    batches += [rng.choices(range(300), k=12) for _ in range(300)]
    for ids in batches:
        for skip in (True, False):
            stream = stream_decoder(tokenizer, skip_special=skip)
            pushed = [stream.push(token_id) for token_id in ids]
            whole = tokenizer.decode(ids, skip_special=skip)
            assert "".join(pushed) + stream.finish() == whole


def test_serialisation_round_trip(case: Case) -> None:
    data = case.tokenizer.to_bytes()
    again = tokenizer_from_bytes(data)
    assert again.to_bytes() == data
    for name in ("vocab_size", "special_tokens", "added_tokens", "bos_id", "eos_id", "add_bos"):
        assert getattr(again, name) == getattr(case.tokenizer, name)
    for text in nasty_strings()[:300]:
        assert again.encode(text) == case.tokenizer.encode(text)
        assert again.encode(text, parse_special=True) == case.tokenizer.encode(
            text, parse_special=True
        )


def test_tokenizer_json_of_the_same_vocabulary(case: Case, tmp_path: Path) -> None:
    if case.json is None:
        pytest.skip("the oracle is no tokenizer.json")
    path = tmp_path / "tokenizer.json"
    path.write_text(case.json)
    tokenizer = load_tokenizer_file(path)
    for text in nasty_strings()[:700]:
        assert tokenizer.encode(text) == case.encode(text)


def test_slow_splitter_equals_tiktokens(case: Case) -> None:
    """Words with dropped bytes and endless white space take a second splitter."""
    tokenizer = case.tokenizer
    if not hasattr(tokenizer, "pattern"):
        pytest.skip("SentencePiece splits no words")
    encode, encode_word = tokenizer._merge
    for text in nasty_strings():
        if not tokenizer._missing or text == text.translate(dict.fromkeys(range(0x20))):
            assert tokenizer._encode_words(text, encode_word) == encode(text)


def test_endless_white_space(case: Case) -> None:
    ids = case.tokenizer.encode("a" + " " * 600_000 + "b")
    assert case.tokenizer.decode(ids) == "a" + " " * 600_000 + "b"


def test_known_ids() -> None:
    """Ids that the models' authors document, so that no table is shifted by one."""
    qwen = load_tokenizer_file(resource("qwen"))
    assert qwen.encode("Hello world") == [9707, 1879]
    assert qwen.special_tokens["<|im_end|>"] == qwen.eos_id == 151645
    assert qwen.added_tokens["</think>"] == 151668
    llama = load_tokenizer_file(resource("llama3"))
    assert llama.encode("Hello world") == [9906, 1917]
    assert (llama.bos_id, llama.special_tokens["<|eot_id|>"], llama.vocab_size) == (
        128000,
        128009,
        128256,
    )
    mistral = load_tokenizer_file(resource("mistral"))
    assert (mistral.bos_id, mistral.eos_id, mistral.add_bos) == (1, 2, True)
