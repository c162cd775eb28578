"""What a decode step costs in Python, microseconds, over a runner that computes nothing.

    python -m benchmarks.host_step [--rounds N] [--record]

The engine runs ahead; every sequence has a prompt of 128 tokens and 256 tokens to come; the mean
over the steps in which all decode, blocks begun and remembered included.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

from benchmarks.records import write_record
from nanocupy.config import ModelConfig
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.engine.schedule import Schedule
from nanocupy.sampling_params import SamplingParams

NUM_PROMPT, NUM_OUTPUT, BLOCK_SIZE = 128, 256, 16
CONFIG = ModelConfig(
    architecture="llama", vocab_size=1 << 17, hidden_size=64, intermediate_size=64, num_layers=1,
    num_heads=1, num_kv_heads=1, head_size=64, max_context=4096,
)  # fmt: skip


class IdleRunner(Runner):
    """Gives every request the same token, at once."""

    can_run_ahead = True

    def __init__(self, max_num_seqs: int) -> None:
        num_blocks = 1 + max_num_seqs * (NUM_PROMPT + NUM_OUTPUT) // BLOCK_SIZE
        self.config, self.device, self.observer = CONFIG, "no device", None
        self.limits = RunnerLimits(num_blocks, BLOCK_SIZE, 4096, 2048, max_num_seqs)

    def run(self, schedule: Schedule) -> list[int]:
        return [7] * len(schedule.sampling)


def step_us(batch: int) -> float:
    """Mean microseconds of `LLMEngine.step` in which `batch` sequences decode."""
    engine = LLMEngine(CONFIG, IdleRunner(batch), run_ahead=True)
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True)
    for number in range(batch):
        ids = [(131 * number + position) % 9973 for position in range(NUM_PROMPT)]
        engine.add_request(str(number), ids, params)
    times = []
    while engine.has_unfinished:
        start = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == batch:
            times.append(time.perf_counter() - start)
    return 1e6 * statistics.mean(times[5:-5])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    device = f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}"
    for batch in (1, 32, 256):
        values = [step_us(batch) for _ in range(options.rounds)]
        print(f"batch {batch}: {statistics.median(values):.1f} us a step")
        if options.record:
            write_record("cpu", f"host-step/b{batch}", values, "us", device=device, dtype="none")


if __name__ == "__main__":
    main()
