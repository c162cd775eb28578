"""GGUF files that are broken, hostile or of unsupported models: one clear line, little memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocupy.checkpoint import open_checkpoint
from nanocupy.checkpoint.gguf import GGUFCheckpoint
from nanocupy.checkpoint.gguf_file import GGUFFile
from nanocupy.errors import CheckpointError, NanocupyError, TokenizerError
from tests.checkpoint.gguf_files import array, pair, raw_gguf, tensor, text, write_gguf
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

HUGE = (1 << 63) + 5
DATA = b"\0" * 32


def alignment(value: int) -> bytes:
    return pair("general.alignment", 4, struct.pack("<I", value))


CONTAINERS: dict[str, tuple[bytes, str]] = {
    "magic only": (b"GGUF", "version: 4 bytes at offset 4 go beyond"),
    "no counts": (b"GGUF\3\0\0\0\0", "number of tensors: 8 bytes"),
    "version 1": (raw_gguf(version=1), "GGUF version 1 is not supported"),
    "version 4": (raw_gguf(version=4), "GGUF version 4"),
    "version 0": (raw_gguf(version=0), "GGUF version 0"),
    "big endian": (raw_gguf(version=3 << 24), "big-endian"),
    "tensors": (raw_gguf(num_tensors=HUGE), f"{HUGE} tensors and 0 metadata keys cannot fit"),
    "keys": (raw_gguf(num_pairs=HUGE), f"0 tensors and {HUGE} metadata keys cannot fit"),
    "one key too many": (raw_gguf([pair("a", 0, b"\1")] * 1, num_pairs=2), "cannot fit"),
    "doubled key": (raw_gguf([pair("a", 0, b"\1")] * 2), "'a' occurs twice"),
    "long key": (raw_gguf([struct.pack("<Q", 1 << 20) + b"a" * 32]), "above 65536"),
    "endless key": (raw_gguf([struct.pack("<Q", 99) + b"a" * 32]), "go beyond"),
    "key not utf-8": (raw_gguf([pair(b"\xff", 0, b"\1")]), "metadata key: not UTF-8"),
    "type": (raw_gguf([pair("a", 13, b"\1")]), "'a': value type 13 is not known"),
    "bool": (raw_gguf([pair("a", 7, b"\2")]), "'a': 2 is neither true nor false"),
    "endless string": (
        raw_gguf([pair("a", 8, struct.pack("<Q", HUGE))]),
        f"'a': {HUGE} bytes at offset",
    ),
    "string not utf-8": (raw_gguf([pair("a", 8, text(b"\xff"))]), "'a': not UTF-8"),
    "cut number": (raw_gguf([pair("ab", 10, b"\1")]), "'ab': 8 bytes at offset"),
    "nested array": (raw_gguf([pair("a", 9, array(9, 1, array(0, 0)))]), "array of arrays"),
    "deep array": (raw_gguf([pair("a", 9, array(9, 1) * 999)]), "array of arrays"),
    "array type": (raw_gguf([pair("a", 9, array(99, 1, DATA))]), "value type 99"),
    "endless array": (raw_gguf([pair("a", 9, array(0, HUGE))]), f"'a': {HUGE} items"),
    "long array": (raw_gguf([pair("a", 9, array(10, 1 << 20))]), "'a': 8388608 bytes"),
    "many strings": (raw_gguf([pair("a", 9, array(8, 1 << 20))]), "1048576 strings do not fit"),
    "strings without end": (
        raw_gguf([pair("a", 9, array(8, 3, text("x") + struct.pack("<Q", HUGE) + b"\0" * 9))]),
        "'a': string 1 of 3 goes beyond",
    ),
    "cut string length": (
        raw_gguf([pair("a", 9, array(8, 2, text("x" * 9) + b"\0"))]),
        "'a': string 1 of 2 goes beyond",
    ),
    "strings not utf-8": (raw_gguf([pair("a", 9, array(8, 1, text(b"\xff")))]), "string 0 is not"),
    "alignment 0": (raw_gguf([alignment(0)]), "general.alignment is 0"),
    "alignment 24": (raw_gguf([alignment(24)]), "general.alignment is 24"),
    "alignment huge": (raw_gguf([alignment(1 << 31)]), "general.alignment is 2147483648"),
    "alignment text": (
        raw_gguf([pair("general.alignment", 8, text("32"))]),
        "general.alignment is '32'",
    ),
    "doubled tensor": (
        raw_gguf(tensors=[tensor("t"), tensor("t", offset=32)], data=DATA * 2),
        "'t' occurs twice",
    ),
    "no dimensions": (raw_gguf(tensors=[tensor("t", ()) + DATA]), "'t': 0 dimensions"),
    "many dimensions": (raw_gguf(tensors=[tensor("t", [1] * 5)]), "'t': 5 dimensions"),
    "dimension 0": (raw_gguf(tensors=[tensor("t", (0, 8))]), r"'t': shape \[8, 0\]"),
    "product": (
        raw_gguf(tensors=[tensor("t", (1 << 62, 1 << 62))], data=DATA),
        "'t': its .* bytes at offset 96 go beyond",
    ),
    "product wraps to 32": (
        raw_gguf(tensors=[tensor("t", ((1 << 62) + 8,))], data=DATA),
        "go beyond",
    ),
    "blocks": (raw_gguf(tensors=[tensor("t", (48,), 2)], data=DATA), "blocks of 32"),
    "unread type": (raw_gguf(tensors=[tensor("t", (256,), 10)]), "type Q2_K is not supported"),
    "unknown type": (raw_gguf(tensors=[tensor("t", (8,), 999)]), r"number 999 \(not known\)"),
    "removed type": (raw_gguf(tensors=[tensor("t", (32,), 4)]), r"number 4 \(not known\)"),
    "offset": (raw_gguf(tensors=[tensor("t", offset=HUGE)], data=DATA), "leaves a hole"),
    "unaligned": (raw_gguf(tensors=[tensor("t", offset=4)], data=DATA), "leaves a hole"),
    "overlap": (
        raw_gguf(tensors=[tensor("a", (16,)), tensor("b", offset=32)], data=DATA * 2),
        "'b' overlaps",
    ),
    "same place": (raw_gguf(tensors=[tensor("a"), tensor("b")], data=DATA), "'b' overlaps"),
    "truncated": (raw_gguf(tensors=[tensor("t")], data=DATA[:20]), "go beyond the file's"),
    "no data": (raw_gguf(tensors=[tensor("t")]), "go beyond the file's"),
    "padded": (raw_gguf(tensors=[tensor("t")], data=DATA * 2), "32 bytes follow the last"),
    "newlines in a name": (
        raw_gguf(tensors=[tensor("a\nb\x1b[2J", (8,), 999)]),
        r"'a\\nb\\x1b\[2J'",
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_bad_container(name: str, tmp_path: Path) -> None:
    data, message = CONTAINERS[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 1
    assert peak < 1 << 20
    line = str(caught.value)
    assert line.startswith(str(path))
    assert line.isprintable()
    assert len(line) < len(str(path)) + 300


def test_the_largest_honest_arrays_cost_a_multiple_of_the_file(tmp_path: Path) -> None:
    count = 1 << 18
    pairs = [
        pair("numbers", 9, array(4, count, np.arange(count, dtype="<u4").tobytes())),
        pair("strings", 9, array(8, count, text("") * count)),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf(pairs))
    tracemalloc.start()
    GGUFFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * path.stat().st_size


ARRAY_4 = np.ones(4, np.float32)
VECTOR = np.ones(32, np.float32)
YARN_LOG = {"type": "yarn", "yarn_log_multiplier": 0.1}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "gemma2"}, "general.architecture 'gemma2' is not"),
    "experts": ({"keys": {"llama.expert_count": 8}}, "expert_count is 8: mixture-of-experts"),
    "window": ({"keys": {"llama.attention.sliding_window": 4096}}, "sliding window is not"),
    "soft capping": ({"keys": {"llama.attn_logit_softcapping": 50.0}}, "soft capping"),
    "not causal": ({"keys": {"llama.attention.causal": False}}, "only causal"),
    "split": ({"keys": {"split.count": 3, "split.no": 1}}, "part 2 of 3.*--merge"),
    "longrope": ({"keys": {"llama.rope.scaling.type": "longrope"}}, "'longrope' is not supported"),
    "yarn log": (
        {
            "keys": {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.yarn_log_multiplier": 0.1,
            }
        },
        "yarn_log_multiplier 0.1 is not supported",
    ),
    "attention factor": ({"keys": {"llama.rope.scaling.attn_factor": 2.0}}, "without yarn"),
    "factor below 1": ({"keys": {"llama.rope.scaling.factor": 0.5}}, "factor is 0.5"),
    "factor nan": ({"keys": {"llama.rope.scaling.factor": float("nan")}}, "factor is nan"),
    "rotation": ({"keys": {"llama.rope.dimension_count": 4}}, "rope.dimension_count 4 is not"),
    "value size": ({"keys": {"llama.attention.value_length": 16}}, "value heads of 16"),
    "layers differ": (
        {"keys": {"llama.attention.head_count_kv": [2, 1]}},
        r"head_count_kv is \[2, 1\]; a model whose layers differ",
    ),
    "layer count": ({"keys": {"llama.feed_forward_length": [64] * 3}}, "expected 2 equal"),
    "no layers": ({"keys": {"llama.block_count": ...}}, "llama: block_count is missing"),
    "layers": ({"keys": {"llama.block_count": 0}}, "block_count is 0"),
    "many layers": ({"keys": {"llama.block_count": 1 << 31}}, "block_count is 2147483648"),
    "more layers": ({"keys": {"llama.block_count": 3}}, "layers.2.attn_norm.weight.*missing"),
    "fewer layers": ({"keys": {"llama.block_count": 1}}, "layers.1.* does not belong"),
    "hidden": ({"keys": {"llama.embedding_length": 16}}, r"shape \[48, 32\].*\[48, 16\]"),
    "heads": ({"keys": {"llama.attention.head_count": 3}}, "not a multiple"),
    "text for a number": ({"keys": {"llama.context_length": "64"}}, "context_length is '64'"),
    "no epsilon": ({"keys": {"llama.attention.layer_norm_rms_epsilon": ...}}, "is missing"),
    "eos": ({"keys": {"tokenizer.ggml.eos_token_id": 48}}, "eos_token_id is 48"),
    "bos": ({"keys": {"tokenizer.ggml.bos_token_id": 4096}}, "bos_token_id is 4096"),
    "template": ({"keys": {"tokenizer.chat_template": 3}}, "chat_template is 3"),
    "sampling": ({"keys": {"general.sampling.temp": -1.0}}, "general.sampling.temp is -1.0"),
    "no embedding": ({"drop": ["token_embd.weight"]}, "token_embd.weight .* is missing"),
    "missing tensor": ({"drop": ["blk.1.ffn_up.weight"]}, "layers.1.up.weight .* is missing"),
    "unknown tensor": ({"extra": {"blk.0.attn_sinks": VECTOR}}, "'blk.0.attn_sinks' is not part"),
    "bias in one layer": ({"extra": {"blk.0.attn_q.bias": VECTOR}}, "layers.0.k.bias .* missing"),
    "rope divisors": (
        {"extra": {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}},
        "does not follow LLaMA 3.1's formula",
    ),
    "rope divisors nan": ({"extra": {"rope_freqs.weight": ARRAY_4 * np.nan}}, "NaN"),
    "rope divisors zero": ({"extra": {"rope_freqs.weight": ARRAY_4 * 0}}, "does not follow"),
    "rope divisors shape": (
        {"extra": {"rope_freqs.weight": np.ones(5, np.float32)}},
        r"shape \[5\], expected \[4\]",
    ),
    "two scalings": (
        {"extra": {"rope_freqs.weight": ARRAY_4}, "keys": {"llama.rope.scaling.factor": 2.0}},
        "both rope_freqs.weight and rope.scaling.type 'linear'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    path = write_gguf(tmp_path / "m.gguf", TinyCheckpoint(tiny_config()), **options)
    with pytest.raises(NanocupyError, match=message) as caught:
        open_checkpoint(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert "\n" not in line


def test_a_gguf_file_is_one_whatever_its_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.safetensors", TinyCheckpoint(tiny_config()))
    assert open_checkpoint(path).format == "gguf"


def test_text_named_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("once upon a time")
    with pytest.raises(CheckpointError, match="does not start with 'GGUF'"):
        GGUFCheckpoint(path)


def test_vocabulary_that_does_not_fit_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Big:
        vocab_size = 49

    monkeypatch.setattr(
        "nanocupy.tokenizer.tokenizer_from_gguf", lambda metadata: Big(), raising=False
    )
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", TinyCheckpoint(tiny_config())))
    with pytest.raises(CheckpointError, match=r"tokenizer has 49 ids .* only 48 rows"):
        _ = checkpoint.tokenizer


def test_a_broken_tokenizer_is_refused_with_the_files_name(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.model": "nobody-knows", "tokenizer.ggml.tokens": ["a", "b"]}
    path = write_gguf(tmp_path / "m.gguf", TinyCheckpoint(tiny_config()), keys=keys)
    with pytest.raises(TokenizerError, match=r"m\.gguf: tokenizer: .*nobody-knows"):
        _ = GGUFCheckpoint(path).tokenizer


# ---- fuzzing


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A sound file with every kind of value, its bytes, and where its header ends."""
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    write_gguf(
        path,
        TinyCheckpoint(tiny_config(num_layers=1)),
        matrix_type=Type.Q4_0,
        keys={
            "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "é"],
            "tokenizer.ggml.scores": [0.0, 0.5],
            "tokenizer.chat_template": "{{ messages }}",
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
        },
    )
    file = GGUFFile(path)
    return path, path.read_bytes(), min(t.offset for t in file.tensors.values())


