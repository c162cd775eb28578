"""The runner on the CPU: binds the forward's op calls to NumPy buffers and runs them in order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanocupy.config import ModelConfig
from nanocupy.engine.batch import (
    ForwardBatch,
    build_batch,
    build_penalty_batch,
    build_sampler_batch,
)
from nanocupy.engine.binding import BoundCall, StepObserver, bind_calls, run_calls, step_dims
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.engine.scheduler import ScheduledRequest
from nanocupy.errors import CheckpointError
from nanocupy.model.forward import Buffer, decoder_forward
from nanocupy.model.rope import rope_parameters
from nanocupy.ops.numpy_ops import NumpyOps


class NumpyRunner(Runner):
    """Runs `config` with `weights` (name in `weight_layout` -> array) on NumPy.

    Activations and cache are of `dtype` (float32; float64 makes an oracle, with float64 compute).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, np.ndarray],
        limits: RunnerLimits,
        dtype: type[np.floating] = np.float32,
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
        self.forward = decoder_forward(config, rope)
        self._dims = step_dims(
            limits.max_step_tokens, limits.max_num_seqs, limits.max_step_tokens, 0
        ) | {"N": limits.num_blocks, "P": limits.block_size, "M": self.table_width}
        self._memory = self._allocate()
        self._memory["inv_freq"] = rope.inv_freq
        # The steps' shapes repeat (decode: always the same): their bound calls are kept.
        self._bound: dict[tuple[int, ...], list[BoundCall]] = {}

    def bytes_by_owner(self) -> dict[str, int]:
        owners = {"weights": sum(w.nbytes for w in self.weights.values())}
        for memory in self._memory.values():
            owner = "kv cache" if memory.ndim == 4 else "activations"
            owners[owner] = owners.get(owner, 0) + memory.nbytes
        return owners

    def run(self, schedule: Sequence[ScheduledRequest]) -> list[int]:
        batch = build_batch(
            schedule, block_size=self.limits.block_size, table_width=self.table_width
        )
        logits = self.logits(batch)
        requests = [s.request for s in schedule if s.samples]
        return self._sample(requests, logits) if requests else []

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

    def _sample(self, requests: Sequence[Any], logits: np.ndarray) -> list[int]:
        # A NaN reaches the maximum, and a row of nothing but -inf has no other.
        if not np.isfinite(logits.max(axis=-1)).all():
            raise CheckpointError(
                "the model computes NaN or infinite logits: its weights are damaged or out of "
                "range; check the file with `nanocupy inspect --verify`"
            )
        penalties = build_penalty_batch(requests, self.config.eos_ids)
        if penalties is not None:
            self.ops.penalize(logits, **vars(penalties))
        ids = np.empty(len(requests), np.int32)
        self.ops.sample(logits, **vars(build_sampler_batch(requests)), out=ids)
        return ids.tolist()

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
            dtype = np.dtype(np.int32) if buffer.dtype == "int32" else self.dtype
            if buffer.dtype == "cache":
                # Heads first in memory: the blocks of one head, where they lie in a row, are then
                # one matrix that BLAS takes without a copy.
                num_blocks, num_heads, block_size, head_size = shape
                flat = np.zeros((num_heads, num_blocks, block_size, head_size), dtype)
                memory[buffer.name] = flat.swapaxes(0, 1)
            elif buffer.name not in memory:
                memory[buffer.name] = np.zeros(math.prod(shape), dtype)
        return memory

    def _view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The start of the buffer `name`, in `shape`; a cache is always whole."""
        memory = self._memory[name]
        return memory if memory.ndim == 4 else memory[: math.prod(shape)].reshape(shape)
