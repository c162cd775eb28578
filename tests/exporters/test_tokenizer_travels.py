"""The tokenizer goes into the NanoInfer 2 file and comes out the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanocupy.checkpoint import open_checkpoint
from nanocupy.errors import CheckpointError, TokenizerError
from nanocupy.exporters.legacy import write_legacy
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.tokenizer import Tokenizer, load_tokenizer_file
from tests.checkpoint.nanoinfer2_files import TOKENIZER, honest
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

TEXT = "Grüße, 世界! 🙂  12345\n\tdef f(x): return x"


def byte_level_file(path: Path) -> Path:
    """A tokenizer.json of byte-level BPE: 256 bytes, one merge, one special token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    spelling = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocab = {spelling[b]: b for b in range(256)} | {"re": 256}
    special = {"id": 257, "content": "<|end|>", "special": True, "single_word": False}
    special |= {"lstrip": False, "rstrip": False, "normalized": False}
    document = {
        "version": "1.0",
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["r e"]},
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer_file(byte_level_file(tmp_path / "tokenizer.json"))


def test_the_tokenizer_travels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = TinyCheckpoint(tiny_config(vocab_size=300), tokenizer=tokenizer)
    write_nanoinfer2(model, tmp_path / "m.nano")
    carried = open_checkpoint(tmp_path / "m.nano").tokenizer
    assert carried is not None
    ids = tokenizer.encode(TEXT)
    assert 256 in ids
    assert carried.encode(TEXT) == ids
    assert carried.decode(ids) == TEXT
    assert dict(carried.special_tokens) == {"<|end|>": 257}
    assert carried.to_bytes() == tokenizer.to_bytes()


def test_a_sentencepiece_model_travels_with_a_legacy_file(tmp_path: Path) -> None:
    mistral_common = pytest.importorskip("mistral_common")
    folder = Path(mistral_common.__file__).parent / "data"
    source = folder / "tokenizer.model.v1"
    if not source.exists():
        pytest.skip("this mistral_common carries no SentencePiece model")
    model = TinyCheckpoint(tiny_config(vocab_size=32000, hidden_size=8, head_size=2))
    write_legacy(model, tmp_path / "a.bin", layout="A")
    with open_checkpoint(tmp_path / "a.bin", tokenizer_path=source) as legacy:
        write_nanoinfer2(legacy, tmp_path / "m.nano")
        assert legacy.tokenizer is not None
        ids = legacy.tokenizer.encode(TEXT)
        with pytest.raises(CheckpointError, match="is what would be exported"):
            write_nanoinfer2(legacy, tmp_path / "a.bin")
    carried = open_checkpoint(tmp_path / "m.nano").tokenizer
    assert carried is not None
    assert carried.encode(TEXT) == ids
    assert carried.decode(ids) == TEXT


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = honest(TinyCheckpoint(tiny_config()))
    file.sections = [(TOKENIZER, 0, tokenizer.to_bytes())]
    (tmp_path / "m.nano").write_bytes(file.pack())
    with pytest.raises(CheckpointError, match=r"258 ids but the embedding only 48 rows"):
        _ = open_checkpoint(tmp_path / "m.nano").tokenizer


@pytest.mark.parametrize("cut", [1, 100, 10**9])
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, tokenizer: Tokenizer, cut: int) -> None:
    file = honest(TinyCheckpoint(tiny_config(vocab_size=300)))
    file.sections = [(TOKENIZER, 0, tokenizer.to_bytes()[:-cut])]
    (tmp_path / "m.nano").write_bytes(file.pack())
    with pytest.raises(TokenizerError, match=r"m\.nano: tokenizer: "):
        _ = open_checkpoint(tmp_path / "m.nano").tokenizer
