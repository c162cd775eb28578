"""The runner on a GPU: one arena, and steps as captured graphs, one launched ahead of the other.

A step of decodes alone runs on the decode batch that lives on the device (`device_decode`); any
other brings its inputs along (`device_mixed`). Either ends with the sampled ids on the device,
where the next step finds them, and with a copy of them under way to the host. It is written against
`cuda.device.Device`, over `CudaOps`; it imports no CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanocupy.checkpoint.base import Checkpoint
from nanocupy.config import LM_HEAD, ModelConfig
from nanocupy.cuda.arena import ArenaPlan
from nanocupy.cuda.device import Device
from nanocupy.cuda.step_stamps import StepStamps
from nanocupy.engine.batch import ForwardBatch, build_penalty_batch
from nanocupy.engine.binding import StepObserver
from nanocupy.engine.device_decode import DecodeBatch
from nanocupy.engine.device_drafts import DraftSteps
from nanocupy.engine.device_kernels import kernel_variants
from nanocupy.engine.device_lane import Lane
from nanocupy.engine.device_mixed import MixedSteps
from nanocupy.engine.device_penalties import PenaltySlots
from nanocupy.engine.device_plan import (
    DeviceSettings,
    buffer_specs,
    forward_calls,
    lane_buffers,
    op_sizes,
)
from nanocupy.engine.device_step import addresses_on, layer_table
from nanocupy.engine.device_swap import HostBlocks, blocks_written
from nanocupy.engine.device_weights import placed_weight, upload_weights
from nanocupy.engine.request import Request
from nanocupy.engine.results import StepResult
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.engine.schedule import Schedule
from nanocupy.memory.host_pool import SwapCosts
from nanocupy.model.forward import Buffer
from nanocupy.model.rope import rope_parameters
from nanocupy.model.weights import weight_layout
from nanocupy.ops.cuda_sizes import ITEMSIZES
from nanocupy.ops.kernel_variants import Variant
from nanocupy.sampling_params import SamplingParams


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
        self.dtypes = settings.dtype, settings.residual_dtype, settings.weight_dtype(LM_HEAD)
        self.plan = ArenaPlan(buffer_specs(config, device, settings, limits))
        view = device.allocate(self.plan).view
        rope = rope_parameters(config)
        self.forward = forward_calls(config, settings.cache_dtype)
        self.weights = {w.name: placed_weight(w, settings, view) for w in weight_layout(config)}
        sizes = self._sizes = op_sizes(config, settings, limits)
        num_bytes = sizes.dequantized_size * ITEMSIZES[sizes.dtype]
        self._staging = view("dequantized", (num_bytes,), np.uint8) if num_bytes else None
        self._main = Lane(device, view, sizes, limits, self.weights)
        self.ops = self._main.ops
        # Where prompts go while others decode, if that is to be side by side.
        self._side: Lane | None = None
        if settings.two_streams:
            own = lane_buffers(config, sizes, device.traits)
            self._side = Lane(device.second_stream(), view, sizes, limits, self.weights, own=own)
        self._penalties = PenaltySlots(limits.max_num_seqs, config.eos_ids)
        parts = self._main, self.forward, sizes, limits, self._penalties
        self._decoding = DecodeBatch(*parts)
        self._mixed = MixedSteps(*parts)
        self._drafts = DraftSteps(self._decoding, *parts)
        self._is_state_known = True  # whether the device has what the host thinks
        self._batch: Any = None  # the requests of the last step, where it was of decodes alone
        self._rows: Mapping[Request, int] | Sequence[Request] = ()  # see `_row_of`
        self._rings: dict[int, StepStamps] = {}  # by their steps
        constants = {
            "inv_freq": rope.inv_freq,
            "place_numbers": np.arange(limits.max_num_seqs + 1, dtype=np.int32),
        }
        sent = [self._put(name, values) for name, values in constants.items()]
        sent += self._put_layers()
        buffers = (b for call in self.forward for b in call.arguments.values())
        caches = [view(b.name) for b in buffers if isinstance(b, Buffer) and b.is_cache]
        # A cache that was never written must not hold NaN where padding reads it.
        for cache in caches:
            device.fill(cache, 0)
        self._host_blocks = HostBlocks(device, caches, limits.num_host_blocks)
        device.synchronize("preparing the device")
        del sent  # it had to stay until now

    def _put(self, name: str, values: np.ndarray) -> np.ndarray:
        """Start to copy a constant to its buffer, from the pinned array that is returned."""
        host = self._device.pinned(values.nbytes).view(values.dtype).reshape(values.shape)
        host[...] = values
        self._device.to_device(self._main.view(name), host)
        return host

    def _put_layers(self) -> list[np.ndarray]:
        """Start to copy what a whole step's one launch must know of the layers, where there is one,
        from the arrays that are returned."""
        if "step_layers" not in self.plan.specs:
            return []
        table = layer_table(
            self.forward, addresses_on(self._main), self.weights, self._sizes.layer_format
        )
        return [self._put("step_layers", table)]

    @property
    def observer(self) -> StepObserver | None:
        return self._main.observer

    @observer.setter
    def observer(self, observer: StepObserver | None) -> None:
        self._main.observer = observer

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
            upload_weights(
                self.config, checkpoint, self.weights, self._device, self.ops, progress,
                stored=self.settings.quantized, staging=self._staging,
            )  # fmt: skip
            sent = self._put_layers()  # again: the units of packed codes are known now
            self._device.synchronize("describing the layers")
            del sent  # it had to stay until now

    def kernel_variants(self) -> list[Variant]:
        """The kernel modules that steps need: to compile them all at once, beforehand."""
        return kernel_variants(self.config, self.settings, self.limits, self._device.traits)

    def counts_tokens(self, params: SamplingParams) -> bool:
        return self._penalties.fit(params)

    def swap_costs(self) -> SwapCosts | None:
        return self._host_blocks.costs()

    def force_acceptance(self, count: Callable[[Sequence[int]], int] | None) -> bool:
        self._drafts.force = count
        return True

    def stamp_steps(self, num_steps: int) -> StepStamps | None:
        if not num_steps:
            self._main.stamps = None
            return None
        # Graphs refer to the ring they write to, so a ring is made once.
        if num_steps not in self._rings:
            self._rings[num_steps] = StepStamps(self._device, num_steps)
        self._main.stamps = stamps = self._rings[num_steps]
        stamps.clear()
        return stamps

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
            # Nobody reads the step that failed, but it may still copy what was staged for it.
            for lane in self._lanes:
                lane.device.synchronize("a step that was given up")
            self._decoding.renew()
            self._penalties.forget()
            self._is_state_known = True
        self._host_blocks.settle()
        if schedule.swap_out or schedule.swap_in:
            written = blocks_written(schedule, self.limits.block_size)
            self._host_blocks.copy(schedule, written)
            self._batch = None
        if not schedule.requests:
            return list
        if schedule.requests is self._batch:
            self._decoding.grow(schedule.grown)
            self._decoding.run()
            collect = self._decoding.collector()
        else:
            collect = self._launch_other(schedule)
        moment = self._device.moment()

        def read() -> list[int] | StepResult:
            self._device.wait(moment, "a step")
            token_ids = collect()
            return self._mixed.logprobs.result(token_ids) if schedule.wants_logprobs else token_ids

        return read

    @property
    def _lanes(self) -> tuple[Lane, ...]:
        return (self._main,) if self._side is None else (self._main, self._side)

    def _launch_other(self, schedule: Schedule) -> Callable[[], list[int]]:
        """A step that is no repetition of the one before. Returns what reads its ids, in the order
        of the schedule's rows."""
        if schedule.has_drafts and self._drafts.fits(schedule):
            collect = self._drafts.launch(schedule, self._row_of)
            self._batch, self._rows = None, ()
            return collect
        sampling = schedule.row_requests
        drafting = {item.request for item in schedule if item.drafts}
        self._penalties.give_up(drafting)
        self._penalties.assign([r for r in sampling if r not in drafting])
        penalties = build_penalty_batch(
            sampling, self.config.eos_ids,
            lambda request: request not in drafting and self._penalties.take(request),
            schedule.row_drafts if drafting else (),
        )  # fmt: skip
        is_plain = penalties is None and not schedule.wants_logprobs
        decodes = [s.request for s in schedule if s.samples and s.num_tokens == 1]
        if is_plain and len(decodes) == len(schedule.requests):
            self._decoding.start(decodes, self._row_of())
            self._decoding.run()
            self._rows = self._decoding.state.places[: len(decodes)]
            self._batch = schedule.requests
            return self._decoding.collector()
        self._batch = None
        beside = self._side is not None and self.observer is None and not drafting
        if is_plain and decodes and beside:
            return self._side_by_side(schedule, decodes)
        self._mixed.prepare(self._main, schedule, penalties, self._row_of)()
        self._rows = () if drafting else sampling  # nothing of a step with drafts stays unread
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
        self._decoding.start(decodes, self._row_of())
        side.device.follow(main.device)
        with side.device.current():
            start_prompts = self._mixed.prepare(side, prompts, None, self._row_of)
            main.device.follow(side.device)
            start_prompts()
        self._decoding.run()
        main.device.follow(side.device)
        rows = dict(zip(decodes, self._decoding.places.tolist(), strict=True))
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
        self._batch, self._rows = None, ()
        self._host_blocks.settle()
        return self._mixed.logits(batch)
