"""What goes wrong with one request is that one's alone: everybody else's tokens stay the same."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from nanocupy import LLM, SamplingParams
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.results import StepOutput
from nanocupy.engine.runner import RunnerLimits
from nanocupy.errors import CheckpointError, RequestError
from nanocupy.evaluation import score_text
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from nanocupy.model.load import load_numpy_weights
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.cli.test_cli_generate import TEMPLATE, byte_tokenizer

CONFIG = tiny_config(max_context=96)
BAD_TOKEN = 47
# No request says the bad token by itself.
GREEDY = SamplingParams(
    temperature=0, max_tokens=9, ignore_eos=True, logit_bias={BAD_TOKEN: -100.0}
)
PROMPTS = [np.random.default_rng(n).integers(0, 47, 5 + 4 * n).tolist() for n in range(5)]
BAD_PROMPT = [*PROMPTS[2], BAD_TOKEN, 5, 6, 7, 8]


def damaged(weights, token_id: int = BAD_TOKEN, value: float = np.nan):
    """Weights of a model that has no numbers for a text with this token."""
    embed = weights["embed.weight"].copy()
    embed[token_id] = value
    return {**weights, "embed.weight": embed}


def make_engine(*, num_blocks=80, chunk=64, run_ahead=False) -> LLMEngine:
    weights = damaged(load_numpy_weights(TinyCheckpoint(CONFIG, seed=3)))
    limits = RunnerLimits(num_blocks, 4, 96, chunk, 6)
    runner = NumpyRunner(CONFIG, weights, limits, deferred=run_ahead)
    return LLMEngine(CONFIG, runner, run_ahead=run_ahead)


def run(engine: LLMEngine, on_step=lambda number: None) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {}
    number = 0
    with np.errstate(invalid="ignore"):
        while engine.has_unfinished:
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
            engine.scheduler.check_integrity()
            on_step(number)
            number += 1
    assert engine.pool.num_free == engine.pool.num_blocks - 1
    return outputs


def tokens(outputs) -> list[list[int]]:
    return [[o.token_id for o in outputs[str(number)]] for number in range(len(PROMPTS))]


def alone() -> list[list[int]]:
    found = {}
    for number, ids in enumerate(PROMPTS):
        engine = make_engine()
        engine.add_request(str(number), ids, GREEDY)
        found |= run(engine)
    return tokens(found)


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("settings", [{}, {"chunk": 5}, {"num_blocks": 25}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_without_numbers_fails_its_request(temperature, settings, run_ahead):
    engine = make_engine(run_ahead=run_ahead, **settings)
    engine.add_request("bad first", BAD_PROMPT, GREEDY.with_(temperature=temperature))
    for number, ids in enumerate(PROMPTS):
        engine.add_request(str(number), ids, GREEDY)
    engine.add_request("bad last", BAD_PROMPT, GREEDY.with_(n=2, top_p=0.5, presence_penalty=1))
    outputs = run(engine)
    assert outputs.pop("bad first") == [StepOutput("bad first", -1, "error")]
    lasts = sorted(outputs.pop("bad last"), key=lambda output: output.sample_index)
    assert lasts == [StepOutput("bad last", -1, "error", index) for index in (0, 1)]
    assert tokens(outputs) == alone()


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
def test_one_that_fails_in_the_middle(run_ahead):
    """It is led to say the bad token; the next row has no numbers."""
    engine = make_engine(run_ahead=run_ahead)
    for number, ids in enumerate(PROMPTS):
        engine.add_request(str(number), ids, GREEDY)
    engine.add_request("bad", [1, 2, 3], GREEDY.with_(logit_bias={BAD_TOKEN: 100.0}))
    outputs = run(engine)
    got = [(o.token_id, o.finish_reason) for o in outputs.pop("bad")]
    assert got == [(BAD_TOKEN, None), (-1, "error")]
    assert tokens(outputs) == alone()


def test_what_has_failed_is_not_remembered():
    engine = make_engine()
    engine.add_request("bad", BAD_PROMPT, GREEDY)
    run(engine)
    assert len(engine.pool.cache) == 0
    engine.add_request("good", PROMPTS[2], GREEDY)
    engine.add_request("bad", BAD_PROMPT, GREEDY)
    run(engine)
    assert len(engine.pool.cache) == (len(PROMPTS[2]) + 8) // 4  # the good one's


def test_logprobs_of_one_that_fails():
    engine = make_engine()
    engine.add_request("bad", BAD_PROMPT, GREEDY.with_(logprobs=2, prompt_logprobs=1))
    engine.add_request("0", PROMPTS[0], GREEDY.with_(logprobs=2))
    outputs = run(engine)
    assert outputs["bad"] == [StepOutput("bad", -1, "error")]
    assert all(np.isfinite(o.logprobs.logprob) for o in outputs["0"])


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
def test_mistakes_while_others_run(run_ahead):
    """Everything a caller can do wrong, in the middle of the others' work."""
    engine = make_engine(run_ahead=run_ahead, num_blocks=25)
    for number, ids in enumerate(PROMPTS):
        engine.add_request(str(number), ids, GREEDY)

    def mistakes(step: int) -> None:
        running = next(iter(engine._requests), None)
        if running is not None:
            with pytest.raises(RequestError, match="in use"):
                engine.add_request(running, [1], GREEDY)
        for ids, params, words in (
            ([1] * 96, GREEDY, "96 tokens, the context holds 96"),
            ([48], GREEDY, "token id 48"),
            ([], GREEDY, "empty"),
            ([1], GREEDY.with_(stop_token_ids=(99,)), "token id 99"),
        ):
            with pytest.raises(RequestError, match=words):
                engine.add_request("new", ids, params)
        assert "new" not in engine._requests
        engine.abort("never there")
        engine.abort("0", 7)
        for number in range(len(PROMPTS)):
            if str(number) not in engine._requests:
                engine.abort(str(number))  # it has ended

    assert tokens(run(engine, mistakes)) == alone()


