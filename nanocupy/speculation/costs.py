"""What steps of decodes take, with drafts and without, as measured while the engine runs."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT = 7  # measurements of a kind; their median counts, the lower of two
# A device loads what a step needs when its shape comes first, and captures it when it comes again.
_NOT_COUNTED = 2
_LONG = 2.5  # beside a step without drafts: one that took longer may have loaded or captured
_LEAST = 2  # measurements without which a kind is unknown; one where most are not to be had
_OTHER = 1 / 4  # of the sequences of a batch: with so many more or fewer it is another


def bucket(count: int) -> int:
    """Equal for counts whose steps take much the same: each up to 8, then by powers of two."""
    return count if count <= 8 else 5 + (count - 1).bit_length()


class StepCosts:
    """Seconds of a step by sequences and drafts. Buckets: see `bucket`."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, int], deque[float]] = {}
        self._left_out: dict[tuple[int, int], int] = {}
        self._untimed: set[tuple[int, int]] = set()  # beside a caller who takes long
        self._num_drafts: dict[tuple[int, int], int] = {}  # of the last step of a kind
        self._plain_seqs: dict[int, int] = {}  # by bucket: of the last plain step that was counted
        self._least: dict[tuple[int, int], float] = {}  # that a step of a kind has taken

    def add(self, num_seqs: int, num_drafts: int, seconds: float | None) -> None:
        """A step of so many sequences, one token each, and drafts of all of them together; None:
        nobody knows how long it took."""
        if seconds is not None and seconds <= 0.0:
            seconds = None  # of a clock that does not tell them apart
        kind = bucket(num_seqs), bucket(num_drafts)
        self._num_drafts[kind] = num_drafts
        if seconds is not None:
            self._least[kind] = min(seconds, self._least.get(kind, seconds))
        left_out = self._left_out.get(kind, 0)
        if left_out < _NOT_COUNTED:
            self._left_out[kind] = left_out + 1
        elif seconds is not None:
            self._kinds.setdefault(kind, deque(maxlen=_KEPT)).append(seconds)
            if not num_drafts:
                self._plain_seqs[kind[0]] = num_seqs
        else:
            self._untimed.add(kind)

    def has_seen(self, num_seqs: int, num_drafts: int) -> bool:
        """Plain: whether its median is known; with drafts: whether one was timed, and not long."""
        plain = self.seconds(num_seqs, 0)
        kind = bucket(num_seqs), bucket(num_drafts)
        return plain is not None and (not num_drafts or self._seen(kind, plain) is not None)

    def moved(self, num_seqs: int) -> None:
        """So many sequences run now: what their steps take is measured anew where it is known of so
        many more or fewer that it differs, though their bucket is the same."""
        batch = bucket(num_seqs)
        before = self._plain_seqs.get(batch, num_seqs)
        if abs(num_seqs - before) > _OTHER * before:
            del self._plain_seqs[batch]
            del self._kinds[batch, 0]
            self.forget_drafts(num_seqs)

    def is_sure(self, num_seqs: int) -> bool:
        """Whether more than one step without drafts was measured, which may have been disturbed."""
        return len(self._kinds.get((bucket(num_seqs), 0), ())) >= _LEAST

    def seconds(self, num_seqs: int, num_drafts: int) -> float | None:
        """Of a step of this kind; None where it is not known."""
        return self._median((bucket(num_seqs), bucket(num_drafts)))

    def estimate(self, num_seqs: int, num_drafts: int) -> float | None:
        """The same; where it is not known, what such a step has taken once, unless that was long;
        and no more than the nearest kind with drafts lets expect: half of what that takes beyond a
        step without is thought to be in proportion to the drafts. None where nothing is known of
        this batch with drafts, or without."""
        batch, plain = bucket(num_seqs), self._median((bucket(num_seqs), 0))
        if plain is None:
            return None
        kind = batch, bucket(num_drafts)
        known, seen = self._median(kind), self._seen(kind, plain)
        if known is not None:
            return known
        kinds = [k for k in self._num_drafts if k[0] == batch and k[1] and k != kind]
        for other in sorted(kinds, key=lambda k: abs(self._num_drafts[k] - num_drafts)):
            seconds = self._median(other) or self._seen(other, plain)
            if seconds is not None:
                more = 0.5 + 0.5 * num_drafts / self._num_drafts[other]
                seconds = plain + (seconds - plain) * more
                return seconds if seen is None else min(seconds, seen)
        return seen

    def knows_drafts(self, num_seqs: int) -> bool:
        """Whether steps of this batch are known with any number of drafts."""
        return any(k[0] == bucket(num_seqs) and k[1] and self._median(k) for k in self._kinds)

    def forget_drafts(self, num_seqs: int) -> None:
        """Measure steps with drafts of a batch of this bucket anew."""
        batch = bucket(num_seqs)
        for kept in (self._kinds, self._least):
            for kind in [kind for kind in kept if kind[0] == batch and kind[1]]:
                del kept[kind]

    def _median(self, kind: tuple[int, int]) -> float | None:
        found = self._kinds.get(kind)
        if found is None or len(found) < (1 if kind in self._untimed else _LEAST):
            return None
        return statistics.median_low(found)  # what disturbs a step makes it longer

    def _seen(self, kind: tuple[int, int], plain_s: float) -> float | None:
        least = self._least.get(kind)
        return least if least is not None and least <= _LONG * plain_s else None
