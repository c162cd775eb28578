"""The decode batch that lives on the device, as the host knows it: places, and words to change.

Every decoding request has a place; its token, position, slot, block table and sampling parameters
are words of one int32 array. A step ends by moving all of them on, on the device; the host moves
its own copy on by the same rule, compares it with what the next step needs, and sends the words
that differ: a request came or left, or got a block. Mostly there are none. Only the tokens are the
device's alone: the host may not know them yet. Host side, NumPy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanocupy.engine.batch import build_sampler_batch
from nanocupy.engine.request import Request

# name -> (words a place, dtype); seeds first, as 8-byte values want an even offset
_FIELDS: dict[str, tuple[int, str]] = {
    "seeds": (2, "uint64"),
    "counters": (2, "uint32"),
    "token_ids": (1, "int32"),
    "positions": (1, "int32"),
    "slots": (1, "int32"),
    "kv_lens": (1, "int32"),
    "rope_lens": (1, "int32"),
    "temperature": (1, "float32"),
    "top_k": (1, "int32"),
    "top_p": (1, "float32"),
    "min_p": (1, "float32"),
    "penalty_slots": (1, "int32"),
}


class DecodeState:
    """Places for `max_num_seqs` requests, with block tables of `table_width` columns.

    Fields lie one behind the other in `words` int32 [num_words], each [max_num_seqs, its words];
    block tables come last, [max_num_seqs, table_width]. A free place has kv_len 0.
    """

    def __init__(self, max_num_seqs: int, table_width: int, block_size: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.table_width = table_width
        self.block_size = block_size
        self._offsets: dict[str, int] = {}
        offset = 0
        for name, (width, _) in _FIELDS.items():
            self._offsets[name] = offset
            offset += width * max_num_seqs
        self._offsets["block_tables"] = offset
        self.num_words = offset + max_num_seqs * table_width
        self.words = np.zeros(self.num_words, np.int32)  # what the device holds
        self.places: list[Request | None] = [None] * max_num_seqs
        # By the request itself, as a later one may have an ended one's name.
        self._place_of: dict[int, int] = {}
        self._num_blocks = [0] * max_num_seqs  # of each place's table, as the device has it
        self._fresh: set[int] = set()  # places whose table is another request's
        # Preemptions of each place's request: who comes back has other blocks. And its rewinds:
        # the token that the device has at a position may then be another than stands there.
        self._num_preemptions = [0] * max_num_seqs
        self._num_rewinds = [0] * max_num_seqs

    def view(self, array: Any, name: str, num_places: int) -> Any:
        """The field `name` of the first places, in `array` (this state's words, here or on the
        device), in its own dtype and shape."""
        start = self._offsets[name]
        if name == "block_tables":
            size = num_places * self.table_width
            return array[start : start + size].reshape(num_places, self.table_width)
        width, dtype = _FIELDS[name]
        part = array[start : start + width * num_places].view(np.dtype(dtype))
        return part.reshape(num_places, 2) if name == "counters" else part

    @property
    def field_names(self) -> tuple[str, ...]:
        return (*_FIELDS, "block_tables")

    @property
    def num_places(self) -> int:
        """Places in use: the first ones."""
        return len(self._place_of)

    def places_of(self, requests: Sequence[Request]) -> np.ndarray:
        """The places int32 [n] of requests of the last `updates`."""
        return np.array([self._place_of[id(request)] for request in requests], np.int32)

    def place_of(self, request: Request) -> int:
        """The place of one of them."""
        return self._place_of[id(request)]

    def updates(
        self,
        requests: Sequence[Request],
        rows: Mapping[Request, int] | None = None,
        penalty_slots: Mapping[Request, int] | None = None,
    ) -> np.ndarray:
        """Make this the batch: int32 [n, 2], index and value of every word the device must change.

        Each request decodes one token, its last. Other requests lose their places. rows: where the
        step before sampled the tokens that were not read yet; such a token is sent as -1 - row,
        for `resolve_tokens` to put in. penalty_slots: of those that take penalties.
        """
        wanted = {id(request) for request in requests}
        changed: list[tuple[int, int]] = []
        for key in self._place_of.keys() - wanted:
            changed += self._free(self._place_of.pop(key))
        rewound: list[int] = []
        holes = [i for i in range(len(requests)) if self.places[i] is None]
        # Places beyond the batch move into holes, so that a batch fills the first places.
        for key, place in list(self._place_of.items()):
            if place >= len(requests):
                changed += self._free(place)
                del self._place_of[key]
        for request in requests:
            if id(request) not in self._place_of:
                self._place_of[id(request)] = place = holes.pop(0)
                self.places[place] = request
                self._fresh.add(place)
            place = self._place_of[id(request)]
            if self._num_preemptions[place] != request.num_preemptions:
                self._num_preemptions[place] = request.num_preemptions
                self._fresh.add(place)
            if self._num_rewinds[place] != request.num_rewinds:
                self._num_rewinds[place] = request.num_rewinds
                rewound.append(place)
        new = self._wanted_words(requests, penalty_slots or {})
        # The device has the token of a sequence that it has itself moved on to this position.
        moved = self.view(self.words, "positions", len(requests)) == new["positions"]
        moved[[*self._fresh, *rewound]] = False
        for name in _FIELDS:
            width = _FIELDS[name][0]
            start = self._offsets[name]
            old = self.words[start : start + width * len(requests)]
            if name == "token_ids":
                for place in np.flatnonzero(~moved):
                    changed.append((start + int(place), self._token(self.places[place], rows)))
                continue
            for i in np.flatnonzero(old != new[name]):
                changed.append((start + int(i), int(new[name][i])))
            old[:] = new[name]
        for place, request in enumerate(self.places[: len(requests)]):
            changed += self._table_updates(place, request)
        # A word may have been freed and taken again: the last value counts.
        return np.array(list(dict(changed).items()), np.int32).reshape(-1, 2)

    def grown(self, requests: Sequence[Request]) -> np.ndarray:
        """The same for a batch that is the one of the step before, but that these of its requests
        have one block more."""
        changed: list[tuple[int, int]] = []
        for request in requests:
            place = self._place_of[id(request)]
            self._num_blocks[place] = len(request.block_ids)
            column, block = len(request.block_ids) - 1, request.block_ids[-1]
            table = self._offsets["block_tables"] + place * self.table_width + column
            changed.append((table, block))
            position = int(self.words[self._offsets["positions"] + place])
            if position // self.block_size == column:
                slot = block * self.block_size + position % self.block_size
                changed.append((self._offsets["slots"] + place, slot))
        updates = np.array(changed, np.int32).reshape(-1, 2)
        self.words[updates[:, 0]] = updates[:, 1]
        return updates

    def advance(self) -> None:
        """What the device does at the end of a step, but for the token ids, which it alone has."""
        num = self.num_places
        self.view(self.words, "positions", num)[:] += 1
        positions = self.view(self.words, "positions", num)
        self.view(self.words, "kv_lens", num)[:] = positions + 1
        rope_lens = self.view(self.words, "rope_lens", num)
        np.maximum(rope_lens, positions + 1, out=rope_lens)
        self.view(self.words, "counters", num)[:, 0] += 1
        columns = positions // self.block_size
        tables = self.view(self.words, "block_tables", num)
        inside = columns < self.table_width
        blocks = tables[np.arange(num), np.where(inside, columns, 0)]
        slots = np.where(inside, blocks, 0) * self.block_size + positions % self.block_size
        self.view(self.words, "slots", num)[:] = slots

    def caught_up(self, requests: Sequence[Request]) -> np.ndarray | None:
        """`updates` for requests that are the batch already, with the words in which they are not
        what the device has: mostly none, or the blocks that one got. None where anything else may
        differ, or a token was not read yet; nothing is changed then."""
        if len(requests) != self.num_places or self._fresh:
            return None
        for request in requests:
            place = self._place_of.get(id(request))
            if (
                place is None
                or self._num_preemptions[place] != request.num_preemptions
                or request.num_pending_tokens
            ):
                return None
        offsets, words = self._offsets, self.words
        changed: list[tuple[int, int]] = []
        for request in requests:
            place, position = self._place_of[id(request)], request.num_computed_tokens
            moved = words[offsets["positions"] + place] != position
            if self._num_rewinds[place] != request.num_rewinds:
                self._num_rewinds[place], moved = request.num_rewinds, True
            if not moved and self._num_blocks[place] == len(request.block_ids):
                continue
            changed += self._table_updates(place, request)
            slot = request.block_ids[position // self.block_size] * self.block_size
            wanted = {offsets["slots"] + place: slot + position % self.block_size}
            if moved:
                rope_len = max(request.num_prompt_tokens, position + 1)
                wanted |= {
                    offsets["positions"] + place: position,
                    offsets["kv_lens"] + place: position + 1,
                    offsets["rope_lens"] + place: rope_len,
                    offsets["counters"] + 2 * place: request.num_tokens,
                }
                changed.append((offsets["token_ids"] + place, self._token(request, None)))
            for index, value in wanted.items():
                if words[index] != value:
                    words[index] = value
                    changed.append((index, value))
        return np.array(changed, np.int32).reshape(-1, 2)

    def move_on(self, places: Sequence[int], counts: Sequence[int]) -> None:
        """What the device does at the end of a step that checks drafts, but for the token ids:
        each of these places goes on by so many tokens."""
        # Word by word: places are few, and NumPy's calls take longer than what they do.
        offsets, words = self._offsets, self.words
        for place, count in zip(places, counts, strict=True):
            position = int(words[offsets["positions"] + place]) + count
            column = position // self.block_size
            block = 0
            if column < self.table_width:
                block = int(words[offsets["block_tables"] + place * self.table_width + column])
            words[offsets["positions"] + place] = position
            words[offsets["kv_lens"] + place] = position + 1
            rope_lens = offsets["rope_lens"] + place
            words[rope_lens] = max(int(words[rope_lens]), position + 1)
            words[offsets["counters"] + 2 * place] += count
            words[offsets["slots"] + place] = block * self.block_size + position % self.block_size

    @staticmethod
    def _token(request: Request, rows: Mapping[Request, int] | None) -> int:
        if request.num_pending_tokens:
            assert rows is not None
            return -1 - rows[request]
        return (request.output_ids or request.prompt_ids)[-1]

    def _wanted_words(
        self, requests: Sequence[Request], penalty_slots: Mapping[Request, int]
    ) -> dict[str, np.ndarray]:
        """Every field of the batch, in the order of places, as int32 words."""
        order = self.places[: len(requests)]
        positions = np.array([r.num_computed_tokens for r in order], np.int32)
        blocks = [r.block_ids[p // self.block_size] for r, p in zip(order, positions, strict=True)]
        prompt_lens = np.array([r.num_prompt_tokens for r in order], np.int32)
        fields = {
            "positions": positions,
            "slots": np.array(blocks, np.int32) * self.block_size + positions % self.block_size,
            "kv_lens": positions + 1,
            "rope_lens": np.maximum(prompt_lens, positions + 1),
            "penalty_slots": np.array([penalty_slots.get(r, 0) for r in order], np.int32),
            **vars(build_sampler_batch(order)),
        }
        return {
            name: np.ascontiguousarray(fields[name], dtype).reshape(-1).view(np.int32)
            for name, (_, dtype) in _FIELDS.items()
            if name != "token_ids"
        }

    def _table_updates(self, place: int, request: Request) -> list[tuple[int, int]]:
        before, count = self._num_blocks[place], len(request.block_ids)
        if before == count and place not in self._fresh:
            return []  # a running request's blocks are only ever added to
        num_columns = max(before, count)
        start = self._offsets["block_tables"] + place * self.table_width
        row = self.words[start : start + num_columns]
        # Columns beyond the request's blocks name the null block, so that a step too many of a
        # request that has ended writes there.
        new = np.zeros(num_columns, np.int32)
        new[:count] = request.block_ids
        changed = [(start + int(i), int(new[i])) for i in np.flatnonzero(row != new)]
        row[:] = new
        self._num_blocks[place] = count
        self._fresh.discard(place)
        return changed

    def _free(self, place: int) -> list[tuple[int, int]]:
        """Empty a place. Most of its words may stay as they are; not its slots, which are written,
        nor the kv_len that marks it."""
        self.places[place] = None
        changed = []
        for name in ("kv_lens", "slots", "positions", "token_ids", "penalty_slots"):
            index = self._offsets[name] + place
            self.words[index] = 0
            changed.append((index, 0))
        return changed
