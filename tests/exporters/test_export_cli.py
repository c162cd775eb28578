"""The export commands: sources of every kind, one line at the end, and death at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanocupy.checkpoint import open_checkpoint
from nanocupy.checkpoint.base import dequantized
from nanocupy.cli import main
from nanocupy.config import ModelConfig
from nanocupy.exporters.legacy import write_legacy
from tests.checkpoint.legacy_files import layout_b
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

HF_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    **{part: f"self_attn.{part}_proj" for part in "qkvo"},
}
HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
QWEN3: dict[str, Any] = {
    "architecture": "qwen3",
    "has_qk_norm": True,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "head_size": 12,
}


def hf_name(name: str) -> str:
    special = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
    *prefix, part, ending = name.split(".")
    if not prefix:
        return f"{special[part]}.{ending}"
    return f"model.layers.{prefix[1]}.{HF_PARTS[part]}.{ending}"


def hf_folder(folder: Path, model: TinyCheckpoint) -> Path:
    """The model as Hugging Face would keep it, with no tokenizer."""
    from safetensors.numpy import save_file

    c: ModelConfig = model.config
    folder.mkdir()
    save_file(
        {hf_name(n): np.asarray(model.read(n)) for n in model.tensors},
        folder / "model.safetensors",
    )
    settings = {
        "architectures": [HF_CLASSES[c.architecture]],
        "model_type": c.architecture,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_size,
        "max_position_embeddings": c.max_context,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied_lm_head,
        "hidden_act": "silu",
        "bos_token_id": c.bos_id,
        "eos_token_id": c.eos_ids[0],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def run(*argv: object) -> int:
    return main([str(a) for a in argv])


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("export-llama", {}),
        ("export-qwen", {"architecture": "qwen2", "has_qkv_bias": True, "tied_lm_head": True}),
        ("export-qwen", QWEN3),
    ],
)
def test_folders_become_one_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    changes: dict[str, Any],
    dtype: str | None,
) -> None:
    model = TinyCheckpoint(tiny_config(**changes), dtype="float16")
    source, out = hf_folder(tmp_path / "hf", model), tmp_path / "m.nano"
    assert run(command, source, out, *(("--dtype", dtype) if dtype else ())) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: ")
    assert captured.out.count("\n") == 1
    with open_checkpoint(out) as opened:
        for name in model.tensors:
            np.testing.assert_allclose(
                np.asarray(opened.read(name), np.float32),
                np.asarray(model.read(name), np.float32),
                rtol=2**-8,
            )
        stored = {i.dtype for i in opened.tensors.values() if len(i.shape) == 2}
        assert stored == {dtype or "float16"}


def test_folders_become_legacy_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, changes, form in (("llama", {}, "A"), ("qwen", QWEN3, "C")):
        model = TinyCheckpoint(tiny_config(**changes))
        source, out = hf_folder(tmp_path / name, model), tmp_path / f"{name}.bin"
        assert run(f"export-{name}", source, out, "--legacy") == 0
        assert "note: a legacy file carries no tokenizer" in capsys.readouterr().err
        with open_checkpoint(out) as opened:
            assert opened.format == f"nanoinfer-legacy-{form}"
            np.testing.assert_array_equal(
                opened.read("layers.1.k.weight"), model.read("layers.1.k.weight")
            )


def test_legacy_files_become_nanoinfer_2(tmp_path: Path) -> None:
    model = TinyCheckpoint(tiny_config())
    write_legacy(model, tmp_path / "a.bin", layout="A")
    out = tmp_path / "m.nano"
    options = ("--kind", "llama3", "--rope-scaling", "llama3:8", "--format", "A")
    assert run("export-llama", tmp_path / "a.bin", out, *options) == 0
    opened = open_checkpoint(out)
    assert (opened.config.rope_theta, opened.config.rope_scaling.factor) == (5e5, 8.0)
    np.testing.assert_array_equal(opened.read("layers.0.q.weight"), model.read("layers.0.q.weight"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("export-qwen", "llama", "OUT"), "architecture is llama, not Qwen; use export-llama"),
        (("export-llama", "qwen", "OUT"), "architecture is qwen2, not LLaMA's; use export-qwen"),
        (("export-gguf", "llama", "OUT"), "not a GGUF file but huggingface"),
        (("export-qwen", "qwen", "OUT", "--legacy"), "it has QKV bias"),
        (("export-llama", "llama", "OUT", "--legacy-layout", "C"), "it has no q and k norms"),
        (("export-llama", "llama", "OUT", "--legacy", "--dtype", "float16"), "--dtype is float16"),
        (("export-llama", "llama", "OUT", "--dtype", "int8"), "int8"),
        (("export-llama", "llama", "OUT", "--kind", "llama2"), "(legacy_kind) is for a legacy"),
        (("export-llama", "llama", "OUT", "--rope-scaling", "x"), "(rope_scaling) is for a legacy"),
        (("export-llama", "llama", "llama"), "not a regular file"),
        (("export-llama", "./none", "OUT"), "no such file"),
    ],
)
def test_mistakes_end_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    hf_folder(tmp_path / "llama", TinyCheckpoint(tiny_config()))
    qwen2 = tiny_config(architecture="qwen2", has_qkv_bias=True)
    hf_folder(tmp_path / "qwen", TinyCheckpoint(qwen2))
    assert run(*argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("nanocupy: error: ")
    assert words in error
    assert sorted(os.listdir(tmp_path)) == ["llama", "qwen"]


def test_groups_that_straddle_rows(tmp_path: Path) -> None:
    """A legacy file's q and k can then only be read as floats; the rest keeps its codes."""
    model = TinyCheckpoint(tiny_config(hidden_size=96, intermediate_size=160, head_size=24))
    (tmp_path / "m.bin").write_bytes(layout_b(model, 64))
    out = tmp_path / "m.nano"
    assert run("export-llama", tmp_path / "m.bin", out) == 0
    with open_checkpoint(tmp_path / "m.bin") as source, open_checkpoint(out) as opened:
        assert opened.tensors["layers.0.q.weight"].dtype == "float16"
        assert opened.tensors["layers.1.v.weight"].dtype == "int8"
        for name, info in opened.tensors.items():
            want, found = dequantized(source.read(name)), dequantized(opened.read(name))
            if info.dtype == "float16":
                want = want.astype(np.float16)
            np.testing.assert_array_equal(found, want, name)
        assert [problem for _, problem in opened.verify() if problem] == []
    assert run("quantize", tmp_path / "m.bin", "--to", "int4", "--out", out) == 0