def test_a_prompt_beyond_all_blocks():
    engine = make_engine(num_blocks=6)  # 5 blocks of 4 tokens
    with pytest.raises(RequestError, match="20 tokens, the context holds 20"):
        engine.add_request("a", [1] * 20, GREEDY)
    engine.add_request("a", [1] * 19, GREEDY)
    (output,) = run(engine)["a"]
    assert output.finish_reason == "length"


# ------------------------------------------------------------------------------ as text


@pytest.fixture
def llm(tmp_path) -> LLM:
    """A model of bytes that has no numbers for a text with a "!"."""
    config = tiny_config(vocab_size=260, max_context=256, bos_id=256, eos_ids=(258,))
    checkpoint = TinyCheckpoint(config, tokenizer=byte_tokenizer(), chat_template=TEMPLATE)
    write_nanoinfer2(checkpoint, tmp_path / "tiny.nano")
    llm = LLM(tmp_path / "tiny.nano", device="cpu", max_num_seqs=8)
    llm._engine.runner.weights = damaged(llm._engine.runner.weights, ord("!"))
    return llm


TEXT = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logit_bias={33: -100.0})


@pytest.mark.filterwarnings("ignore:invalid value")
def test_errors_reach_who_asked(llm):
    fine = llm.generate("fine", TEXT)
    for ask in (
        lambda: llm.generate("bad!", TEXT),
        lambda: llm.chat([{"role": "user", "content": "bad!"}], TEXT),
        lambda: list(llm.stream("bad!", TEXT)),
    ):
        message = r"^request \d+: the model computes NaN or infinite logits: .*inspect --verify"
        with pytest.raises(CheckpointError, match=message):
            ask()
    bad, good = llm.generate(["bad!", "fine"], TEXT)
    assert (bad.finish_reason, bad.text, bad.token_ids) == ("error", "", [])
    assert (good.text, good.finish_reason) == (fine.text, "length")
    stream = llm.stream("bad!", TEXT)
    assert next(stream).finish_reason == "error"
    with pytest.raises(CheckpointError):
        next(stream)
    assert not llm._engine.has_unfinished
    assert not llm._answers


def test_unknown_sampling_parameters(llm):
    for make in (llm.default_params, TEXT.with_):
        with pytest.raises(RequestError, match="temprature is no sampling parameter; there are n,"):
            make(temprature=1)


