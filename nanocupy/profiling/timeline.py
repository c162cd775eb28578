"""Spans of time with what was done in them; as tables for people and as a trace for viewers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanocupy.profiling.cost import Cost

NOTHING = Cost(0, 0)


@dataclass(frozen=True)
class Span:
    """Something that took time: its op or name, its layer, when (seconds), and its cost."""

    name: str
    layer: int | None
    start_s: float
    duration_s: float
    cost: Cost = NOTHING
    track: str = "ops"
    num_tokens: int = 0  # of a step
    num_seqs: int = 0
    num_rows: int = 0  # after which a token was chosen


@dataclass(frozen=True)
class Total:
    """Spans of one key, summed."""

    key: str
    count: int
    seconds: float
    share: float
    cost: Cost

    @property
    def gigabytes_per_second(self) -> float:
        return self.cost.num_bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def gigaflops_per_second(self) -> float:
        return self.cost.num_flops / self.seconds / 1e9 if self.seconds else 0.0


def totals(
    spans: Iterable[Span], key: Callable[[Span], str], *, by_time: bool = True
) -> list[Total]:
    """Spans summed by key, the most time first (or as they first came); shares are of all spans."""
    groups: dict[str, list[Span]] = {}
    for span in spans:
        groups.setdefault(key(span), []).append(span)
    all_seconds = sum(span.duration_s for group in groups.values() for span in group) or 1.0
    result = []
    for name, group in groups.items():
        seconds = sum(span.duration_s for span in group)
        cost = sum((span.cost for span in group), NOTHING)
        result.append(Total(name, len(group), seconds, seconds / all_seconds, cost))
    return sorted(result, key=lambda total: -total.seconds) if by_time else result


def trace_events(
    spans: Iterable[Span], memory: Iterable[tuple[float, dict[str, int]]] = ()
) -> list[dict[str, Any]]:
    """The spans in the trace-event format, which chrome://tracing and Perfetto open.

    memory: (seconds, owner -> bytes) samples, drawn as stacked counters.
    Source: "Trace Event Format", the Chromium project.
    """
    tracks: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for span in spans:
        track = tracks.setdefault(span.track, len(tracks))
        args: dict[str, Any] = {"bytes": span.cost.num_bytes, "flops": span.cost.num_flops}
        if span.layer is not None:
            args["layer"] = span.layer
        events.append(
            {
                "name": span.name,
                "ph": "X",
                "ts": span.start_s * 1e6,
                "dur": span.duration_s * 1e6,
                "pid": 0,
                "tid": track,
                "args": args,
            }
        )
    for name, track in tracks.items():
        events.append(
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": track, "args": {"name": name}}
        )
    for seconds, owners in memory:
        events.append(
            {"name": "memory (bytes)", "ph": "C", "ts": seconds * 1e6, "pid": 0, "args": owners}
        )
    return events


def write_trace(path: Path, events: list[dict[str, Any]]) -> None:
    """Write a trace file. Raises OSError."""
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
