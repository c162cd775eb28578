"""Steps of decodes alone: the batch that lives on the device, and its graph.

`decode_state` is the batch as the host knows it. Here its differences are sent, and a step is one
graph: forward, sample, move on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanocupy.cuda.step_stamps import DECODE
from nanocupy.engine.binding import step_dims
from nanocupy.engine.decode_state import DecodeState
from nanocupy.engine.device_lane import Lane
from nanocupy.engine.device_penalties import PenaltySlots
from nanocupy.engine.device_plan import MAX_UPDATES, decode_bucket, table_width
from nanocupy.engine.device_step import WholeStep
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.model.forward import OpCall
from nanocupy.ops.cuda_sampling import DecodePlaces
from nanocupy.ops.cuda_sizes import OpSizes, kv_len_bound

MOVED_FIELDS = (
    "block_tables", "token_ids", "positions", "kv_lens", "slots", "rope_lens", "counters",
)  # fmt: skip


class DecodeBatch:
    """Runs `forward` on `lane` for the requests that decode, one token each."""

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
        self._penalizes = False  # whether any request has a penalty slot
        self._forward = forward
        self._sizes = sizes
        self._limits = limits
        self._whole = WholeStep(lane, forward) if lane.ops.can_step(1) else None
        self._words = lane.view("decode_state")
        self.renew()

    def renew(self) -> None:
        """Begin with no requests, on the device too."""
        limits = self._limits
        self.state = DecodeState(limits.max_num_seqs, table_width(limits), limits.block_size)
        self._lane.device.fill(self._words, 0)

    def start(self, requests: Sequence[Request], rows: Mapping[Request, int]) -> None:
        """Make these requests the batch. rows: where the step before sampled."""
        slots = self._penalties.slots_of(requests)
        if slots is None and not self._penalizes and self.catch_up(requests):
            self.places = self.state.places_of(requests)
            return
        self._penalizes = slots is not None
        slot_of = None if slots is None else dict(zip(requests, slots.tolist(), strict=True))
        self.update(self.state.updates(requests, rows, slot_of))
        self._penalties.fill(self._lane, requests)
        self.places = self.state.places_of(requests)  # int32 [n]

    def catch_up(self, requests: Sequence[Request]) -> bool:
        """Make these requests the batch, where they are it already and the host knows all of their
        tokens: it takes a fraction of `start`. False where they are not, and nothing is done."""
        updates = self.state.caught_up(requests)
        if updates is not None and len(updates):
            self.update(updates)
        return updates is not None

    def grow(self, requests: Sequence[Request]) -> None:
        """The batch is that of the step before, but these of it have one block more."""
        self.update(self.state.grown(requests))

    def update(self, updates: np.ndarray) -> None:
        """Change words of the batch; tokens that are not known yet are put in."""
        lane, state = self._lane, self.state
        for start in range(0, len(updates), MAX_UPDATES):
            if start:
                # The staging memory is reused.
                lane.device.synchronize("sending the decode batch")
            part = updates[start : start + MAX_UPDATES]
            staged = lane.inputs.staging.updates[: len(part)]
            staged[...] = part
            on_device = lane.view("updates", (len(part), 2))
            lane.device.to_device(on_device, staged)
            lane.ops.apply_updates(on_device, self._words)
        if len(updates) and updates[:, 1].min() < 0:  # a token of the step before, maybe
            token_ids = state.view(self._words, "token_ids", state.num_places)
            lane.ops.resolve_tokens(token_ids, lane.view("sampled"))

    def run(self) -> None:
        """One token for each request, and start to fetch them."""
        state, lane = self.state, self._lane
        num_places = decode_bucket(state.num_places, self._limits.max_num_seqs)
        greedy = not state.view(state.words, "temperature", state.num_places).any()
        kv_lens = state.view(state.words, "kv_lens", num_places)
        traits = lane.device.traits
        bound = 0  # one launch is the same for all lengths
        if not self._can_be_whole(num_places):
            bound = kv_len_bound(self._sizes, traits, num_places, int(kv_lens.max()))
        dims = step_dims(num_places, num_places, num_places, 1, bound)
        lane.step(
            ("decode", num_places, bound, "greedy" if greedy else "sampled", self._penalizes),
            lambda: self._body(num_places, dims, greedy),
            DECODE, dims, np.arange(num_places + 1), kv_lens,
        )  # fmt: skip
        state.advance()
        lane.fetch(state.num_places)

    def collector(self) -> Callable[[], list[int]]:
        """What reads the ids of this step, in the order of the requests, once it has ended."""
        places, staging = self.places, self._lane.inputs.staging
        return lambda: staging.sampled[places].tolist()

    def inputs(self, num_places: int) -> dict[str, Any]:
        """The fields of the batch on the device, and what of a step's inputs is always the same
        there."""
        fields = {
            name: self.state.view(self._words, name, num_places) for name in self.state.field_names
        }
        numbers = self._lane.view("place_numbers")
        return fields | {
            "query_starts": numbers[: num_places + 1],
            "sample_rows": numbers[:num_places],
        }

    def _can_be_whole(self, num_places: int) -> bool:
        lane = self._lane
        return self._whole is not None and lane.observer is None and lane.ops.can_step(num_places)

    def _run_forward(self, num_places: int, dims: Mapping[str, int]) -> None:
        """The logits of so many places."""
        lane, inputs = self._lane, self.inputs(num_places)
        if self._whole is not None and self._can_be_whole(num_places):
            self._whole.run(inputs, dims)
        else:
            lane.run(self._forward, inputs, dims, lane.observer)

    def _body(self, num_places: int, dims: Mapping[str, int], greedy: bool) -> None:
        """What a graph holds: forward, sample, move on."""
        lane, inputs = self._lane, self.inputs(num_places)
        self._run_forward(num_places, dims)
        if self._penalizes:
            lane.penalize(inputs["penalty_slots"])
        moved = {name: inputs[name] for name in MOVED_FIELDS}
        places = DecodePlaces(**moved, block_size=self._limits.block_size)
        lane.sample(num_places, None if greedy else inputs, places)
        if self._penalizes:
            lane.count(inputs["penalty_slots"])
