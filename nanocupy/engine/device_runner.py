"""The runner on a GPU: one arena, and steps as captured graphs, one launched ahead of the other.

A step of decodes alone runs on the decode batch that lives on the device; any other brings its
inputs along. Either ends with the sampled ids on the device, where the next step finds them, and
with a copy of them under way to the host. It is written against `cuda.device.Device`, over
`CudaOps`; it imports no CuPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanocupy.checkpoint.base import Checkpoint, dequantized
from nanocupy.checkpoint.random import RandomCheckpoint
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
from nanocupy.engine.request import PENDING_TOKEN, Request
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.engine.schedule import Schedule
from nanocupy.engine.step_inputs import StepShape, fill, step_shape
from nanocupy.model.forward import decoder_forward
from nanocupy.model.rope import rope_parameters
from nanocupy.model.weights import weight_layout
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import ITEMSIZES, workspace_plan

_ALIGNMENT = 16  # bytes
_SAMPLER_FIELDS = ("temperature", "top_k", "top_p", "min_p", "seeds", "counters")


@dataclass
class _Staging:
    """Pinned memory of a step that is under way: what it sends, and what it brings back."""

    inputs: np.ndarray  # uint8
    updates: np.ndarray  # int32 [MAX_UPDATES, 2]
    sampled: np.ndarray  # int32 [max_num_seqs]


class DeviceRunner(Runner):
    """Runs `config` on `device`. Fill the weights (`upload_weights`) before the first step."""

    can_run_ahead = True

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
        sizes = op_sizes(config, settings, limits)
        self._few_queries = sizes.max_queries
        workspaces = {name: self._view(name) for name in workspace_plan(sizes, device.traits)}
        device.fill(workspaces["counters"], 0)
        self.ops = CudaOps(device.kernels, device.matmul, workspaces, sizes, device.traits)

        width = table_width(limits)
        self.state = DecodeState(limits.max_num_seqs, width, limits.block_size)
        self._state_words = self._view("decode_state")
        device.fill(self._state_words, 0)
        self._inputs = self._view("inputs")
        self._inputs_used = 0
        # Two steps may be under way, so each of their parts on the host is there twice.
        self._staging = [self._new_staging() for _ in range(2)]
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
        layout = list(weight_layout(self.config))
        itemsize = ITEMSIZES[self.settings.dtype]
        total = sum(math.prod(weight.shape) for weight in layout) * itemsize
        with self._device.uploader(total, progress) as uploader:
            for weight in layout:
                row = 0
                for source in weight.sources:
                    num_rows = checkpoint.tensors[source].shape[0]
                    part = self.weights[weight.name][row : row + num_rows]
                    row += num_rows
                    deviation = None
                    if isinstance(checkpoint, RandomCheckpoint):
                        deviation = checkpoint.deviation(source)
                    if deviation is None:
                        uploader.upload(source, dequantized(checkpoint.read(source)), part)
                    else:  # made there: quicker by far than here
                        self.ops.fill_normal(part, deviation, checkpoint.seed_of(source))
        self._device.synchronize("loading the weights")

    def _new_staging(self) -> _Staging:
        pinned = self._device.pinned
        return _Staging(
            pinned(self._inputs.nbytes),
            pinned(8 * MAX_UPDATES).view(np.int32).reshape(-1, 2),
            pinned(4 * self.limits.max_num_seqs).view(np.int32),
        )

    def stamp_steps(self, num_steps: int) -> StepStamps:
        self._stamps = StepStamps(self._device, num_steps) if num_steps else None
        return self._stamps

    # ----------------------------------------------------------------- steps

    def run(self, schedule: Schedule) -> list[int]:
        return self.launch(schedule)()

    def launch(self, schedule: Schedule) -> Callable[[], list[int]]:
        self._staging.reverse()
        staging = self._staging[0]
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

        def read() -> list[int]:
            self._device.wait(moment, "a step")
            return staging.sampled[order].tolist()

        return read

    def _launch_other(self, schedule: Schedule, staging: _Staging) -> Any:
        """A step that is no repetition of the one before. Returns the rows, in `sampled`, of the
        requests that sample, in the schedule's order."""
        sampling = schedule.sampling
        rows = {request: row for row, request in enumerate(self._previous)}
        penalties = build_penalty_batch(sampling, self.config.eos_ids)
        if penalties is None and all(s.samples and s.num_tokens == 1 for s in schedule):
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
        self._step(batch, sampling, penalties, staging)
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
            self._forward(self._send(exact, batch, None, self._staging[0]), _dims(exact))
            self._device.to_host(host, self._view("logits", shape))

        self._device.eager("logits were asked for", body)
        self._device.synchronize("a step")
        return host

    # ----------------------------------------------------------------- decodes alone

    def _decode(self, staging: _Staging, updates: np.ndarray) -> Any:
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
        if self.observer is None:
            device.run(
                ("decode", num_places, "greedy" if greedy else "sampled", self._stamps),
                lambda: self._decode_step(num_places, greedy),
            )
        else:  # the calls of a graph cannot be seen one by one
            dims = step_dims(num_places, num_places, num_places, 1)
            kv_lens = state.view(state.words, "kv_lens", num_places).tolist()
            self._observed(
                dims, range(num_places + 1), kv_lens, lambda: self._decode_step(num_places, greedy)
            )
        state.advance()
        self._fetch(staging, state.num_places)
        return self._places

    def _decode_step(self, num_places: int, greedy: bool) -> None:
        """The body of a decode graph: forward, sample, move on."""

        def field(name: str) -> Any:
            return self.state.view(self._state_words, name, num_places)

        if self._stamps is not None:
            self._stamps.start()
        numbers = self._view("place_numbers")
        inputs = {
            "token_ids": field("token_ids"),
            "positions": field("positions"),
            "slots": field("slots"),
            "rope_lens": field("rope_lens"),
            "kv_lens": field("kv_lens"),
            "block_tables": field("block_tables"),
            "query_starts": numbers[: num_places + 1],
            "sample_rows": numbers[:num_places],
        }
        self._forward(inputs, step_dims(num_places, num_places, num_places, 1))
        sampler = None if greedy else {name: field(name) for name in _SAMPLER_FIELDS}
        sampled = self._sample(num_places, sampler)
        self.ops.advance_decode_state(
            sampled, field("block_tables"), field("token_ids"), field("positions"),
            field("kv_lens"), field("slots"), field("rope_lens"), field("counters"),
            self.limits.block_size,
        )  # fmt: skip
        if self._stamps is not None:
            self._stamps.end(DECODE)

    # ----------------------------------------------------------------- any other step

    def _step(
        self,
        batch: ForwardBatch,
        requests: Sequence[Request],
        penalties: PenaltyBatch | None,
        staging: _Staging,
    ) -> None:
        """Forward and sample for a batch that brings its inputs along; a graph for each rounded
        shape. Penalties are sent and done between the two."""
        shape = step_shape(
            batch,
            max_tokens=self.limits.max_step_tokens,
            max_num_seqs=self.limits.max_num_seqs,
            max_table_width=table_width(self.limits),
            max_rows=self.limits.max_num_seqs,
            few_queries=self._few_queries,
        )
        greedy = all(r.params.temperature == 0 for r in requests)
        sampler = None if greedy else build_sampler_batch(requests)
        inputs = self._send(shape, batch, sampler, staging)
        self.ops.resolve_tokens(inputs["token_ids"], self._view("sampled"))
        params = None if greedy else {name: inputs[name] for name in _SAMPLER_FIELDS}

        def body(draws: bool) -> None:
            if self._stamps is not None:
                self._stamps.start()
            self._forward(inputs, _dims(shape))
            if draws and shape.num_rows:
                self._sample(shape.num_rows, params)
            if self._stamps is not None:
                self._stamps.end(OTHER)

        draws = penalties is None
        if self.observer is not None:
            lens = batch.kv_lens.tolist() + [0] * (shape.num_seqs - len(batch.kv_lens))
            starts = batch.query_starts.tolist()
            starts += starts[-1:] * (shape.num_seqs + 1 - len(starts))
            self._observed(_dims(shape), starts, lens, lambda: body(draws))
        else:
            how = ("greedy" if greedy else "sampled") if draws else "logits"
            self._device.run(("step", shape, how, self._stamps), lambda: body(draws))
        if penalties is not None:
            logits = self._view("logits", (len(requests), self.config.vocab_size))
            for rows, part in split_penalties(penalties, MIN_INPUT_BYTES // 32):
                if self._inputs_used > self._inputs.nbytes - MIN_INPUT_BYTES:
                    self._device.synchronize("sending penalties")  # the staging memory is reused
                    self._inputs_used = shape.num_bytes
                self.ops.penalize(logits[rows], **self._put_all(vars(part), staging))
            self._sample(shape.num_rows, params)
        self._fetch(staging, len(requests))

    def _send(
        self, shape: StepShape, batch: ForwardBatch, sampler: Any, staging: _Staging
    ) -> dict[str, Any]:
        """Bring the inputs of a step over; each as an array of the device, by name."""
        fill(staging.inputs, shape, batch, sampler)
        self._inputs_used = shape.num_bytes
        self._device.to_device(self._inputs[: shape.num_bytes], staging.inputs[: shape.num_bytes])
        return {
            name: self._inputs[offset : offset + math.prod(size) * dtype.itemsize]
            .view(dtype)
            .reshape(size)
            for name, (offset, dtype, size) in shape.arrays.items()
        }

    # ----------------------------------------------------------------- parts of both

    def _sample(self, num_rows: int, params: Mapping[str, Any] | None) -> Any:
        """Ids of the first rows of the logits, into `sampled`. params: None takes the argmax."""
        logits = self._view("logits", (num_rows, self.config.vocab_size))
        sampled = self._view("sampled", (num_rows,))
        if params is None:
            self.ops.argmax(logits, sampled)
        else:
            self.ops.sample(logits, **params, out=sampled)
        return sampled

    def _fetch(self, staging: _Staging, num_rows: int) -> None:
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

    def _forward(self, inputs: Mapping[str, Any], dims: Mapping[str, int]) -> None:
        """The op calls of a step, in order. `inputs`: the batch's arrays, where they lie."""
        limits = self.limits
        all_dims = {"N": limits.num_blocks, "P": limits.block_size, "M": 0, **dims}

        def view(name: str, shape: tuple[int, ...]) -> Any:
            return inputs[name] if name in inputs else self._view(name, shape)

        bound = bind_calls(self.forward, self.ops, view, self.weights, all_dims)
        run_calls(bound, self.observer)

    # ----------------------------------------------------------------- inputs

    def _put(self, name: str, values: np.ndarray) -> None:
        """Copy a constant to its buffer."""
        host = self._device.pinned(values.nbytes).view(values.dtype).reshape(values.shape)
        host[...] = values
        self._device.to_device(self._view(name), host)

    def _put_all(self, arrays: Mapping[str, np.ndarray], staging: _Staging) -> dict[str, Any]:
        """Send arrays in one copy, behind what the step has sent so far; each as an array of the
        device, by the same names."""
        start = self._inputs_used
        offsets: dict[str, int] = {}
        for name, array in arrays.items():
            offset, end = self._inputs_used, self._inputs_used + array.nbytes
            assert end <= self._inputs.nbytes, f"the inputs of a step outgrew their memory: {name}"
            staging.inputs[offset:end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._inputs_used = -(-end // _ALIGNMENT) * _ALIGNMENT
            offsets[name] = offset
        stop = min(self._inputs_used, self._inputs.nbytes)
        if stop > start:
            self._device.to_device(self._inputs[start:stop], staging.inputs[start:stop])
        return {
            name: self._inputs[offsets[name] : offsets[name] + array.nbytes]
            .view(array.dtype)
            .reshape(array.shape)
            for name, array in arrays.items()
        }


def _dims(shape: StepShape) -> dict[str, int]:
    return step_dims(shape.num_tokens, shape.num_seqs, shape.num_rows, shape.max_queries)
