"""What the adaptive policy loses and keeps where times are hard to know, or captures come on top:
the engine on simulated machines, with forced acceptance."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace

import pytest

from nanocupy.speculation.policy import DraftPolicy
from tests.speculation.simulated_engine import MAX_DRAFTS, Machine, simulate
from tests.speculation.test_draft_budget import (
    LEAST,
    MACHINES,
    RUNS,
    adaptive,
    course,
    plain_course,
    rate,
)


@pytest.mark.parametrize("share", ["0.0", "0.4", "0.95"])
@pytest.mark.parametrize("caller", [0.05, 0.6, 1.5, 6.0])
@pytest.mark.parametrize("name", ["small", "large"])
def test_no_slower_beside_a_caller_who_takes_long(name, caller, share):
    """Where times are only known of steps that are read at once, which costs what runs beside."""
    machine = replace(MACHINES[name], caller=caller)
    run = course(machine, share, 1, 1000, adaptive(1, machine))
    assert min(rate(machine, run, 1, num_tokens) for num_tokens in RUNS) >= LEAST
    if share == "0.95":
        assert rate(machine, run, 1, 1000) > 1.8


@pytest.mark.parametrize(
    ("name", "caller", "gains"),
    [("small", 0.6, (2.0, 2.5)), ("small", 1.5, (2.5, 3.5)), ("large", 6.0, (2.5, 3.7))],
)
def test_what_drafts_bring_beside_such_a_caller_is_had_early(name, caller, gains):
    """A step without drafts that was read at once suffices to try some: by 100 and 256 tokens."""
    machine = replace(MACHINES[name], caller=caller)
    runs = [course(machine, "0.95", 1, 256, adaptive(1, machine), seed) for seed in range(7)]
    for num_tokens, gain in zip(RUNS, gains, strict=False):
        found = [rate(machine, run, 1, num_tokens) for run in runs]
        assert min(found) >= LEAST
        assert statistics.median(found) > gain


@pytest.mark.parametrize("caller", [0.6, 6.0])
@pytest.mark.parametrize("name", ["small", "large"])
def test_one_that_was_disturbed_is_not_believed_for_long(name, caller):
    """The only step without drafts that was timed: beside it drafts seem to cost nothing."""
    machine = replace(MACHINES[name], caller=caller)
    policy = adaptive(1, machine)
    add, disturbed = policy.costs.add, []

    def add_disturbed(num_seqs, num_drafts, seconds):
        if not num_drafts and seconds is not None and not disturbed:
            disturbed.append(seconds)
            seconds *= 3.0
        add(num_seqs, num_drafts, seconds)

    policy.costs.add = add_disturbed
    run = course(machine, "0.0", 1, 1000, policy)
    assert disturbed
    assert rate(machine, run, 1, 1000) > 0.97  # 0.58 if it were


@pytest.mark.parametrize("part", [0.6, 0.3, 0.1])
@pytest.mark.parametrize("num_seqs", [16, 64])
@pytest.mark.parametrize("name", ["small", "large"])
def test_drafts_that_only_some_have_do_not_end_those_of_all(name, num_seqs, part):
    """A proposer finds something for a part of the requests in each step: what pays is taken."""
    machine, found = MACHINES[name], []
    for policy in (adaptive(num_seqs, machine), DraftPolicy(MAX_DRAFTS)):
        run = simulate(machine, lambda at: 0.9, num_seqs, 256, policy, seed=1, promising=part)
        found.append(rate(machine, run, num_seqs, 256))
    assert found[0] >= LEAST
    if found[1] >= 1.25:
        assert found[0] >= 0.9 * found[1]


@pytest.mark.parametrize("share", ["0.0", "0.4", "0.8"])
@pytest.mark.parametrize("name", MACHINES)
def test_nor_where_steps_do_not_run_ahead(name, share):
    machine = replace(MACHINES[name], run_ahead=False)
    run = course(machine, share, 1, 1000, adaptive(1, machine))
    assert min(rate(machine, run, 1, num_tokens) for num_tokens in RUNS) >= LEAST
    assert share != "0.8" or rate(machine, run, 1, 1000) > 1.5


@pytest.mark.parametrize("num_seqs", [1, 4, 16])
@pytest.mark.parametrize("share", ["0.0", "0.2", "0.4", "0.8"])
def test_nor_where_a_draft_model_reads_first(num_seqs, share):
    """What came since its last try, in all tries that come alone: that is charged, and not taken
    for what steps with drafts take."""
    machine = replace(MACHINES["large with a draft model"], catch_up=0.7)
    run = course(machine, share, num_seqs, 1000, adaptive(num_seqs, machine))
    rates = [rate(machine, run, num_seqs, num_tokens) for num_tokens in RUNS]
    assert min(rates) >= LEAST
    assert share != "0.8" or rates[-1] > 1.7


def captured(machine: Machine, capture_ms: float) -> tuple[Machine, Counter[int]]:
    """One that takes so much longer for the first two steps of each form with drafts: by tokens of
    a sequence, rounded up to a power of two; and how many of each there were."""
    seen: Counter[int] = Counter()

    def step(seqs: int, drafts: int) -> float:
        if not drafts:
            return machine.step(seqs, 0)
        form = (drafts // seqs).bit_length()
        seen[form] += 1
        return machine.step(seqs, drafts) + capture_ms * (seen[form] <= 2)

    return replace(machine, step=step), seen


@pytest.mark.parametrize(
    ("name", "capture_ms", "gain"),
    [("small", 0.0, 2.2), ("small", 3.0, 1.9), ("large", 3.0, 3.8), ("large", 10.0, 3.4)],
)
def test_one_short_copy_gains_though_steps_are_captured(name, capture_ms, gain):
    """A fresh engine's first answer, of 110 tokens; most of those there are."""
    found = []
    for seed in range(20):
        machine, _ = captured(MACHINES[name], capture_ms)
        run = simulate(machine, lambda at: 0.92, 1, 110, adaptive(1, machine), seed=seed)
        found.append(rate(MACHINES[name], run, 1, 110))
    assert statistics.median(found) > gain
    assert sum(each > 1.1 for each in found) >= 17


@pytest.mark.parametrize("num_seqs", [1, 16])
@pytest.mark.parametrize("name", ["small", "large"])
def test_forms_that_take_long_once_do_not_end_drafts(name, num_seqs):
    """A device loads and captures a form of step when it comes first; that is over then."""
    machine, seen = captured(MACHINES[name], 30.0)
    policy = adaptive(num_seqs, machine)
    for number in range(4):
        run = course(machine, "0.95", num_seqs, 256, policy, number)
        if not number:  # beyond what captures take it is not slow either
            captures_ms = 30.0 * sum(min(2, count) for count in seen.values())
            plain = plain_course(MACHINES[name], num_seqs, 256)
            assert run.times[-1] - captures_ms < plain.seconds(256 * num_seqs) / LEAST
    always = course(MACHINES[name], "0.95", num_seqs, 256, DraftPolicy(MAX_DRAFTS))
    assert run.times[-1] < 1.15 * always.times[-1]
