"""A draft model proposes: on NumPy, greedy and sampled, with caches too small and models alike."""

from __future__ import annotations

from functools import cache

import pytest

from nanocupy.config import RopeScaling
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.scheduler import SchedulerSettings
from nanocupy.model.load import load_numpy_weights
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.draft_model import DraftModelProposer
from nanocupy.speculation.policy import DraftPolicy
from nanocupy.speculation.speculator import Speculator
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.engine import test_equalities as equalities
from tests.engine.fake_runner import FakeRunner
from tests.engine.test_equalities import ROOMY, TIGHT, alone, requests, run

MAX_DRAFTS = 5
OTHER = tiny_config(
    vocab_size=56, max_context=96, num_layers=1, hidden_size=16, intermediate_size=24, num_heads=2,
    num_kv_heads=1, rope_scaling=RopeScaling("dynamic", factor=2.0, original_context=16),
)  # fmt: skip


@cache
def draft_weights(kind: str):
    """A model like the one that is guessed for, but for some noise in its weights; another one."""
    if kind == "other":
        return OTHER, load_numpy_weights(TinyCheckpoint(OTHER, seed=9))
    config = equalities.CONFIGS["plain"]
    weights = dict(equalities.weights_of("plain"))
    if kind == "alike":
        noise = load_numpy_weights(TinyCheckpoint(config, seed=77))
        weights = {name: w + 0.12 * noise[name] for name, w in weights.items()}
    return config, weights


def draft_runner(
    kind: str, *, num_blocks: int = 200, chunk: int = 64, max_context: int = 96,
    deferred: bool = False,
) -> NumpyRunner:  # fmt: skip
    config, weights = draft_weights(kind)
    limits = RunnerLimits(num_blocks, 4, max_context, chunk, 6)
    return NumpyRunner(config, weights, limits, deferred=deferred)


def make_engine(
    runner: NumpyRunner, *, num_blocks: int = ROOMY, chunk: int = 64, run_ahead: bool = False,
    num_drafts: int = MAX_DRAFTS, **settings,
) -> LLMEngine:  # fmt: skip
    limits = RunnerLimits(num_blocks, 4, 96, chunk, 6, 64, MAX_DRAFTS, 30)
    config = equalities.CONFIGS["plain"]
    model = NumpyRunner(config, equalities.weights_of("plain"), limits, deferred=run_ahead)
    speculator = Speculator(DraftModelProposer(runner, config.vocab_size), DraftPolicy(num_drafts))
    return LLMEngine(
        config, model, SchedulerSettings(6, chunk, max_draft_tokens=30, **settings),
        run_ahead=run_ahead, speculator=speculator,
    )  # fmt: skip


def check_end(engine: LLMEngine) -> None:
    proposer = engine.speculator.proposer
    proposer.check_integrity()
    pool = proposer._memory.pool
    assert pool.num_free == pool.num_blocks - 1
    assert not proposer._mirrors


