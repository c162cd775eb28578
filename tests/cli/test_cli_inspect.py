"""`nanocupy inspect`: figures against hand arithmetic, damage, and files that mean harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import nanocupy.checkpoint.open
from nanocupy import cli
from nanocupy.checkpoint.base import Checkpoint, GenerationDefaults, TensorInfo
from nanocupy.cli import fit
from nanocupy.cli.console import binary_bytes, printable
from nanocupy.config import ModelConfig, RopeScaling

LLAMA_1B = ModelConfig(  # the public shape of Llama-3.2-1B
    architecture="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_size=64,
    max_context=131072,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 32.0, 8192),
    tied_lm_head=True,
    bos_id=128000,
    eos_ids=(128001, 128009),
    name="tiny",
)


class MemoryCheckpoint(Checkpoint):
    """A checkpoint without a file, after the reader's contract; every value is zero."""

    def __init__(self, config: ModelConfig, damaged: tuple[str, ...] = ()) -> None:
        self.path = Path("made/up.nano")
        self.format = "nanoinfer-2"
        self.config = config
        self.tensors = {
            name: TensorInfo(name, shape, "bfloat16", 2 * int(np.prod(shape)))
            for name, shape in config.tensor_shapes().items()
        }
        self.generation_defaults = GenerationDefaults(temperature=0.6, top_k=20)
        self.damaged = damaged

    def read(self, name: str) -> np.ndarray:
        return np.zeros(self.tensors[name].shape, np.float32)

    def _load_tokenizer(self) -> None:
        return None

    def verify(self) -> Iterator[tuple[str, str | None]]:
        for name in self.tensors:
            yield name, "its checksum differs" if name in self.damaged else None


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd):
    """Gives a function: inspect this checkpoint with these options -> (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "model").touch()

    def run(checkpoint: Checkpoint, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(
            nanocupy.checkpoint.open, "open_checkpoint", lambda path, **kwargs: checkpoint
        )
        code = cli.main(["inspect", "model", *options])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_memory_by_hand() -> None:
    # Llama-3.2-1B: 16 layers, 8 key/value heads of 64, keys and values
    assert fit.kv_bytes_per_token(LLAMA_1B, "bf16") == 16 * 8 * 64 * 2 * 2
    assert fit.kv_bytes_per_token(LLAMA_1B, "fp32") == 16 * 8 * 64 * 2 * 4
    for codes in ("int8", "fp8"):
        assert fit.kv_bytes_per_token(LLAMA_1B, codes) == 16 * 8 * (64 + 2) * 2
    assert LLAMA_1B.num_parameters == 1_235_814_400  # as published
    assert fit.weight_bytes(LLAMA_1B, "bf16") == 2 * 1_235_814_400
    assert fit.weight_bytes(LLAMA_1B, "fp32") == 4 * 1_235_814_400
    linear = 16 * (2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192)
    others = 1_235_814_400 - linear
    assert fit.weight_bytes(LLAMA_1B, "int8") == 2 * others + linear + linear // 128 * 4
    assert fit.weight_bytes(LLAMA_1B, "int4") == 2 * others + linear // 2 + linear // 128 * 8


def test_longest_context_just_fits() -> None:
    config = LLAMA_1B.with_(max_context=1 << 27)
    for dtype, kv in (("bf16", "bf16"), ("fp32", "fp32"), ("int4", "bf16")):
        tokens = fit.longest_context(config, 8 * 2**30, dtype)
        per_token = fit.kv_bytes_per_token(config, kv)
        used = fit.weight_bytes(config, dtype) + tokens * per_token
        assert used <= 0.9 * 8 * 2**30 < used + per_token
    assert fit.longest_context(LLAMA_1B, 80 * 2**30, "bf16") == LLAMA_1B.max_context
    assert fit.longest_context(LLAMA_1B, 2**30, "bf16") == 0


def test_tables_and_json_agree(shown) -> None:
    checkpoint = MemoryCheckpoint(LLAMA_1B)
    code, text, err = shown(checkpoint)
    assert (code, err) == (0, "")
    for words in (
        *("1,235,814,400", "llama3 scaling by 32", "LM head is the embedding", "2.302 GiB"),
        *("32 KiB", "131,072 (all)", "temperature 0.6, top_k 20", "none in the file"),
    ):
        assert words in text
    code, text, _ = shown(checkpoint, "--json", "--tensors", "--verify")
    report = json.loads(text)
    assert report["config"] == LLAMA_1B.to_dict()
    assert report["dtypes"]["bfloat16"]["nbytes"] == 2 * 1_235_814_400
    assert len(report["tensors"]) == len(checkpoint.tensors)
    assert report["verify"] == {"tensors": len(checkpoint.tensors), "damaged": {}}


def test_damage_is_named_and_ends_with_2(shown) -> None:
    checkpoint = MemoryCheckpoint(LLAMA_1B, damaged=("layers.3.k.weight", "final_norm.weight"))
    code, text, err = shown(checkpoint, "--verify")
    assert code == 2
    assert "layers.3.k.weight" in text
    last = err.splitlines()[-1]
    assert "2 of 146 tensors damaged, first layers.3.k.weight: its checksum differs" in last
    code, text, err = shown(checkpoint, "--verify", "--json")
    assert code == 2
    assert json.loads(text)["verify"]["damaged"]["final_norm.weight"] == "its checksum differs"
    assert err.count("\n") == 1
    code, text, err = shown(MemoryCheckpoint(LLAMA_1B), "--verify")
    assert code == 0
    assert "all 146 tensors whole" in text


HOSTILE = "\x1b]0;owned\x07\x1b[2J[bold red]x[/]\r\n\u202egnp\u2028\ud800"


def test_what_a_file_says_cannot_steer_the_terminal(shown) -> None:
    checkpoint = MemoryCheckpoint(LLAMA_1B.with_(name=HOSTILE))
    checkpoint.metadata = {HOSTILE: [HOSTILE]}
    checkpoint.chat_template = HOSTILE
    checkpoint.path = Path(HOSTILE)
    for options in ((), ("--template", "--tensors"), ("--json",)):
        code, text, _ = shown(checkpoint, *options)
        assert code == 0
        assert not set(text) & set("\x1b\x07\r\u202e\u2028\ud800\x9b")
    assert "[bold red]x[/]" in shown(checkpoint)[1]  # shown as it is, not as markup


def test_printable_escapes_and_clips() -> None:
    assert printable("a\x1b\n\u202e\x9bü你") == r"a\x1b\n\u202e\x9bü你"
    assert printable("abcdef", 3) == "abc…"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5 TiB")],
)
def test_binary_bytes(num_bytes: int, text: str) -> None:
    assert binary_bytes(num_bytes) == text


def test_options_reach_the_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd) -> None:
    seen: dict[str, object] = {}

    def record(path: Path, **kwargs: object) -> Checkpoint:
        seen.update(kwargs, path=path)
        return MemoryCheckpoint(LLAMA_1B)

    monkeypatch.setattr(nanocupy.checkpoint.open, "open_checkpoint", record)
    model = tmp_path / "m.bin"
    model.touch()
    options = ["--format", "A", "--kind", "llama2", "--tokenizer", "t.model"]
    assert cli.main(["inspect", str(model), *options]) == 0
    assert seen == {
        "path": model, "legacy_format": "A", "legacy_kind": "llama2", "rope_scaling": None,
        "tokenizer_path": "t.model",
    }  # fmt: skip
