"""What guesses cost and what they bring: decoding with drafts beside decoding without.

With random weights a draft model is never right, so how many drafts count is decided by a coin of
the wanted acceptance. Else it is as in use: drafts are found, checked in one forward, and what
follows the rejected ones is written again. A device makes drafts right where it chooses (one small
kernel more in a step), so that it moves its batch on by itself, as in use.

What a step takes is told apart: the time that the device computes, by its own clock, and the time
in which it waits for the host, which must read a step before it can find drafts for the next.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanocupy.bench.measure import (
    DECODE_OUTPUT,
    DECODE_PROMPT,
    WARMUPS,
    Measurement,
    itemsize_of,
    kv_token_bytes,
    random_prompts,
    require_room,
    weight_bytes,
    weight_counts,
)
from nanocupy.cuda.step_stamps import DECODE, DRAFTS, IdleTime, idle_share
from nanocupy.engine.draft_backend import make_policy
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.request import Request
from nanocupy.profiling.step_parts import PARTS, StepParts
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.acceptance import count_right
from nanocupy.speculation.policy import DraftPolicy
from nanocupy.speculation.proposer import Proposer
from nanocupy.speculation.speculator import Speculator


class FreeProposer(Proposer):
    """Guesses without looking, from random ids that are drawn beforehand: what is measured beside
    it is all but the guessing."""

    name = "free"
    NUM_IDS = 1 << 12

    def __init__(self, vocab_size: int) -> None:
        draw = random.Random(0).randrange
        self._ids = [draw(vocab_size) for _ in range(self.NUM_IDS)]
        self._next = 0

    def is_promising(self, request: Request) -> bool:
        return True

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, Sequence[int]]:
        found = {}
        for request, count in wanted.items():
            if self._next + count > self.NUM_IDS:
                self._next = 0
            found[request] = self._ids[self._next : self._next + count]
            self._next += count
        return found

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


class TimedProposer(Proposer):
    """Adds up what another one takes, and counts its guesses."""

    def __init__(self, inner: Proposer) -> None:
        self._inner = inner
        self.name = inner.name
        self.seconds: list[float] = []  # of a turn, by its guesses for the one who got most

    def is_promising(self, request: Request) -> bool:
        return self._inner.is_promising(request)

    def forget(self, request: Request) -> None:
        self._inner.forget(request)

    @property
    def max_step_tokens(self) -> int:
        return self._inner.max_step_tokens

    @max_step_tokens.setter
    def max_step_tokens(self, value: int) -> None:
        self._inner.max_step_tokens = value

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, Sequence[int]]:
        start = time.perf_counter()
        found = self._inner.propose(wanted)
        self.was_reading = self._inner.was_reading
        most = max(map(len, found.values()), default=0)
        if most and not self.was_reading:
            self.seconds.append((time.perf_counter() - start) / most)
        return found


class ForcedAcceptance:
    """Each draft is right with this probability, those before it being right; what was chosen does
    not matter."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._random = random.Random(1)

    def __call__(self, drafts: Sequence[int], chosen: Sequence[int] = ()) -> int:
        count = 0
        while count < len(drafts) and self._random.random() < self._share:
            count += 1
        return count


@dataclass(frozen=True)
class SpeculativeResult:
    """Output tokens a second of all sequences; acceptance None: without drafts.

    step_ms: median of all steps, finding drafts included; draft_ms: what finding them takes for
    each draft in turn; tokens_per_forward: of sequences with drafts; x_off, x_step: rate and step
    beside those without drafts. device_ms, idle_ms: medians of what a step takes on the device, by
    its own clock, and of its wait before one, None where it has no clock; of steps that decode or
    that check drafts, the copies to the device and back included in the latter alone. x_device:
    device_ms beside that without drafts. parts_us: the host's time.
    """

    result: Measurement
    acceptance: float | None
    step_ms: float
    draft_ms: float = 0.0
    tokens_per_forward: float = 1.0
    x_off: float = 1.0
    x_step: float = 1.0
    device_ms: float | None = None
    idle_ms: float | None = None
    x_device: float | None = None
    parts_us: Mapping[str, float] | None = None

    def details(self) -> dict[str, Any]:
        """All but the result, for JSON."""
        shown = (None if n is None else round(n, 4) for n in (
            self.device_ms, self.idle_ms, self.x_device
        ))  # fmt: skip
        names = "device_ms", "idle_ms", "x_device"
        parts = {name: round(n, 1) for name, n in (self.parts_us or {}).items()}
        return {
            "acceptance": self.acceptance,
            "step_ms": round(self.step_ms, 4),
            "draft_ms": round(self.draft_ms, 4),
            "tokens_per_forward": round(self.tokens_per_forward, 3),
            "x_off": round(self.x_off, 4),
            "x_step": round(self.x_step, 4),
            **dict(zip(names, shown, strict=True)),
            "host_parts_us": parts,
        }


