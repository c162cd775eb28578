"""The real engine on a machine whose times are given, by a clock of its own: nothing is computed.

A device runs one step after the other. The host launches a step while the one before it runs, but
for steps with drafts and those after them, as on a GPU: there the device waits for the host.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.request import Request
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.engine.schedule import Schedule
from nanocupy.engine.step_times import StepTimes
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.policy import DraftPolicy
from nanocupy.speculation.proposer import Proposer
from nanocupy.speculation.speculator import Speculator
from tests.checkpoint.tiny import tiny_config

MAX_DRAFTS = 7


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Machine:
    """Times in any one unit. step: the device's, of so many sequences and drafts of all together;
    launch: the host's of a step like the one before, and `other_launch` of another; find: the
    host's for drafts, of so many requests and of the one that has most, and `catch_up` more where
    one has tokens that were not seen; caller: between two calls of `step`. run_ahead: whether the
    device runs beside the host."""

    step: Callable[[int, int], float]
    launch: float = 0.0
    other_launch: float = 0.0
    find: Callable[[int, int], float] = lambda num_requests, most: 0.0
    catch_up: float = 0.0
    caller: float = 0.0
    run_ahead: bool = True


class SimulatedRunner(Runner):
    """All tokens are zeros. disturb: by what a step takes longer."""

    device = "simulated"
    observer = None

    def __init__(
        self, machine: Machine, clock: Clock, num_seqs: int, max_context: int, *,
        disturb: Callable[[], float] = lambda: 1.0,
    ) -> None:  # fmt: skip
        self.config = tiny_config(vocab_size=1 << 16, max_context=max_context)
        size = 1024
        self.limits = RunnerLimits(
            1 + num_seqs * -(-max_context // size), size, max_context, 1 << 14, num_seqs,
            max_drafts=MAX_DRAFTS, max_draft_rows=MAX_DRAFTS * num_seqs,
        )  # fmt: skip
        self.can_run_ahead = machine.run_ahead
        self.num_drafts: list[int] = []  # of each step
        self._machine, self._clock = machine, clock
        self._disturb = disturb
        self._free_at = 0.0
        self._last: object = None

    def run(self, schedule: Schedule) -> list[int]:
        raise AssertionError("steps are launched")

    def launch(self, schedule: Schedule) -> Callable[[], list[int]]:
        machine, clock = self._machine, self._clock
        is_same = schedule.requests is self._last
        self._last = schedule.requests
        clock.now += machine.launch if is_same else machine.other_launch
        self.num_drafts.append(sum(len(item.drafts) for item in schedule))
        seconds = machine.step(len(schedule), self.num_drafts[-1]) * self._disturb()
        ends_at = self._free_at = max(self._free_at, clock.now) + seconds
        if not machine.run_ahead:
            clock.now = ends_at
        ids = [0] * sum(item.num_rows for item in schedule)

        def read() -> list[int]:
            clock.now = max(clock.now, ends_at)
            return ids

        return read


class SimulatedProposer(Proposer):
    """Guesses zeros, in the time that the machine takes to find them. promising: how likely there
    is something for a request in a step."""

    name = "simulated"

    def __init__(self, machine: Machine, clock: Clock, promising: float = 1.0) -> None:
        self._machine, self._clock = machine, clock
        self._promising, self._rng = promising, random.Random(5)
        self._num_seen: dict[Request, int] = {}

    def is_promising(self, request: Request) -> bool:
        return self._rng.random() < self._promising

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, Sequence[int]]:
        machine, seen = self._machine, self._num_seen
        self.was_reading = machine.catch_up > 0 and any(
            request.num_tokens - seen.get(request, 0) > 2 for request in wanted
        )
        self._clock.now += machine.catch_up * self.was_reading
        self._clock.now += machine.find(len(wanted), max(wanted.values()))
        for request, count in wanted.items():
            seen[request] = request.num_tokens + count - 1
        return {request: [0] * count for request, count in wanted.items()}

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


@dataclass
class Course:
    """How a run went: when how many tokens of all had come, and the drafts of each step."""

    times: list[float]
    num_tokens: list[int]
    num_drafts: list[int]

    def seconds(self, num_tokens: int) -> float:
        """Until so many tokens of all had come; in proportion within a step."""
        n = bisect_left(self.num_tokens, num_tokens)
        if n == 0:
            return 0.0
        before, after = self.num_tokens[n - 1 : n + 1]
        part = (num_tokens - before) / (after - before)
        return self.times[n - 1] + part * (self.times[n] - self.times[n - 1])


def simulate(
    machine: Machine,
    share: Callable[[int], float],
    num_seqs: int,
    num_tokens: int,
    policy: DraftPolicy | None,
    *,
    seed: int = 0,
    length: int | None = None,
    disturbed: bool = False,
    promising: float = 1.0,
) -> Course:
    """Decode with forced acceptance until all have num_tokens each on average. policy: None =
    without drafts. share: how likely a draft is right once a request has so many tokens; length: of
    an answer, behind which another request comes; disturbed: steps take 2 % more or less, and now
    and then three times as long; promising: see `SimulatedProposer`."""
    clock, rng, noise = Clock(), random.Random(seed), random.Random(seed + 1)

    def disturb() -> float:
        return noise.uniform(0.98, 1.02) * (3.0 if noise.random() < 0.02 else 1.0)

    # Some get more tokens than others, by their luck.
    runner = SimulatedRunner(
        machine, clock, num_seqs, 2 * num_tokens + 512,
        **({"disturb": disturb} if disturbed else {}),
    )  # fmt: skip
    num_read = 0

    def count_right(drafts: Sequence[int], chosen: Sequence[int]) -> int:
        count = 0
        while count < len(drafts) and rng.random() < share(num_read // num_seqs):
            count += 1
        return count

    speculator = None
    if policy is not None:
        proposer = SimulatedProposer(machine, clock, promising)
        speculator = Speculator(proposer, policy, count_right)
    engine = LLMEngine(
        runner.config, runner, run_ahead=machine.run_ahead, speculator=speculator, clock=clock,
        prefix_cache=False,
    )  # fmt: skip
    engine._times = StepTimes(clock)
    params = SamplingParams(temperature=0, max_tokens=length or 10**9, ignore_eos=True)
    names = iter(range(10**9))

    def fill() -> None:
        while len(engine._requests) < num_seqs:
            engine.add_request(str(next(names)), [1], params)

    course = Course([], [], runner.num_drafts)
    start, begun = 0.0, set()
    while num_read < num_tokens * num_seqs:
        fill()
        outputs = engine.step()
        if len(begun) < num_seqs:
            begun.update(output.request_id for output in outputs)
            start = clock.now
            if len(begun) == num_seqs:
                course.times.append(0.0)
                course.num_tokens.append(0)
                runner.num_drafts.clear()
        else:
            num_read += len(outputs)
            if outputs:
                course.times.append(clock.now - start)
                course.num_tokens.append(num_read)
        clock.now += machine.caller
    return course