# A source whose every tensor takes its time; "reading" says that the export is under way.
SLOW_EXPORT = """
import sys, time
import nanocupy.checkpoint
from nanocupy.cli import main
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

class Slow(TinyCheckpoint):
    def read(self, name):
        if name.startswith("layers.1."):
            print("reading", flush=True)
            time.sleep(30)
        return super().read(name)

nanocupy.checkpoint.open_checkpoint = lambda path, **options: Slow(tiny_config())
sys.exit(main(["export-llama", sys.argv[1], sys.argv[2]]))
"""


@pytest.mark.parametrize(
    ("signum", "code", "left_files"),
    [(signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 0), (signal.SIGKILL, -9, 1)],
)
def test_killed_exports_leave_no_file_of_that_name(
    tmp_path: Path, signum: int, code: int, left_files: int
) -> None:
    out = tmp_path / "m.nano"
    out.write_bytes(b"the export before")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_EXPORT, str(tmp_path), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    assert any(name.endswith(".partial") for name in os.listdir(tmp_path))
    start_s = time.monotonic()
    process.send_signal(signum)
    process.communicate()
    assert process.returncode == code
    assert time.monotonic() - start_s < 5
    # What SIGKILL leaves is hidden and is no model's name.
    rest = [name for name in os.listdir(tmp_path) if name != "m.nano"]
    assert len(rest) == left_files
    assert all(name.startswith(".") for name in rest)
    assert out.read_bytes() == b"the export before"