def test_samples_as_text(llm):
    params = TEXT.with_(temperature=1.5, seed=3, n=3, logprobs=1, prompt_logprobs=0)
    answer = llm.generate("Hi", params)
    assert len(answer.samples) == len(set(answer.texts)) == 3
    assert answer.text == answer.texts[0] == llm.generate("Hi", params.with_(n=1)).text
    assert [len(s.logprobs) for s in answer.samples] == [12, 12, 12]
    assert [[p.token_id for p in s.logprobs] for s in answer.samples] == [
        s.token_ids for s in answer.samples
    ]
    ids = llm.encode("Hi")
    assert answer.prompt_logprobs[0] is None
    assert [p.token_id for p in answer.prompt_logprobs[1:]] == ids[1:]
    texts, ended = ["", "", ""], {}
    for chunk in llm.stream("Hi", params):
        texts[chunk.sample_index] += chunk.text
        assert chunk.logprobs.token_id == chunk.token_id
        if chunk.finish_reason:
            ended[chunk.sample_index] = chunk.finish_reason
    assert texts == answer.texts
    assert ended == dict.fromkeys(range(3), "length")
    assert llm.generate("Hi", TEXT).prompt_logprobs is None


def test_a_stop_string_ends_one_sample(llm):
    params = TEXT.with_(temperature=1.5, seed=3, n=3)
    texts = llm.generate("Hi", params).texts
    stop = next(c for c in texts[1] if c not in texts[0] + texts[2])
    stopped = llm.generate("Hi", params.with_(stop=stop))
    assert stopped.texts == [texts[0], texts[1][: texts[1].index(stop)], texts[2]]
    assert [s.finish_reason for s in stopped.samples] == ["length", "stop", "length"]
    assert not llm._engine.has_unfinished


def test_progress(llm, monkeypatch):
    params = TEXT.with_(max_tokens=2)
    shown = []
    for prompts, progress, is_terminal in (
        (20, None, True), (20, None, False), (2, None, True), (2, True, False), (20, False, True),
    ):  # fmt: skip
        stderr = io.StringIO()
        monkeypatch.setattr(stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr(sys, "stderr", stderr)
        assert len(llm.generate(["a"] * prompts, params, progress=progress)) == prompts
        shown.append("answers" in stderr.getvalue())
    assert shown == [True, False, False, True, False]


# ------------------------------------------------------------------------------ of prompts


def spoil_head(monkeypatch, runner, token_id: int) -> None:
    """No numbers in the logits of the rows of this token, and in no others."""
    lm_head = type(runner.ops).lm_head

    def spoilt(self, x, **arguments):
        x = x.copy()
        x[runner._memory["token_ids"].reshape(-1)[: len(x)] == token_id] = np.inf
        lm_head(self, x=x, **arguments)

    monkeypatch.setattr(type(runner.ops), "lm_head", spoilt)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("chunk", [64, 4])
@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
def test_a_prompt_of_which_one_row_has_no_numbers(monkeypatch, run_ahead, chunk):
    engine = make_engine(run_ahead=run_ahead, chunk=chunk)
    spoil_head(monkeypatch, engine.runner, 46)
    prompt = [1, 2, 46, 3, 4, 5, 6, 7, 8, 9, 10]
    engine.add_request("asks", prompt, GREEDY.with_(prompt_logprobs=1, n=2))
    engine.add_request("does not", prompt, GREEDY)
    outputs = run(engine)
    assert len(outputs["does not"]) == 9
    assert outputs["asks"].count(StepOutput("asks", -1, "error", 0)) == 1
    others = [o for o in outputs["asks"] if o.sample_index]  # which nobody asks for the prompt's
    assert [o.token_id for o in others] == [o.token_id for o in outputs["does not"]]
    assert len(others) == len(outputs["asks"]) - 1


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_text_of_which_one_row_has_no_numbers_has_no_score(llm, monkeypatch):
    ids = [1, 2, 7, 3, 4, 5, 6, 8, 9]
    assert np.isfinite(score_text(llm, ids, 6, 3).perplexity)
    spoil_head(monkeypatch, llm._engine.runner, 7)
    for window in (20, 6):
        with pytest.raises(CheckpointError, match="the model computes NaN or infinite logits"):
            score_text(llm, ids, window, 3)