@pytest.mark.parametrize("deferred", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("kind", ["same", "alike", "other"])
@pytest.mark.parametrize("params", ["greedy", "random", "penalties"])
def test_the_model_alone_decides(params, kind, deferred):
    engine = make_engine(draft_runner(kind, deferred=deferred), run_ahead=deferred)
    assert run(engine, requests(params)) == alone("plain", params)
    check_end(engine)
    counters = engine.speculator.counters
    assert counters.num_proposed > 50
    if kind == "same" and params != "penalties":
        assert counters.num_accepted == counters.num_proposed
    elif kind == "alike":
        assert 0.04 < counters.acceptance < 1
    elif kind == "other":
        assert counters.acceptance < 0.3


@pytest.mark.parametrize("chunk", [7, 9, 64])
@pytest.mark.parametrize("num_blocks", [10, 24, 200])
def test_small_caches_and_chunks_of_the_draft(num_blocks, chunk):
    runner = draft_runner("alike", num_blocks=num_blocks, chunk=chunk)
    engine = make_engine(runner)
    for _ in range(2):
        assert run(engine, requests()) == alone("plain")
    check_end(engine)
    assert engine.speculator.counters.num_accepted


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preempted(mode):
    runner = draft_runner("alike")
    engine = make_engine(runner, num_blocks=TIGHT, policy="priority", preemption=mode)
    assert run(engine, requests()) == alone("plain")
    check_end(engine)
    assert engine.speculator.counters.num_accepted
    counters = engine.scheduler.counters
    assert counters.num_swapped_out + counters.num_recomputed


@pytest.mark.parametrize("live", [None, 9])
@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
def test_a_prompt_is_read_a_chunk_a_step(run_ahead, live, monkeypatch):
    """Beside another that decodes and goes on to get guesses: before each step of the model the
    draft model computes a chunk at most, as large as those of the model are now. Until it has read
    all, that is no miss."""
    runner = draft_runner("same", chunk=16, deferred=run_ahead)
    engine = make_engine(runner, chunk=64, run_ahead=run_ahead)
    if live is not None:
        engine.configure(SchedulerSettings(6, live, max_draft_tokens=30))
    chunk = live or 16
    prompt = [(7 * i + i // 5) % 48 for i in range(70)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    asked = {"short": [3, 4, 5], "long": prompt}
    wanted = {}
    for name, ids in asked.items():
        plain = equalities.make_engine("plain")
        plain.add_request(name, ids, params)
        wanted[name] = []
        while plain.has_unfinished:
            wanted[name] += [output.token_id for output in plain.step()]
    original, sizes = runner.launch, []

    def launch(schedule):
        sizes.append(sum(item.num_tokens for item in schedule if not item.samples))
        return original(schedule)

    monkeypatch.setattr(runner, "launch", launch)
    got: dict[str, list[int]] = {name: [] for name in asked}
    for name in asked:
        engine.add_request(
            name, asked[name], params.with_(max_tokens=60 if name == "short" else 24)
        )
    guessed_beside = 0
    while engine.has_unfinished:
        sizes.clear()
        before = len(got["short"])
        for output in engine.step():
            got[output.request_id].append(output.token_id)
        assert sum(size > 0 for size in sizes) <= 1
        assert max(sizes, default=0) <= chunk
        guessed_beside += max(sizes, default=0) > 1 and len(got["short"]) - before > 1
    assert got["long"] == wanted["long"]
    assert got["short"][:24] == wanted["short"]
    assert guessed_beside >= 3
    assert engine.speculator.counters.num_missed == 0
    assert engine.speculator.counters.acceptance == 1
    check_end(engine)


def test_what_takes_longer_to_read_is_not_measured(monkeypatch):
    """The steps before which the draft model reads a prompt say nothing of those before which it
    does not."""
    engine = make_engine(draft_runner("same", chunk=16))
    proposer, told, reading = engine.speculator.proposer, [], []
    original = proposer.propose

    def propose(room):
        found = original(room)
        reading.append(proposer.was_reading)
        return found

    monkeypatch.setattr(proposer, "propose", propose)
    monkeypatch.setattr(
        engine.speculator.policy, "stepped",
        lambda seqs, drafts, seconds, *, is_usual: told.append((drafts, seconds, is_usual)),
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    engine.add_request("a", [(7 * i) % 48 for i in range(60)], params)
    while engine.has_unfinished:
        engine.step()
    assert reading.count(True) == 4  # 60 tokens of the prompt and one more, but for two, by 16
    timed = [drafts for drafts, seconds, is_usual in told if is_usual and seconds is not None]
    assert reading.count(False) == sum(drafts > 0 for drafts in timed) > 2


def test_a_context_that_ends_before_the_models():
    engine = make_engine(draft_runner("same", max_context=20))
    assert run(engine, requests()) == alone("plain")
    check_end(engine)
    assert engine.speculator.counters.num_accepted


def test_ids_that_only_one_of_them_has():
    small = tiny_config(vocab_size=30, max_context=96)
    limits = RunnerLimits(200, 4, 96, 64, 6)
    runner = NumpyRunner(small, load_numpy_weights(TinyCheckpoint(small, seed=3)), limits)
    engine = make_engine(runner)
    assert run(engine, requests()) == alone("plain")
    check_end(engine)
    assert not engine.speculator.proposer._unfit
    # One whose guesses may be no ids of the model.
    engine = make_engine(draft_runner("other"))
    proposer = engine.speculator.proposer
    assert proposer.runner.config.vocab_size > proposer._vocab_size == 48
    assert run(engine, requests()) == alone("plain")


def test_a_draft_that_gives_no_numbers_guesses_nothing():
    config, weights = draft_weights("same")
    broken = {n: w * float("nan") if "norm" in n else w for n, w in weights.items()}
    runner = NumpyRunner(config, broken, RunnerLimits(200, 4, 96, 64, 6))
    engine = make_engine(runner)
    assert run(engine, requests()) == alone("plain")
    check_end(engine)
    assert not engine.speculator.counters.num_proposed
    assert engine.speculator.counters.num_missed > 10


@pytest.mark.parametrize("deferred", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("where", ["launch", "read"])
def test_a_step_of_the_draft_that_fails(where, deferred, monkeypatch):
    runner = draft_runner("alike", deferred=deferred)
    engine = make_engine(runner, run_ahead=deferred)
    original, calls = runner.launch, []

    def failing(schedule):
        calls.append(schedule)
        fails = len(calls) % 7 == 0
        if fails and where == "launch":
            raise OSError("no luck")
        read = original(schedule)
        state = {"failed": not fails}

        def reading():
            if not state["failed"]:
                state["failed"] = True
                raise OSError("no luck")
            return read()

        return reading

    monkeypatch.setattr(runner, "launch", failing)
    outputs = [[] for _ in requests()]
    for number, (_, ids, params, priority) in enumerate(requests()):
        engine.add_request(str(number), ids, params, priority)
    failures = 0
    while engine.has_unfinished:
        try:
            for output in engine.step():
                outputs[int(output.request_id)].append(output.token_id)
        except OSError:
            failures += 1
        engine.scheduler.check_integrity()
    assert failures > 2
    assert outputs == alone("plain")
    check_end(engine)


def test_every_token_of_the_draft_is_read_from_the_right_block():
    """The draft is a runner that checks all it reads; it knows what comes."""
    config = tiny_config(vocab_size=40, max_context=64)
    limits = RunnerLimits(60, 4, 64, 24, 5, max_drafts=5, max_draft_rows=20)
    for run_ahead in (False, True):
        model = FakeRunner(config, limits, deferred=run_ahead)
        draft = CheckingDraft(config, RunnerLimits(40, 4, 64, 24, 5), deferred=run_ahead)
        speculator = Speculator(DraftModelProposer(draft, 40), DraftPolicy(5))
        engine = LLMEngine(config, model, run_ahead=run_ahead, speculator=speculator)
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        for number in range(12):
            engine.add_request(str(number), list(range(number, 3 * number + 2)), params)
        while engine.has_unfinished:
            engine.step()
            speculator.proposer.check_integrity()
        assert 0.3 < speculator.counters.acceptance < 0.95


class CheckingDraft(FakeRunner):
    """Keeps what every position holds of every mirror, and is wrong now and then."""

    def _prepare(self, schedule):
        size = self.limits.block_size
        assert schedule.num_tokens <= self.limits.max_step_tokens
        items = []
        for item in schedule:
            request, start = item.request, item.request.num_computed_tokens
            given = request.token_slice(start, start + item.num_tokens)
            assert len(request.block_ids) * size >= start + item.num_tokens
            items.append((request, start, given, list(request.block_ids), item.samples))

        def execute():
            found = []
            for request, start, given, blocks, samples in items:
                given = [self._last[request] if t == -1 else t for t in given]
                for position, token_id in enumerate(given, start):
                    before = 0
                    if position:
                        at = position - 1
                        before = self.cells[blocks[at // size]][at % size]
                    self.cells[blocks[position // size]][position % size] = hash((before, token_id))
                # All that the cache holds must be of the tokens that the mirror has now.
                history, known = 0, request.prompt_ids + request.output_ids
                for position in range(min(start + len(given), len(known))):
                    history = hash((history, known[position]))
                    cell = self.cells[blocks[position // size]][position % size]
                    assert cell == history, "a wrong token was computed, or none"
                if samples:
                    at = start + len(given) - 1
                    history = self.cells[blocks[at // size]][at % size]
                    token_id = (history >> 7) % self.config.vocab_size
                    if history % 5 == 0:
                        token_id = (token_id + 1) % self.config.vocab_size
                    self._last[request] = token_id
                    found.append(token_id)
            return found

        return execute

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._last = {}
