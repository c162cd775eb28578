"""What the benches measure, through the engine: from ids in to ids on the host.

Prompts are random ids, greedy, ends of text ignored. The first runs are not counted: a device loads
what a step needs when its shape comes first, and captures it as a graph when it comes again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nanocupy.config import EMBEDDING, LM_HEAD, ModelConfig
from nanocupy.engine.engine import LLMEngine
from nanocupy.errors import ConfigError
from nanocupy.sampling_params import SamplingParams

WARMUPS = 2  # runs that are not counted, where a step's shape may come once a run
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

    def run(seed: int) -> float:
        return 1e3 * statistics.median(decode_steps(engine, batch, seed))

    values = _repeat(run, repeats)
    config, itemsize = engine.config, itemsize_of(dtype)
    context = DECODE_PROMPT + DECODE_OUTPUT // 2
    counts = weight_counts(config)
    weights = counts.body + counts.head
    attention_flops = 4 * config.num_layers * config.q_size * context * batch
    return Measurement(
        f"decode/{shape}/{dtype}/b{batch}",
        "ms",
        values,
        num_bytes=weight_bytes(engine, itemsize) + kv_token_bytes(engine) * context * batch,
        num_flops=2 * weights * batch + attention_flops,
    )


def decode_steps(engine: LLMEngine, batch: int, seed: int) -> Iterator[float]:
    """Run what the decode bench runs once. Gives the seconds of each step that brought a token of
    every sequence, right after it. Raises ConfigError where it does not fit."""
    params = SamplingParams(temperature=0, max_tokens=DECODE_OUTPUT, ignore_eos=True)
    require_room(engine, DECODE_PROMPT + DECODE_OUTPUT, batch)
    for number, ids in enumerate(random_prompts(engine, batch, DECODE_PROMPT, seed)):
        engine.add_request(f"bench-{number}", ids, params)
    found = False
    while engine.has_unfinished:
        start = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == batch:  # every sequence decodes: neither a prompt nor a straggler
            found = True
            yield time.perf_counter() - start
    if not found:
        raise ConfigError(
            f"with chunk_size {engine.runner.limits.max_step_tokens} the first of {batch} "
            "sequences ends before the last one's prompt is in; raise it, or take fewer"
        )


def prefill(
    engine: LLMEngine, shape: str, dtype: str, num_tokens: int, repeats: int = 3
) -> Measurement:
    """Milliseconds from a prompt of `num_tokens` to its first token."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    require_room(engine, num_tokens + 1, 1)

    def run(seed: int) -> float:
        (ids,) = random_prompts(engine, 1, num_tokens, seed)
        start = time.perf_counter()
        engine.add_request("bench", ids, params)
        while engine.has_unfinished:
            engine.step()
        return 1e3 * (time.perf_counter() - start)

    values = _repeat(run, repeats)
    config, weights = engine.config, weight_counts(engine.config)
    attention_flops = 2 * config.num_layers * config.q_size * num_tokens**2  # the causal half
    return Measurement(
        f"prefill/{shape}/{dtype}/t{num_tokens}",
        "ms",
        values,
        num_bytes=weight_bytes(engine, itemsize_of(dtype)),
        num_flops=2 * (weights.body * num_tokens + weights.head) + attention_flops,
    )


def random_prompts(engine: LLMEngine, count: int, num_tokens: int, seed: int) -> list[list[int]]:
    """`count` prompts of ids of the engine's model, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, engine.config.vocab_size, (count, num_tokens)).tolist()


def _repeat(run: Callable[[int], float], repeats: int) -> tuple[float, ...]:
    for _ in range(WARMUPS):
        run(0)
    return tuple(run(seed) for seed in range(1, repeats + 1))


def require_room(engine: LLMEngine, num_tokens: int, batch: int) -> None:
    """Raises ConfigError where the engine does not take `batch` sequences of so many tokens."""
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


@dataclass(frozen=True)
class WeightCounts:
    """Weights that a step reads whole: of all layers, and of the LM head. Of an embedding of its
    own a step reads rows alone."""

    body: int
    head: int


def weight_counts(config: ModelConfig) -> WeightCounts:
    head = config.vocab_size * config.hidden_size
    return WeightCounts(config.num_parameters - (head if config.tied_lm_head else 2 * head), head)


def weight_bytes(engine: LLMEngine, itemsize: int) -> int:
    """Bytes of the weights that a step reads whole, as the runner keeps them."""
    kept = getattr(engine.runner, "weights", None)
    if not kept:
        counts = weight_counts(engine.config)
        return (counts.body + counts.head) * itemsize
    rows_alone = {EMBEDDING} if LM_HEAD in kept else set()
    return sum(weight.nbytes for name, weight in kept.items() if name not in rows_alone)


def kv_token_bytes(engine: LLMEngine) -> int:
    """Bytes of a token's keys and values in the engine's cache, scales included."""
    limits = engine.runner.limits
    num_tokens = limits.num_blocks * limits.block_size
    return engine.runner.bytes_by_owner()["kv cache"] // num_tokens


def itemsize_of(dtype: str) -> int:
    """Bytes of a value."""
    return 4 if dtype == "float32" else 2
