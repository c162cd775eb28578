"""`nanocupy bench startup`: a model file to start from, processes of their own, times by part."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from nanocupy import LLM, cli
from nanocupy.bench.first_token import PARTS, Stopwatch
from nanocupy.bench.model_file import made_up_tokenizer, write_random_model
from nanocupy.bench.shapes import SHAPES, random_checkpoint
from nanocupy.bench.startup import startup
from nanocupy.checkpoint import open_checkpoint
from nanocupy.errors import NanocupyError
from tests.checkpoint.tiny import tiny_config

CONFIG = tiny_config(vocab_size=300, max_context=64, tied_lm_head=True)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "smollm2-135m", CONFIG)


def test_a_made_up_tokenizer_says_any_text() -> None:
    tokenizer = made_up_tokenizer(5000)
    assert tokenizer.vocab_size == 5000
    text = "The capital of France is… 東京\n\x00"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    spellings = {tokenizer.token_bytes(token_id) for token_id in range(5000)}
    assert len(spellings) == 5000
    merged = [s for s in spellings if len(s) > 1]
    assert len(merged) == 5000 - 256
    word = min((s for s in merged if s.isalpha()), key=lambda s: (len(s), s))
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode(word.decode())] == [word]


def test_the_file_is_a_model(tiny_shape: None, tmp_path: Path) -> None:
    path = tmp_path / "model.nano"
    write_random_model("smollm2-135m", "float32", path)
    found, expected = open_checkpoint(path), random_checkpoint("smollm2-135m", "float32")
    assert list(found.tensors) == list(expected.tensors)
    for name in expected.tensors:
        assert np.array_equal(found.read(name), expected.read(name))
    assert LLM(path, device="cpu").tokenizer.vocab_size == 300


def test_parts_within_parts_are_taken_out() -> None:
    moments = iter([1.0, 2.0, 5.0, 6.0, 7.0, 17.0, 20.0, 30.0])
    watch = Stopwatch(lambda: next(moments))

    class Thing:
        def load(self, value):
            return value + 1

    thing = Thing()
    watch.wrap(thing, "load", "load")
    with watch.part("open"):  # 1 to 20
        assert thing.load(1) == 2  # 2 to 5
        with pytest.raises(KeyError), watch.part("load"):  # 6 to 7
            raise KeyError
        with watch.part("open"):  # 17 and 20
            pass
    assert watch.seconds == {"open": 1 + 1 + 10 + 3 + 10, "load": 3 + 1}


def test_shares_of_parts_and_other_threads() -> None:
    moments = iter([float(2**i) for i in range(12)])
    watch = Stopwatch(lambda: next(moments))

    def in_a_thread() -> None:
        with watch.part("device/driver"), watch.part("/driver"):  # 32, 64; 128, 256
            pass

    with watch.part("device"):  # 1
        with watch.part("/arena"), watch.part("/waiting"):  # 2, 4; 8, 16
            pass
        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
        with watch.part("import/cupy"):  # 512 to 1024
            pass
    arena, waiting = (4 - 2) + (16 - 8), 8 - 4
    assert watch.seconds == {
        "device": (2 - 1) + (512 - 16) + (2048 - 1024),
        "device/arena": arena,
        "device/waiting": waiting,
        "import/cupy": 512,
    }
    assert watch.shares() == {"import/cupy": 512, "device/arena": arena, "device/waiting": waiting}
    assert list(watch.shares()) == ["import/cupy", "device/arena", "device/waiting"]
    whole = {"device": watch.seconds["device"] + arena + waiting, "import": 512}
    assert watch.parts() == dict.fromkeys(PARTS, 0) | whole
    assert watch.beside == {"driver": (256 - 32) + (128 - 64)}


def test_what_is_timed_is_there() -> None:
    """Names that a change would leave behind."""
    pytest.importorskip("cupy")
    code = (
        "from nanocupy.bench.first_token import Stopwatch, _watch_device\n"
        "watch = Stopwatch()\n"
        "with watch.part('device'):\n"
        "    _watch_device(watch)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command(tiny_shape: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["bench", "startup", "--device", "cpu", "--max-context", "48", "--repeats", "1"]
    assert cli.main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "startup/smollm2-135m/float32"
    assert result["unit"] == "s"
    for parts, seconds in (("parts", result["value"]), ("cold_parts", result["cold_s"])):
        assert list(result[parts]) == list(PARTS)
        assert 0.9 * seconds <= sum(result[parts].values()) <= seconds + 1e-3
        assert all(result[parts][name] > 0 for name in ("start", "import", "open", "load"))
        assert result[parts]["compile"] == 0
    assert "first token/encode" in result["shares"]
    assert result["shares"]["open/engine"] <= result["parts"]["open"]
    assert result["beside"] == {}
    write_random_model("smollm2-135m", "float32", tmp_path / "own.nano")
    assert result["bytes"] == (tmp_path / "own.nano").stat().st_size
    assert cli.main([*argv, "--model", str(tmp_path / "own.nano")]) == 0
    table = capsys.readouterr().out
    assert "startup/own/float32 on cpu" in table
    assert table.index("first token") < table.index("to the first token")
    assert cli.main([*argv, "--model", "x", "--shape", "smollm2-135m"]) == 2
    assert "give --model or --shape, not both" in capsys.readouterr().err


def test_a_start_that_fails_says_why(tiny_shape: None, tmp_path: Path) -> None:
    write_random_model("smollm2-135m", "float32", tmp_path / "own.nano")
    with pytest.raises(NanocupyError, match=r"the start failed: .*this model takes 2 to 64 tokens"):
        startup(tmp_path / "own.nano", "own", "float32", {"device": "cpu", "max_context": 65})
