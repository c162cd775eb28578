"""Drafts on a device, on the host shim: the same tokens as without, and as on NumPy."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from nanocupy.engine.device_penalties import PenaltySlots
from nanocupy.engine.device_plan import DeviceSettings, draft_limits
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.scheduler import SchedulerSettings
from nanocupy.model.load import load_numpy_weights
from nanocupy.speculation.draft_model import DraftModelProposer
from nanocupy.speculation.policy import DraftPolicy
from nanocupy.speculation.proposer import Proposer
from nanocupy.speculation.speculator import Speculator
from tests.checkpoint.tiny import TinyCheckpoint
from tests.engine.device_runs import CONFIGS, FLOAT32, GREEDY, arrivals, penalised
from tests.engine.drafts import GuessingProposer
from tests.shim.device import MODERN, OLD, ShimDevice

LIMITS = RunnerLimits(60, 4, 96, 32, 6, max_drafts=5, max_draft_rows=12)


def make_runner(name: str, device: ShimDevice, limits=LIMITS, seed: int = 3) -> DeviceRunner:
    checkpoint = TinyCheckpoint(CONFIGS[name], seed=seed)
    settings = replace(FLOAT32, two_streams=False)
    runner = DeviceRunner(checkpoint.config, device, limits, settings)
    runner.upload_weights(checkpoint)
    return runner


def run(engine: LLMEngine, requests) -> dict[str, list[int]]:
    outputs: dict[str, list[int]] = {name: [] for name in requests}
    waiting, step = dict(requests), 0
    while waiting or engine.has_unfinished:
        for name, (at, ids, params) in list(waiting.items()):
            if step >= at:
                engine.add_request(name, ids, params)
                del waiting[name]
        for output in engine.step():
            outputs[output.request_id].append(output.token_id)
        engine.scheduler.check_integrity()
        step += 1
    return outputs


def plain(name: str, requests) -> dict[str, list[int]]:
    """On NumPy, each at its time, without drafts."""
    weights = load_numpy_weights(TinyCheckpoint(CONFIGS[name], seed=3))
    return run(LLMEngine(CONFIGS[name], NumpyRunner(CONFIGS[name], weights, LIMITS)), requests)


class NowAndThen(Proposer):
    """Guesses in some steps and not in others, so that decodes and checks take turns."""

    name = "now and then"

    def __init__(self, inner: Proposer) -> None:
        self._inner = inner
        self._asked = 0

    def is_promising(self, request):
        return self._inner.is_promising(request)

    def propose(self, wanted):
        self._asked += 1
        return self._inner.propose(wanted) if self._asked % 3 else {}

    def forget(self, request):
        self._inner.forget(request)


def guessing(wanted, right: float = 0.75, num_drafts: int = 5) -> Speculator:
    proposer = GuessingProposer(lambda request: wanted[request.request_id], right, 48)
    return Speculator(NowAndThen(proposer), DraftPolicy(num_drafts))


@pytest.mark.parametrize("traits", [MODERN, OLD], ids=["modern", "old"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_same_tokens_as_without(name, temperature, traits):
    requests = arrivals(7, GREEDY.with_(temperature=temperature, seed=5))
    wanted = plain(name, requests)
    device = ShimDevice(traits=traits)
    runner = make_runner(name, device)
    speculator = guessing(wanted)
    engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
    assert run(engine, requests) == wanted
    counters = speculator.counters
    assert 5 < counters.num_accepted < counters.num_proposed
    assert device.counts["replayed"] > 3


def test_greedy_ones_and_others():
    """Who draws may join those who don't, in steps with drafts and in others, and leave again."""
    requests = arrivals(8, GREEDY.with_(seed=5))
    requests = {
        name: (at, ids, params.with_(temperature=0.9 * (int(name) % 2), max_tokens=12))
        for name, (at, ids, params) in requests.items()
    }
    wanted = plain("llama", requests)
    runner = make_runner("llama", ShimDevice())
    speculator = guessing(wanted)
    engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
    assert run(engine, requests) == wanted
    assert speculator.counters.num_accepted > 10


