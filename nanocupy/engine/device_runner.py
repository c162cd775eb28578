"""The runner on a GPU: one arena, and steps as captured graphs, one launched ahead of the other.

A step of decodes alone runs on the decode batch that lives on the device; any other brings its
inputs along. Either ends with the sampled ids on the device, where the next step finds them, and
with a copy of them under way to the host. It is written against `cuda.device.Device`, over
`CudaOps`; it imports no CuPy.
"""

from __future__ import annotations

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
from nanocupy.engine.binding import StepObserver, step_dims
from nanocupy.engine.decode_state import DecodeState
from nanocupy.engine.device_lane import Lane
from nanocupy.engine.device_logprobs import DeviceLogprobs
from nanocupy.engine.device_plan import (
    MAX_UPDATES,
    MIN_INPUT_BYTES,
    DeviceSettings,
    buffer_specs,
    decode_bucket,
    lane_buffers,
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
from nanocupy.memory.host_pool import SwapCosts
from nanocupy.model.forward import decoder_forward
from nanocupy.model.rope import rope_parameters
from nanocupy.model.weights import weight_layout
from nanocupy.ops.cuda_sizes import fused_bounds, kv_len_bound
from nanocupy.ops.kernel_variants import Variant, VariantCollector


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
        view = device.allocate(self.plan).view
        rope = rope_parameters(config)
        self.forward = decoder_forward(config, rope)
        self.weights = {w.name: view(f"weight.{w.name}") for w in weight_layout(config)}
        sizes = self._sizes = op_sizes(config, settings, limits)
        self._main = Lane(device, view, sizes, limits, self.weights)
        self.ops = self._main.ops
        # Where prompts go while others decode, if that is to be side by side.
        self._side: Lane | None = None
        if settings.two_streams:
            own = lane_buffers(config, sizes, device.traits)
            self._side = Lane(device.second_stream(), view, sizes, limits, self.weights, own=own)
        self.state = self._new_state()
        self._state_words = view("decode_state")
        device.fill(self._state_words, 0)
        self._is_state_known = True  # whether the device has what `state` says
        self._batch: Any = None  # the requests of the last step, where it was of decodes alone
        self._rows: Mapping[Request, int] | Sequence[Request] = ()  # see `_row_of`
        self._stamps: StepStamps | None = None
        self._rings: dict[int, StepStamps] = {}  # by their steps
        constants = {
            "inv_freq": rope.inv_freq,
            "place_numbers": np.arange(limits.max_num_seqs + 1, dtype=np.int32),
        }
        sent = [self._put(name, values) for name, values in constants.items()]
        caches = [view(n) for n in self.plan.specs if n.startswith(("key_cache.", "value_cache."))]
        # A cache that was never written must not hold NaN where padding reads it.
        for cache in caches:
            device.fill(cache, 0)
        self._host_blocks = HostBlocks(device, caches, limits.num_host_blocks)
        self._logprobs = DeviceLogprobs(device, config.vocab_size, self._head_of, limits)
        device.synchronize("preparing the device")
        del sent  # it had to stay until now

    def _new_state(self) -> DecodeState:
        limits = self.limits
        return DecodeState(limits.max_num_seqs, table_width(limits), limits.block_size)

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
        with self._device.current():
            upload_weights(self.config, checkpoint, self.weights, self._device, self.ops, progress)

    def kernel_variants(self) -> list[Variant]:
        """The kernel modules that steps of every kind need: to compile them at once, beforehand."""
        lane, limits = self._main, self.limits
        calls = [call for call in self.forward if not call.layer]  # the layers are alike

        def work() -> None:
            for num_tokens in sorted({1, min(64, limits.max_step_tokens), limits.max_step_tokens}):
                shape = StepShape(num_tokens, 1, table_width(limits), 1, num_tokens)
                inputs = lane.inputs.arrays_of(shape)
                lane.run(calls, inputs, _dims(shape))
            for params in (None, inputs):
                lane.sample(1, params)
            most = min(limits.max_num_seqs, limits.max_step_tokens)
            for num in sorted({min(n, most) for n in (1, 2, 4, 8, 16, most)}):
                bounds = fused_bounds(self._sizes, self._device.traits, num)
                for bound in (*bounds, limits.max_context + 1):
                    inputs = self._decode_inputs(num)
                    lane.run(calls, inputs, step_dims(num, num, num, 1, bound))
            lane.ops.resolve_tokens(inputs["token_ids"], lane.view("sampled"))

        collector = VariantCollector()
        lane.dry_run(collector, work)
        return collector.variants

    def swap_costs(self) -> SwapCosts | None:
        return self._host_blocks.costs()

    def stamp_steps(self, num_steps: int) -> StepStamps | None:
        if not num_steps:
            self._stamps = None
            return None
        # Graphs refer to the ring they write to, so a ring is made once.
        if num_steps not in self._rings:
            self._rings[num_steps] = StepStamps(self._device, num_steps)
        self._stamps = self._rings[num_steps]
        self._stamps.clear()
        return self._stamps

    # ----------------------------------------------------------------- steps

    def run(self, schedule: Schedule) -> list[int] | StepResult:
        return self.launch(schedule)()

    def launch(self, schedule: Schedule) -> Callable[[], list[int] | StepResult]:
        try:
            with self._device.current():
                return self._launch(schedule)
        except BaseException:
            # Who knows what of it was done: the decode batch is made anew, here and there.
            self._batch, self._is_state_known = None, False
            raise

    def _launch(self, schedule: Schedule) -> Callable[[], list[int] | StepResult]:
        for lane in self._lanes:
            lane.inputs.turn()
        if not self._is_state_known:
            self.state = self._new_state()
            self._device.fill(self._state_words, 0)
            self._is_state_known = True
        if schedule.swap_out or schedule.swap_in:
            self._host_blocks.copy(schedule)
            self._batch = None
        if not schedule.requests:
            return list
        if schedule.requests is self._batch:
            self._update_state(self.state.grown(schedule.grown))
            self._decode()
            collect = self._collect_places
        else:
            collect = self._launch_other(schedule)
        moment = self._device.moment()

        def read() -> list[int] | StepResult:
            self._device.wait(moment, "a step")
            token_ids = collect()
            return self._logprobs.result(token_ids) if schedule.wants_logprobs else token_ids

        return read

    @property
    def _lanes(self) -> tuple[Lane, ...]:
        return (self._main,) if self._side is None else (self._main, self._side)

    def _launch_other(self, schedule: Schedule) -> Callable[[], list[int]]:
        """A step that is no repetition of the one before. Returns what reads its ids, in the order
        of the requests that sample."""
        sampling = schedule.sampling
        penalties = build_penalty_batch(sampling, self.config.eos_ids)
        is_plain = penalties is None and not schedule.wants_logprobs
        decodes = [s.request for s in schedule if s.samples and s.num_tokens == 1]
        if is_plain and len(decodes) == len(schedule.requests):
            self._start_decoding(decodes)
            self._decode()
            self._rows = self.state.places[: len(decodes)]
            self._batch = schedule.requests
            return self._collect_places
        self._batch = None
        if is_plain and decodes and self._side is not None and self.observer is None:
            return self._side_by_side(schedule, decodes)
        self._step(self._main, schedule, penalties)()
        self._rows = sampling
        staging = self._main.inputs.staging
        return lambda: staging.sampled[: len(sampling)].tolist()

    def _side_by_side(
        self, schedule: Schedule, decodes: Sequence[Request]
    ) -> Callable[[], list[int]]:
        """The prompts of a step on the second stream, while the others decode on the first."""
        main, side = self._main, self._side
        assert side is not None
        deciding = set(decodes)
        prompts = Schedule(tuple(s for s in schedule if s.request not in deciding))
        # Both put in the tokens of the step before, ere either draws its own.
        self._start_decoding(decodes)
        side.device.follow(main.device)
        with side.device.current():
            start_prompts = self._step(side, prompts, None)
            main.device.follow(side.device)
            start_prompts()
        self._decode()
        main.device.follow(side.device)
        rows = dict(zip(decodes, self._places.tolist(), strict=True))
        rows |= {r: side.first_row + row for row, r in enumerate(prompts.sampling)}
        self._rows = rows
        stagings = main.inputs.staging, side.inputs.staging
        order = [rows[request] for request in schedule.sampling]

        def collect() -> list[int]:
            return np.concatenate([staging.sampled for staging in stagings])[order].tolist()

        return collect

    def _row_of(self) -> Mapping[Request, int]:
        """Where the step before put the ids that it sampled, in `sampled`."""
        if isinstance(self._rows, Mapping):
            return self._rows
        return {request: row for row, request in enumerate(self._rows)}

    def logits(self, batch: ForwardBatch) -> np.ndarray:
        """Logits float32 [S, V] of the batch's sampled rows, on the host: for tests and tools."""
        lane, num_rows = self._main, len(batch.sample_rows)
        host = self._device.pinned(max(4, 4 * num_rows * self.config.vocab_size)).view(np.float32)
        host = host[: num_rows * self.config.vocab_size].reshape(num_rows, -1)
        self._batch, self._rows = None, ()
        num_seqs, width = batch.block_tables.shape
        queries = int(np.diff(batch.query_starts).max(initial=0))
        exact = StepShape(len(batch.token_ids), num_seqs, width, num_rows, queries)

        def body() -> None:
            lane.run(self.forward, lane.inputs.send_step(exact, batch, None), _dims(exact))
            self._device.to_host(host, lane.logits(num_rows))

        self._device.eager("logits were asked for", body)
        self._device.synchronize("a step")
        return host

    # ----------------------------------------------------------------- decodes alone

    def _start_decoding(self, requests: Sequence[Request]) -> None:
        """Make these requests the decode batch, on the device too."""
        self._update_state(self.state.updates(requests, self._row_of()))
        self._places = self.state.places_of(requests)

    @property
    def _collect_places(self) -> Callable[[], list[int]]:
        places, staging = self._places, self._main.inputs.staging
        return lambda: staging.sampled[places].tolist()

    def _update_state(self, updates: np.ndarray) -> None:
        """Change words of the decode batch; tokens that are not known yet are put in."""
        state, device, lane = self.state, self._device, self._main
        for start in range(0, len(updates), MAX_UPDATES):
            if start:
                device.synchronize("sending the decode batch")  # the staging memory is reused
            part = updates[start : start + MAX_UPDATES]
            staged = lane.inputs.staging.updates[: len(part)]
            staged[...] = part
            on_device = lane.view("updates", (len(part), 2))
            device.to_device(on_device, staged)
            lane.ops.apply_updates(on_device, self._state_words)
        if len(updates) and updates[:, 1].min() < 0:  # a token of the step before, maybe
            token_ids = state.view(self._state_words, "token_ids", state.num_places)
            lane.ops.resolve_tokens(token_ids, lane.view("sampled"))

    def _decode(self) -> None:
        """One token for each request of the batch: one graph."""
        state, device, lane = self.state, self._device, self._main
        num_places = decode_bucket(state.num_places, self.limits.max_num_seqs)
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
        lane.fetch(state.num_places)

    def _decode_step(self, num_places: int, dims: Mapping[str, int], greedy: bool) -> None:
        """The body of a decode graph: forward, sample, move on."""
        if self._stamps is not None:
            self._stamps.start()
        lane, inputs = self._main, self._decode_inputs(num_places)
        lane.run(self.forward, inputs, dims, self.observer)
        lane.ops.advance_decode_state(
            lane.sample(num_places, None if greedy else inputs),
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
        numbers = self._main.view("place_numbers")
        return fields | {
            "query_starts": numbers[: num_places + 1],
            "sample_rows": numbers[:num_places],
        }

    # ----------------------------------------------------------------- any other step

    def _step(
        self, lane: Lane, schedule: Schedule, penalties: PenaltyBatch | None
    ) -> Callable[[], None]:
        """Forward and sample for a batch that brings its inputs along; a graph for each rounded
        shape. Between the two, logits that are asked for are kept, and penalties done.

        Sends the inputs; what it returns starts the rest.
        """
        batch = build_batch(schedule, block_size=self.limits.block_size)
        is_pending = batch.token_ids[batch.query_starts[1:] - 1] == PENDING_TOKEN
        if is_pending.any():
            rows = self._row_of()
            for b in np.flatnonzero(is_pending):
                row = rows[schedule.requests[b].request]
                batch.token_ids[batch.query_starts[b + 1] - 1] = -1 - row
        requests, limits = schedule.sampling, self.limits
        shape = step_shape(
            batch,
            max_tokens=limits.max_step_tokens,
            max_num_seqs=limits.max_num_seqs,
            max_table_width=table_width(limits),
            max_rows=limits.max_num_seqs,
            few_queries=self._sizes.max_queries,
        )
        greedy = all(r.params.temperature == 0 for r in requests)
        inputs = lane.inputs.send_step(
            shape, batch, None if greedy else build_sampler_batch(requests)
        )
        if is_pending.any():
            lane.ops.resolve_tokens(inputs["token_ids"], lane.view("sampled"))
        params = None if greedy else inputs
        draws = penalties is None and not schedule.wants_logprobs

        stamps = self._stamps if lane is self._main else None

        def body() -> None:
            if stamps is not None:
                stamps.start()
            lane.run(self.forward, inputs, _dims(shape), self.observer)
            if draws and shape.num_rows:
                lane.sample(shape.num_rows, params)
            if stamps is not None:
                stamps.end(OTHER)

        def start() -> None:
            if self.observer is not None:
                lens = batch.kv_lens.tolist() + [0] * (shape.num_seqs - len(batch.kv_lens))
                starts = batch.query_starts.tolist()
                starts += starts[-1:] * (shape.num_seqs + 1 - len(starts))
                self._observed(_dims(shape), starts, lens, body)
            else:
                how = ("greedy" if greedy else "sampled") if draws else "logits"
                lane.device.run(("step", shape, how, stamps), body)
            if not draws:
                if schedule.wants_logprobs:
                    self._logprobs.keep(schedule, lane.logits(len(requests)), _dims(shape))
                self._penalize(lane, penalties, shape)
                if shape.num_rows:
                    lane.sample(shape.num_rows, params)
            lane.fetch(len(requests))

        return start

    def _penalize(self, lane: Lane, penalties: PenaltyBatch | None, shape: StepShape) -> None:
        for rows, part in split_penalties(penalties, MIN_INPUT_BYTES // 32):
            if lane.inputs.is_full:
                lane.device.synchronize("sending penalties")
                lane.inputs.rewind(shape.num_bytes)
            lane.ops.penalize(lane.logits(shape.num_rows)[rows], **lane.inputs.send(vars(part)))

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
        lane = self._main
        lane.inputs.rewind(0)
        head = [call for call in self.forward if call.op == "lm_head"]
        sent = lane.inputs.send({"sample_rows": rows})
        with self._device.current():
            lane.run(head, sent, {**dims, "S": len(rows)})
        return lane.logits(len(rows))

    def _put(self, name: str, values: np.ndarray) -> np.ndarray:
        """Start to copy a constant to its buffer, from the pinned array that is returned."""
        host = self._device.pinned(values.nbytes).view(values.dtype).reshape(values.shape)
        host[...] = values
        self._device.to_device(self._main.view(name), host)
        return host


def _dims(shape: StepShape) -> dict[str, int]:
    return step_dims(shape.num_tokens, shape.num_seqs, shape.num_rows, shape.max_queries)