def open_and_read_all(path: Path, data: bytes) -> None:
    """Only an error of ours may come of it, in one line, and little memory may be taken."""
    path.write_bytes(data)
    line = ""
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            list(checkpoint.verify())
    except NanocupyError as exc:
        line = str(exc)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "\n" not in line
    # Decoding takes a block's temporaries; nothing may grow with a number in the header.
    assert peak < 3 << 20


def test_the_sound_file_opens(sound: tuple[Path, bytes, int]) -> None:
    path, data, _ = sound
    path.write_bytes(data)
    assert len(list(GGUFCheckpoint(path).verify())) == 12


@given(data=st.data())
@settings(max_examples=400, deadline=2000)
def test_flipped_bytes(sound: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, original, header_end = sound
    place = st.tuples(st.integers(4, header_end - 1), st.integers(0, 255))
    flipped = bytearray(original)
    for at, value in data.draw(st.lists(place, min_size=1, max_size=3)):
        flipped[at] = value
    open_and_read_all(path, bytes(flipped))


@given(data=st.data(), word=st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]))
@settings(max_examples=200, deadline=2000)
def test_hostile_numbers(sound: tuple[Path, bytes, int], data: st.DataObject, word: int) -> None:
    path, original, header_end = sound
    at = data.draw(st.integers(4, header_end - 8))
    size = data.draw(st.sampled_from([4, 8]))
    hostile = (word % 2 ** (8 * size)).to_bytes(size, "little")
    open_and_read_all(path, original[:at] + hostile + original[at + size :])


