"""`nanocupy bench` and the public shapes it runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nanocupy import cli
from nanocupy.bench import measure
from nanocupy.bench.shapes import SHAPES, random_checkpoint
from nanocupy.cli.bench import SHAPE_NAMES
from nanocupy.errors import ConfigError
from tests.checkpoint.tiny import tiny_config


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "smollm2-135m", tiny_config(max_context=512))


def test_shapes_have_the_size_their_names_say() -> None:
    billions = {name: config.num_parameters / 1e9 for name, config in SHAPES.items()}
    assert list(billions) == list(SHAPE_NAMES)
    # Parameters as the models' cards give them.
    expected = {
        "smollm2-135m": 0.135, "qwen2.5-0.5b": 0.494, "qwen3-0.6b": 0.596, "llama-3.2-1b": 1.24,
        "tinyllama-1.1b": 1.10, "qwen2.5-7b": 7.62, "qwen3-8b": 8.19, "llama-3.1-8b": 8.03,
    }  # fmt: skip
    assert billions == pytest.approx(expected, rel=6e-3)


def test_random_weights_are_the_same_again_and_never_zero(tiny_shape: None) -> None:
    one, two = (random_checkpoint("smollm2-135m", "bfloat16") for _ in range(2))
    for name in one.tensors:
        assert np.array_equal(one.read(name), two.read(name))
        assert np.count_nonzero(one.read(name)) > 0.99 * one.read(name).size
    assert not np.array_equal(one.read("layers.0.gate.weight"), one.read("layers.0.up.weight"))


def test_decode_and_prefill_report(
    tiny_shape: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "DECODE_OUTPUT", 6)
    argv = ["--device", "cpu", "--repeats", "2", "--json"]
    assert cli.main(["bench", "decode", "--batch", "1,3", *argv]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == [
        "decode/smollm2-135m/float32/b1",
        "decode/smollm2-135m/float32/b3",
    ]
    assert all(line["value"] > 0 and line["unit"] == "ms" for line in lines)
    # Weights are read once whatever the batch; keys and values once a sequence.
    config = SHAPES["smollm2-135m"]
    kv_bytes = 2 * config.num_layers * config.kv_size * (128 + 3) * 4
    assert lines[1]["bytes"] - lines[0]["bytes"] == 2 * kv_bytes
    assert cli.main(["bench", "prefill", "--tokens", "40", *argv[:-1]]) == 0
    assert "prefill/smollm2-135m/float32/t40" in capsys.readouterr().out


def test_what_does_not_fit_is_refused(tiny_shape: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "prefill", "--device", "cpu", "--tokens", "512"]) == 2
    assert "takes 512 tokens, not 513" in capsys.readouterr().err
    assert cli.main(["bench", "decode", "--batch", "0"]) == 2
    assert "'0' must be whole numbers from 1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="shape 'x' is not known"):
        random_checkpoint("x")
