"""Watches a growing text for stop strings, and holds back what may yet become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feed it text piece by piece; it gives back what is safe to show."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, text: str) -> str:
        """The text that can be shown now. Once a stop string is complete, `stopped_by` is set and
        nothing from its first character on is ever shown."""
        if self.stopped_by is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        # The stop that begins first wins; of two at one place, the longer.
        found = [(self._held.find(s), -len(s), s) for s in self._stops if s in self._held]
        if found:
            at, _, self.stopped_by = min(found)
            shown, self._held = self._held[:at], ""
            return shown
        keep = max(self._overlap(s) for s in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        return shown

    def finish(self) -> str:
        """What was held back and became no stop string."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
