"""Which request has which slot of penalty state on the device.

A slot has what a request's penalties depend on: its parameters, and how often each token of the
vocabulary was drawn. It is filled when the request first draws; from then on every step counts what
it draws, on the device, and the host needs to know none of the ids. How a slot looks is said in
`kernels_cu/penalties.cu`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from nanocupy.engine.device_lane import Lane
from nanocupy.engine.device_plan import MAX_PENALTY_ENTRIES, PENALTY_RECORD_WORDS
from nanocupy.engine.request import Request, RequestState
from nanocupy.sampling_params import SamplingParams

_HEAD_WORDS = PENALTY_RECORD_WORDS - 2 * MAX_PENALTY_ENTRIES
_IN_PROMPT, _MOST = 0x8000, 0x7FFF


class PenaltySlots:
    """Slots for `max_num_seqs` requests, from 1 on; banned: ids that must not come while a request
    is short of its min_tokens."""

    def __init__(self, max_num_seqs: int, banned: Sequence[int]) -> None:
        self._num_slots = max_num_seqs
        self._banned = banned
        self.forget()

    def forget(self) -> None:
        """Nothing is known of what the device has."""
        self._slot_of: dict[Request, int] = {}
        self._free = list(range(self._num_slots, 0, -1))
        self._new: set[Request] = set()  # those whose slots are not filled

    def fit(self, params: SamplingParams) -> bool:
        """Whether a request's entries have room in a slot; or its penalties come from the host."""
        num_banned = len(self._banned_by(params)) if params.min_tokens else 0
        return len(params.logit_bias) + num_banned <= MAX_PENALTY_ENTRIES

    def take(self, request: Request) -> bool:
        """Whether the next draw of a request takes penalties, from a slot."""
        if not request.changes_logits:
            return False
        p = request.params
        return (p.has_penalties or request.num_output_tokens < p.min_tokens) and self.fit(p)

    def assign(self, requests: Sequence[Request]) -> None:
        """Give slots to all who draw in the next step and want one. There are enough: others lose
        theirs, and come back with all their tokens known."""
        new = [r for r in requests if r not in self._slot_of and self.take(r)]
        if not new:
            return
        self._release([r for r in self._slot_of if r.state is RequestState.FINISHED])
        if len(new) > len(self._free):
            drawing = set(requests)
            self._release([r for r in self._slot_of if r not in drawing])
        self._slot_of |= {request: self._free.pop() for request in new}
        self._new = set(new)

    def give_up(self, requests: Collection[Request]) -> None:
        """Their penalties come from the host this time, as does what counts of their drafts when it
        is read: their slots are filled anew the next."""
        self._release([r for r in requests if r in self._slot_of])

    def slots_of(self, requests: Sequence[Request]) -> np.ndarray | None:
        """Their slots int32 [n], 0 for none; None where nobody has one."""
        if not any(request.changes_logits for request in requests):
            return None
        slots = [self._slot_of.get(r, 0) if self.take(r) else 0 for r in requests]
        return np.array(slots, np.int32) if any(slots) else None

    def fill(self, lane: Lane, requests: Sequence[Request]) -> None:
        """Start to fill the slots of those who are new, through `lane` behind what it has sent."""
        if not self._new:
            return
        records, counts = lane.view("penalty_records"), lane.view("penalty_counts")
        kept_bytes = lane.inputs.num_bytes
        for request in requests:
            if request not in self._new:
                continue
            assert not request.num_pending_tokens
            lane.inputs.make_room(kept_bytes)
            slot = self._slot_of[request]
            record = self._record(request)
            lane.inputs.copy_to(records[slot][: len(record)], record)
            if request.params.counts_tokens:
                lane.device.fill(counts[slot], 0)
                seen = _seen(request)
                if len(seen):
                    pairs = lane.inputs.send({"pairs": seen})["pairs"]
                    lane.ops.set_token_counts(pairs, counts[slot])
            self._new.discard(request)

    def _release(self, requests: Sequence[Request]) -> None:
        self._free += [self._slot_of.pop(request) for request in requests]
        self._new.difference_update(requests)

    def _banned_by(self, params: SamplingParams) -> list[int]:
        return [*self._banned, *params.stop_token_ids]

    def _record(self, request: Request) -> np.ndarray:
        """int32 words."""
        p = request.params
        ban_left = max(0, p.min_tokens - request.num_output_tokens)
        banned = self._banned_by(p) if ban_left else []
        num_biases = len(p.logit_bias)
        record = np.zeros(_HEAD_WORDS + 2 * (num_biases + len(banned)), np.int32)
        record[:3] = num_biases, len(banned), ban_left
        floats = record.view(np.float32)
        floats[3:6] = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        record[6] = p.counts_tokens
        record[_HEAD_WORDS::2] = [*p.logit_bias, *banned]
        floats[_HEAD_WORDS + 1 :: 2][:num_biases] = list(p.logit_bias.values())
        return record


def _seen(request: Request) -> np.ndarray:
    """What a request has seen: int32 [n, 2], each token and its word. The prompt matters to the
    repetition penalty alone."""
    words = {token: min(count, _MOST) for token, count in request.output_counts.items()}
    if request.params.repetition_penalty != 1:
        for token in set(request.prompt_ids):
            words[token] = words.get(token, 0) | _IN_PROMPT
    return np.array(list(words.items()), np.int32).reshape(-1, 2)
