"""What the model tests share: fixtures read, models loaded, a runner driven by hand.

Drives the NumPy runner through the same batches that the engine builds, but asks for the logits of
every token, and picks block ids at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nanocupy.checkpoint import Checkpoint
from nanocupy.config import ModelConfig
from nanocupy.engine.batch import build_batch
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.scheduler import ScheduledRequest
from nanocupy.model.load import load_numpy_weights
from nanocupy.sampling_params import SamplingParams
from tests.model.reference_models import NUM_GENERATED

FIXTURES = Path(__file__).parent.parent / "fixtures"
CONTEXT = 128  # tokens a test's sequence may have
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_GENERATED, ignore_eos=True)


@dataclass(frozen=True)
class Reference:
    """What transformers computed for one prompt; see tests/fixtures/make_logits.py.

    Rows are the prompt's positions, then the greedy tokens but the last. `sampled` [rows, C] are
    the logits at `columns`, `rms` [rows] those of the whole rows; `whole` [2, V] all logits of the
    prompt's last row and of the very last.
    """

    prompt: list[int]
    greedy: list[int]
    columns: np.ndarray
    sampled: np.ndarray
    rms: np.ndarray
    whole: np.ndarray

    @property
    def tokens(self) -> list[int]:
        """What the model is fed, one token a row."""
        return self.prompt + self.greedy[:-1]

    def error(self, logits: np.ndarray) -> float:
        """The worst |error| / (|reference| + rms of the row) of `logits` [rows, V]."""
        assert logits.shape == (len(self.tokens), self.whole.shape[1])
        ends = [len(self.prompt) - 1, -1]
        worst = 0.0
        for got, wanted, rms in (
            (logits[:, self.columns], self.sampled, self.rms),
            (logits[ends], self.whole, self.rms[ends]),
        ):
            error = abs(got.astype(np.float64) - wanted) / (abs(wanted) + rms[:, None])
            assert np.isfinite(error).all()
            worst = max(worst, float(error.max()))
        return worst


def references(name: str) -> list[Reference]:
    """All prompts of the fixture `name`."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = dict(file)
    count = sum(key.startswith("prompt_") for key in arrays)
    return [
        Reference(
            arrays[f"prompt_{i}"].tolist(),
            arrays[f"greedy_{i}"].tolist(),
            arrays["columns"],
            arrays[f"sample_{i}"],
            arrays[f"rms_{i}"],
            arrays[f"whole_{i}"],
        )
        for i in range(count)
    ]


@dataclass(frozen=True)
class LoadedModel:
    """A config and the running model's weights."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray]

    def runner(
        self,
        dtype: type[np.floating] = np.float32,
        block_size: int = 16,
        num_blocks: int = 48,
        max_step_tokens: int = 4 * CONTEXT,
    ) -> NumpyRunner:
        limits = RunnerLimits(num_blocks, block_size, CONTEXT, max_step_tokens, max_num_seqs=8)
        return NumpyRunner(self.config, self.weights, limits, dtype)

    def engine(self, num_blocks: int = 48, max_step_tokens: int = 4 * CONTEXT) -> LLMEngine:
        runner = self.runner(num_blocks=num_blocks, max_step_tokens=max_step_tokens)
        return LLMEngine(self.config, runner)


def load(checkpoint: Checkpoint, dtype: type[np.floating] = np.float32) -> LoadedModel:
    return LoadedModel(checkpoint.config, load_numpy_weights(checkpoint, dtype))


def every_row(
    runner: NumpyRunner, batch_of: Sequence[Reference], chunk_size: int = CONTEXT
) -> list[np.ndarray]:
    """Logits of every row of each reference, [rows, V] each, all run in the same batches.

    A step feeds each sequence the next chunk of its prompt or, past it, the next greedy token of
    the reference. Sequences that are done drop out.
    """
    limits = runner.limits
    block_ids = np.random.default_rng(5).permutation(np.arange(1, limits.num_blocks)).tolist()
    requests = []
    for i, reference in enumerate(batch_of):
        request = Request(str(i), reference.prompt, GREEDY, 0, CONTEXT)
        for _ in range(-(-len(reference.tokens) // limits.block_size)):
            request.block_ids.append(block_ids.pop())
        requests.append(request)
    rows: list[list[np.ndarray]] = [[] for _ in requests]
    while True:
        schedule = []
        for request, reference in zip(requests, batch_of, strict=True):
            done = request.num_computed_tokens
            if done >= request.num_tokens and len(request.output_ids) < NUM_GENERATED - 1:
                request.append(reference.greedy[len(request.output_ids)])
            if done < request.num_tokens:
                num_tokens = min(chunk_size, request.num_tokens - done)
                schedule.append(ScheduledRequest(request, num_tokens, samples=True))
        if not schedule:
            return [np.concatenate(parts) for parts in rows]
        batch = build_batch(schedule, block_size=limits.block_size, table_width=runner.table_width)
        batch = replace(batch, sample_rows=np.arange(len(batch.token_ids), dtype=np.int32))
        logits = runner.logits(batch).copy()
        for item, start in zip(schedule, batch.query_starts, strict=False):
            rows[int(item.request.request_id)].append(logits[start : start + item.num_tokens])
            item.request.num_computed_tokens += item.num_tokens


def generated(engine: LLMEngine, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy ids of all prompts, which run together in `engine`."""
    outputs: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    while engine.has_unfinished:
        for output in engine.step():
            outputs[int(output.request_id)].append(output.token_id)
        engine.pool.check_integrity()
    return outputs
