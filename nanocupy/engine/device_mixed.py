"""Steps that bring their inputs along: prompts and chunks of them, decodes among them, drafts to be
checked, penalties and log-probabilities.

Their sizes are rounded up to few shapes, and each shape is a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanocupy.cuda.step_stamps import OTHER
from nanocupy.engine.batch import (
    ForwardBatch,
    PenaltyBatch,
    build_batch,
    build_sampler_batch,
    split_penalties,
)
from nanocupy.engine.device_lane import Lane
from nanocupy.engine.device_logprobs import DeviceLogprobs
from nanocupy.engine.device_penalties import PenaltySlots
from nanocupy.engine.device_plan import MIN_INPUT_BYTES, table_width
from nanocupy.engine.request import PENDING_TOKEN, Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import Schedule
from nanocupy.engine.step_inputs import StepShape, step_shape
from nanocupy.model.forward import OpCall
from nanocupy.ops.cuda_sizes import OpSizes


class MixedSteps:
    """Runs `forward` for whatever a schedule holds. lane: where log-probabilities are asked for."""

    def __init__(
        self,
        lane: Lane,
        forward: Sequence[OpCall],
        sizes: OpSizes,
        limits: RunnerLimits,
        penalties: PenaltySlots,
    ) -> None:
        self._lane = lane
        self._penalties = penalties
        self._forward = forward
        self._max_queries = sizes.max_queries
        self._vocab_size = sizes.vocab_size
        self._limits = limits
        self.logprobs = DeviceLogprobs(lane.device, sizes.vocab_size, self._head_of, limits)

    def prepare(
        self,
        lane: Lane,
        schedule: Schedule,
        penalties: PenaltyBatch | None,
        row_of: Callable[[], Mapping[Request, int]],
    ) -> Callable[[], None]:
        """Send the inputs of a step to `lane`; what it returns starts the rest: forward, penalties,
        sample. Logits that are asked for are kept before the penalties.

        penalties: of those without a slot; row_of: where the step before sampled the tokens that
        were not read yet.
        """
        limits, requests = self._limits, schedule.row_requests
        drafts = schedule.row_drafts if schedule.has_drafts else ()
        batch = build_batch(schedule, block_size=limits.block_size)
        is_pending = batch.token_ids[batch.query_starts[1:] - 1] == PENDING_TOKEN
        if is_pending.any():
            rows = row_of()
            for b in np.flatnonzero(is_pending):
                row = rows[schedule.requests[b].request]
                batch.token_ids[batch.query_starts[b + 1] - 1] = -1 - row
        shape = step_shape(
            batch,
            max_tokens=limits.max_step_tokens,
            max_num_seqs=limits.max_num_seqs,
            max_table_width=table_width(limits),
            max_rows=limits.max_rows,
            few_queries=self._max_queries,
        )
        greedy = all(r.params.temperature == 0 for r in requests)
        slots = self._penalties.slots_of(requests)
        inputs = lane.inputs.send_step(
            shape, batch, None if greedy else build_sampler_batch(requests, drafts), slots
        )
        self._penalties.fill(lane, requests)
        if is_pending.any():
            lane.ops.resolve_tokens(inputs["token_ids"], lane.view("sampled"))
        params = None if greedy else inputs
        draws = penalties is None and not schedule.wants_logprobs
        how = ("greedy" if greedy else "sampled") if draws else "logits"

        def draw() -> None:
            if not shape.num_rows:
                return
            if slots is not None:
                lane.penalize(inputs["penalty_slots"])
            lane.sample(shape.num_rows, params)
            if slots is not None:
                lane.count(inputs["penalty_slots"])

        def body() -> None:
            lane.run(self._forward, inputs, shape.dims, lane.observer)
            if draws:
                draw()

        def start() -> None:
            lane.step(
                ("step", shape, how, draws and slots is not None),
                body,
                OTHER,
                shape.dims,
                batch.query_starts,
                batch.kv_lens,
            )
            if not draws:
                if schedule.wants_logprobs:
                    self.logprobs.keep(schedule, lane.logits(len(requests)), shape.dims)
                self._penalize(lane, penalties, shape)
                draw()
            lane.fetch(len(requests))

        return start

    def logits(self, batch: ForwardBatch) -> np.ndarray:
        """Logits float32 [S, V] of the batch's sampled rows, on the host, waited for."""
        lane, num_rows, width = self._lane, len(batch.sample_rows), self._vocab_size
        host = lane.device.pinned(max(4, 4 * num_rows * width)).view(np.float32)
        host = host[: num_rows * width].reshape(num_rows, -1)
        num_seqs, table_columns = batch.block_tables.shape
        queries = int(np.diff(batch.query_starts).max(initial=0))
        exact = StepShape(len(batch.token_ids), num_seqs, table_columns, num_rows, queries)

        def body() -> None:
            lane.run(self._forward, lane.inputs.send_step(exact, batch, None), exact.dims)
            lane.device.to_host(host, lane.logits(num_rows))

        lane.device.eager("logits were asked for", body)
        lane.device.synchronize("a step")
        return host

    def _penalize(self, lane: Lane, penalties: PenaltyBatch | None, shape: StepShape) -> None:
        kept_bytes = lane.inputs.num_bytes
        for rows, part in split_penalties(penalties, MIN_INPUT_BYTES // 32):
            lane.inputs.make_room(kept_bytes)
            lane.ops.penalize(lane.logits(shape.num_rows)[rows], **lane.inputs.send(vars(part)))

    def _head_of(self, rows: np.ndarray, dims: Mapping[str, int]) -> Any:
        """Logits [n, V] of these rows int32 [n] of the step of `dims` that has just run."""
        lane = self._lane
        lane.inputs.rewind(0)
        head = [call for call in self._forward if call.op == "lm_head"]
        sent = lane.inputs.send({"sample_rows": rows})
        with lane.device.current():
            lane.run(head, sent, {**dims, "S": len(rows)})
        return lane.logits(len(rows))