@pytest.mark.parametrize("where", ["device", "host", "beside prompts"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_penalties(temperature, where, monkeypatch):
    """Counted on the device, by what was accepted; or from the host, where a request's have no room
    in a slot; or both in turns, as those with drafts beside prompts come from the host."""
    requests = penalised(temperature, 8 if where == "beside prompts" else 6)
    if where != "beside prompts":
        requests = {name: (0, ids[:4], params) for name, (_, ids, params) in requests.items()}
    if where == "host":
        monkeypatch.setattr(PenaltySlots, "fit", lambda *args: False)
    wanted = plain("llama", requests)
    runner = make_runner("llama", ShimDevice())
    speculator = guessing(wanted, right=0.6, num_drafts=3)
    engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
    assert run(engine, requests) == wanted
    assert speculator.counters.num_accepted > 5
    launched = runner._device.kernels.launched
    assert ("penalize_draft_rows" in launched) == ("count_accepted" in launched)
    assert ("penalize_draft_rows" in launched) == (where != "host")
    assert ("penalize_rows" in launched) == (where != "device")


def test_a_draft_model_beside_it():
    requests = arrivals(5, GREEDY.with_(temperature=0.7, seed=2))
    wanted = plain("llama", requests)
    device = ShimDevice()
    runner = make_runner("llama", device)
    of_draft = draft_limits(LIMITS, CONFIGS["llama"])
    for seed, least, most in ((3, 1.0, 1.0), (4, 0.0, 0.5)):
        draft = make_runner("llama", device.second_stream(), of_draft, seed)
        proposer = DraftModelProposer(draft, runner.config.vocab_size)
        speculator = Speculator(proposer, DraftPolicy(4))
        engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
        assert run(engine, requests) == wanted
        proposer.check_integrity()
        assert speculator.counters.num_proposed > 10
        assert least <= speculator.counters.acceptance <= most


def test_a_draft_model_goes_on_from_what_came():
    """However many of its guesses were right, the last among them or not, the next ones are those
    of a proposer that has never seen the request."""
    of_draft = draft_limits(LIMITS, CONFIGS["llama"])
    weights = load_numpy_weights(TinyCheckpoint(CONFIGS["llama"], seed=3))
    whole = replace(of_draft, max_step_tokens=300)  # all that came is read in one step
    fresh = DraftModelProposer(NumpyRunner(CONFIGS["llama"], weights, whole), 48)
    proposer = DraftModelProposer(make_runner("llama", ShimDevice(), of_draft), 48)
    rng = random.Random(0)
    outputs = {number: [7] for number in range(3)}

    def request(number: int) -> Request:
        params = GREEDY.with_(max_tokens=80, temperature=0.7 if number == 2 else 0.0)
        return Request(str(number), [3 + number, 4, 5, 9], params, 1, 96)

    def brought(requests: dict[int, Request]) -> dict[Request, int]:
        for number, one in requests.items():
            one.output_ids = list(outputs[number])
            one.num_tokens = one.num_known_tokens
        return dict.fromkeys(requests.values(), 4)

    lasting = {number: request(number) for number in outputs}
    for turn in range(12):
        new = {number: request(number) for number in outputs}
        # Some are left out at times, so that batches change.
        asked = [number for number in outputs if turn % 4 or number != turn // 4]
        got = proposer.propose(brought({number: lasting[number] for number in asked}))
        wanted = fresh.propose(brought({number: new[number] for number in asked}))
        for number in asked:
            guesses = list(wanted[new[number]])
            assert list(got[lasting[number]]) == guesses, (turn, number)
            fresh.forget(new[number])
            num_right = 3 if turn % 2 else rng.randrange(5)
            outputs[number] += guesses[:num_right]
            if num_right < 4:
                outputs[number].append((guesses[num_right] + rng.randrange(1, 48)) % 48)
            else:
                outputs[number].append(rng.randrange(48))


@pytest.mark.parametrize("cache", ["int8", "float8_e4m3fn"])
def test_a_quantised_cache(cache):
    """What was written for a wrong draft is written over, its scale too."""
    requests = arrivals(5, GREEDY.with_(temperature=0.7, seed=3))
    checkpoint = TinyCheckpoint(CONFIGS["qwen2"], seed=3)
    answers = []
    for right in (None, 0.7):
        settings = replace(FLOAT32, cache_dtype=cache)
        runner = DeviceRunner(checkpoint.config, ShimDevice(), LIMITS, settings)
        runner.upload_weights(checkpoint)
        speculator = None if right is None else guessing(answers[0], right)
        engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
        answers.append(run(engine, requests))
    assert answers[0] == answers[1]
    assert speculator.counters.num_accepted > 5


def test_rows_beyond_one_a_sequence_have_room():
    """As many drafts as a step may have, of all sequences at once."""
    limits = replace(LIMITS, max_draft_rows=30)
    requests = {str(i): (0, [i, 7, i, 7], GREEDY.with_(max_tokens=9)) for i in range(6)}
    wanted = plain("qwen2", requests)
    runner = make_runner("qwen2", ShimDevice(), limits)
    proposer = GuessingProposer(lambda request: wanted[request.request_id], 1.0, 48)
    proposer._random.random, proposer._random.randint = lambda: 0.5, lambda low, high: high
    speculator = Speculator(proposer, DraftPolicy(5))
    engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
    assert run(engine, requests) == wanted
    counters = speculator.counters
    assert counters.num_accepted == counters.num_proposed
    assert counters.num_proposed >= 30


@pytest.mark.parametrize("num_seqs", [1, 6])
def test_steps_that_hold_few_tokens(num_seqs):
    """As few as sequences run at once, or one more: guesses have what room is left."""
    num_tokens = max(num_seqs, 2)
    limits = replace(
        LIMITS, max_step_tokens=num_tokens, max_num_seqs=num_seqs, max_draft_rows=num_tokens - 1
    )
    requests = {str(i): (i // 2, [i, 7, i, 7], GREEDY.with_(max_tokens=12)) for i in range(7)}
    wanted = plain("llama", requests)
    runner = make_runner("llama", ShimDevice(), limits)
    speculator = guessing(wanted)
    engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
    assert run(engine, requests) == wanted
    assert 0 < speculator.counters.num_accepted < speculator.counters.num_proposed


def test_two_streams_take_one_for_drafts():
    requests = arrivals(6, GREEDY)
    wanted = plain("llama", requests)
    checkpoint = TinyCheckpoint(CONFIGS["llama"], seed=3)
    settings = replace(FLOAT32, two_streams=True)
    runner = DeviceRunner(checkpoint.config, ShimDevice(), LIMITS, settings)
    runner.upload_weights(checkpoint)
    speculator = guessing(wanted)
    engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
    assert run(engine, requests) == wanted
    assert speculator.counters.num_accepted > 5


def test_logprobs_beside_drafts():
    requests = arrivals(5, GREEDY)
    requests = {
        name: (at, ids, params.with_(logprobs=1 if int(name) % 2 else None))
        for name, (at, ids, params) in requests.items()
    }
    wanted = plain("llama", requests)
    runner = make_runner("llama", ShimDevice())
    speculator = guessing(wanted)
    engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
    assert run(engine, requests) == wanted
    assert speculator.counters.num_accepted > 3  # of the three requests that may have drafts


def test_the_kernels_that_drafts_need_are_known_beforehand():
    device = ShimDevice()
    runner = make_runner("qwen3-ntk", device)
    known = {(file, tuple(sorted(m.items()))) for file, m in runner.kernel_variants()}
    plain_limits = replace(LIMITS, max_drafts=0, max_draft_rows=0)
    without = make_runner("qwen3-ntk", ShimDevice(), plain_limits).kernel_variants()
    assert {("attention_decode.cu", q) for q in (2, 4, 8)} <= {
        (file, dict(m).get("QUERIES")) for file, m in known
    }
    assert len(known) > len(without)
    asked: set = set()
    get = device.kernels.get

    def noted(file: str, entry: str, **macros: int):
        asked.add((file, tuple(sorted(macros.items()))))
        return get(file, entry, **macros)

    device.kernels.get = noted
    requests = arrivals(9, GREEDY.with_(temperature=0.7, seed=1))
    wanted = plain("qwen3-ntk", requests)
    engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=guessing(wanted))
    assert run(engine, requests) == wanted
    assert asked - known <= {m for m in asked if m[0] == "gemv.cu"}, "batches between the powers"


def test_a_draft_model_has_no_kernels_that_check_drafts():
    limits = draft_limits(LIMITS, CONFIGS["llama"])
    of_draft, of_model = (
        {file for file, _ in make_runner("llama", ShimDevice(), lim).kernel_variants()}
        for lim in (limits, LIMITS)
    )
    assert of_model - of_draft == {"drafts.cu"}


def test_a_steady_step_is_its_graph_alone():
    """The batch is on the device, and drafts are sent by the graph: while no block comes, nothing
    else is copied."""
    params = GREEDY.with_(max_tokens=80)
    wanted = plain("llama", {"0": (0, [3, 4], params)})
    device = ShimDevice()
    runner = make_runner("llama", device, replace(LIMITS, block_size=16))
    proposer = GuessingProposer(lambda request: wanted["0"], 0.6, 48)
    proposer._random.randint = lambda low, high: high
    engine = LLMEngine(
        runner.config, runner, run_ahead=True, speculator=Speculator(proposer, DraftPolicy(2))
    )
    engine.add_request("0", [3, 4], params)
    (request,) = engine._requests["0"]
    launch, seen = runner.launch, []

    def noted(schedule):
        before = device.counts["to_device"]
        read = launch(schedule)
        copies = device.counts["to_device"] - before
        seen.append((schedule.has_drafts, len(request.block_ids), copies))
        return read

    runner.launch = noted
    tokens = []
    while engine.has_unfinished:
        tokens += [output.token_id for output in engine.step()]
    assert tokens == wanted["0"]
    steady = [
        after[2]
        for before, after in pairwise(seen)
        if before[0] and after[0] and before[1] == after[1]
    ]
    assert len(steady) > 10
    assert set(steady[2:]) == {0}, steady  # the first ones are run eagerly, and captured


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preempted(mode):
    """Who comes back has other blocks, at the same place maybe, and its drafts go on."""
    requests = {str(i): (i, [i, 7, i, 7, 9], GREEDY.with_(max_tokens=25)) for i in range(5)}
    wanted = plain("llama", requests)
    limits = replace(LIMITS, num_blocks=22, num_host_blocks=30)
    runner = make_runner("llama", ShimDevice(), limits)
    speculator = guessing(wanted)
    settings = SchedulerSettings(
        6, 32, policy="priority", preemption=mode, max_draft_tokens=limits.max_draft_rows
    )
    engine = LLMEngine(runner.config, runner, settings, run_ahead=True, speculator=speculator)
    assert run(engine, requests) == wanted
    counters = engine.scheduler.counters
    assert counters.num_swapped_out if mode == "swap" else counters.num_recomputed
    assert speculator.counters.num_accepted > 10


def test_several_queries_in_one_launch(monkeypatch):
    """16 bits, short contexts, few sequences: attention is one launch with what stands before it,
    which reads lengths and slots early, so what lays these out must have ended. The tokens are
    those of two launches, and greedy ones those without drafts."""
    settings = DeviceSettings("bfloat16", "bfloat16", "bfloat16", two_streams=False)
    requests = {
        str(i): (12 * i, [3 + i, 4, 5], GREEDY.with_(max_tokens=24, temperature=0.4 * i, seed=2))
        for i in range(3)
    }
    answers, launched = [], set()
    for right, is_fused in ((None, True), (0.8, False), (0.8, True)):
        device = ShimDevice(traits=replace(MODERN, whole_steps=False))
        get = device.kernels.get

        def noted(file: str, entry: str, get=get, **macros: int):
            launched.add((entry, macros.get("QUERIES", 1)))
            return get(file, entry, **macros)

        device.kernels.get = noted
        runner = DeviceRunner(CONFIGS["llama"], device, LIMITS, settings)
        runner.upload_weights(TinyCheckpoint(CONFIGS["llama"], seed=3))
        speculator = None if right is None else guessing(answers[0], right, 3)
        engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
        launched.clear()
        with monkeypatch.context() as patch:
            if not is_fused:
                patch.setattr("nanocupy.engine.device_drafts.fused_bounds", lambda *args: ())
            answers.append(run(engine, requests))
        queries = {n for entry, n in launched if entry == "attention_decode_fused"}
        assert queries == ({1, 2, 4} if right and is_fused else {1})
    assert answers[1] == answers[2]
    assert answers[0]["0"] == answers[2]["0"]
    assert speculator.counters.num_accepted > 10
    known = {(file, tuple(sorted(m.items()))) for file, m in runner.kernel_variants()}
    assert ("attention_decode_fused.cu", 4) in {(f, dict(m).get("QUERIES", 1)) for f, m in known}


@pytest.mark.parametrize("penalizes", [False, True])
def test_a_bench_makes_drafts_right(penalizes):
    """As many as it says; the host's copy of the batch stays what the device has, so that a step
    is its graph alone, and no word of the batch is sent."""
    device = ShimDevice()
    runner = make_runner("llama", device, replace(LIMITS, block_size=96, num_blocks=12))
    coin = random.Random(4)
    counts = []

    def force(drafts):
        counts.append(coin.randrange(len(drafts) + 1))
        return counts[-1]

    assert runner.force_acceptance(force)
    proposer = GuessingProposer(lambda request: [-1] * 90, 0.0, 48)
    proposer.is_promising = lambda request: True
    proposer._random.random, proposer._random.randint = lambda: 0.5, lambda low, high: high
    speculator = Speculator(proposer, DraftPolicy(4))
    engine = LLMEngine(runner.config, runner, run_ahead=True, speculator=speculator)
    params = GREEDY.with_(max_tokens=60, frequency_penalty=0.3 * penalizes)
    engine.add_request("0", [3, 4], params)
    given, before, copies = [], device.counts["to_device"], []
    while engine.has_unfinished:
        before = device.counts["to_device"]
        given.append(len(engine.step()))
        copies.append(device.counts["to_device"] - before)
    assert sum(given) == 60
    assert speculator.counters.num_accepted >= sum(counts) - 4 > 20
    assert speculator.counters.num_accepted <= sum(counts) + 3  # one may be right by chance
    if not penalizes:
        assert set(copies[5:-4]) == {0}, copies
    runner.force_acceptance(None)
    engine.add_request("1", [3, 4], GREEDY.with_(max_tokens=9))
    while engine.has_unfinished:
        engine.step()
