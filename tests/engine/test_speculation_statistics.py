"""What is drawn with drafts is drawn from the model's own distribution: chi-square against
probabilities that are worked out apart, and rules that are wrong, which must show."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.runner import RunnerLimits
from nanocupy.model.load import load_numpy_weights
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.acceptance import count_right
from nanocupy.speculation.policy import DraftPolicy
from nanocupy.speculation.proposer import Proposer
from nanocupy.speculation.speculator import Speculator
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.ops import sampling_oracle as oracle
from tests.ops.sampling_oracle import SETTINGS, Setting, p_value

DRAWS = 200_000
SMALLEST_P = 1e-7
NUM_SEQS, NUM_DRAFTS = 100, 3
BY_NAME = {setting.name: setting for setting in SETTINGS}
WITHOUT_PENALTIES = ["temperature 1", "top-p, hotter", "every cut"]


class PositionRunner(NumpyRunner):
    """The NumPy runner, but for the model: logits_at gives the logits of the token at a position,
    for each of positions int [S]."""

    def __init__(self, vocab: int, logits_at: Callable[[np.ndarray], np.ndarray]) -> None:
        config = tiny_config(vocab_size=vocab, max_context=64, num_layers=1)
        limits = RunnerLimits(
            NUM_SEQS * 4 + 1, 16, 64, 2 * NUM_SEQS * 16, NUM_SEQS, 0, 15, 15 * NUM_SEQS
        )
        super().__init__(config, load_numpy_weights(TinyCheckpoint(config)), limits)
        self._logits_at = logits_at

    def logits(self, batch):
        return self._logits_at(batch.positions[batch.sample_rows] + 1)


class LikelyProposer(Proposer):
    """Guesses among likely tokens, and the same one again and again; knows no random numbers."""

    name = "likely"

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._random = random.Random(1)

    def is_promising(self, request):
        return True

    def propose(self, wanted):
        return {r: [self._random.choice(self._tokens)] * n for r, n in wanted.items()}

    def forget(self, request):
        pass


def params_of(setting: Setting, seed: int, **changes) -> SamplingParams:
    return SamplingParams(
        temperature=setting.temperature, top_k=setting.top_k, top_p=setting.top_p,
        min_p=setting.min_p, repetition_penalty=setting.repetition,
        presence_penalty=setting.presence, frequency_penalty=setting.frequency,
        logit_bias={t: max(b, -100.0) for t, b in setting.bias.items()}, seed=seed,
        ignore_eos=True, **changes,
    )  # fmt: skip


def run_all(engine: LLMEngine, requests) -> dict[str, list[int]]:
    """The tokens of each request; so many at once that all run."""
    found: dict[str, list[int]] = {}
    waiting = iter(requests)
    while True:
        while len(engine.scheduler.running) + len(engine.scheduler.waiting) < NUM_SEQS:
            request = next(waiting, None)
            if request is None:
                break
            engine.add_request(*request)
        if not engine.has_unfinished:
            return found
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output.token_id)


def draw(setting: Setting, num_draws: int, count=count_right) -> tuple[np.ndarray, Speculator]:
    """How often each token comes where every position has the setting's logits."""
    runner = PositionRunner(setting.vocab, lambda at: np.tile(setting.logits, (len(at), 1)))
    likely = np.argsort(setting.logits)[-4:].tolist()
    speculator = Speculator(LikelyProposer(likely), DraftPolicy(NUM_DRAFTS), count)
    engine = LLMEngine(runner.config, runner, prefix_cache=False, speculator=speculator)
    length = 40
    params = [params_of(setting, seed, max_tokens=length) for seed in range(num_draws // length)]
    requests = ((str(i), [1, 2], p) for i, p in enumerate(params))
    counts = np.zeros(setting.vocab, np.int64)
    for tokens in run_all(engine, requests).values():
        counts += np.bincount(tokens, minlength=setting.vocab)
    return counts, speculator


@pytest.mark.parametrize("name", WITHOUT_PENALTIES)
def test_draws_follow_the_models_distribution(name):
    setting = BY_NAME[name]
    counts, speculator = draw(setting, DRAWS)
    assert counts.sum() == DRAWS
    assert p_value(counts, oracle.probabilities(setting)) > SMALLEST_P
    share = speculator.counters.acceptance
    assert 0.03 < share < 0.97
    assert speculator.counters.num_forwards > DRAWS // 4


def keep_any_likely(drafts, chosen):
    return 1 if drafts[0] % 2 else 0


def keep_one_too_many(drafts, chosen):
    return min(count_right(drafts, chosen) + 1, len(drafts))


@pytest.mark.parametrize("wrong", [keep_any_likely, keep_one_too_many])
def test_a_wrong_rule_would_show(wrong):
    setting = BY_NAME["temperature 1"]
    counts, _ = draw(setting, DRAWS // 20, wrong)
    assert p_value(counts, oracle.probabilities(setting)) < SMALLEST_P


@pytest.mark.parametrize("name", ["every penalty", "everything"])
def test_penalties_count_the_drafts_before_a_token(name):
    """All of the output but its first token is proposed, and right; what is drawn after it, in the
    same step, must be penalised for every one of them."""
    setting = BY_NAME[name]
    first = len(setting.prompt)
    forced = np.full((len(setting.output), setting.vocab), -1e6, np.float32)
    forced[np.arange(len(setting.output)), setting.output] = 1e6
    rows = np.concatenate([forced, setting.logits[None]])

    class Known(LikelyProposer):
        def propose(self, wanted):
            return {r: setting.output[len(r.output_ids) :] for r in wanted if r.output_ids}

    runner = PositionRunner(setting.vocab, lambda at: rows[at - first])
    speculator = Speculator(Known([]), DraftPolicy(15))
    engine = LLMEngine(runner.config, runner, prefix_cache=False, speculator=speculator)
    num_draws, length = 12_000, len(setting.output) + 1
    requests = (
        (str(i), setting.prompt, params_of(setting, i, max_tokens=length)) for i in range(num_draws)
    )
    found = list(run_all(engine, requests).values())
    assert all(tokens[:-1] == setting.output for tokens in found)
    assert speculator.counters.num_accepted == num_draws * (length - 2)
    counts = np.bincount([tokens[-1] for tokens in found], minlength=setting.vocab)
    assert p_value(counts, oracle.probabilities(setting)) > SMALLEST_P
    blind = oracle.probabilities(Setting(
        setting.name, setting.vocab, setting.temperature, setting.top_k, setting.top_p,
        setting.min_p, bias=setting.bias,
    ))  # fmt: skip
    assert p_value(counts, blind) < SMALLEST_P, "the penalties change too little to be seen"
