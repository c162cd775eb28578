"""The runner on a GPU: one arena, decode as captured graphs, everything else as it comes.

It is written against `cuda.device.Device`, over `CudaOps`; it imports no CuPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanocupy.checkpoint.base import Checkpoint, dequantized
from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.config import ModelConfig
from nanocupy.cuda.arena import ArenaPlan
from nanocupy.cuda.device import Device
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
from nanocupy.engine.request import Request
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.engine.schedule import Schedule
from nanocupy.model.forward import decoder_forward
from nanocupy.model.rope import rope_parameters
from nanocupy.model.weights import weight_layout
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import ITEMSIZES, workspace_plan

_ALIGNMENT = 16  # bytes


class DeviceRunner(Runner):
    """Runs `config` on `device`. Fill the weights (`upload_weights`) before the first step."""

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
        workspaces = {name: self._view(name) for name in workspace_plan(sizes, device.traits)}
        device.fill(workspaces["counters"], 0)
        self.ops = CudaOps(device.kernels, device.matmul, workspaces, sizes, device.traits)

        width = table_width(limits)
        self.state = DecodeState(limits.max_num_seqs, width, limits.block_size)
        self._state_words = self._view("decode_state")
        device.fill(self._state_words, 0)
        self._inputs = self._view("inputs")
        self._inputs_host = device.pinned(self._inputs.nbytes)
        self._inputs_used = 0
        self._updates_host = device.pinned(8 * MAX_UPDATES).view(np.int32).reshape(-1, 2)
        self._sampled_host = device.pinned(4 * limits.max_num_seqs).view(np.int32)
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

    # ----------------------------------------------------------------- steps

    def run(self, schedule: Schedule) -> list[int]:
        self._host_blocks.copy(schedule)
        if not schedule.requests:
            return []
        sampling = schedule.sampling
        penalties = build_penalty_batch(sampling, self.config.eos_ids)
        decodes = all(s.samples and s.num_tokens == 1 for s in schedule)
        if decodes and penalties is None:
            return self._decode(sampling)
        batch = build_batch(schedule, block_size=self.limits.block_size)
        self._inputs_used = 0
        why = "a prompt's chunk" if not decodes else "penalties"
        if self.observer is not None:
            self.observer.begin_step(
                _dims(batch), batch.query_starts.tolist(), batch.kv_lens.tolist()
            )
        self._device.eager(why, lambda: self._eager_step(batch, sampling, penalties))
        self._device.synchronize("a step")
        if self.observer is not None:
            self.observer.end_step()
        return self._sampled_host[: len(sampling)].tolist()

    def logits(self, batch: ForwardBatch) -> np.ndarray:
        """Logits float32 [S, V] of the batch's sampled rows, on the host: for tests and tools."""
        shape = (len(batch.sample_rows), self.config.vocab_size)
        host = self._device.pinned(max(4, 4 * math.prod(shape))).view(np.float32)
        host = host[: math.prod(shape)].reshape(shape)

        self._inputs_used = 0

        def body() -> None:
            self._forward_eager(batch)
            self._device.to_host(host, self._view("logits", shape))

        self._device.eager("logits were asked for", body)
        self._device.synchronize("a step")
        return host

    def _decode(self, requests: Sequence[Request]) -> list[int]:
        """One token for each request: one graph, and what the host must change before it."""
        state, device = self.state, self._device
        updates = state.updates(requests)
        num_places = decode_bucket(len(requests), self.limits.max_num_seqs)
        greedy = all(r.params.temperature == 0 for r in requests)

        def send(part: np.ndarray) -> None:
            self._updates_host[: len(part)] = part
            on_device = self._view("updates", (len(part), 2))
            device.to_device(on_device, self._updates_host[: len(part)])
            self.ops.apply_updates(on_device, self._state_words)

        for start in range(0, len(updates), MAX_UPDATES):
            if start:
                device.synchronize("sending the decode batch")  # the staging memory is reused
            send(updates[start : start + MAX_UPDATES])
        if self.observer is None:
            device.run(
                ("decode", num_places, "greedy" if greedy else "sampled"),
                lambda: self._decode_step(num_places, greedy),
            )
        else:  # the calls of a graph cannot be seen one by one
            dims = step_dims(num_places, num_places, num_places, 1)
            kv_lens = state.view(state.words, "kv_lens", num_places).tolist()
            self.observer.begin_step(dims, range(num_places + 1), kv_lens)
            device.eager("observed", lambda: self._decode_step(num_places, greedy))
        state.advance()
        device.synchronize("a decode step")
        if self.observer is not None:
            self.observer.end_step()
        state.sampled(self._sampled_host[: state.num_places])
        return [int(self._sampled_host[state.place_of(r)]) for r in requests]

    def _decode_step(self, num_places: int, greedy: bool) -> None:
        """The body of a decode graph: forward, sample, move on, send the ids to the host."""

        def field(name: str) -> Any:
            return self.state.view(self._state_words, name, num_places)

        sampled = self._view("sampled", (num_places,))
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
        dims = step_dims(num_places, num_places, num_places, 1)
        self._forward(inputs, dims)
        logits = self._view("logits", (num_places, self.config.vocab_size))
        if greedy:
            self.ops.argmax(logits, sampled)
        else:
            names = ("temperature", "top_k", "top_p", "min_p", "seeds", "counters")
            self.ops.sample(logits, **{name: field(name) for name in names}, out=sampled)
        self.ops.advance_decode_state(
            sampled, field("block_tables"), field("token_ids"), field("positions"),
            field("kv_lens"), field("slots"), field("rope_lens"), field("counters"),
            self.limits.block_size,
        )  # fmt: skip
        self._device.to_host(self._sampled_host[:num_places], sampled)

    def _eager_step(
        self, batch: ForwardBatch, requests: Sequence[Request], penalties: PenaltyBatch | None
    ) -> None:
        self._forward_eager(batch)
        if not requests:
            return
        logits = self._view("logits", (len(requests), self.config.vocab_size))
        sampled = self._view("sampled", (len(requests),))
        for rows, part in split_penalties(penalties, MIN_INPUT_BYTES // 32):
            if self._inputs_used > self._inputs.nbytes - MIN_INPUT_BYTES:
                self._device.synchronize("sending penalties")  # the staging memory is reused
                self._inputs_used = 0
            self.ops.penalize(logits[rows], **self._put_all(vars(part)))
        if all(r.params.temperature == 0 for r in requests):
            self.ops.argmax(logits, sampled)
        else:
            self.ops.sample(
                logits, **self._put_all(vars(build_sampler_batch(requests))), out=sampled
            )
        self._device.to_host(self._sampled_host[: len(requests)], sampled)

    def _forward_eager(self, batch: ForwardBatch) -> None:
        self._forward(self._put_all(vars(batch)), _dims(batch))

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

    def _put_all(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Send arrays in one copy; each as an array of the device, by the same names.

        Every call of a step takes the next part of the staging memory, as the copies of the calls
        before may still be under way; `run` starts over when the step is done.
        """
        start = self._inputs_used
        offsets: dict[str, int] = {}
        for name, array in arrays.items():
            offset, end = self._inputs_used, self._inputs_used + array.nbytes
            assert end <= self._inputs.nbytes, f"the inputs of a step outgrew their memory: {name}"
            self._inputs_host[offset:end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._inputs_used = -(-end // _ALIGNMENT) * _ALIGNMENT
            offsets[name] = offset
        stop = min(self._inputs_used, self._inputs.nbytes)
        if stop > start:
            self._device.to_device(self._inputs[start:stop], self._inputs_host[start:stop])
        return {
            name: self._inputs[offsets[name] : offsets[name] + array.nbytes]
            .view(array.dtype)
            .reshape(array.shape)
            for name, array in arrays.items()
        }


def _dims(batch: ForwardBatch) -> dict[str, int]:
    max_queries = int(np.diff(batch.query_starts).max(initial=0))
    return step_dims(len(batch.token_ids), len(batch.kv_lens), len(batch.sample_rows), max_queries)
