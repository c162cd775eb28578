"""Guesses by prompt lookup on real text and real weights: what they bring, by what is asked for.

    python -m benchmarks.speculative_text [--model smollm2-135m] [--device cuda] [--record]

Answers are greedy. Each prompt is answered without guesses and with them, as they are by default
and always as many as may be; tokens a second count from the first token on. Where the text of an
answer repeats its prompt's, most guesses are right; where it does not, nothing should be lost.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from dataclasses import dataclass

from benchmarks.ceilings import device_name
from benchmarks.records import write_record
from nanocupy import LLM, SamplingParams
from nanocupy.speculation.policy import DraftPolicy

TEXT = (
    "The lighthouse on Gull Island was built in 1871 by Marta Olsen, an engineer from Bergen. "
    "It is 34 metres tall and its lamp can be seen from 22 kilometres away. In 1932 the lamp was "
    "changed from oil to electricity. Since 1988 nobody has lived in the lighthouse, and it is "
    "kept by a group of volunteers from the village of Norvik. Every summer about 4,000 people "
    "visit the island by boat."
)
CODE = """def area(width, height):
    result = width * height
    return result

def perimeter(width, height):
    result = 2 * (width + height)
    return result
"""
PROMPTS = {
    "copy": f"Copy this text word for word, but write 1872 instead of 1871:\n\n{TEXT}",
    "rename": f"Rewrite this Python code with the variable result renamed to value:\n\n{CODE}",
    "summary": f"Summarize this text in two sentences:\n\n{TEXT}",
    "story": "Tell me a short story about a fox.",
}
WAYS = ("off", "adaptive", "always")


@dataclass(frozen=True)
class Answer:
    """Tokens a second behind the first one, the ids, and with guesses how they went."""

    rate: float
    token_ids: tuple[int, ...]
    tokens_per_step: float
    acceptance: float | None


def answer(llm: LLM, prompt: str, max_tokens: int) -> Answer:
    """One greedy answer."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    counters = llm.speculation
    before = (counters.num_proposed, counters.num_accepted) if counters else (0, 0)
    stream = llm.stream([{"role": "user", "content": prompt}], params)
    start = 0.0
    for _ in stream:
        start = start or time.perf_counter()
    seconds = time.perf_counter() - start
    ids = tuple(stream.completion().token_ids)
    accepted = counters.num_accepted - before[1] if counters else 0
    proposed = counters.num_proposed - before[0] if counters else 0
    steps = max(1, len(ids) - 1 - accepted)
    return Answer(
        (len(ids) - 1) / seconds,
        ids,
        (len(ids) - 1) / steps,
        accepted / proposed if proposed else None,
    )


def measure(args: argparse.Namespace, way: str) -> dict[str, list[Answer]]:
    """The answers to all prompts, `args.repeats` of each behind one that warms up."""
    llm = LLM(
        args.model,
        device=args.device,
        dtype=args.dtype,
        max_context=1024,
        max_num_seqs=1,
        prefix_cache=False,  # every answer begins with its prompt
        gpu_memory_utilization=0.25,
        speculate="off" if way == "off" else "ngram",
        draft_tokens=args.draft_tokens,
    )
    if way == "always":
        llm._engine.speculator.policy = DraftPolicy(args.draft_tokens)
    return {
        name: [answer(llm, prompt, args.max_tokens) for _ in range(1 + args.repeats)][1:]
        for name, prompt in PROMPTS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", default="smollm2-135m", help="in the records")
    parser.add_argument("--device", default="cpu", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--draft-tokens", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/records/")
    args = parser.parse_args()

    found = {way: measure(args, way) for way in WAYS}
    print(f"{'':10}{'':10}tokens  tok/s    x off  a step  right  same")
    for name in PROMPTS:
        off = found["off"][name]
        base = statistics.median(one.rate for one in off)
        for way in WAYS:
            answers = found[way][name]
            rate = statistics.median(one.rate for one in answers)
            last, same = answers[-1], answers[-1].token_ids == off[-1].token_ids
            right = "" if last.acceptance is None else f"{100 * last.acceptance:.0f} %"
            print(
                f"{name:10}{way:10}{len(last.token_ids):6}{rate:7.0f}{rate / base:9.2f}"
                f"{last.tokens_per_step:8.2f}{right:>7}  {'yes' if same else 'no'}"
            )
            if args.record:
                write_record(
                    "speculative", f"speculative/{args.name}/text/{name}/{way}",
                    [one.rate for one in answers], "tok/s", device=_device(args.device),
                    dtype=args.dtype, tokens=len(last.token_ids), x_off=round(rate / base, 4),
                    tokens_per_step=round(last.tokens_per_step, 4), acceptance=last.acceptance,
                    same_tokens=same,
                )  # fmt: skip


def _device(llm_device: str) -> str:
    if llm_device == "cuda":
        return device_name()
    return f"{os.cpu_count()} cores {platform.machine()}"


if __name__ == "__main__":
    main()