@given(data=st.data())
@settings(max_examples=150, deadline=2000)
def test_cut_padded_and_random(sound: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, original, header_end = sound
    mutation = st.one_of(
        st.integers(4, len(original) - 1).map(lambda n: original[:n]),
        st.binary(min_size=1, max_size=64).map(lambda more: original + more),
        st.integers(24, header_end).map(lambda n: original[:n] + original[n + 1 :]),
        st.binary(max_size=200).map(lambda body: b"GGUF\3\0\0\0" + body),
        st.binary(max_size=200).map(lambda body: original[:24] + body),
    )
    open_and_read_all(path, data.draw(mutation))


def test_flips_over_the_demo_models_header(demo_gguf: Path, tmp_path: Path) -> None:
    """The real header, its tensors cut off: no flip may hang, crash or be taken for a model."""
    file = GGUFFile(demo_gguf)
    with demo_gguf.open("rb") as opened:
        header = opened.read(min(t.offset for t in file.tensors.values()))
    rng = np.random.default_rng(0)
    path = tmp_path / "m.gguf"
    for _ in range(40):
        flipped = bytearray(header)
        # Half of them among the first keys, half anywhere.
        end = len(header) if rng.random() < 0.5 else 2000
        flipped[rng.integers(4, end)] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        start = time.perf_counter()
        with pytest.raises(NanocupyError):
            open_checkpoint(path)
        assert time.perf_counter() - start < 2
