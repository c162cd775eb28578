"""What the scheduler gives those who share a GPU: recorded, on the real clock.

    python -m benchmarks.serving prefix [--shape llama-3.1-8b]
    python -m benchmarks.serving priorities [--shape qwen3-0.6b] [--seconds 10]

prefix: the time to the first token of a prompt whose first 4096 tokens another one had, beside the
same without the prefix cache. priorities: Poisson arrivals at 1.2 times what the engine can serve
(measured first: how quickly a full queue gets shorter), a tenth of them of level 0 and the rest of
level 5; the time to the first token of the urgent ones under the policy "priority" beside first
come, first served, and what that costs all of them together. Everybody is served to the end.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.ceilings import device_name
from benchmarks.records import write_record
from nanocupy.bench.shapes import random_checkpoint
from nanocupy.engine.backend import make_engine
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.engine import LLMEngine, scheduler_settings
from nanocupy.engine.request import RequestPriority
from nanocupy.sampling_params import SamplingParams

SHARED, NEW = 4096, 64
URGENT_SHARE, OVERLOAD = 0.1, 1.2
PROMPT_LENS, OUTPUT_LENS = (50, 400), (20, 150)
NUM_SEQS = 64


def first_token_ms(engine: LLMEngine, ids: list[int]) -> float:
    """Milliseconds from a request to its only token, on an idle engine."""
    start = time.perf_counter()
    engine.add_request("bench", ids, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    return 1e3 * (time.perf_counter() - start)


def run_prefix(shape: str) -> None:
    checkpoint = random_checkpoint(shape, "bfloat16")
    rng = np.random.default_rng(0)
    vocab_size = checkpoint.config.vocab_size
    config = EngineConfig(
        device="cuda", dtype="bfloat16", max_context=SHARED + NEW + 16, max_num_seqs=8,
        chunk_size=SHARED + NEW,
    )  # fmt: skip
    engine = make_engine(checkpoint, config, progress=True)
    hits, misses = [], []
    for _ in range(6):  # the first two of each load and capture what they need
        shared = rng.integers(0, vocab_size, SHARED).tolist()
        for values in (misses, hits):
            ids = shared + rng.integers(0, vocab_size, NEW).tolist()
            values.append(first_token_ms(engine, ids))
    hits, misses = hits[2:], misses[2:]
    ratio = float(np.median(misses) / np.median(hits))
    write_record(
        "serving", f"serving/prefix-hit/{shape}/bfloat16", hits, "ms", device=device_name(),
        dtype="bfloat16", shared_tokens=SHARED, new_tokens=NEW,
        without_ms=round(float(np.median(misses)), 3), times_faster=round(ratio, 2),
    )  # fmt: skip
    print(
        f"{shape}: {SHARED} shared + {NEW} new tokens: {np.median(hits):.2f} ms to the first token "
        f"with the prefix cache, {np.median(misses):.2f} without: {ratio:.1f} times faster"
    )


@dataclass(frozen=True)
class Arrival:
    """A request of the load: when it comes, seconds from the start, and what it is."""

    at_s: float
    ids: list[int]
    num_output: int
    is_urgent: bool


def load_of(rng: random.Random, vocab_size: int, count: int, rate: float) -> list[Arrival]:
    """`count` Poisson arrivals at `rate` a second; 0: all at once."""
    at_s, found = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate) if rate else 0.0
        ids = [rng.randrange(vocab_size) for _ in range(rng.randint(*PROMPT_LENS))]
        found.append(Arrival(at_s, ids, rng.randint(*OUTPUT_LENS), rng.random() < URGENT_SHARE))
    return found


@dataclass(frozen=True)
class Served:
    """Times to the first token by urgency, when each request ended, in all; and output tokens."""

    waits_s: dict[bool, list[float]]
    ends_s: list[float]
    took_s: float
    num_tokens: int

    @property
    def requests_per_s(self) -> float:
        """While the engine was full: between the first and the last fifth of them."""
        first, last = len(self.ends_s) // 5, 4 * len(self.ends_s) // 5
        return (last - first) / (self.ends_s[last] - self.ends_s[first])


def serve(engine: LLMEngine, load: list[Arrival]) -> Served:
    start = time.perf_counter()
    waits: dict[bool, list[float]] = {True: [], False: []}
    started: set[str] = set()
    num_tokens, coming = 0, 0
    ends: list[float] = []
    while coming < len(load) or engine.has_unfinished:
        now = time.perf_counter() - start
        while coming < len(load) and load[coming].at_s <= now:
            one = load[coming]
            params = SamplingParams(temperature=0, max_tokens=one.num_output, ignore_eos=True)
            level = 0 if one.is_urgent else 5
            engine.add_request(str(coming), one.ids, params, RequestPriority(level))
            coming += 1
        if not engine.has_unfinished:
            time.sleep(max(0.0, load[coming].at_s - (time.perf_counter() - start)))
            continue
        for output in engine.step():
            num_tokens += 1
            if output.finish_reason:
                ends.append(time.perf_counter() - start)
            if output.request_id not in started:
                started.add(output.request_id)
                one = load[int(output.request_id)]
                waits[one.is_urgent].append(time.perf_counter() - start - one.at_s)
    return Served(waits, ends, time.perf_counter() - start, num_tokens)


def run_priorities(shape: str, seconds: float) -> None:
    checkpoint = random_checkpoint(shape, "bfloat16")
    config = EngineConfig(
        device="cuda", dtype="bfloat16", max_context=1024, max_num_seqs=NUM_SEQS,
        chunk_size=2048, prefix_cache=False,
    )  # fmt: skip
    engine = make_engine(checkpoint, config, progress=True)
    vocab_size = checkpoint.config.vocab_size
    for seed in range(2):  # the first loads and captures what it needs
        load = load_of(random.Random(seed), vocab_size, 600, 0)
        capacity = serve(engine, load).requests_per_s
    rate = OVERLOAD * capacity
    load = load_of(random.Random(7), vocab_size, int(rate * seconds), rate)
    found = {}
    for policy in ("fcfs", "priority"):
        engine.configure(scheduler_settings(config.with_(policy=policy), engine.runner.limits))
        served = serve(engine, load)
        assert len(served.ends_s) == len(load), "somebody was not served"
        found[policy] = {
            "urgent_p99_ms": 1e3 * float(np.percentile(served.waits_s[True], 99)),
            "others_p99_ms": 1e3 * float(np.percentile(served.waits_s[False], 99)),
            "tokens_per_s": served.num_tokens / served.took_s,
        }
        print(f"{policy:9s}", {name: round(value, 1) for name, value in found[policy].items()})
    first, second = found["fcfs"], found["priority"]
    times = first["urgent_p99_ms"] / second["urgent_p99_ms"]
    share = second["tokens_per_s"] / first["tokens_per_s"]
    write_record(
        "serving", f"serving/priority-p99/{shape}/bfloat16", [second["urgent_p99_ms"]], "ms",
        device=device_name(), dtype="bfloat16", capacity_per_s=round(capacity, 2),
        requests=len(load), times_faster=round(times, 2), throughput_share=round(share, 4),
        **{f"{p}_{n}": round(v, 2) for p, values in found.items() for n, v in values.items()},
    )  # fmt: skip
    print(
        f"{shape}: {len(load)} requests at {rate:.1f} a second (capacity {capacity:.1f}): the "
        f"urgent ones' p99 to the first token is {times:.1f} times better than first come, first "
        f"served; {share:.1%} of its tokens a second"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("prefix", "priorities"))
    parser.add_argument("--shape", help="a public shape (llama-3.1-8b; qwen3-0.6b)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of arrivals")
    args = parser.parse_args()
    if args.what == "prefix":
        run_prefix(args.shape or "llama-3.1-8b")
    else:
        run_priorities(args.shape or "qwen3-0.6b", args.seconds)


if __name__ == "__main__":
    main()
