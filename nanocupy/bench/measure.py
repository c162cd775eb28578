"""What the benches measure, through the engine: from ids in to ids on the host.

Prompts are random ids, greedy, ends of text ignored. One run warms up and is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanocupy.engine.engine import LLMEngine
from nanocupy.errors import ConfigError
from nanocupy.sampling_params import SamplingParams

DECODE_PROMPT, DECODE_OUTPUT = 128, 256  # a decode bench runs from context 128 to 384


@dataclass(frozen=True)
class Measurement:
    """Runs of one thing. name as in docs/performance.md; values in `unit`; bytes and flops are
    the floor of one unit of work (one step, one prompt)."""

    name: str
    unit: str
    values: tuple[float, ...]
    num_bytes: int
    num_flops: int

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def decode(engine: LLMEngine, shape: str, dtype: str, batch: int, repeats: int = 3) -> Measurement:
    """Milliseconds of a decode step of `batch` sequences: the median step of each run."""
    params = SamplingParams(temperature=0, max_tokens=DECODE_OUTPUT, ignore_eos=True)
    _require_room(engine, DECODE_PROMPT + DECODE_OUTPUT, batch)

    def run(seed: int) -> float:
        for number, ids in enumerate(_prompts(engine, batch, DECODE_PROMPT, seed)):
            engine.add_request(f"bench-{number}", ids, params)
        times = []
        while engine.has_unfinished:
            start = time.perf_counter()
            outputs = engine.step()
            if len(outputs) == batch:  # every sequence decodes: neither a prompt nor a straggler
                times.append(time.perf_counter() - start)
        if not times:
            raise ConfigError(
                f"with chunk_size {engine.runner.limits.max_step_tokens} the first of {batch} "
                "sequences ends before the last one's prompt is in; raise it, or take fewer"
            )
        return 1e3 * statistics.median(times)

    values = _repeat(run, repeats)
    config, itemsize = engine.config, _itemsize(dtype)
    context = DECODE_PROMPT + DECODE_OUTPUT // 2
    weights = config.num_parameters
    if not config.tied_lm_head:
        weights -= config.vocab_size * config.hidden_size  # of the embedding one row is read
    kv_values = 2 * config.num_layers * config.kv_size * context * batch
    attention_flops = 4 * config.num_layers * config.q_size * context * batch
    return Measurement(
        f"decode/{shape}/{dtype}/b{batch}",
        "ms",
        values,
        num_bytes=(weights + kv_values) * itemsize,
        num_flops=2 * weights * batch + attention_flops,
    )


def prefill(
    engine: LLMEngine, shape: str, dtype: str, num_tokens: int, repeats: int = 3
) -> Measurement:
    """Milliseconds from a prompt of `num_tokens` to its first token."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    _require_room(engine, num_tokens + 1, 1)

    def run(seed: int) -> float:
        (ids,) = _prompts(engine, 1, num_tokens, seed)
        start = time.perf_counter()
        engine.add_request("bench", ids, params)
        while engine.has_unfinished:
            engine.step()
        return 1e3 * (time.perf_counter() - start)

    values = _repeat(run, repeats)
    config = engine.config
    head = config.vocab_size * config.hidden_size
    weights = config.num_parameters - (head if config.tied_lm_head else 2 * head)
    attention_flops = 2 * config.num_layers * config.q_size * num_tokens**2  # the causal half
    return Measurement(
        f"prefill/{shape}/{dtype}/t{num_tokens}",
        "ms",
        values,
        num_bytes=(weights + head) * _itemsize(dtype),
        num_flops=2 * weights * num_tokens + 2 * head + attention_flops,
    )


def _prompts(engine: LLMEngine, count: int, num_tokens: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, engine.config.vocab_size, (count, num_tokens)).tolist()


def _repeat(run: Callable[[int], float], repeats: int) -> tuple[float, ...]:
    run(0)
    return tuple(run(seed) for seed in range(1, repeats + 1))


def _require_room(engine: LLMEngine, num_tokens: int, batch: int) -> None:
    limits = engine.runner.limits
    blocks = engine.pool.blocks_for(num_tokens) * batch
    if num_tokens > engine.max_context or batch > limits.max_num_seqs:
        raise ConfigError(
            f"{batch} sequences of {num_tokens} tokens do not fit: this engine takes "
            f"{limits.max_num_seqs} of {engine.max_context}"
        )
    if blocks > limits.num_blocks - 1:
        raise ConfigError(
            f"{batch} sequences of {num_tokens} tokens need {blocks} cache blocks, "
            f"there is memory for {limits.num_blocks - 1}"
        )


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
