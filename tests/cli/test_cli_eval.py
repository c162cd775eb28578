"""`nanocupy eval`, and what it rests on, on a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanocupy import LLM, cli
from nanocupy.engine.batch import build_batch
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import ScheduledRequest
from nanocupy.errors import CheckpointError, RequestError
from nanocupy.evaluation import TextScore, score_text, windows
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.model.load import load_numpy_weights
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.cli.test_cli_generate import byte_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and nobody minds. Çe n'est pas grave.\n" * 3


@pytest.fixture(scope="module")
def checkpoint() -> TinyCheckpoint:
    config = tiny_config(vocab_size=260, max_context=256, bos_id=256, eos_ids=(258,), name="tiny")
    return TinyCheckpoint(config, tokenizer=byte_tokenizer())


@pytest.fixture(scope="module")
def model(checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.nano"
    write_nanoinfer2(checkpoint, path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


@given(st.integers(0, 300), st.integers(2, 60), st.data())
def test_windows_score_every_token_once(num_tokens, window, data) -> None:
    overlap = data.draw(st.integers(1, window - 1))
    scored = []
    for start, end, first in windows(num_tokens, window, overlap):
        assert 0 <= start < first < end <= num_tokens
        assert end - start <= window
        assert first - start >= min(overlap, first)
        scored += range(first, end)
    assert scored == list(range(1, num_tokens))


def log_probabilities(checkpoint: TinyCheckpoint, ids: list[int]) -> np.ndarray:
    """[len(ids), V] after each token, in float64 from one forward's logits."""
    limits = RunnerLimits(80, 4, 256, 256, 256)
    runner = NumpyRunner(checkpoint.config, load_numpy_weights(checkpoint), limits)
    request = Request("a", list(ids), SamplingParams(), 0, len(ids) + 1)
    request.block_ids = list(range(1, 2 + len(ids) // 4))
    batch = build_batch(
        [ScheduledRequest(request, len(ids), True)], block_size=4,
        table_width=getattr(runner, "table_width", None),
    )  # fmt: skip
    batch = type(batch)(**vars(batch) | {"sample_rows": np.arange(len(ids), dtype=np.int32)})
    logits = runner.logits(batch).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_one_window_is_the_forward_itself(model: Path, checkpoint: TinyCheckpoint) -> None:
    llm = LLM(model, device="cpu")
    ids = llm.encode(TEXT)[:120]
    wanted = log_probabilities(checkpoint, ids)[:-1]
    score = score_text(llm, ids, 120, 60)
    assert np.allclose(score.logprobs, wanted[np.arange(119), ids[1:]], atol=1e-4)
    assert score.best_ids == wanted.argmax(-1).tolist()
    assert score.perplexity == pytest.approx(math.exp(-np.mean(score.logprobs)))
    seen: list[tuple[int, int]] = []
    parts = score_text(llm, ids, 40, 10, lambda *numbers: seen.append(numbers))
    assert parts.logprobs[:39] == pytest.approx(score.logprobs[:39], abs=1e-4)
    # The second window begins 10 tokens before those that it scores.
    wanted = log_probabilities(checkpoint, ids[30:70])
    assert parts.logprobs[39:69] == pytest.approx(
        [wanted[i - 31, ids[i]] for i in range(40, 70)], abs=1e-4
    )
    assert seen[-1] == (119, 119)


def test_agreement() -> None:
    one, other = TextScore([-1.0] * 4, [1, 2, 3, 4]), TextScore([-2.0] * 4, [1, 0, 3, 0])
    assert one.agreement(one) == 1
    assert one.agreement(other) == other.agreement(one) == 0.5
    assert TextScore([-math.inf, -1.0], [0, 0]).perplexity == math.inf


def test_the_table_and_the_json(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", "-m", str(model), "--text", str(text), "--device", "cpu", "--tokens", "100"]
    assert cli.main([*argv, "--against", "chunk_size=7"]) == 0
    out = capsys.readouterr().out
    assert "chunk_size=7" in out
    assert "+0.00%" in out
    assert "100.00%" in out
    assert cli.main([*argv, "--json", "--against", "chunk_size=7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["tokens"] for run in found["runs"]] == [99, 99]
    assert found["same_choice"] == 1
    assert found["runs"][0]["perplexity"] == pytest.approx(found["runs"][1]["perplexity"])
    assert cli.main([*argv, "--json"]) == 0
    assert "same_choice" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--against", "chunk_size"], "NAME=VALUE"),
        (["--against", "speed=9"], "speed"),
        (["--against", "chunk_size=0"], "chunk_size is 0"),
        (["--window", "400"], "window is"),
        (["--window", "40", "--overlap", "40"], "overlap is 40"),
    ],
)
def test_bad_options(model: Path, text: Path, more, says, capsys) -> None:
    # The text is longer than the model's context, so that the window is what was asked for.
    text.write_text(TEXT * 3, "utf-8")
    argv = ["eval", "-m", str(model), "--text", str(text), "--device", "cpu", *more]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "says"), [(b"\xff\xfe", "not UTF-8"), (b"", "two are the least"), (None, "cannot")]
)
def test_bad_texts(model: Path, tmp_path: Path, content, says, capsys) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["eval", "-m", str(model), "--text", str(path), "--device", "cpu"]) == 2
    assert says in capsys.readouterr().err


def test_a_model_without_numbers(model: Path) -> None:
    llm = LLM(model, device="cpu")
    weights = llm._engine.runner.weights
    llm._engine.runner.weights = {**weights, "embed.weight": weights["embed.weight"] * np.nan}
    with pytest.raises(CheckpointError, match=r"^the model computes NaN or infinite logits: "):
        score_text(llm, list(range(20)), 20, 10)
    with pytest.raises(RequestError, match="two are the least"):
        score_text(llm, [5], 20, 10)
