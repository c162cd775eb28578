"""`nanocupy bench speculative`, on a tiny shape."""

from __future__ import annotations

import json

import pytest

from nanocupy import cli
from nanocupy.bench import measure
from nanocupy.bench.shapes import SHAPES
from nanocupy.bench.speculative import ForcedAcceptance
from tests.checkpoint.tiny import tiny_config

CONFIG = tiny_config(max_context=512, tied_lm_head=True)
DRAFT = tiny_config(max_context=512, vocab_size=80, num_layers=1, tied_lm_head=True)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "smollm2-135m", CONFIG)
    monkeypatch.setitem(SHAPES, "qwen2.5-0.5b", DRAFT)
    monkeypatch.setattr("nanocupy.bench.speculative.DECODE_OUTPUT", 40)
    monkeypatch.setattr("nanocupy.bench.speculative.DECODE_PROMPT", 12)
    monkeypatch.setattr(measure, "DECODE_OUTPUT", 40)


def bench(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict]:
    argv = ("bench", "speculative", "--device", "cpu", "--repeats", "1", "--json", *argv)
    assert cli.main(list(argv)) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_guesses_that_cost_nothing(capsys):
    found = bench(capsys, "--batch", "1,3", "--acceptance", "0,0.5,1", "--draft-tokens", "4")
    names = [result["name"] for result in found]
    start = "speculative/smollm2-135m/free/float32/b"
    assert names == [
        f"{start}{batch}/{kind}"
        for batch in (1, 3)
        for kind in ("off", "k4/a0", "k4/a0.5", "k4/a1")
    ]
    for off, none, half, all_ in (found[:4], found[4:]):
        assert off["x_off"] == 1
        assert off["tokens_per_forward"] == none["tokens_per_forward"] == 1
        assert 1.3 < half["tokens_per_forward"] < 3
        assert 4 < all_["tokens_per_forward"] <= 5  # the last step has less to guess
        assert all_["x_step"] > 0


def test_a_draft_model_and_the_policy(capsys):
    found = bench(
        capsys, "--draft-shape", "qwen2.5-0.5b", "--acceptance", "0.8", "--draft-tokens", "3"
    )
    assert [r["name"].rpartition("float32/")[2] for r in found] == ["b1/off", "b1/k3/a0.8"]
    assert found[1]["draft_ms"] > 0
    assert found[1]["tokens_per_forward"] > 1.5
    (_, adaptive) = bench(capsys, "--acceptance", "0", "--adaptive")
    assert adaptive["name"].endswith("/adaptive/a0")


def test_for_people(capsys):
    assert cli.main(["bench", "speculative", "--device", "cpu", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "x off" in out
    assert "speculative/smollm2-135m/free/float32 on cpu" in out
    assert [name in out for name in ("b1/off", "b1/k5/a0.6", "b1/k5/a0.8")] == [True] * 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--acceptance", "1.1"], "must be numbers from 0 to 1"),
        (["--acceptance", "x"], "must be numbers from 0 to 1"),
        (["--draft-tokens", "8"], "draft_tokens is 8"),
        (["--speculate", "ngram"], "speculate is ngram; leave it out here: --draft-shape says"),
        (["--draft-model", "a.nano"], "draft_model is a.nano; leave it out here: --draft-shape"),
    ],
)
def test_refusals(argv, message, capsys):
    assert cli.main(["bench", "speculative", "--device", "cpu", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("what", ["decode", "prefill --tokens 8", "throughput"])
def test_other_benches_open_no_draft_model(what, capsys):
    argv = ["bench", *what.split(), "--device", "cpu", "--draft-model", "small.nano"]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "draft_model is 'small.nano', but this command opens no draft model; leave it out" in err


def test_a_coin_decides():
    toss = ForcedAcceptance(0.7)
    counts = [toss((0,) * 50, (1,) * 51) for _ in range(4000)]
    assert sum(counts) / len(counts) == pytest.approx(0.7 / 0.3, rel=0.06)
    assert ForcedAcceptance(1.0)((5, 6), (0, 0, 0)) == 2
