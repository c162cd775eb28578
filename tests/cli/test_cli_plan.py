"""`nanocupy plan`: bytes that can be counted by hand, and one line for what cannot be planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanocupy import cli
from nanocupy.bench.shapes import SHAPES
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

CARD = ("--arch", "sm_90a", "--memory", "80")
LLAMA = SHAPES["llama-3.1-8b"]


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert cli.main(["plan", *CARD, "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("weights", ["auto", "int8", "int4", "fp8"])
def test_bytes_of_weights_and_cache(
    capsys: pytest.CaptureFixture[str], weights: str, kv_dtype: str
) -> None:
    argv = ["--shape", "llama-3.1-8b", "--max-num-seqs", "64"]
    found = planned(capsys, *argv, "--weight-format", weights, "--kv-cache-dtype", kv_dtype)
    owners = found["bytes_by_owner"]
    ends = 2 * LLAMA.vocab_size * LLAMA.hidden_size
    in_layers = LLAMA.num_parameters - ends - (2 * LLAMA.num_layers + 1) * LLAMA.hidden_size
    others = 2 * (LLAMA.num_parameters - in_layers)
    # Codes, and 4 bytes for each 128 inputs; all widths of this model are multiples of 128.
    of_layers = {"auto": 2.0, "int4": 0.5 + 4 / 128}.get(weights, 1 + 4 / 128) * in_layers
    assert owners["weights"] == others + of_layers
    row = 2 * LLAMA.head_size if kv_dtype == "auto" else LLAMA.head_size + 2
    token = 2 * LLAMA.num_layers * LLAMA.num_kv_heads * row
    # The null block has 16 tokens too.
    assert owners["kv cache"] == token * (found["cache_tokens"] + 16)
    # All that may be taken is, but for less than two blocks and gaps.
    assert 0 <= 0.9 * 80e9 - found["total_bytes"] < 4e6


def test_a_tied_matrix_of_two_types_is_there_twice(capsys: pytest.CaptureFixture[str]) -> None:
    shape = SHAPES["llama-3.2-1b"]
    argv = ["--shape", "llama-3.2-1b"]
    one = planned(capsys, *argv)["bytes_by_owner"]["weights"]
    found = planned(capsys, *argv, "--lm-head-dtype", "float32")
    assert (found["embed_dtype"], found["lm_head_dtype"]) == ("bfloat16", "float32")
    # And the norm before the head is in 32 bits too.
    more = 4 * shape.vocab_size * shape.hidden_size + 2 * shape.hidden_size
    assert found["bytes_by_owner"]["weights"] == one + more


def test_of_a_file_as_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tiny_config(head_size=64, num_heads=2, num_kv_heads=1, max_context=96)
    write_nanoinfer2(TinyCheckpoint(config), tmp_path / "tiny.nano")
    # All that 16 sequences can have, as there is room for it.
    assert cli.main(["plan", *CARD, "-m", str(tmp_path / "tiny.nano")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("sm_90a, 74.51 GiB free")
    assert "the cache holds 1,536 tokens in bfloat16, for 16 sequences of up to 96\n" in out
    assert [line.split()[0] for line in out.splitlines() if "MiB" in line or "KiB" in line]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (CARD, "give either --model or --shape"),
        ((*CARD, "--shape", "llama-3.1-8b", "--device", "cpu"), "device is cpu; a plan is of a"),
        (("--arch", "sm_52", "--memory", "8", "--shape", "qwen3-0.6b"), "'sm_52' is not known"),
        (
            ("--arch", "sm_90a", "--memory", "8", "--shape", "llama-3.1-8b"),
            "weights and workspaces",
        ),
        (
            ("--arch=sm_86", "--memory=24", "--shape=qwen3-0.6b", "--kv-cache-dtype=fp8"),
            "kv_cache_dtype is fp8, which cards from compute capability 8.9 on have",
        ),
        ((*CARD, "--shape", "qwen3-0.6b", "--max-context", "99999999"), "max_context is 99999999"),
    ],
)
def test_mistakes_end_in_one_line(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    assert cli.main(["plan", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("nanocupy: error: ")
    assert words in err


def test_without_a_gpu_it_says_what_to_give(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanocupy.cuda import probe

    class Absent:
        usable, reason = False, "no NVIDIA driver"

    monkeypatch.setattr(probe, "find_cuda", lambda: Absent)
    assert cli.main(["plan", "--shape", "qwen3-0.6b"]) == 2
    message = "there is no GPU to plan for: no NVIDIA driver; give --arch and --memory"
    assert message in capsys.readouterr().err
