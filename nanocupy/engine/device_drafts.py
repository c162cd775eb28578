"""Steps that check drafts of requests of the decode batch, without prompts beside them.

The batch lives on the device (`device_decode`), so the host sends drafts and whose they are, and
nothing else while the same requests go on: the step's inputs are laid out there, and it ends with
each place moved on by what was right. The host moves its own copy on by the same rule when it has
read what was chosen.

What the next step checks follows from what this one chose, so the device waits while the host reads
and launches. Therefore all that steps of one form have in common is worked out once: `_Form`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nanocupy.cuda.step_stamps import DRAFTS
from nanocupy.engine.device_decode import MOVED_FIELDS, DecodeBatch
from nanocupy.engine.device_lane import SAMPLER_FIELDS, Lane
from nanocupy.engine.device_penalties import PenaltySlots
from nanocupy.engine.device_plan import decode_bucket
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import Schedule, ScheduledRequest
from nanocupy.engine.step_inputs import StepShape, bucket, query_bucket
from nanocupy.model.forward import OpCall
from nanocupy.ops.cuda_sampling import DecodePlaces
from nanocupy.ops.cuda_sizes import OpSizes, fused_bounds
from nanocupy.speculation.acceptance import count_right

# Of a step: the bound on its contexts, whether all are greedy, whether any takes penalties, whether
# drafts are forced.
_Kind = tuple[int, bool, bool, bool]
_MAX_FORMS = 64  # that are kept; they hold no memory of the device


@dataclass(frozen=True)
class _Form:
    """What steps have in common in which the same places have as many rows each.

    words      int32, what is sent: query_starts [B + 1], place and draft of each row [2, T]; the
               drafts are still to be put in, those of each request at `draft_at`; then, where some
               are forced, which ones [T]
    staged     the pinned memory that the step's graph copies to the device
    rows_at    of the ids that come back, those of the schedule's rows, in its order
    """

    shape: StepShape
    dims: Mapping[str, int]
    key: tuple[Hashable, ...]
    places: list[int]
    words: np.ndarray
    draft_at: list[slice]
    staged: np.ndarray
    query_starts: np.ndarray
    rows_of: np.ndarray  # int32 [B]
    rows_at: slice | np.ndarray
    body: Callable[[], None]


class DraftSteps:
    """Runs `forward` on `lane` for the requests of `decoding` and their drafts."""

    def __init__(
        self,
        decoding: DecodeBatch,
        lane: Lane,
        forward: Sequence[OpCall],
        sizes: OpSizes,
        limits: RunnerLimits,
        penalties: PenaltySlots,
    ) -> None:
        self._decoding = decoding
        self._sizes = sizes
        self._penalties = penalties
        self._lane = lane
        self._forward = forward
        self._limits = limits
        # A step has no more rows; what is sent beside it comes behind the inputs of any step.
        self._max_rows = min(limits.max_step_tokens, limits.max_rows)
        largest = StepShape(self._max_rows, limits.max_num_seqs, 1, self._max_rows, 1)
        max_words = 3 * self._max_rows + limits.max_num_seqs + 8
        self._front_bytes = largest.num_bytes + 4 * max_words
        # Graphs copy from here and to here. One of each is enough: a step with drafts is read
        # before the next one is launched.
        self._staged = lane.device.pinned(4 * max_words).view(np.int32)
        self._chosen = lane.device.pinned(4 * self._max_rows).view(np.int32)
        self._forms: dict[Hashable, _Form] = {}
        # For benches: how many of a request's drafts are made right.
        self.force: Callable[[Sequence[int]], int] | None = None
        self._bounds: dict[tuple[int, int], tuple[int, ...]] = {}  # see _bound

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
        lane, items = self._lane, schedule.requests
        penalizes = schedule.changes_logits
        self._bring_batch([item.request for item in items], penalizes, row_of)
        form = self._form(items, penalizes)
        words = form.staged
        words[:] = form.words
        for at, item in zip(form.draft_at, items, strict=True):
            words[at] = item.drafts
            if self.force is not None:
                first = at.start + form.shape.num_tokens
                words[first : first + self.force(item.drafts)] = 1
        kv_lens = form.rows_of
        if lane.observer is not None:  # who else asks
            state = self._decoding.state
            positions = state.view(state.words, "positions", form.shape.num_seqs)
            kv_lens = np.where(kv_lens, positions + kv_lens, 0)
        lane.step(form.key, form.body, DRAFTS, form.dims, form.query_starts, kv_lens)

        def collect() -> list[int]:
            token_ids = self._chosen[form.rows_at].tolist()
            moved, row = [], 0
            for item in items:
                chosen, row = token_ids[row : row + item.num_rows], row + item.num_rows
                moved.append(1 + count_right(item.drafts, chosen))
            self._decoding.state.move_on(form.places, moved)
            return token_ids

        return collect

    def _bring_batch(
        self,
        requests: Sequence[Request],
        penalizes: bool,
        row_of: Callable[[], Mapping[Request, int]],
    ) -> None:
        """See to it that the decode batch is these requests, as they are now."""
        if not penalizes and self._decoding.catch_up(requests):
            return
        self._lane.inputs.rewind(self._front_bytes)
        self._penalties.assign(requests)
        self._decoding.start(requests, row_of())

    def _form(self, items: Sequence[ScheduledRequest], penalizes: bool) -> _Form:
        """Of a step of these, whose requests are the batch."""
        state = self._decoding.state
        places = [state.place_of(item.request) for item in items]
        counts = [item.num_rows for item in items]
        bound = self._bound(items, counts)
        greedy = all(item.request.params.temperature == 0 for item in items)
        kind = bound, greedy, penalizes, self.force is not None
        known_as = (*places, *counts), kind
        form = self._forms.get(known_as)
        if form is None:
            if len(self._forms) == _MAX_FORMS:
                self._forms.clear()
            form = self._forms[known_as] = self._new_form(places, counts, kind)
        return form

    def _bound(self, items: Sequence[ScheduledRequest], counts: Sequence[int]) -> int:
        """The bound on contexts to capture the step with, 0 for none: see `kv_len_bound`."""
        num_places = decode_bucket(len(items), self._limits.max_num_seqs)
        known_as = num_places, query_bucket(max(counts))
        bounds = self._bounds.get(known_as)
        if bounds is None:
            traits = self._lane.device.traits
            bounds = self._bounds[known_as] = fused_bounds(self._sizes, traits, *known_as)
        if not bounds:
            return 0
        longest = max(item.request.num_computed_tokens + item.num_tokens for item in items)
        return next((bound for bound in bounds if bound >= longest), 0)

    def _new_form(self, places: list[int], counts: list[int], kind: _Kind) -> _Form:
        limits = self._limits
        num_places = decode_bucket(self._decoding.state.num_places, limits.max_num_seqs)
        rows_of = np.zeros(num_places, np.int32)
        rows_of[places] = counts
        query_starts = np.zeros(num_places + 1, np.int32)
        np.cumsum(rows_of, out=query_starts[1:])
        num_tokens = bucket(int(query_starts[-1]), self._max_rows)
        shape = StepShape(num_tokens, num_places, 1, num_tokens, query_bucket(max(counts)))
        bound, greedy, _, is_forced = kind
        words = np.full(num_places + 1 + (2 + is_forced) * num_tokens, -1, np.int32)
        words[: num_places + 1] = query_starts
        row_places = words[num_places + 1 :][:num_tokens]
        firsts = query_starts[places].tolist()
        rows = [range(first, first + n) for first, n in zip(firsts, counts, strict=True)]
        first_draft = num_places + 1 + num_tokens
        for place, own in zip(places, rows, strict=True):
            row_places[own.start : own.stop] = place
            if is_forced:
                first = first_draft + num_tokens
                words[first + own.start + 1 : first + own.stop] = 0
        order = [row for own in rows for row in own]
        in_order = order == list(range(len(order)))
        dims = shape.dims | {"L": bound}
        staged = self._staged[: len(words)]
        return _Form(
            shape,
            dims,
            ("drafts", "greedy" if greedy else "sampled", shape, *kind),
            places,
            words,
            [slice(first_draft + own.start + 1, first_draft + own.stop) for own in rows],
            staged,
            query_starts,
            rows_of,
            slice(0, len(order)) if in_order else np.array(order),
            self._body(shape, dims, staged, kind),
        )

    def _body(
        self, shape: StepShape, dims: Mapping[str, int], staged: np.ndarray, kind: _Kind
    ) -> Callable[[], None]:
        """What the graph of a form holds, the copies to the device and back included."""
        lane = self._lane
        _, greedy, penalizes, _ = kind
        num_places, num_tokens = shape.num_seqs, shape.num_tokens
        # What the graph fills comes first; behind it comes what is sent.
        words = lane.inputs.array_at(shape.num_bytes, staged.dtype, staged.shape)
        starts = words[: num_places + 1]
        row_places, drafts, *forced = words[num_places + 1 :].reshape(-1, num_tokens)
        fields = self._decoding.inputs(num_places)
        moved = {name: fields[name] for name in MOVED_FIELDS}
        places = DecodePlaces(**moved, block_size=self._limits.block_size)
        params = {name: fields[name] for name in SAMPLER_FIELDS}
        rows = lane.inputs.arrays_of(shape)
        inputs = rows | {"query_starts": starts, "block_tables": fields["block_tables"]}

        def body() -> None:
            lane.device.to_device(words, staged)
            lane.ops.lay_out_drafts(row_places, drafts, starts, places, params, rows)
            lane.run(self._forward, inputs, dims, lane.observer)
            if penalizes:
                lane.penalize_drafts(row_places, drafts, starts, fields["penalty_slots"])
            lane.sample(num_tokens, None if greedy else rows)
            if forced:
                lane.ops.force_drafts(lane.sampled(num_tokens), drafts, *forced)
            if penalizes:
                lane.count_accepted(drafts, starts, fields["penalty_slots"])
            lane.ops.accept_drafts(lane.sampled(num_tokens), drafts, starts, places)
            lane.device.to_host(self._chosen[:num_tokens], lane.sampled(num_tokens))

        return body
