"""The runner on a GPU: one arena, and steps as captured graphs, one launched ahead of the other.

A step of decodes alone runs on the decode batch that lives on the device; any other brings its
inputs along. Either ends with the sampled ids on the device, where the next step finds them, and
with a copy of them under way to the host. It is written against `cuda.device.Device`, over
`CudaOps`; it imports no CuPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanocupy.checkpoint.base import Checkpoint
from nanocupy.config import ModelConfig
from nanocupy.cuda.arena import ArenaPlan
from nanocupy.cuda.device import Device
from nanocupy.cuda.step_stamps import DECODE, OTHER, StepStamps
from nanocupy.engine.batch import (
    ForwardBatch,
    PenaltyBatch,
    build_batch,
    build_penalty_batch,
    build_sampler_batch,
    split_penalties,
)
from nanocupy.engine.binding import StepObserver, bind_calls, run_calls, step_dims
from nanocupy.engine.decode_state import DecodeState
from nanocupy.engine.device_inputs import DeviceInputs, Staging
from nanocupy.engine.device_logprobs import DeviceLogprobs
from nanocupy.engine.device_plan import (
    MAX_UPDATES,
    MIN_INPUT_BYTES,
    DeviceSettings,
    buffer_specs,
    decode_bucket,
    op_sizes,
    table_width,
)
from nanocupy.engine.device_swap import HostBlocks
from nanocupy.engine.device_weights import upload_weights
from nanocupy.engine.request import PENDING_TOKEN, Request
from nanocupy.engine.results import StepResult
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.engine.schedule import Schedule
from nanocupy.engine.step_inputs import StepShape, step_shape
from nanocupy.model.forward import OpCall, decoder_forward
from nanocupy.model.rope import rope_parameters
from nanocupy.model.weights import weight_layout
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import kv_len_bound, workspace_plan
from nanocupy.ops.kernel_variants import Variant, VariantCollector

_SAMPLER_FIELDS = ("temperature", "top_k", "top_p", "min_p", "seeds", "counters")


class DeviceRunner(Runner):
    """Runs `config` on `device`. Fill the weights (`upload_weights`) before the first step."""

    can_run_ahead = True
    has_logprobs = True

    def __init__(
        self,
        config: ModelConfig,
        device: Device,
        limits: RunnerLimits,
        settings: DeviceSettings | None = None,
    ) -> None:
        settings = settings or DeviceSettings()
        self.config = config
        self.limits = limits
        self.settings = settings
        self._device = device
        self.device = device.name
        self.observer: StepObserver | None = None  # while there is one, nothing runs as a graph
        self.plan = ArenaPlan(buffer_specs(config, device, settings, limits))
        arena = device.allocate(self.plan)
        self._view = arena.view
        rope = rope_parameters(config)
        self.forward = decoder_forward(config, rope)
        self._is_dynamic = rope.is_dynamic
        self.weights = {w.name: self._view(f"weight.{w.name}") for w in weight_layout(config)}
        sizes = self._sizes = op_sizes(config, settings, limits)
        workspaces = {name: self._view(name) for name in workspace_plan(sizes, device.traits)}
        device.fill(workspaces["counters"], 0)
        self._workspaces = workspaces
        self.ops = CudaOps(device.kernels, device.matmul, workspaces, sizes, device.traits)

        width = table_width(limits)
        self.state = DecodeState(limits.max_num_seqs, width, limits.block_size)
        self._state_words = self._view("decode_state")
        device.fill(self._state_words, 0)
        self._inputs = DeviceInputs(device, self._view("inputs"), limits.max_num_seqs)
        self._batch: Any = None  # the requests of the last step, where it was of decodes alone
        self._previous: Sequence[Request] = ()  # whose tokens `sampled` holds, by row
        self._stamps: StepStamps | None = None
        self._put("inv_freq", rope.inv_freq)
        places = np.arange(limits.max_num_seqs + 1, dtype=np.int32)
        self._put("place_numbers", places)
        caches = [
            self._view(n) for n in self.plan.specs if n.startswith(("key_cache.", "value_cache."))
        ]
        # A cache that was never written must not hold NaN where padding reads it.
        for cache in caches:
            device.fill(cache, 0)
        self._host_blocks = HostBlocks(device, caches, limits.num_host_blocks)
        self._logprobs = DeviceLogprobs(device, config.vocab_size, self._head_of, limits)
        device.synchronize("preparing the device")

    @property
    def clock(self) -> Device:
        """What tells the times of a step's calls."""
        return self._device

    def bytes_by_owner(self) -> dict[str, int]:
        return self.plan.bytes_by_owner()

    def upload_weights(
        self, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Copy the checkpoint's tensors into place, or make random ones there; progress is called
        with bytes done and in all. Raises CheckpointError, CudaError."""
        upload_weights(self.config, checkpoint, self.weights, self._device, self.ops, progress)

    def kernel_variants(self) -> list[Variant]:
        """The kernel modules that steps of every kind need: to compile them at once, beforehand."""
        collector = VariantCollector()
        real, limits = self.ops, self.limits
        self.ops = CudaOps(
            collector, lambda *args: None, self._workspaces, self._sizes, self._device.traits
        )
        calls = [call for call in self.forward if not call.layer]  # the layers are alike

        def work() -> None:
            for num_tokens in sorted({1, min(64, limits.max_step_tokens), limits.max_step_tokens}):
                shape = StepShape(num_tokens, 1, table_width(limits), 1, num_tokens)
                inputs = self._inputs.arrays_of(shape)
                self._forward(inputs, _dims(shape), calls)
            for params in (None, inputs):
                self._sample(1, params)
            for num in sorted({min(n, limits.max_num_seqs) for n in (1, 2, 4, 8, 16, 1 << 30)}):
                for longest in (1, limits.max_context):
                    bound = kv_len_bound(self._sizes, self._device.traits, num, longest)
                    inputs = self._decode_inputs(num)
                    self._forward(inputs, step_dims(num, num, num, 1, bound), calls)
            self.ops.resolve_tokens(inputs["token_ids"], self._view("sampled"))

        try:
            return collector.collect(work)
        finally:
            self.ops = real

    def stamp_steps(self, num_steps: int) -> StepStamps:
        self._stamps = StepStamps(self._device, num_steps) if num_steps else None
        return self._stamps

    # ----------------------------------------------------------------- steps

    def run(self, schedule: Schedule) -> list[int] | StepResult:
        return self.launch(schedule)()

    def launch(self, schedule: Schedule) -> Callable[[], list[int] | StepResult]:
        staging = self._inputs.turn()
        if schedule.swap_out or schedule.swap_in:
            self._host_blocks.copy(schedule)
            self._batch = None
        if not schedule.requests:
            return list
        if schedule.requests is self._batch:
            order = self._decode(staging, self.state.grown(schedule.grown))
        else:
            order = self._launch_other(schedule, staging)
        moment = self._device.moment()

        def read() -> list[int] | StepResult:
            self._device.wait(moment, "a step")
            token_ids = staging.sampled[order].tolist()
            if not schedule.wants_logprobs:
                return token_ids
            return self._logprobs.result(token_ids)

        return read

    def _launch_other(self, schedule: Schedule, staging: Staging) -> Any:
        """A step that is no repetition of the one before. Returns the rows, in `sampled`, of the
        requests that sample, in the schedule's order."""
        sampling = schedule.sampling
        rows = {request: row for row, request in enumerate(self._previous)}
        penalties = build_penalty_batch(sampling, self.config.eos_ids)
        decodes = all(s.samples and s.num_tokens == 1 for s in schedule)
        if decodes and penalties is None and not schedule.wants_logprobs:
            self._batch = schedule.requests
            updates = self.state.updates(sampling, rows)
            self._previous = self.state.places[: len(sampling)]
            self._places = self.state.places_of(sampling)
            return self._decode(staging, updates)
        self._batch = None
        batch = build_batch(schedule, block_size=self.limits.block_size)
        for row, item in zip(batch.query_starts[1:] - 1, schedule, strict=True):
            if batch.token_ids[row] == PENDING_TOKEN:
                batch.token_ids[row] = -1 - rows[item.request]
        self._previous = sampling
        self._step(schedule, batch, penalties, staging)
        return slice(0, len(sampling))

    def logits(self, batch: ForwardBatch) -> np.ndarray:
        """Logits float32 [S, V] of the batch's sampled rows, on the host: for tests and tools."""
        shape = (len(batch.sample_rows), self.config.vocab_size)
        host = self._device.pinned(max(4, 4 * math.prod(shape))).view(np.float32)
        host = host[: math.prod(shape)].reshape(shape)
        self._batch, self._previous = None, ()
        num_seqs, width = batch.block_tables.shape
        queries = int(np.diff(batch.query_starts).max(initial=0))
        exact = StepShape(len(batch.token_ids), num_seqs, width, shape[0], queries)

        def body() -> None:
            self._forward(self._inputs.send_step(exact, batch, None), _dims(exact))
            self._device.to_host(host, self._view("logits", shape))

        self._device.eager("logits were asked for", body)
        self._device.synchronize("a step")
        return host

    # ----------------------------------------------------------------- decodes alone

    def _decode(self, staging: Staging, updates: np.ndarray) -> Any:
        """One token for each request of the batch: one graph, and what the host must change before
        it. Returns the rows of the requests."""
        state, device = self.state, self._device
        for start in range(0, len(updates), MAX_UPDATES):
            if start:
                device.synchronize("sending the decode batch")  # the staging memory is reused
            part = updates[start : start + MAX_UPDATES]
            staging.updates[: len(part)] = part
            on_device = self._view("updates", (len(part), 2))
            device.to_device(on_device, staging.updates[: len(part)])
            self.ops.apply_updates(on_device, self._state_words)
        num_places = decode_bucket(state.num_places, self.limits.max_num_seqs)
        if len(updates) and updates[:, 1].min() < 0:  # a token of the step before, maybe
            token_ids = state.view(self._state_words, "token_ids", num_places)
            self.ops.resolve_tokens(token_ids, self._view("sampled"))
        greedy = not state.view(state.words, "temperature", state.num_places).any()
        kv_lens = state.view(state.words, "kv_lens", num_places)
        bound = kv_len_bound(self._sizes, device.traits, num_places, int(kv_lens.max()))
        dims = step_dims(num_places, num_places, num_places, 1, bound)
        if self.observer is None:
            device.run(
                ("decode", num_places, bound, "greedy" if greedy else "sampled", self._stamps),
                lambda: self._decode_step(num_places, dims, greedy),
            )
        else:  # the calls of a graph cannot be seen one by one
            self._observed(
                dims, range(num_places + 1), kv_lens.tolist(),
                lambda: self._decode_step(num_places, dims, greedy),
            )  # fmt: skip
        state.advance()
        self._fetch(staging, state.num_places)
        return self._places

    def _decode_step(self, num_places: int, dims: Mapping[str, int], greedy: bool) -> None:
        """The body of a decode graph: forward, sample, move on."""

        if self._stamps is not None:
            self._stamps.start()
        inputs = self._decode_inputs(num_places)
        self._forward(inputs, dims)
        sampled = self._sample(num_places, None if greedy else inputs)
        self.ops.advance_decode_state(
            sampled,
            *(inputs[name] for name in ("block_tables", "token_ids", "positions", "kv_lens")),
            *(inputs[name] for name in ("slots", "rope_lens", "counters")),
            self.limits.block_size,
        )
        if self._stamps is not None:
            self._stamps.end(DECODE)

    def _decode_inputs(self, num_places: int) -> dict[str, Any]:
        """The fields of the decode state, and what of a step's inputs is always the same there."""
        fields = {
            name: self.state.view(self._state_words, name, num_places)
            for name in self.state.field_names
        }
        numbers = self._view("place_numbers")
        return fields | {
            "query_starts": numbers[: num_places + 1],
            "sample_rows": numbers[:num_places],
        }

    # ----------------------------------------------------------------- any other step

    def _step(
        self,
        schedule: Schedule,
        batch: ForwardBatch,
        penalties: PenaltyBatch | None,
        staging: Staging,
    ) -> None:
        """Forward and sample for a batch that brings its inputs along; a graph for each rounded
        shape. Between the two, logits that are asked for are kept, and penalties done."""
        requests = schedule.sampling
        shape = step_shape(
            batch,
            max_tokens=self.limits.max_step_tokens,
            max_num_seqs=self.limits.max_num_seqs,
            max_table_width=table_width(self.limits),
            max_rows=self.limits.max_num_seqs,
            few_queries=self._sizes.max_queries,
        )
        greedy = all(r.params.temperature == 0 for r in requests)
        sampler = None if greedy else build_sampler_batch(requests)
        inputs = self._inputs.send_step(shape, batch, sampler)
        self.ops.resolve_tokens(inputs["token_ids"], self._view("sampled"))
        params = None if greedy else inputs

        def body(draws: bool) -> None:
            if self._stamps is not None:
                self._stamps.start()
            self._forward(inputs, _dims(shape))
            if draws and shape.num_rows:
                self._sample(shape.num_rows, params)
            if self._stamps is not None:
                self._stamps.end(OTHER)

        draws = penalties is None and not schedule.wants_logprobs
        if self.observer is not None:
            lens = batch.kv_lens.tolist() + [0] * (shape.num_seqs - len(batch.kv_lens))
            starts = batch.query_starts.tolist()
            starts += starts[-1:] * (shape.num_seqs + 1 - len(starts))
            self._observed(_dims(shape), starts, lens, lambda: body(draws))
        else:
            how = ("greedy" if greedy else "sampled") if draws else "logits"
            self._device.run(("step", shape, how, self._stamps), lambda: body(draws))
        if not draws:
            logits = self._view("logits", (len(requests), self.config.vocab_size))
            if schedule.wants_logprobs:
                self._logprobs.keep(schedule, logits, _dims(shape))
            for rows, part in split_penalties(penalties, MIN_INPUT_BYTES // 32):
                if self._inputs.is_full:
                    self._device.synchronize("sending penalties")
                    self._inputs.rewind(shape.num_bytes)
                self.ops.penalize(logits[rows], **self._inputs.send(vars(part)))
            if shape.num_rows:
                self._sample(shape.num_rows, params)
        self._fetch(staging, len(requests))

    # ----------------------------------------------------------------- parts of both

    def _sample(self, num_rows: int, params: Mapping[str, Any] | None) -> Any:
        """Ids of the first rows of the logits, into `sampled`. params: None takes the argmax."""
        logits = self._view("logits", (num_rows, self.config.vocab_size))
        sampled = self._view("sampled", (num_rows,))
        if params is None:
            self.ops.argmax(logits, sampled)
        else:
            self.ops.sample(logits, **{n: params[n] for n in _SAMPLER_FIELDS}, out=sampled)
        return sampled

    def _fetch(self, staging: Staging, num_rows: int) -> None:
        """Start the copy of the sampled ids to the host."""
        if num_rows:
            self._device.to_host(staging.sampled[:num_rows], self._view("sampled", (num_rows,)))

    def _observed(
        self,
        dims: Mapping[str, int],
        query_starts: Sequence[int],
        kv_lens: Sequence[int],
        body: Callable[[], None],
    ) -> None:
        assert self.observer is not None
        self.observer.begin_step(dims, query_starts, kv_lens)
        self._device.eager("observed", body)
        self._device.synchronize("a step")
        self.observer.end_step()

    def _head_of(self, rows: np.ndarray, dims: Mapping[str, int]) -> Any:
        """Logits [n, V] of these rows int32 [n] of the step of `dims` that has just run."""
        self._inputs.rewind(0)
        sent = self._inputs.send({"sample_rows": rows})
        dims = {**dims, "S": len(rows)}
        self._forward(sent, dims, [call for call in self.forward if call.op == "lm_head"])
        return self._view("logits", (len(rows), self.config.vocab_size))

    def _forward(
        self,
        inputs: Mapping[str, Any],
        dims: Mapping[str, int],
        calls: Sequence[OpCall] | None = None,
    ) -> None:
        """The op calls of a step, in order, or some of them. `inputs`: the batch's arrays."""
        limits = self.limits
        all_dims = {"N": limits.num_blocks, "P": limits.block_size, "M": 0, **dims}

        def view(name: str, shape: tuple[int, ...]) -> Any:
            return inputs[name] if name in inputs else self._view(name, shape)

        bound = bind_calls(calls or self.forward, self.ops, view, self.weights, all_dims)
        run_calls(bound, self.observer)

    # ----------------------------------------------------------------- inputs

    def _put(self, name: str, values: np.ndarray) -> None:
        """Copy a constant to its buffer."""
        host = self._device.pinned(values.nbytes).view(values.dtype).reshape(values.shape)
        host[...] = values
        self._device.to_device(self._view(name), host)


def _dims(shape: StepShape) -> dict[str, int]:
    return step_dims(shape.num_tokens, shape.num_seqs, shape.num_rows, shape.max_queries)
