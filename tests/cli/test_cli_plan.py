"""`nanocupy plan`: bytes that can be counted by hand, and one line for what cannot be planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanocupy import cli
from nanocupy.bench.shapes import SHAPES
from nanocupy.cli.console import binary_bytes
from nanocupy.cli.plan import Card, describe_plan
from nanocupy.cuda.cards import common_cards
from nanocupy.engine.backend import device_model
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.runner import RunnerLimits
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.shim.device import ShimDevice

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
    report = planned(capsys, "-m", str(tmp_path / "tiny.nano"))
    rows = [line.split() for line in out.splitlines()[1:]]
    found = {
        " ".join(row[:-2]): " ".join(row[-2:]) for row in rows if row[-1:] in (["KiB"], ["MiB"])
    }
    owners = report["bytes_by_owner"] | {"in all": report["total_bytes"]}
    assert found == {owner: binary_bytes(num_bytes) for owner, num_bytes in owners.items()}


SETTINGS = [
    (), ("--no-whole-steps",), ("--two-streams",), ("--lm-head-dtype", "float32"),
    ("--weight-format", "int8"), ("--kv-cache-dtype", "int8"), ("--block-size", "8"),
]  # fmt: skip


@pytest.mark.parametrize("argv", SETTINGS, ids=" ".join)
def test_it_is_the_plan_that_a_start_makes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: tuple[str, ...]
) -> None:
    sizes = {"head_size": 64, "hidden_size": 128, "intermediate_size": 256}
    config = tiny_config(num_heads=2, num_kv_heads=1, max_context=96, **sizes)
    checkpoint = TinyCheckpoint(config)
    write_nanoinfer2(checkpoint, tmp_path / "tiny.nano")
    found = planned(capsys, "-m", str(tmp_path / "tiny.nano"), *argv)
    names = {a[2:].replace("-", "_"): b for a, b in zip(argv[::2], argv[1::2], strict=False)}
    flags = {"--no-whole-steps": {"whole_steps": False}, "--two-streams": {"two_streams": True}}
    if argv and argv[0] in flags:
        names = flags[argv[0]]
    settings = EngineConfig(**{n: int(v) if n == "block_size" else v for n, v in names.items()})
    card = common_cards((9, 0))[-1]
    traits = replace(card, whole_steps=settings.whole_steps)
    model, of_device, _ = device_model(checkpoint, settings, traits)
    limits = RunnerLimits(
        found["cache_blocks"] + 1, settings.block_size, 96, settings.max_step_tokens,
        settings.max_num_seqs,
    )  # fmt: skip
    runner = DeviceRunner(model.config, ShimDevice(traits), limits, of_device)
    assert found["bytes_by_owner"] == runner.bytes_by_owner()
    assert found["total_bytes"] == runner.plan.total_bytes


def test_whole_steps_and_their_room(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--shape", "qwen3-0.6b"]
    whole, ops = planned(capsys, *argv), planned(capsys, *argv, "--no-whole-steps")
    for owner in ("workspaces", "batch"):
        assert whole["bytes_by_owner"][owner] > ops["bytes_by_owner"][owner]


def test_a_head_in_codes_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.engine.test_quantized_weights import QuantizedCheckpoint

    for head, wanted in (("auto", "int8"), ("float16", "float16")):
        card = Card("a card", common_cards((9, 0))[-1], 80 << 30)
        settings = EngineConfig(dtype="bfloat16", lm_head_dtype=head)
        checkpoint = QuantizedCheckpoint({"lm_head": ("int8", 32)})
        assert describe_plan(checkpoint, settings, card)["lm_head_dtype"] == wanted


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
