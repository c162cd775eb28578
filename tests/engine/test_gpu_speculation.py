"""Drafts on a real GPU: the tokens of a request are those without, and a step takes no memory.

Float32, greedy. Where a step of several tokens and one of a single token differ in the last bits, a
token may differ if the two best logits before it are within 1e-4 of each other (`same_tokens`).
"""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.engine.device_plan import DeviceSettings, draft_limits
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.request import RequestPriority
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.scheduler import SchedulerSettings
from nanocupy.speculation.draft_model import DraftModelProposer
from nanocupy.speculation.ngram import NgramProposer
from nanocupy.speculation.policy import AdaptiveDrafts, DraftPolicy
from nanocupy.speculation.speculator import Speculator
from tests.engine.drafts import GuessingProposer
from tests.engine.test_gpu_serving import CONFIG, GREEDY, ROOMY, TIGHT, requests, same_tokens
from tests.engine.test_gpu_serving import make_runner as make_plain_runner
from tests.engine.test_gpu_serving import run as run_plain

pytestmark = pytest.mark.gpu

MAX_DRAFTS = 7
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {3: 2.0}}


def make_runner(
    dtype: str = "float32", *, num_blocks: int = ROOMY, num_layers: int = 6, seed: int = 6,
    device=None, **options,
) -> DeviceRunner:  # fmt: skip
    from nanocupy.cuda.device import CudaDevice

    config = CONFIG.with_(num_layers=num_layers)
    checkpoint = RandomCheckpoint(config, dtype, seed=seed)
    limits = RunnerLimits(
        num_blocks, 16, 512, 256, 12, 0 if device else 200, MAX_DRAFTS, 12 * MAX_DRAFTS
    )
    if device is not None:
        limits = draft_limits(limits, config)
    settings = DeviceSettings(dtype, dtype, dtype)
    runner = DeviceRunner(config, device or CudaDevice(**options), limits, settings)
    runner.upload_weights(checkpoint)
    return runner


def run(runner, speculator, params=GREEDY, batch=None, **settings) -> list[list[int]]:
    return run_engine(runner, speculator, params, batch, **settings)[0]


def run_engine(runner, speculator, params=GREEDY, batch=None, **settings):
    """The tokens of each request, and the engine that made them."""
    settings = SchedulerSettings(12, 256, max_draft_tokens=12 * MAX_DRAFTS, **settings)
    engine = LLMEngine(CONFIG, runner, settings, run_ahead=True, speculator=speculator)
    batch = requests() if batch is None else batch
    outputs: list[list[int]] = [[] for _ in batch]
    step = 0
    while engine.has_unfinished or any(at >= step for at, *_ in batch):
        for number, (at, ids, level) in enumerate(batch):
            if at == step:
                engine.add_request(str(number), ids, params, RequestPriority(level))
        for output in engine.step():
            outputs[int(output.request_id)].append(output.token_id)
        engine.scheduler.check_integrity()
        step += 1
    assert engine.pool.num_free == engine.pool.num_blocks - 1
    return outputs, engine


@pytest.fixture(scope="module")
def alone():
    """Every request by itself, without drafts; and the runner of it."""
    runner = make_plain_runner(num_blocks=ROOMY)
    outputs = [
        run_plain(runner, [(0, ids, 0)], prefix_cache=False, run_ahead=False)[0][0]
        for _, ids, _ in requests()
    ]
    return outputs, runner


def guessing(outputs, right: float, num_drafts: int = MAX_DRAFTS, policy=None) -> Speculator:
    proposer = GuessingProposer(lambda r: outputs[int(r.request_id)], right, CONFIG.vocab_size)
    return Speculator(proposer, policy or DraftPolicy(num_drafts))


