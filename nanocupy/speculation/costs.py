"""What steps of decodes take, with drafts and without, as measured while the engine runs."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT = 7  # measurements of a kind; their median counts, the lower of two
# A device loads what a step needs when its shape comes first, and captures it when it comes again.
_NOT_COUNTED = 2
_LEAST = 2  # measurements without which a kind is unknown


def bucket(count: int) -> int:
    """Equal for counts whose steps take much the same: each up to 8, then by powers of two."""
    return count if count <= 8 else 5 + (count - 1).bit_length()


class StepCosts:
    """Seconds of a step by sequences and drafts. Buckets: see `bucket`."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, int], deque[float]] = {}
        self._left_out: dict[tuple[int, int], int] = {}
        self._num_drafts: dict[tuple[int, int], int] = {}  # of the last step of a kind

    def add(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        """A step of so many sequences, one token each, and drafts of all of them together."""
        kind = bucket(num_seqs), bucket(num_drafts)
        self._num_drafts[kind] = num_drafts
        left_out = self._left_out.get(kind, 0)
        if left_out < _NOT_COUNTED:
            self._left_out[kind] = left_out + 1
        else:
            self._kinds.setdefault(kind, deque(maxlen=_KEPT)).append(seconds)

    def seconds(self, num_seqs: int, num_drafts: int) -> float | None:
        """Of a step of this kind; None where it is not known."""
        return self._median((bucket(num_seqs), bucket(num_drafts)))

    def estimate(self, num_seqs: int, num_drafts: int, *, hopeful: bool = False) -> float | None:
        """The same; where it is not known, from the nearest kind with drafts: more drafts cost in
        proportion, or if `hopeful` nothing more; fewer no less. None where no kind with drafts is
        known, or none without."""
        batch = bucket(num_seqs)
        known, plain = self._median((batch, bucket(num_drafts))), self._median((batch, 0))
        if known is not None or plain is None:
            return known
        kinds = [kind for kind in self._kinds if kind[0] == batch and kind[1]]
        for kind in sorted(kinds, key=lambda kind: abs(self._num_drafts[kind] - num_drafts)):
            seconds = self._median(kind)
            if seconds is not None:
                more = 1.0 if hopeful else max(1.0, num_drafts / self._num_drafts[kind])
                return plain + (seconds - plain) * more
        return None

    def forget_drafts(self, num_seqs: int) -> None:
        """Measure steps with drafts of a batch of this bucket anew."""
        batch = bucket(num_seqs)
        self._kinds = {k: v for k, v in self._kinds.items() if k[0] != batch or not k[1]}

    def _median(self, kind: tuple[int, int]) -> float | None:
        found = self._kinds.get(kind)
        if found is None or len(found) < _LEAST:
            return None
        return statistics.median_low(found)  # what disturbs a step makes it longer
