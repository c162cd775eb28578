"""Profiles a model: some prompts and some decode steps, timed op by op."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanocupy.cuda.nvtx import Nvtx
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.runner import Runner
from nanocupy.model.weights import weight_layout
from nanocupy.ops.packed_matrix import PackedMatrix
from nanocupy.profiling.ranges import RangeObserver, RangeWatch
from nanocupy.profiling.recorder import HostClock, StepRecorder
from nanocupy.profiling.timeline import Span
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.speculator import SpeculationCounters, Speculator


@dataclass(frozen=True)
class Profile:
    """Spans of the prompts' steps and of the decode steps, and bytes by owner at the end; what came
    of guesses, where there were any."""

    prefill: list[Span]
    decode: list[Span]
    memory: list[tuple[float, dict[str, int]]]
    speculation: SpeculationCounters | None = None


def profile(
    runner: Runner,
    *,
    prompt_tokens: int,
    output_tokens: int,
    batch: int,
    itemsize: int,
    nvtx: Nvtx | None = None,
    speculator: Speculator | None = None,
) -> Profile:
    """Run `batch` random prompts of `prompt_tokens` ids and `output_tokens` greedy tokens each,
    after one uncounted run. nvtx: where ranges of the counted run go; speculator: what
    guesses, for this runner. Raises RequestError where they do not fit."""
    config = runner.config
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (batch, prompt_tokens)).tolist()
    engine = LLMEngine(config, runner, prefix_cache=False, speculator=speculator)

    def run() -> None:
        for number, ids in enumerate(prompts):
            engine.add_request(f"profile-{number}", ids, params)
        while engine.has_unfinished:
            engine.step()

    run()
    if speculator is not None:
        speculator.counters = SpeculationCounters()
    shapes = {weight.name: weight.shape for weight in weight_layout(config)}
    clock = getattr(runner, "clock", None) or HostClock()
    kept = getattr(runner, "weights", {}).items()
    packed = {name: weight.nbytes for name, weight in kept if isinstance(weight, PackedMatrix)}
    recorder = StepRecorder(clock, shapes, itemsize, packed)
    runner.observer = recorder
    if nvtx is not None:
        runner.observer = RangeObserver(nvtx, recorder)
        engine.watch = RangeWatch(nvtx)
    try:
        run()
    finally:
        runner.observer = None
    # A step with more tokens than sequences had some of a prompt, or guesses: then all are rows.
    prefill: list[Span] = []
    decode: list[Span] = []
    part = decode
    for span in recorder.spans:
        if span.track == "steps":
            has_prompts = span.num_tokens > max(span.num_seqs, span.num_rows)
            part = prefill if has_prompts else decode
        part.append(span)
    start = min(span.start_s for span in recorder.spans)
    end = max(span.start_s + span.duration_s for span in recorder.spans)
    memory = runner.bytes_by_owner()
    counters = None if speculator is None else speculator.counters
    return Profile(prefill, decode, [(start, memory), (end, memory)], counters)
