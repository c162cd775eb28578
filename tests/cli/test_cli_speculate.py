"""Guesses from the command line and the Python API: the same text, told counts, clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanocupy import LLM, SamplingParams, cli
from nanocupy.engine import draft_backend
from nanocupy.engine.config import EngineConfig
from nanocupy.errors import CapacityError, ConfigError
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.speculation.policy import DraftPolicy
from nanocupy.tokenizer import tokenizer_from_gguf
from nanocupy.tokenizer.byte_text import BYTE_TO_CHAR
from nanocupy.tokenizer.compare import first_difference
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config

PROMPT = "one two three one two three one two"
PARAMS = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def byte_tokenizer(changes: dict[int, str] | None = None, more: tuple[str, ...] = ()):
    """Every byte a token, and some control tokens."""
    tokens = [*(BYTE_TO_CHAR[b] for b in range(256)), "<|endoftext|>", "<|im_end|>", *more]
    for token_id, token in (changes or {}).items():
        tokens[token_id] = token
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 256 + [3] * (len(tokens) - 256),
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": 256,
        }
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, drafts for it that are padded to other sizes, and some that do not fit."""
    folder = tmp_path_factory.mktemp("models")

    def write(name: str, tokenizer, seed: int = 0, vocab: int = 264, **changes) -> None:
        config = tiny_config(vocab_size=vocab, max_context=128, eos_ids=(256,), **changes)
        write_nanoinfer2(TinyCheckpoint(config, seed=seed, tokenizer=tokenizer), folder / name)

    write("model.nano", byte_tokenizer())
    write("same.nano", byte_tokenizer(), vocab=264)
    write("small.nano", byte_tokenizer(more=("<|tool|>",)), 5, 272, num_layers=1, hidden_size=16)
    write("another.nano", byte_tokenizer({65: BYTE_TO_CHAR[66], 66: BYTE_TO_CHAR[65]}))
    write("mute.nano", None)
    return folder


def generate(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str]:
    status = cli.main(["generate", "--device", "cpu", "--temperature", "0", "--raw", *argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["generate", "--device", "cpu", *argv, "Hello"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_the_same_text_and_a_line_that_tells(models, capsys, monkeypatch):
    # A tiny model's step takes as long with guesses as without, so that they pay by any measure.
    monkeypatch.setattr(draft_backend, "make_policy", lambda _, most, runner: DraftPolicy(most))
    argv = ["-m", str(models / "model.nano"), "--max-tokens", "60", PROMPT]
    wanted, err = generate(capsys, *argv)
    assert "guesses" not in err
    for more in (
        ["--speculate", "ngram"],
        ["--draft-model", str(models / "small.nano")],
        ["--draft-model", str(models / "same.nano"), "--speculate", "draft", "--draft-tokens", "7"],
    ):
        out, err = generate(capsys, *argv, *more)
        assert out == wanted
        assert "guesses: proposed " in err
    assert "(100 %)" in err  # of a draft that is the model itself
    out, err = generate(capsys, *argv, "--draft-model", "nowhere.nano", "--speculate", "off")
    assert out == wanted
    assert "guesses" not in err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_flags_are_in_the_help(command, capsys):
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--speculate" in out
    assert "--draft-model" in out


@pytest.mark.parametrize("stop", ["e", "wo", "xyz"])
def test_stop_strings_and_samples(models, stop, monkeypatch):
    monkeypatch.setattr(draft_backend, "make_policy", lambda _, most, runner: DraftPolicy(most))
    path = models / "model.nano"
    plain = LLM(path, device="cpu")
    text = plain.generate(PROMPT, PARAMS).text
    stop = {"e": text[9], "wo": text[20:22], "xyz": "xyz"}[stop]
    for params in (
        PARAMS.with_(stop=(stop,)),
        PARAMS.with_(stop=(stop,), n=3, temperature=0.4, seed=1, top_k=3),
    ):
        wanted = plain.generate([PROMPT, "ab ab ab"], params)
        for options in ({"speculate": "ngram"}, {"draft_model": str(models / "same.nano")}):
            llm = LLM(path, device="cpu", draft_tokens=7, **options)
            got = llm.generate([PROMPT, "ab ab ab"], params)
            for a, b in zip(got, wanted, strict=True):
                assert [(s.text, s.token_ids, s.finish_reason) for s in a.samples] == [
                    (s.text, s.token_ids, s.finish_reason) for s in b.samples
                ]
            assert llm.speculation.num_proposed
            pool = llm._engine.pool
            assert pool.num_free == pool.num_blocks - 1


def test_refusals(models, capsys):
    model = ["-m", str(models / "model.nano")]
    assert "draft_tokens is 0; it must be a whole number from 1 to 7" in refusal(
        capsys, *model, "--speculate", "ngram", "--draft-tokens", "0"
    )
    assert "draft_tokens is 1000" in refusal(capsys, *model, "--draft-tokens", "1000")
    assert "draft_model names no model" in refusal(capsys, *model, "--speculate", "draft")
    assert "nowhere.nano: no such file" in refusal(capsys, *model, "--draft-model", "nowhere.nano")
    err = refusal(capsys, *model, "--draft-model", str(models / "another.nano"))
    assert "another tokenizer" in err
    assert "id 65 is 'A' in the one and 'B' in the other" in err
    assert "has no tokenizer" in refusal(capsys, *model, "--draft-model", str(models / "mute.nano"))


def test_tokenizers_are_compared_by_what_ids_mean():
    one = byte_tokenizer()
    assert first_difference(one, byte_tokenizer()) is None
    assert first_difference(one, byte_tokenizer(more=("<|a|>", "<|b|>"))) is None
    assert first_difference(byte_tokenizer(more=("<|a|>",)), one) is None
    renamed = byte_tokenizer({257: "<|end|>"})
    assert "id 257 is '<|im_end|>' in the one" in first_difference(one, renamed)
    assert "id 258 is '<|a|>' in the one and '<|b|>'" in first_difference(
        byte_tokenizer(more=("<|a|>",)), byte_tokenizer(more=("<|b|>",))
    )


def test_memory_is_shared_or_refused():
    model, draft = tiny_config(num_layers=6), tiny_config(num_layers=2)
    config = EngineConfig(cpu_cache_share=0.4)
    one, other = draft_backend.cpu_shares(config, model, draft, 1 << 30)
    assert (one.cpu_cache_share, other.cpu_cache_share) == pytest.approx((0.3, 0.1))
    num_bytes = 4 * (model.num_parameters + draft.num_parameters)
    draft_backend.cpu_shares(config, model, draft, num_bytes)
    with pytest.raises(CapacityError, match=r"weights of both models take .* for the draft model"):
        draft_backend.cpu_shares(config, model, draft, num_bytes - 1)


def test_a_running_engine_keeps_its_proposer(models):
    llm = LLM(models / "model.nano", device="cpu", speculate="ngram")
    with pytest.raises(ConfigError, match="speculate is fixed at start"):
        llm.configure(speculate="off")
