"""Steps that check drafts of requests of the decode batch, without prompts beside them.

The batch lives on the device (`device_decode`), so the host sends drafts and whose they are, and
nothing else while the same requests go on: the step's inputs are laid out there, and it ends with
each place moved on by what was right. The host moves its own copy on by the same rule when it has
read what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nanocupy.cuda.step_stamps import OTHER
from nanocupy.engine.device_decode import MOVED_FIELDS, DecodeBatch
from nanocupy.engine.device_lane import SAMPLER_FIELDS, Lane
from nanocupy.engine.device_penalties import PenaltySlots
from nanocupy.engine.device_plan import decode_bucket
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import Schedule
from nanocupy.engine.step_inputs import StepShape, bucket, query_bucket
from nanocupy.model.forward import OpCall
from nanocupy.ops.cuda_sampling import DecodePlaces
from nanocupy.speculation.acceptance import count_right


class DraftSteps:
    """Runs `forward` on `lane` for the requests of `decoding` and their drafts."""

    def __init__(
        self,
        decoding: DecodeBatch,
        lane: Lane,
        forward: Sequence[OpCall],
        limits: RunnerLimits,
        penalties: PenaltySlots,
    ) -> None:
        self._decoding = decoding
        self._penalties = penalties
        self._lane = lane
        self._forward = forward
        self._limits = limits
        # A step has no more rows; what is sent beside it comes behind the inputs of any step.
        self._max_rows = min(limits.max_step_tokens, limits.max_rows)
        largest = StepShape(self._max_rows, limits.max_num_seqs, 1, self._max_rows, 1)
        self._front_bytes = largest.num_bytes + 8 * (self._max_rows + limits.max_num_seqs + 8)

    def fits(self, schedule: Schedule) -> bool:
        """Whether all of the step's requests decode, and none needs the host for its logits."""
        if schedule.wants_logprobs:
            return False
        if schedule.changes_logits and not all(
            self._penalties.fit(r.params) for r in schedule.sampling if r.changes_logits
        ):
            return False
        return all(item.samples and item.num_tokens == item.num_rows for item in schedule)

    def launch(
        self, schedule: Schedule, row_of: Callable[[], Mapping[Request, int]]
    ) -> Callable[[], list[int]]:
        """Start the step. Returns what reads the ids of its rows once it has ended; that must be
        done before the next step. row_of: where the step before sampled."""
        decoding, lane, limits = self._decoding, self._lane, self._limits
        requests = [item.request for item in schedule]
        if schedule.changes_logits or not decoding.state.is_current(requests):
            lane.inputs.rewind(self._front_bytes)
            self._penalties.assign(requests)
            decoding.start(requests, row_of())
        state = decoding.state
        places = state.places_of(requests)
        num_places = decode_bucket(state.num_places, limits.max_num_seqs)
        num_rows = np.array([item.num_rows for item in schedule], np.int32)
        rows_of = np.zeros(num_places, np.int32)
        rows_of[places] = num_rows
        query_starts = np.zeros(num_places + 1, np.int32)
        np.cumsum(rows_of, out=query_starts[1:])
        total = int(query_starts[-1])
        num_tokens = bucket(total, self._max_rows)
        shape = StepShape(
            num_tokens,
            num_places,
            1,
            num_tokens,
            query_bucket(int(num_rows.max())),
        )
        sent = np.full((2, num_tokens), -1, np.int32)  # places and drafts of the rows
        firsts = query_starts[places]
        for item, place, first in zip(schedule, places, firsts, strict=True):
            sent[0, first : first + item.num_rows] = place
            sent[1, first + 1 : first + item.num_rows] = item.drafts
        self._run(shape, query_starts, sent, rows_of, schedule.changes_logits)
        lane.fetch(total)
        staging = lane.inputs.staging
        order = np.concatenate([np.arange(f, f + n) for f, n in zip(firsts, num_rows, strict=True)])

        def collect() -> list[int]:
            token_ids = staging.sampled[order].tolist()
            moved, row = [], 0
            for item in schedule:
                chosen, row = token_ids[row : row + item.num_rows], row + item.num_rows
                moved.append(1 + count_right(item.drafts, chosen))
            state.move_on(places, np.array(moved, np.int32))
            return token_ids

        return collect

    def _run(
        self,
        shape: StepShape,
        query_starts: np.ndarray,
        sent: np.ndarray,
        rows_of: np.ndarray,
        penalizes: bool,
    ) -> None:
        """The step's inputs, and its graph."""
        lane, state = self._lane, self._decoding.state
        lane.inputs.rewind(shape.num_bytes)  # what the graph fills; behind it comes what is sent
        words = lane.inputs.send({"words": np.concatenate([query_starts, sent.reshape(-1)])})
        words = words["words"]
        num_places, num_tokens = shape.num_seqs, shape.num_tokens
        starts = words[: num_places + 1]
        row_places, drafts = words[num_places + 1 :].reshape(2, num_tokens)
        fields = self._decoding.inputs(num_places)
        moved = {name: fields[name] for name in MOVED_FIELDS}
        places = DecodePlaces(**moved, block_size=self._limits.block_size)
        params = {name: fields[name] for name in SAMPLER_FIELDS}
        rows = lane.inputs.arrays_of(shape)
        inputs = rows | {"query_starts": starts, "block_tables": fields["block_tables"]}
        used = state.num_places
        greedy = not state.view(state.words, "temperature", used).any()

        def body() -> None:
            lane.ops.lay_out_drafts(row_places, drafts, starts, places, params, rows)
            lane.run(self._forward, inputs, shape.dims, lane.observer)
            if penalizes:
                lane.penalize_drafts(row_places, drafts, starts, fields["penalty_slots"])
            lane.sample(num_tokens, None if greedy else rows)
            if penalizes:
                lane.count_accepted(drafts, starts, fields["penalty_slots"])
            lane.ops.accept_drafts(lane.sampled(num_tokens), drafts, starts, places)

        kv_lens = np.where(rows_of, state.view(state.words, "positions", num_places) + rows_of, 0)
        key = ("drafts", shape, "greedy" if greedy else "sampled", penalizes)
        lane.step(key, body, OTHER, shape.dims, query_starts, kv_lens)
