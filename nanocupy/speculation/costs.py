"""What steps of decodes take, with drafts and without, as measured while the engine runs."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT = 7  # measurements of a kind; their median counts
# A device loads what a step needs when its shape comes first, and captures it when it comes again.
_NOT_COUNTED = 2
_LEAST = 2  # measurements without which a kind is unknown
_MOST_AGE = 4096  # steps after which a kind that came no more is unknown again


def bucket(count: int) -> int:
    """Equal for counts whose steps take much the same: each up to 8, then by powers of two."""
    return count if count <= 8 else 5 + (count - 1).bit_length()


class StepCosts:
    """Seconds of a step by sequences and drafts. Buckets: see `bucket`."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, int], deque[float]] = {}
        self._left_out: dict[tuple[int, int], int] = {}
        self._seen_at: dict[tuple[int, int], int] = {}
        self._num_steps = 0

    def add(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        """A step of so many sequences, one token each, and drafts of all of them together."""
        kind = bucket(num_seqs), bucket(num_drafts)
        self._num_steps += 1
        self._seen_at[kind] = self._num_steps
        left_out = self._left_out.get(kind, 0)
        if left_out < _NOT_COUNTED:
            self._left_out[kind] = left_out + 1
        else:
            self._kinds.setdefault(kind, deque(maxlen=_KEPT)).append(seconds)

    def seconds(self, num_seqs: int, num_drafts: int) -> float | None:
        """Of a step of this kind; None where it is not known."""
        return self._median((bucket(num_seqs), bucket(num_drafts)))

    def estimate(self, num_seqs: int, num_drafts: int, first_guess: float) -> float | None:
        """The same, where it is not known from the nearest kind with drafts, else as a step without
        drafts times `first_guess`; None where that is not known either."""
        batch, wanted = bucket(num_seqs), bucket(num_drafts)
        known = self._median((batch, wanted))
        if known is not None:
            return known
        near = sorted(
            (abs(drafts - wanted), drafts) for of, drafts in self._kinds if of == batch and drafts
        )
        for _, drafts in near:
            seconds = self._median((batch, drafts))
            if seconds is not None:
                return seconds
        plain = self._median((batch, 0))
        return None if plain is None else plain * first_guess

    def _median(self, kind: tuple[int, int]) -> float | None:
        found = self._kinds.get(kind)
        if found is None or len(found) < _LEAST:
            return None
        if kind[1] and self._num_steps - self._seen_at[kind] > _MOST_AGE:
            del self._kinds[kind]
            return None
        return statistics.median(found)
