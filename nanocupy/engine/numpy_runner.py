"""The runner on the CPU: binds the forward's op calls to NumPy buffers and runs them in order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from nanocupy.config import HEAD_NORM, ModelConfig
from nanocupy.engine.batch import (
    ForwardBatch,
    PenaltyBatch,
    SamplerBatch,
    build_batch,
    build_penalty_batch,
    build_sampler_batch,
)
from nanocupy.engine.binding import BoundCall, StepObserver, bind_calls, run_calls, step_dims
from nanocupy.engine.request import PENDING_TOKEN, Request
from nanocupy.engine.results import StepResult, TokenLogprob
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.engine.schedule import Schedule
from nanocupy.engine.step_logprobs import PromptRows, asking_rows, prompt_rows, sampled_logprobs
from nanocupy.model.forward import Buffer, decoder_forward
from nanocupy.model.rope import rope_parameters
from nanocupy.ops.kv_codes import CODE_DTYPES, SCALE
from nanocupy.ops.numpy_ops import NumpyOps

# Rows of a prompt that the LM head sees at once, where its log-probabilities are asked for.
_PROMPT_ROWS = 64


class NumpyRunner(Runner):
    """Runs `config` with `weights` (name in `weight_layout` -> array) on NumPy.

    Activations and cache are of `dtype` (float32; float64 makes an oracle, with float64 compute).
    cache_dtype: "int8" or "float8_e4m3fn" for a quantised cache, whose numbers are then `dtype`.
    With `deferred`, a launched step is computed only when its ids are read, so that nothing can
    depend on them before: for tests of an engine that runs ahead.
    """

    has_logprobs = True

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, np.ndarray],
        limits: RunnerLimits,
        dtype: type[np.floating] = np.float32,
        *,
        cache_dtype: str | None = None,
        deferred: bool = False,
    ) -> None:
        self.device = "cpu"
        self.observer: StepObserver | None = None
        self.config = config
        self.limits = limits
        self.weights = weights
        self.ops = NumpyOps(dtype)
        self.dtype = np.dtype(dtype)
        self.table_width = -(-limits.max_context // limits.block_size)
        rope = rope_parameters(config)
        # The dtypes of the cache's parts, by their roles; codes that are no int8 are bits.
        cache = self.dtype if cache_dtype is None else np.dtype(CODE_DTYPES[cache_dtype])
        self._dtypes = {"cache": cache, "cache scales": SCALE, "int32": np.dtype(np.int32)}
        self.forward = decoder_forward(config, rope, quantized_cache=cache_dtype is not None)
        self._dims = step_dims(
            limits.max_step_tokens, limits.max_num_seqs, limits.max_step_tokens, 0
        ) | {"N": limits.num_blocks, "P": limits.block_size, "M": self.table_width}
        self._caches: dict[str, np.ndarray] = {}
        self._memory = self._allocate()
        self._memory["inv_freq"] = rope.inv_freq
        num_host_blocks = limits.num_host_blocks
        self._host_blocks = [
            np.empty((num_host_blocks, *cache.shape[1:]), cache.dtype)
            for cache in self._caches.values()
            if num_host_blocks
        ]
        self.can_run_ahead = deferred
        self._queue: deque[Callable[[], list[int] | StepResult]] = deque()  # launched, not computed
        self._last_ids: dict[Request, int] = {}  # what the last computed step sampled
        # The steps' shapes repeat (decode: always the same): their bound calls are kept.
        self._bound: dict[tuple[int, ...], list[BoundCall]] = {}

    @property
    def dtypes(self) -> tuple[str, str, str]:  # type: ignore[override]
        return self.dtype.name, self.dtype.name, self.weights[HEAD_NORM].dtype.name

    def bytes_by_owner(self) -> dict[str, int]:
        owners = {"weights": sum(w.nbytes for w in self.weights.values())}
        for name, memory in self._memory.items():
            owner = "kv cache" if name in self._caches else "activations"
            owners[owner] = owners.get(owner, 0) + memory.nbytes
        return owners

    def run(self, schedule: Schedule) -> list[int] | StepResult:
        return self._prepare(schedule)()

    def launch(self, schedule: Schedule) -> Callable[[], list[int] | StepResult]:
        if not self.can_run_ahead:
            return super().launch(schedule)
        self._queue.append(self._prepare(schedule))
        return self._run_next

    def _run_next(self) -> list[int] | StepResult:
        result = self._queue[0]()
        self._queue.popleft()  # only now: who was interrupted reads again
        return result

    def _prepare(self, schedule: Schedule) -> Callable[[], list[int] | StepResult]:
        """The step as a function, which looks at the requests no more."""
        if not schedule.requests:
            return lambda: self._swap(schedule) or []
        batch = build_batch(
            schedule, block_size=self.limits.block_size, table_width=self.table_width
        )
        last_rows = batch.query_starts[1:] - 1
        pending = [
            (row, item.request)
            for row, item in zip(last_rows, schedule, strict=True)
            if batch.token_ids[row] == PENDING_TOKEN
        ]
        requests = schedule.row_requests
        drafts = schedule.row_drafts if schedule.has_drafts else ()
        penalties = build_penalty_batch(requests, self.config.eos_ids, drafts=drafts)
        sampler = build_sampler_batch(requests, drafts)
        asking = asking_rows(requests)
        of_prompts = prompt_rows(schedule) if schedule.wants_logprobs else []

        def execute() -> list[int] | StepResult:
            self._swap(schedule)
            for row, request in pending:  # where the last step failed, any token will do
                batch.token_ids[row] = max(self._last_ids[request], 0)
            logits = self.logits(batch)
            kept = logits[asking]
            token_ids = self._sample(logits, penalties, sampler) if requests else []
            self._last_ids = dict(zip(requests, token_ids, strict=True))
            if not schedule.wants_logprobs:
                return token_ids
            return StepResult(
                token_ids,
                sampled_logprobs(kept, asking, requests, token_ids),
                {r.request: self._prompt_logprobs(r, len(batch.token_ids)) for r in of_prompts},
            )

        return execute

    def _swap(self, schedule: Schedule) -> None:
        """The copies of a step, in its order."""
        for pairs, is_out in ((schedule.swap_out, True), (schedule.swap_in, False)):
            if pairs:
                blocks, host_blocks = np.array(pairs).T
                for cache, host in zip(self._caches.values(), self._host_blocks, strict=True):
                    if is_out:
                        host[host_blocks] = cache[blocks]
                    else:
                        cache[blocks] = host[host_blocks]

    def logits(self, batch: ForwardBatch) -> np.ndarray:
        """Logits [S, V] of the batch's sampled rows, float32 (or the oracle's dtype); the array is
        overwritten by the next step."""
        max_queries = int(np.diff(batch.query_starts).max(initial=0))
        key = (len(batch.token_ids), len(batch.kv_lens), len(batch.sample_rows), max_queries)
        for name, values in vars(batch).items():
            if name in self._memory:
                self._view(name, values.shape)[...] = values
        if self.observer is not None:
            lists = batch.query_starts.tolist(), batch.kv_lens.tolist()
            self.observer.begin_step(step_dims(*key), *lists)
        run_calls(self._bind(*key), self.observer)
        if self.observer is not None:
            self.observer.end_step()
        return self._view("logits", (key[2], self.config.vocab_size))

    def _sample(
        self, logits: np.ndarray, penalties: PenaltyBatch | None, sampler: SamplerBatch
    ) -> list[int]:
        if penalties is not None:
            self.ops.penalize(logits, **vars(penalties))
        ids = np.empty(len(logits), np.int32)
        self.ops.sample(logits, **vars(sampler), out=ids)
        return ids.tolist()

    def _prompt_logprobs(self, rows: PromptRows, num_tokens: int) -> list[TokenLogprob]:
        """Of the step that has just run: the LM head once more, for rows of its batch."""
        head = [call for call in self.forward if call.op == "lm_head"]
        found: list[TokenLogprob] = []
        for part in rows.split(_PROMPT_ROWS):
            num_rows = len(part.rows)
            self._view("sample_rows", part.rows.shape)[...] = part.rows
            dims = self._dims | step_dims(num_tokens, 0, num_rows, 0)
            run_calls(bind_calls(head, self.ops, self._view, self.weights, dims))
            found += part.logprobs(self._view("logits", (num_rows, self.config.vocab_size)))
        return found

    # ----------------------------------------------------------------- binding

    def _bind(self, *key: int) -> list[BoundCall]:
        if key not in self._bound:
            if len(self._bound) >= 64:
                self._bound.clear()
            dims = self._dims | step_dims(*key)
            self._bound[key] = bind_calls(self.forward, self.ops, self._view, self.weights, dims)
        return self._bound[key]

    def _allocate(self) -> dict[str, np.ndarray]:
        """Every buffer of the forward at its largest; the system commits pages as they are used."""
        memory: dict[str, np.ndarray] = {}
        buffers = (v for c in self.forward for v in c.arguments.values() if isinstance(v, Buffer))
        for buffer in buffers:
            shape = tuple(self._dims.get(n, n) for n in buffer.shape)
            dtype = self._dtypes.get(buffer.dtype, self.dtype)
            if buffer.is_cache:
                # Heads first in memory: the blocks of one head, where they lie in a row, are then
                # one matrix that BLAS takes without a copy.
                flat = np.zeros((shape[1], shape[0], *shape[2:]), dtype)
                memory[buffer.name] = self._caches[buffer.name] = flat.swapaxes(0, 1)
            elif buffer.name not in memory:
                memory[buffer.name] = np.zeros(math.prod(shape), dtype)
        return memory

    def _view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The start of the buffer `name`, in `shape`; a cache is always whole."""
        memory = self._memory[name]
        return memory if name in self._caches else memory[: math.prod(shape)].reshape(shape)
