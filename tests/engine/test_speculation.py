"""Drafts change how many forwards a request takes, never what it gets: on NumPy, float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import Request, RequestPriority
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import Schedule, ScheduledRequest
from nanocupy.engine.scheduler import SchedulerSettings
from nanocupy.errors import ConfigError
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.policy import AdaptiveDrafts, DraftPolicy
from nanocupy.speculation.speculator import Speculator
from tests.engine import test_equalities as equalities
from tests.engine.drafts import MAX_DRAFTS, GuessingProposer, ngram_speculator
from tests.engine.test_equalities import ROOMY, TIGHT, alone, requests, run

KINDS = ("greedy", "random", "penalties")


def make_engine(
    name: str,
    speculator: Speculator,
    *,
    num_blocks: int = ROOMY,
    chunk: int = 64,
    prefix_cache: bool = True,
    run_ahead: bool = False,
    max_draft_rows: int = 30,
    **settings,
) -> LLMEngine:
    limits = RunnerLimits(num_blocks, 4, 96, chunk, 6, 64, MAX_DRAFTS, max_draft_rows)
    config = equalities.CONFIGS[name]
    runner = NumpyRunner(config, equalities.weights_of(name), limits, deferred=run_ahead)
    return LLMEngine(
        config, runner,
        SchedulerSettings(6, chunk, max_draft_tokens=max_draft_rows, **settings),
        prefix_cache=prefix_cache, run_ahead=run_ahead, speculator=speculator,
    )  # fmt: skip


def guessing(name: str, kind: str, right: float, num_drafts: int = MAX_DRAFTS) -> Speculator:
    outputs = alone(name, kind)
    proposer = GuessingProposer(lambda request: outputs[int(request.request_id)], right, 48)
    return Speculator(proposer, DraftPolicy(num_drafts))


@pytest.mark.parametrize("name", equalities.CONFIGS)
@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_and_cached(name, kind, chunk, run_ahead):
    speculator = guessing(name, kind, 0.7)
    engine = make_engine(name, speculator, chunk=chunk, run_ahead=run_ahead)
    assert run(engine, requests(kind)) == alone(name, kind)
    counters = speculator.counters
    if chunk == 1:
        assert not counters.num_proposed  # no step has room
        return
    assert 0 < counters.num_accepted <= counters.num_proposed
    assert chunk == 7 or counters.num_accepted < counters.num_proposed
    assert len(speculator.proposer.forgotten) == len(requests(kind))


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("kind", KINDS)
def test_preempted(kind, policy, mode, run_ahead):
    speculator = guessing("plain", kind, 0.7)
    engine = make_engine(
        "plain", speculator, num_blocks=TIGHT, run_ahead=run_ahead, policy=policy, preemption=mode
    )
    assert run(engine, requests(kind)) == alone("plain", kind)
    counters = engine.scheduler.counters
    assert (counters.num_swapped_out if mode == "swap" else counters.num_recomputed) >= 2
    assert speculator.counters.num_accepted > 5


class Recording(DraftPolicy):
    """beside_prompts: not, as the adaptive policy."""

    beside_prompts = False

    def __init__(self, max_drafts: int) -> None:
        super().__init__(max_drafts)
        self.steps: list[tuple[int, float | None]] = []  # those with drafts: how many, seconds
        self.num_drafts: list[int] = []  # that were verified in each of them

    def stepped(self, num_seqs, num_drafts, seconds, *, is_usual=True):
        if num_drafts:
            assert 0 < num_seqs <= 6
            self.steps.append((num_drafts, seconds))
            self.num_drafts.append(0)

    def verified(self, request, num_drafts, num_right):
        if num_drafts:
            self.num_drafts[-1] += num_drafts


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
def test_the_policy_is_told_of_steps_with_drafts_that_copy_blocks_too(run_ahead):
    """Drafts that gain there must lose there; what the step took is not told."""
    speculator = guessing("plain", "greedy", 0.7)
    policy = speculator.policy = Recording(MAX_DRAFTS)
    engine = make_engine("plain", speculator, num_blocks=TIGHT, run_ahead=run_ahead)
    stepped, num_copying = speculator.stepped, []

    def copying(schedule, seconds):
        is_copying = bool(schedule.swap_in or schedule.swap_out)
        stepped(schedule, seconds)
        if schedule.has_drafts and is_copying:
            num_copying.append(1)
            assert policy.steps[-1][1] is None

    speculator.stepped = copying
    assert run(engine, requests()) == alone("plain")
    assert num_copying
    assert policy.num_drafts == [num_drafts for num_drafts, _ in policy.steps]
    assert sum(policy.num_drafts) > 20


def test_a_step_that_is_to_be_read_at_once_stays_so():
    """The policy has paid for it when one without drafts was expected."""
    speculator = guessing("plain", "greedy", 0.7)
    speculator.policy.may_wait = lambda num_seqs, num_drafts: not num_drafts
    make_engine("plain", speculator)
    request = Request("0", [1], SamplingParams(), 0, 10)
    schedule = Schedule((ScheduledRequest(request, 1, True),))
    speculator.stepped(schedule, None)
    assert speculator.reads_at_once
    speculator.asking({request: 2})
    assert speculator.reads_at_once
    speculator.stepped(schedule, 1.0)
    assert not speculator.reads_at_once


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_drafts", [1, 4, MAX_DRAFTS])
def test_any_acceptance_and_number(right, num_drafts):
    speculator = guessing("plain", "greedy", right, num_drafts)
    engine = make_engine("plain", speculator)
    assert run(engine, requests()) == alone("plain")
    counters = speculator.counters
    if right == 1.0:
        assert counters.num_accepted == counters.num_proposed
    assert counters.num_tokens == counters.num_forwards + counters.num_accepted
    steps = engine.scheduler.counters.num_steps
    plain = equalities.make_engine("plain")
    run(plain, requests())
    assert (steps < plain.scheduler.counters.num_steps) == (right > 0)


def test_few_rows_for_all_drafts():
    speculator = guessing("plain", "greedy", 1.0)
    engine = make_engine("plain", speculator, max_draft_rows=2)
    assert run(engine, requests()) == alone("plain")
    counters = speculator.counters
    assert 0 < counters.num_proposed <= 2 * counters.num_steps


class Noting(GuessingProposer):
    """Gives all that is asked for, as far as the answer goes, and keeps what it was asked for."""

    def __init__(self, answer) -> None:
        super().__init__(answer, 0.5, 48)
        self.asked: list[dict] = []

    def is_promising(self, request):
        return True

    def propose(self, wanted):
        self.asked.append(dict(wanted))
        answer, rng = self._answer, self._random
        return {
            request: [
                token_id if rng.random() < 0.5 else self._another(token_id)
                for token_id in answer(request)[len(request.output_ids) :][:count]
            ]
            for request, count in wanted.items()
        }


def noted(policy: DraftPolicy, monkeypatch, **options):
    """All requests, through an engine whose proposer was asked for `asked` and whose steps were
    `schedules`."""
    outputs = alone("plain")
    proposer = Noting(lambda request: outputs[int(request.request_id)])
    engine = make_engine("plain", Speculator(proposer, policy), **options)
    original, schedules = engine.runner.launch, []

    def launch(schedule):
        schedules.append((schedule, len(engine.scheduler.running)))
        return original(schedule)

    monkeypatch.setattr(engine.runner, "launch", launch)
    assert run(engine, requests()) == outputs
    return proposer.asked, schedules


@pytest.mark.parametrize(
    "options",
    [{"chunk": 7}, {"chunk": 3}, {"num_blocks": TIGHT}, {"max_draft_rows": 3}, {"chunk": 9,
     "num_blocks": TIGHT, "run_ahead": True}],
    ids=str,
)  # fmt: skip
def test_nothing_is_guessed_that_a_step_has_no_room_for(options, monkeypatch):
    """Be it tokens, rows or blocks: all that the proposer is asked for is checked."""
    asked, schedules = noted(DraftPolicy(MAX_DRAFTS), monkeypatch, **options)
    placed = [
        {item.request: len(item.drafts) for item in schedule if item.drafts}
        for schedule, _ in schedules
        if schedule.has_drafts
    ]
    assert asked == placed
    assert len(asked) > 3
    if options.get("chunk") == 3:  # a token of each who runs, and no more
        full = [schedule for schedule, num_running in schedules if num_running >= 3]
        assert full
        assert not any(schedule.has_drafts for schedule in full)


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
@pytest.mark.parametrize("beside_prompts", [False, True])
def test_a_step_that_computes_prompts_goes_without(beside_prompts, run_ahead, monkeypatch):
    """Also where a prompt is admitted in the step for which drafts were wanted; and nothing is
    guessed for it. Unless the policy wants drafts there."""
    policy = DraftPolicy(MAX_DRAFTS)
    monkeypatch.setattr(policy, "beside_prompts", beside_prompts)
    asked, schedules = noted(policy, monkeypatch, run_ahead=run_ahead)
    drafted = [schedule for schedule, _ in schedules if schedule.has_drafts]
    assert len(asked) == len(drafted) > 3
    mixed = [s for s in drafted if any(not i.samples or i.num_tokens > i.num_rows for i in s)]
    assert bool(mixed) == beside_prompts


@pytest.mark.parametrize("run_ahead", [False, True], ids=["sync", "ahead"])
def test_stop_ids_end_a_request_among_its_drafts(run_ahead):
    stop_ids = tuple(sorted({tokens[len(tokens) // 2] for tokens in alone("plain")}))
    wanted = alone("plain", "greedy", stop_ids)
    assert wanted != alone("plain")
    engine = make_engine("plain", guessing("plain", "greedy", 1.0), run_ahead=run_ahead)
    assert run(engine, requests(), stop_ids) == wanted


def random_batches(count: int, size: int):
    """`count` batches of `size` requests whose prompts repeat themselves now and then, greedy."""
    rng = np.random.default_rng(7)
    for _ in range(count):
        batch = []
        for number in range(size):
            ids = rng.integers(0, 48, rng.integers(1, 12)).tolist()
            ids = (ids * 3)[: int(rng.integers(1, 20))] or ids
            params = SamplingParams(
                temperature=0, max_tokens=int(rng.integers(1, 12)), ignore_eos=rng.random() < 0.5,
                repetition_penalty=1.2 if rng.random() < 0.1 else 1.0,
            )  # fmt: skip
            batch.append((int(rng.integers(0, 6)), ids, params, RequestPriority(number % 3)))
        yield batch


def test_two_thousand_random_requests_by_prompt_lookup():
    proposed = accepted = count = 0
    for number, batch in enumerate(random_batches(40, 50)):
        plain = equalities.make_engine("plain", run_ahead=number % 2 == 1)
        speculator = ngram_speculator(1 + number % MAX_DRAFTS)
        engine = make_engine(
            "plain", speculator, chunk=(64, 9, 17)[number % 3], run_ahead=number % 4 > 1,
            num_blocks=TIGHT if number % 5 == 0 else ROOMY,
        )  # fmt: skip
        assert run(engine, batch) == run(plain, batch), number
        proposed += speculator.counters.num_proposed
        accepted += speculator.counters.num_accepted
        count += len(batch)
    assert count == 2000
    assert 0.1 * proposed < accepted < proposed > 1000


def test_several_samples_share_a_prompt():
    params = SamplingParams(temperature=0.5, n=4, seed=3, max_tokens=60, ignore_eos=True, top_k=3)

    def samples(engine):
        engine.add_request("0", [3, 4, 5, 3, 4, 5, 3, 4], params)
        found = [[] for _ in range(4)]
        while engine.has_unfinished:
            for output in engine.step():
                found[output.sample_index].append(output.token_id)
        return found

    speculator = ngram_speculator()
    wanted = samples(equalities.make_engine("plain"))
    assert samples(make_engine("plain", speculator)) == wanted
    assert len({tuple(tokens) for tokens in wanted}) > 1
    assert speculator.counters.num_proposed


def test_who_asks_for_logprobs_gets_no_drafts_and_the_same_numbers():
    def answers(engine):
        for number, (_, ids, params, _) in enumerate(requests()):
            params = params.with_(logprobs=2 if number % 2 else None)
            engine.add_request(str(number), ids, params)
        found = []
        while engine.has_unfinished:
            found += engine.step()
        return sorted((o for o in found if o.logprobs), key=lambda o: o.request_id)

    speculator = guessing("plain", "greedy", 1.0)
    got, wanted = (answers(e) for e in (
        make_engine("plain", speculator), equalities.make_engine("plain"),
    ))  # fmt: skip
    assert speculator.counters.num_accepted
    assert len(got) == len(wanted) > 10
    for a, b in zip(got, wanted, strict=True):
        assert (a.request_id, a.token_id) == (b.request_id, b.token_id)
        assert a.logprobs.logprob == pytest.approx(b.logprobs.logprob, abs=1e-4)
        assert [i for i, _ in a.logprobs.top] == [i for i, _ in b.logprobs.top]


@pytest.mark.parametrize("bad_row", range(3))
def test_a_request_fails_where_it_would_without_drafts(bad_row, monkeypatch):
    """A row that gave no numbers counts only where all drafts before it were right."""
    speculator = guessing("plain", "greedy", 1.0, 2)
    speculator.proposer._random.random = lambda: 0.5  # never short, never wrong
    engine = make_engine("plain", speculator)
    original = engine.runner.run
    failed = []

    def failing(schedule):
        ids = original(schedule)
        if schedule.has_drafts and not failed:
            ids = list(ids)
            ids[bad_row] = -1
            failed.append(len(schedule.requests[0].request.output_ids))
        return ids

    monkeypatch.setattr(engine.runner, "run", failing)
    speculator.proposer._random.randint = lambda low, high: high
    _, ids, params, _ = requests()[0]
    engine.add_request("0", ids, params)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
        engine.scheduler.check_integrity()
    tokens = [o.token_id for o in outputs]
    before = alone("plain")[0][: failed[0] + bad_row]
    assert tokens == [*before, -1]
    assert outputs[-1].finish_reason == "error"
    assert engine.pool.num_free == engine.pool.num_blocks - 1


def test_a_failed_step_loses_its_drafts_and_nothing_else(monkeypatch):
    engine = make_engine("plain", guessing("plain", "greedy", 0.7), num_blocks=TIGHT)
    original, calls = engine.runner.run, []

    def failing(schedule):
        calls.append(schedule)
        if schedule.has_drafts and len(calls) % 3 == 0:
            raise OSError("no luck")
        return original(schedule)

    monkeypatch.setattr(engine.runner, "run", failing)
    outputs: list[list[int]] = [[] for _ in requests()]
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
    assert failures > 3
    assert outputs == alone("plain")


def test_an_abort_between_two_steps():
    engine = make_engine("plain", guessing("plain", "greedy", 0.8), run_ahead=True)
    for number, (_, ids, params, _) in enumerate(requests()[:4]):
        engine.add_request(str(number), ids, params)
    outputs: list[list[int]] = [[] for _ in range(4)]
    step = 0
    while engine.has_unfinished:
        for output in engine.step():
            outputs[int(output.request_id)].append(output.token_id)
        step += 1
        if step == 4:
            engine.abort("2")
        engine.scheduler.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks - 1
    wanted = alone("plain")
    assert [outputs[i] for i in (0, 1, 3)] == [wanted[i] for i in (0, 1, 3)]
    assert outputs[2] == wanted[2][: len(outputs[2])]


def test_the_adaptive_policy_changes_no_token():
    outputs = alone("plain")
    proposer = GuessingProposer(lambda request: outputs[int(request.request_id)], 0.8, 48)
    speculator = Speculator(proposer, AdaptiveDrafts(5))
    speculator.policy.costs.add = lambda *step: None  # this machine's times decide nothing here
    speculator.policy.costs.estimate = lambda batch, drafts: 1.0 + 0.02 * drafts
    speculator.policy.costs.seconds = lambda batch, drafts: 1.0
    engine = make_engine("plain", speculator)
    assert run(engine, requests()) == outputs
    assert speculator.counters.num_accepted > 10


def test_settings_of_the_scheduler_are_the_runners():
    limits = replace(RunnerLimits(20, 4, 96, 64, 6), max_drafts=3, max_draft_rows=9)
    runner = NumpyRunner(equalities.CONFIGS["plain"], equalities.weights_of("plain"), limits)
    engine = LLMEngine(runner.config, runner, speculator=ngram_speculator(3))
    assert engine.scheduler.settings.max_draft_tokens == 9
    with pytest.raises(
        ConfigError, match=r"guesses are 4 tokens at most, .* built for 3"
    ) as raised:
        LLMEngine(runner.config, runner, speculator=ngram_speculator(4))
    assert "\n" not in str(raised.value)
