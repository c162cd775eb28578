"""Broken and hostile tokenizer files: one line of TokenizerError, never anything else."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocupy.errors import TokenizerError
from nanocupy.tokenizer import (
    Tokenizer,
    byte_text,
    load_tokenizer_file,
    stream_decoder,
    tokenizer_from_bytes,
    tokenizer_from_gguf,
)
from nanocupy.tokenizer.bpe import ByteLevelBPE
from nanocupy.tokenizer.patterns import GPT2
from nanocupy.tokenizer.pieces import AddedToken
from nanocupy.tokenizer.spm import SentencePieceTokenizer
from nanocupy.tokenizer.spm_proto import Pieces, read_model, write_model


def _bpe() -> ByteLevelBPE:
    ranked = [(bytes([b]), b) for b in range(256)] + [(b"ab", 256), (b"abc", 258)]
    return ByteLevelBPE(
        ranked, [AddedToken(257, "<s>"), AddedToken(259, "<t>", False)], pattern=GPT2, bos_id=257
    )


def _pieces() -> Pieces:
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a"]
    types = [2, 3, 3, *([6] * 256), 1, 1, 1, 1]
    return Pieces(texts, [0.0] * 259 + [-3.0, -4.0, -5.0, -1.0], types, bos_id=1, eos_id=2)


def _spm() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(_pieces(), bos_id=1, eos_id=2, add_bos=True)


SMALL = [_bpe, _spm]


def _one_line(action: Any) -> None:
    """Run `action`; if it fails it must be with a single line of TokenizerError."""
    try:
        result = action()
    except TokenizerError as exc:
        if "\n" in str(exc):
            raise
    else:
        if isinstance(result, Tokenizer):
            result.decode(list(range(-2, result.vocab_size + 2)))


@pytest.mark.parametrize("build", SMALL)
def test_every_truncation_and_flip_of_the_serialised_form_is_refused(build: Any) -> None:
    data = build().to_bytes()
    for length in range(0, len(data), 7):
        with pytest.raises(TokenizerError):
            tokenizer_from_bytes(data[:length])
    rng = random.Random(1)
    for _ in range(500):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with pytest.raises(TokenizerError):
            tokenizer_from_bytes(bytes(flipped))
    with pytest.raises(TokenizerError):
        tokenizer_from_bytes(data + b"\0")


@pytest.mark.parametrize("build", SMALL)
def test_flips_with_a_mended_checksum_do_no_harm(build: Any) -> None:
    """Whoever can write the data can write the checksum."""
    import struct
    import zlib

    data = build().to_bytes()[:-4]
    rng = random.Random(2)
    for _ in range(1500):
        flipped = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            flipped[rng.randrange(8, 700 if rng.random() < 0.7 else len(data))] = rng.randrange(256)
        whole = bytes(flipped) + struct.pack("<I", zlib.crc32(flipped))
        _one_line(lambda whole=whole: tokenizer_from_bytes(whole))


def test_flips_of_a_sentencepiece_model(tmp_path: Path) -> None:
    data = write_model(_pieces(), add_dummy_prefix=True)
    assert read_model(data).texts == _pieces().texts
    path = tmp_path / "tokenizer.model"
    rng = random.Random(3)
    for _ in range(600):
        flipped = bytearray(data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data)
        for _ in range(rng.randint(1, 3)):
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        path.write_bytes(flipped)
        _one_line(lambda: load_tokenizer_file(path))
        _one_line(lambda: load_tokenizer_file(path).encode("ab a"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_tokenizer(data: bytes) -> None:
    _one_line(lambda: tokenizer_from_bytes(data))
    _one_line(lambda: tokenizer_from_bytes(b"NANOTOK\x01" + data))
    _one_line(lambda: read_model(data) and None)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "tokenizer.ggml.model": st.sampled_from(["gpt2", "llama", "t5", 4, None]),
            "tokenizer.ggml.pre": st.sampled_from(["qwen2", "smollm", "?", 1]) | _JSON,
            "tokenizer.ggml.tokens": st.lists(st.text(max_size=3), max_size=6) | _JSON,
            "tokenizer.ggml.merges": st.lists(st.just("a b") | st.text(max_size=3)) | _JSON,
            "tokenizer.ggml.scores": st.lists(st.floats(), max_size=6) | _JSON,
            "tokenizer.ggml.token_type": st.lists(st.integers(-1, 8), max_size=6) | _JSON,
            "tokenizer.ggml.bos_token_id": st.integers(-2, 9) | _JSON,
        },
    )
)
def test_arbitrary_gguf_metadata(metadata: dict[str, Any]) -> None:
    _one_line(lambda: tokenizer_from_gguf(metadata))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["model", "added_tokens", "pre_tokenizer", "decoder", "x"]), _JSON)
def test_arbitrary_tokenizer_json(tmp_path_factory: Any, key: str, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    vocab = {byte_text.to_text(bytes([b])): b for b in range(256)}
    fields = {"model": {"vocab": vocab, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}
    path.write_text(json.dumps({**fields, key: value}))
    _one_line(lambda: load_tokenizer_file(path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a tokenizer"),
        (b"PK\x03\x04 rubbish", "not a tokenizer"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not a tokenizer"),
        (b'{"a":' * 100_000, "nested deeper"),
        (b'{"model": {"vocab": {"a": 0, "a": 1}}}', "occurs twice"),
        (b'{"model": {"vocab": {"a": NaN}}}', "NaN is not a number"),
        (b'{"model": {"vocab": {"a": -1}}}', "-1"),
        (b"YQ== 0\nYg== 0\n", "again"),
        (b"YQ== 0\nYg== 7\n", "are not 0 to 1"),
        (b"YQ== 0\nnot base64 1\n", "line 2"),
        (b"YQ== 0\n", "neither Qwen's"),
        (b"\n\xff\xff\xff\xff\x0fx", "field of"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=says) as info:
        load_tokenizer_file(path)
    assert "\n" not in str(info.value)
    assert str(path) in str(info.value)


def test_a_missing_file() -> None:
    with pytest.raises(TokenizerError, match="no such file"):
        load_tokenizer_file("/nowhere/tokenizer.json")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="not a regular file"):
        load_tokenizer_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("build", SMALL)
@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "ab" * 9 + "\udc80"])
def test_lone_surrogates_are_refused(build: Any, text: str) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate"):
        build().encode(text)


@pytest.mark.parametrize("build", SMALL)
def test_ids_outside_the_vocabulary_are_empty(build: Any) -> None:
    tokenizer = build()
    for token_id in (-1, tokenizer.vocab_size, 10**9):
        assert tokenizer.token_bytes(token_id) == b""
        assert tokenizer.decode([token_id]) == ""


def test_many_unreachable_long_tokens_are_refused_soon() -> None:
    """A vocabulary made to keep the check of its merges busy forever."""
    letters = [byte_text.to_text(bytes([b])) for b in range(256)]
    tokens = letters + [f"{'ab' * 3000}{i}" for i in range(200)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [],
    }
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match="too long to check"):
        tokenizer_from_gguf(metadata)
    assert time.perf_counter() - start < 10


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-1, 262), max_size=30), st.sampled_from(SMALL), st.booleans())
def test_stream_equals_whole_decode_on_any_ids(ids: list[int], build: Any, skip: bool) -> None:
    tokenizer = build()
    stream = stream_decoder(tokenizer, skip_special=skip)
    pushed = "".join(map(stream.push, ids))
    assert pushed + stream.finish() == tokenizer.decode(ids, skip_special=skip)


def test_stream_holds_back_an_unfinished_character() -> None:
    stream = stream_decoder(_bpe())
    assert [stream.push(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert stream.push(0xE2) == ""
    assert stream.finish() == "\ufffd"


def test_stream_that_continues_a_text_keeps_its_first_space() -> None:
    tokenizer = _spm()
    ids = tokenizer.encode("a")
    assert tokenizer.decode(ids) == stream_decoder(tokenizer).push(ids[0]) == "a"
    assert stream_decoder(tokenizer, continuing=True).push(ids[0]) == " a"