def speculative(
    engine: LLMEngine,
    shape: str,
    dtype: str,
    batch: int,
    acceptances: Sequence[float],
    *,
    adaptive: bool = False,
    repeats: int = 3,
) -> list[SpeculativeResult]:
    """Decode without drafts, then with as many as the engine takes at each acceptance, from context
    128 on, while all sequences run. With `adaptive` the policy decides how many, as in use.

    The engine's proposer guesses, where it has a draft model; else guesses cost nothing. Raises
    ConfigError where it does not fit.
    """
    speculator, num_drafts = engine.speculator, engine.runner.limits.max_drafts
    assert speculator is not None
    assert num_drafts
    inner: Proposer = speculator.proposer
    if inner.name != "draft":
        inner = FreeProposer(engine.config.vocab_size)
    name = f"speculative/{shape}/{inner.name}/{dtype}/b{batch}"
    try:
        engine.speculator = None
        found = [_measure(engine, f"{name}/off", dtype, batch, repeats)]
        for share in acceptances:
            policy = DraftPolicy(num_drafts)
            if adaptive:
                policy = make_policy(inner, num_drafts, engine.runner)
            timed = TimedProposer(inner)
            coin = ForcedAcceptance(share)
            on_device = engine.runner.force_acceptance(coin)
            rule = count_right if on_device else coin
            if adaptive and on_device:  # steps are captured when one of their form first comes
                for count in range(1, num_drafts + 1):
                    engine.speculator = Speculator(inner, DraftPolicy(count), rule)
                    _decode(engine, batch, 0)
            engine.speculator = Speculator(timed, policy, rule)
            kind = "adaptive" if adaptive else f"k{num_drafts}"
            result = _measure(
                engine, f"{name}/{kind}/a{share:g}", dtype, batch, repeats, share, timed
            )
            off = found[0]
            ratios = {
                "x_off": result.result.median / off.result.median,
                "x_step": result.step_ms / off.step_ms,
            }
            if result.device_ms is not None and off.device_ms:
                ratios["x_device"] = result.device_ms / off.device_ms
            found.append(replace(result, **ratios))
    finally:
        engine.speculator = speculator
        engine.runner.force_acceptance(None)
    return found


def _measure(
    engine: LLMEngine,
    name: str,
    dtype: str,
    batch: int,
    repeats: int,
    acceptance: float | None = None,
    timed: TimedProposer | None = None,
) -> SpeculativeResult:
    rates: list[float] = []
    steps: list[float] = []
    for run in range(WARMUPS + repeats):
        if run == WARMUPS and timed is not None:
            timed.seconds.clear()
        rate, seconds = _decode(engine, batch, run)
        if run >= WARMUPS:
            rates.append(rate)
            steps += seconds
    itemsize, context = itemsize_of(dtype), DECODE_PROMPT + DECODE_OUTPUT // 2
    counts = weight_counts(engine.config)
    speculator = engine.speculator
    forward = speculator.counters.tokens_per_forward if speculator is not None else 1.0
    idle, parts = _watch(engine, batch, DECODE if acceptance is None else DRAFTS)
    return SpeculativeResult(
        Measurement(
            name, "tok/s", tuple(rates),
            num_bytes=weight_bytes(engine, itemsize) + kv_token_bytes(engine) * context * batch,
            num_flops=2 * (counts.body + counts.head) * batch,
        ),
        acceptance,
        1e3 * statistics.median(steps),
        1e3 * statistics.median(timed.seconds) if timed is not None and timed.seconds else 0.0,
        forward,
        device_ms=idle.step_ns / 1e6 if idle is not None else None,
        idle_ms=idle.gap_ns / 1e6 if idle is not None else None,
        x_device=1.0 if idle is not None and acceptance is None else None,
        parts_us=parts,
    )  # fmt: skip


def _watch(engine: LLMEngine, batch: int, kind: int) -> tuple[IdleTime | None, dict[str, float]]:
    """The device's time of steps of `kind` and between them, and the host's by part, microseconds:
    of a run of its own, as watched steps are a little slower. None and {} without a clock."""
    num_steps = 2 * DECODE_OUTPUT + 2 * batch
    stamps = engine.runner.stamp_steps(num_steps)
    if stamps is None:
        return None, {}
    watch, parts = engine.watch, StepParts()
    spent: list[dict[str, float]] = []
    try:
        for run in range(WARMUPS):  # the steps' graphs are captured anew, with stamps
            _decode(engine, batch, run)
        stamps.clear()
        engine.watch = parts
        _decode(engine, batch, WARMUPS, lambda: spent.append(parts.last))
        steps = stamps.read()
    finally:
        engine.watch = watch
        engine.runner.stamp_steps(0)
    medians = {part: 1e6 * statistics.median(step[part] for step in spent) for part in PARTS}
    return idle_share(steps, kind), medians


def _decode(
    engine: LLMEngine, batch: int, seed: int, stepped: Callable[[], None] | None = None
) -> tuple[float, list[float]]:
    """Tokens a second from when all sequences have a token until the first has all of them, and
    what each step took. stepped: called after each of these."""
    require_room(engine, DECODE_PROMPT + DECODE_OUTPUT, batch)
    params = SamplingParams(temperature=0, max_tokens=DECODE_OUTPUT, ignore_eos=True)
    for number, ids in enumerate(random_prompts(engine, batch, DECODE_PROMPT, seed)):
        engine.add_request(f"bench-{number}", ids, params)
    seen: set[str] = set()
    start, end, num_tokens, steps = 0.0, 0.0, 0, []
    while engine.has_unfinished:
        before = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        if start and not end:
            num_tokens += len(outputs)
            steps.append(now - before)
            if stepped is not None:
                stepped()
        seen.update(output.request_id for output in outputs)
        if len(seen) == batch and not start:
            start = now
        if start and not end and any(output.finish_reason for output in outputs):
            end = now
    return num_tokens / (end - start), steps
