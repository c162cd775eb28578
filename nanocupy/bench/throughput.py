"""Many requests of many lengths at once: tokens a second of a busy engine.

With its defaults it is the workload of nano-vllm's bench, whose numbers others publish too: 256
requests, 100 to 1024 tokens in and out, drawn by Python's own random numbers from seed 0.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanocupy.bench.measure import (
    WARMUPS,
    Measurement,
    itemsize_of,
    kv_token_bytes,
    weight_bytes,
    weight_counts,
)
from nanocupy.config import ModelConfig
from nanocupy.engine.engine import LLMEngine
from nanocupy.errors import ConfigError
from nanocupy.sampling_params import SamplingParams

TEMPERATURE = 0.6
_PROMPT_IDS = 10_000  # prompts are of ids 0 to this, where the vocabulary has so many
_REPORT_INTERVAL_S = 0.5  # seldom enough to cost the measured loop nothing

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Workload:
    """How many requests, of which lengths: prompts and outputs are uniform in min_len to max_len
    tokens."""

    num_requests: int = 256
    min_len: int = 100
    max_len: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.min_len <= self.max_len or self.num_requests < 1:
            raise ConfigError(
                f"{self.num_requests} requests of {self.min_len} to {self.max_len} tokens; give "
                "one or more, of lengths from 1, the shortest first"
            )

    @property
    def name(self) -> str:
        if self == Workload():
            return "nano"
        return f"{self.num_requests}x{self.min_len}-{self.max_len}" + (
            f"-seed{self.seed}" if self.seed else ""
        )

    @property
    def max_context(self) -> int:
        """The most tokens that a request can have."""
        return 2 * self.max_len

    def requests(self, vocab_size: int) -> list[tuple[list[int], int]]:
        """(prompt, output tokens) of each request, the same for the same seed."""
        rng = random.Random(self.seed)
        last = min(_PROMPT_IDS, vocab_size - 1)
        # In nano-vllm's order, so that the lengths are the same: each prompt's length, then its
        # ids; then all lengths of outputs.
        prompts = [
            [rng.randint(0, last) for _ in range(rng.randint(self.min_len, self.max_len))]
            for _ in range(self.num_requests)
        ]
        return [(ids, rng.randint(self.min_len, self.max_len)) for ids in prompts]


@dataclass(frozen=True)
class Throughput:
    """One workload, run some times. `result` has output tokens a second; its bytes and flops are
    those of the whole workload. Steps and preemptions are of the last run."""

    result: Measurement
    num_prompt_tokens: int
    num_output_tokens: int
    seconds: tuple[float, ...]
    num_steps: int
    num_preemptions: int

    def details(self) -> dict[str, Any]:
        """All but the result, for JSON."""
        return {
            "seconds": [round(s, 4) for s in self.seconds],
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": self.num_output_tokens,
            "steps": self.num_steps,
            "preemptions": self.num_preemptions,
        }


def throughput(
    engine: LLMEngine,
    shape: str,
    dtype: str,
    workload: Workload,
    repeats: int = 1,
    report: Report = lambda done, total: None,
) -> Throughput:
    """Add all requests at once and run until all have ended, sampling at temperature 0.6, ends of
    text ignored, after two runs that are not counted: steps whose shape comes once in a run are
    captured in the second. Every run has seeds of its own.

    report: called now and then with output tokens done and in all, of all runs. Raises ConfigError
    where the longest request does not fit.
    """
    requests = workload.requests(engine.config.vocab_size)
    longest = max(len(ids) + output for ids, output in requests)
    if longest > engine.max_context:
        raise ConfigError(f"a request has {longest} tokens, this engine takes {engine.max_context}")
    num_output = sum(output for _, output in requests)
    total, done = num_output * (WARMUPS + repeats), 0
    seconds, counts = [], (0, 0)
    for run in range(WARMUPS + repeats):
        before = _counts(engine)
        start = last_report = time.perf_counter()
        for number, (ids, output) in enumerate(requests):
            params = SamplingParams(
                temperature=TEMPERATURE,
                max_tokens=output,
                ignore_eos=True,
                seed=run * len(requests) + number,
            )
            engine.add_request(f"bench-{number}", ids, params)
        while engine.has_unfinished:
            done += len(engine.step())
            now = time.perf_counter()
            if now - last_report >= _REPORT_INTERVAL_S:
                last_report = now
                report(done, total)
        seconds.append(time.perf_counter() - start)
        counts = tuple(b - a for a, b in zip(before, _counts(engine), strict=True))
        report(done, total)
    assert done == total, "a request ended early"
    sizes = weight_bytes(engine, itemsize_of(dtype)), kv_token_bytes(engine)
    num_bytes, num_flops = _floor(engine.config, requests, *sizes, counts[0])
    return Throughput(
        Measurement(
            f"throughput/{workload.name}/{shape}/{dtype}",
            "tok/s",
            tuple(num_output / s for s in seconds[WARMUPS:]),
            num_bytes,
            num_flops,
        ),
        sum(len(ids) for ids, _ in requests),
        num_output,
        tuple(seconds[WARMUPS:]),
        *counts,
    )


def _counts(engine: LLMEngine) -> tuple[int, int]:
    """Steps and preemptions so far."""
    counters = engine.scheduler.counters
    return counters.num_steps, counters.num_swapped_out + counters.num_recomputed


def _floor(
    config: ModelConfig,
    requests: list[tuple[list[int], int]],
    step_bytes: int,
    token_bytes: int,
    num_steps: int,
) -> tuple[int, int]:
    """Bytes and operations of the workload in so many steps: every step reads the weights,
    step_bytes, every generated token but the first its keys and values; a prompt reads them once,
    as it is written."""
    weights = weight_counts(config)
    positions = pairs = num_tokens = num_sampled = 0
    for ids, output in requests:
        prompt, length = len(ids), len(ids) + output - 1  # the last token is never computed
        positions += prompt + (length * (length + 1) - prompt * (prompt + 1)) // 2
        pairs += length * (length + 1) // 2
        num_tokens += length
        num_sampled += output
    num_bytes = num_steps * step_bytes + positions * token_bytes
    num_flops = 2 * (weights.body * num_tokens + weights.head * num_sampled)
    return num_bytes, num_flops + 4 * config.num_layers * config.q_size * pairs