@pytest.mark.parametrize("num_drafts", [1, 3, 5, 7])
@pytest.mark.parametrize("options", [{}, {"use_graphs": False}, {"force_plain": True}], ids=str)
def test_the_same_tokens_as_without(alone, options, num_drafts) -> None:
    speculator = guessing(alone[0], 0.8, num_drafts)
    same_tokens(run(make_runner(**options), speculator), alone)
    assert 0 < speculator.counters.num_accepted < speculator.counters.num_proposed


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preempted(alone, mode) -> None:
    speculator = guessing(alone[0], 0.8)
    runner = make_runner(num_blocks=TIGHT)
    got, engine = run_engine(runner, speculator, policy="priority", preemption=mode)
    same_tokens(got, alone)
    assert speculator.counters.num_accepted > 5
    counters = engine.scheduler.counters
    assert counters.num_swapped_out if mode == "swap" else counters.num_recomputed


def test_prompt_lookup() -> None:
    """Of two tokens that are all there is, every pair has soon been seen."""
    params = GREEDY.with_(logit_bias={5: 100.0, 7: 100.0})
    wanted = run_plain(make_plain_runner(), params=params)[0]
    assert {token_id for tokens in wanted for token_id in tokens} <= {5, 7}
    speculator = Speculator(NgramProposer(), DraftPolicy(MAX_DRAFTS))
    got = run(make_runner(), speculator, params)
    assert sum(a == b for a, b in zip(got, wanted, strict=True)) >= len(wanted) - 1
    assert [len(tokens) for tokens in got] == [len(tokens) for tokens in wanted]
    assert speculator.counters.num_proposed > 50
    assert speculator.counters.num_accepted > 10


def test_the_adaptive_policy(alone) -> None:
    speculator = guessing(alone[0], 0.8, policy=AdaptiveDrafts(5))
    costs = speculator.policy.costs
    costs.add = lambda *step: None  # this machine's times decide nothing here
    costs.estimate = lambda batch, drafts: 1.0 + 0.02 * drafts
    costs.seconds = lambda batch, drafts: 1.0
    same_tokens(run(make_runner(), speculator), alone)
    assert 10 < speculator.counters.num_accepted < speculator.counters.num_proposed


@pytest.mark.parametrize(
    ("seed", "least", "most"), [(6, 0.95, 1.0), (7, 0.0, 0.1)], ids=["itself", "another"]
)
def test_a_draft_model(alone, seed, least, most) -> None:
    runner = make_runner()
    draft = make_runner(device=runner.clock.second_stream(), seed=seed)
    proposer = DraftModelProposer(draft, CONFIG.vocab_size)
    speculator = Speculator(proposer, DraftPolicy(5))
    same_tokens(run(runner, speculator), alone)
    proposer.check_integrity()
    assert not proposer._mirrors
    assert speculator.counters.num_proposed > 50
    assert least <= speculator.counters.acceptance <= most


def test_penalties_and_draws_by_seed() -> None:
    """Sampled tokens with penalties depend on the last bits of logits rarely: most requests are
    equal to the end, and no seed is another's."""
    params = GREEDY.with_(temperature=0.8, top_p=0.9, seed=3, **PENALTIES)
    wanted = run_plain(make_plain_runner(), params=params)[0]
    speculator = guessing(wanted, 0.8)
    got = run(make_runner(), speculator, params)
    assert sum(a == b for a, b in zip(got, wanted, strict=True)) >= len(wanted) - 1
    assert speculator.counters.acceptance > 0.3


def test_sixteen_bits_take_no_memory_while_they_run() -> None:
    """Steps of every number of drafts, captured and replayed, without an allocation."""
    from nanocupy.cuda.arena import device_allocations

    runner = make_runner("bfloat16")
    rng = np.random.default_rng(0)
    batch = [(0, rng.integers(0, 999, 40).tolist(), 0) for _ in range(3)]
    answers = [[5] * 24] * 3
    run(runner, guessing(answers, 0.5), batch=batch)
    speculators = [guessing(answers, 0.5) for _ in range(3)]
    with device_allocations() as count:
        for speculator in speculators:
            run(runner, speculator, batch=batch)
    assert all(speculator.counters.num_steps > 10 for speculator in speculators)
    assert count.pool_mallocs == 0
    graphs = runner.clock.graphs.counters
    assert graphs.replayed > 20
    assert "cannot be captured" not in graphs.eager
