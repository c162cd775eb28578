"""Small vocabularies from every kind of file, against `tokenizers` and `sentencepiece`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanocupy.errors import TokenizerError
from nanocupy.tokenizer import (
    byte_text,
    load_tokenizer_file,
    tokenizer_from_bytes,
    tokenizer_from_gguf,
    tokenizer_from_hf_folder,
)
from nanocupy.tokenizer.bpe import build_from_merges
from nanocupy.tokenizer.patterns import GPT2
from tests.tokenizer.nasty import nasty_strings
from tests.tokenizer.vocabularies import resource

tk = pytest.importorskip("tokenizers")

# --- byte-level BPE with odd merge lists


@st.composite
def merge_lists(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    """A vocabulary over three letters, its merges in any order, some spelled in several ways."""
    vocab = ["a", "b", "c"]
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(0, 12))):
        left, right = draw(st.sampled_from(vocab)), draw(st.sampled_from(vocab))
        if (left, right) not in merges and len(left + right) < 9:
            merges.append((left, right))
            if left + right not in vocab:
                vocab.append(left + right)
    if draw(st.booleans()):
        merges = draw(st.permutations(merges))
    for _ in range(draw(st.integers(0, 2))):  # tokens that no merge makes
        extra = draw(st.text("abc", min_size=2, max_size=4))
        if extra not in vocab:
            vocab.append(extra)
    return vocab, merges


# Every cut is listed, yet "baba" is no token of a text: its middle merges first.
EVERY_CUT = (
    ["a", "b", "c", "ab", "ba", "aa", "baa", "baba"],
    [("a", "b"), ("b", "a"), ("a", "a"), ("ba", "a"), ("b", "aa"), ("ba", "ba")],
)


@settings(max_examples=400, deadline=None)
@example(EVERY_CUT, ["baba", "xbaba baba"], False)
@example(EVERY_CUT, ["baba", "xbaba baba"], True)
@given(
    merge_lists(),
    st.lists(st.text("abc ", min_size=1, max_size=24), min_size=1, max_size=6),
    st.booleans(),
)
def test_any_merge_list_gives_the_oracles_ids(
    lists: tuple[list[str], list[tuple[str, str]]], texts: list[str], ignore_merges: bool
) -> None:
    words, merges = lists
    vocab = [byte_text.to_text(bytes([b])) for b in range(256) if chr(b) not in "abc"] + words
    oracle = tk.Tokenizer(
        tk.models.BPE(
            {token: i for i, token in enumerate(vocab)}, merges, ignore_merges=ignore_merges
        )
    )
    oracle.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    try:
        tokenizer = build_from_merges(
            [(byte_text.to_bytes(token), i) for i, token in enumerate(vocab)],
            [(a.encode(), b.encode()) for a, b in merges],
            [],
            pattern=GPT2,
            ignore_merges=ignore_merges,
            nfc=False,
        )
    except TokenizerError as exc:
        if ignore_merges and "never merged" in str(exc):
            return  # the one kind that is refused
        raise
    for text in [*texts, *words]:
        assert tokenizer.encode(text) == oracle.encode(text).ids
    again = tokenizer_from_bytes(tokenizer.to_bytes())
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


# --- tokenizer.json of several kinds


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """A small byte-level tokenizer, trained here."""
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([s for s in nasty_strings(600) if "\x00" not in s], trainer)
    return tokenizer


def _save(folder: Path, oracle: Any, **files: Any) -> Path:
    oracle.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_gpt2_tokenizer_json_and_vocab_json_agree(gpt2: Any, tmp_path: Path) -> None:
    _save(tmp_path, gpt2)
    by_json = tokenizer_from_hf_folder(tmp_path)
    pair = tmp_path / "pair"
    pair.mkdir()
    gpt2.model.save(str(pair))
    by_pair = tokenizer_from_hf_folder(pair)
    assert load_tokenizer_file(pair / "vocab.json").to_bytes() == by_pair.to_bytes()
    for text in nasty_strings()[:600]:
        assert by_json.encode(text, parse_special=True) == gpt2.encode(text).ids
        assert by_pair.encode(text, parse_special=True) == gpt2.encode(text).ids


@pytest.mark.parametrize(
    "pattern",
    [r"\w+", r"\p{Lu}?\p{Ll}+|[0-9]+", r"[^ ]+", r"x", r"\s+(?!\S)|\s"],
)
def test_a_pattern_with_holes_keeps_what_it_does_not_match(
    gpt2: Any, tmp_path: Path, pattern: str
) -> None:
    oracle = tk.Tokenizer.from_str(gpt2.to_str())
    pre = tk.pre_tokenizers
    oracle.pre_tokenizer = pre.Sequence(
        [
            pre.Split(tk.Regex(pattern), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = tokenizer_from_hf_folder(_save(tmp_path, oracle))
    for text in nasty_strings()[:400]:
        if text.isascii():  # engines differ in \w beyond
            assert tokenizer.encode(text, parse_special=True) == oracle.encode(text).ids


def test_added_tokens_strip_and_normalise_as_told(gpt2: Any, tmp_path: Path) -> None:
    oracle = tk.Tokenizer.from_str(gpt2.to_str())
    oracle.normalizer = tk.normalizers.NFC()
    oracle.add_special_tokens(
        [tk.AddedToken("<l>", lstrip=True), tk.AddedToken("<r>", rstrip=True)]
    )
    oracle.add_tokens([tk.AddedToken("<é>", normalized=True), tk.AddedToken("<l><r>")])
    tokenizer = tokenizer_from_hf_folder(_save(tmp_path, oracle))
    texts = ["a <l> b", "a  <r>  b", "<l><r> x", "x \n <l>", "<e\u0301>", " <l> <r> <l>", "<<l>"]
    for text in texts:
        assert tokenizer.encode(text, parse_special=True) == oracle.encode(text).ids, text


def test_bos_comes_from_the_post_processor_or_the_config(gpt2: Any, tmp_path: Path) -> None:
    oracle = tk.Tokenizer.from_str(gpt2.to_str())
    oracle.post_processor = tk.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer_from_hf_folder(_save(tmp_path, oracle)).add_bos
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}
    tokenizer = tokenizer_from_hf_folder(
        _save(tmp_path, oracle, tokenizer_config={**config, "eos_token": {"content": "!"}})
    )
    assert not tokenizer.add_bos
    assert tokenizer.bos_id == 0
    assert tokenizer.eos_id == oracle.token_to_id("!")
    extra = {"900": {"content": "<|im_end|>", "special": True}}
    tokenizer = tokenizer_from_hf_folder(
        _save(
            tmp_path,
            oracle,
            tokenizer_config={"added_tokens_decoder": extra, "bos_token": None},
            special_tokens_map={"eos_token": "<|im_end|>"},
        )
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (None, 900, False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "byte_fallback"),
        ({"decoder": {"type": "WordPiece"}}, "WordPiece"),
        ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"added_tokens": [{"id": 3, "content": "x", "single_word": True}]}, "single_word"),
        ({"added_tokens": [{"id": 10**9, "content": "x"}]}, "1000000000"),
        ({"added_tokens": 5}, "added_tokens"),
        ({"model": 7}, "model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    gpt2: Any, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(gpt2.to_str()), **change}))
    with pytest.raises(TokenizerError, match=named) as info:
        tokenizer_from_hf_folder(tmp_path)
    assert "\n" not in str(info.value)


# --- SentencePiece's kind


@pytest.fixture(scope="module")
def mistral() -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_file=str(resource("mistral")))


def _pieces(oracle: Any) -> tuple[list[str], list[float], list[int]]:
    size = range(oracle.vocab_size())
    types = [
        2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1
        for i in size
    ]
    return [oracle.id_to_piece(i) for i in size], [oracle.get_score(i) for i in size], types


def test_sentencepiece_from_gguf(mistral: Any) -> None:
    tokens, scores, types = _pieces(mistral)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = tokenizer_from_gguf(metadata)
    for text in nasty_strings()[:600]:
        assert tokenizer.encode(text) == mistral.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    metadata["tokenizer.ggml.add_space_prefix"] = False
    bare = tokenizer_from_gguf(metadata)
    assert bare.encode("hello") != tokenizer.encode("hello")
    assert bare.encode(" hello") == tokenizer.encode("hello")
    assert bare.decode(bare.encode(" hello")) == " hello"


@pytest.mark.parametrize("scheme", ["normalizer", "always", "first", "never"])
def test_llama_kind_of_tokenizer_json(mistral: Any, tmp_path: Path, scheme: str) -> None:
    tokens, _, types = _pieces(mistral)
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, kind in zip(tokens, types, strict=True)
        for cut in range(1, len(piece))
        if kind == 1 and piece[:cut] in ids and piece[cut:] in ids
    ]
    oracle = tk.Tokenizer(
        tk.models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    decoders = [tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    if scheme == "normalizer":
        oracle.normalizer = tk.normalizers.Sequence(
            [tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")]
        )
    else:
        oracle.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    if scheme != "never":
        decoders.append(tk.decoders.Strip(" ", 1, 0))
    oracle.decoder = tk.decoders.Sequence(decoders)
    oracle.add_special_tokens(
        [tk.AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    )
    tokenizer = tokenizer_from_hf_folder(_save(tmp_path, oracle))
    texts = [*nasty_strings()[:600], "<s>a</s> b", " <s> a", "a<s>b</s>", "<s><s>", "▁x", " x"]
    for text in texts:
        encoded = oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, parse_special=True) == encoded, ascii(text)
        assert tokenizer.decode(encoded) == oracle.decode(encoded)
    again = tokenizer_from_bytes(tokenizer.to_bytes())
    assert [again.encode(t) for t in texts] == [tokenizer.encode(t) for t in texts]


def test_a_folder_without_tokenizer_gives_none(tmp_path: Path) -> None:
    assert tokenizer_from_hf_folder(tmp_path) is None
    assert tokenizer_from_gguf({"general.architecture": "llama"}) is None
