"""A profile as one HTML file: timeline, roofline, memory and tables. It loads nothing from outside.

The numbers are in the file as text; only the timeline is drawn by the page's script.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from nanocupy.profiling.profile import Profile
from nanocupy.profiling.roofline import Dot, Roof, draw_roofline
from nanocupy.profiling.timeline import Span, Total, totals

MAX_DECODE_STEPS = 8  # in the timeline; the tables have all of them
_NUM_COLOURS = 8


def write_page(path: Path, profile: Profile, title: str, subtitle: str, roof: Roof | None) -> None:
    """Write the page. title, subtitle: what was run, and on what. Raises OSError."""
    template = files("nanocupy.profiling").joinpath("page.html").read_text(encoding="utf-8")
    page = Template(template).substitute(_contents(profile, title, subtitle, roof))
    path.write_text(page, encoding="utf-8")


def _contents(profile: Profile, title: str, subtitle: str, roof: Roof | None) -> dict[str, str]:
    parts = {"prefill": profile.prefill, "decode": profile.decode}
    by_op = {name: totals(_ops(spans), lambda s: s.name) for name, spans in parts.items()}
    by_layer = {name: totals(_ops(spans), _layer, by_time=False) for name, spans in parts.items()}
    colours: dict[str, int] = {}
    for span in _ops([*profile.prefill, *profile.decode]):
        colours.setdefault(span.name, len(colours) % _NUM_COLOURS)
    steps = {name: _steps(spans) for name, spans in parts.items()}
    note = "One op after the other, each timed on its own."
    if len(steps["decode"]) > MAX_DECODE_STEPS:
        note += f" Of {len(steps['decode'])} decode steps, the first {MAX_DECODE_STEPS} are drawn."
    dots = [
        Dot(
            total.key,
            total.cost.num_flops / total.cost.num_bytes,
            1e9 * total.gigaflops_per_second,
            total.share,
            colours[total.key],
            name == "decode",
        )
        for name, rows in by_op.items()
        for total in rows
        if total.cost.num_bytes
    ]
    tables = ""
    for name in parts:
        if steps[name]:
            tables += _table(f"{name}, by op", by_op[name], len(steps[name]), colours)
            layers = _table(f"{name}, by layer", by_layer[name], len(steps[name]), {})
            tables += f"<details><summary>{name}, by layer</summary>{layers}</details>"
    return {
        "title": escape(title),
        "subtitle": escape(subtitle),
        "figures": _figures(steps),
        "timeline_note": note,
        "legend": "".join(f"<span>{_key(c)}{escape(op)}</span>" for op, c in colours.items()),
        "roofline_note": _roofline_note(roof),
        "roofline": draw_roofline(dots, roof),
        "memory": _memory(profile.memory[-1][1]),
        "tables": tables,
        "data": _timeline_data(profile, list(colours)),
    }


def _ops(spans: Sequence[Span]) -> list[Span]:
    return [span for span in spans if span.track == "ops"]


def _steps(spans: Sequence[Span]) -> list[Span]:
    return [span for span in spans if span.track == "steps"]


def _layer(span: Span) -> str:
    return "outside the layers" if span.layer is None else f"layer {span.layer}"


def _figures(steps: dict[str, list[Span]]) -> str:
    """The few numbers to see first."""
    figures = []
    for name, spans in steps.items():
        if not spans:
            continue
        seconds = sum(span.duration_s for span in spans)
        count = f"{len(spans)} step" + ("" if len(spans) == 1 else "s")
        rate = sum(span.num_tokens for span in spans) / seconds
        figures.append((f"{1e3 * seconds / len(spans):,.4g} ms", f"{name}: a step, of {count}"))
        figures.append((f"{rate:,.1f}", f"{name}: tokens/s"))
    return "".join(f"<div><b>{number}</b>{what}</div>" for number, what in figures)


def _roofline_note(roof: Roof | None) -> str:
    note = (
        "Each op by its work for a byte and its speed: filled for prefill, a ring for decode; the "
        "larger, the more of the time it takes. "
    )
    if roof is None:
        return note
    return note + (
        f"The line is what this device did at best just now: {roof.bytes_per_s / 1e9:,.0f} GB/s of "
        f"memory, {roof.flops_per_s / 1e9:,.0f} GFLOP/s of a large product."
    )


def _memory(owners: dict[str, int]) -> str:
    ordered = sorted(owners.items(), key=lambda item: -item[1])
    total = sum(owners.values()) or 1
    bar, rows = "", ""
    for number, (owner, num_bytes) in enumerate(ordered):
        colour = f"background:var(--c{number % _NUM_COLOURS})"
        share = 100 * num_bytes / total
        bar += f'<div style="width:{share:.3f}%;{colour}" title="{escape(owner)}"></div>'
        rows += (
            f"<tr><td>{_key(number % _NUM_COLOURS)}{escape(owner)}</td>"
            f"<td>{num_bytes:,}</td><td>{num_bytes / 2**20:,.1f}</td><td>{share:.1f} %</td></tr>"
        )
    head = _head("for", "bytes", "MiB", "share")
    return f'<div class="memory">{bar}</div><table>{head}<tbody>{rows}</tbody></table>'


def _table(caption: str, rows: Sequence[Total], num_steps: int, colours: dict[str, int]) -> str:
    body = ""
    for total in rows:
        key = _key(colours[total.key]) if total.key in colours else ""
        cost = total.cost
        intensity = f"{cost.num_flops / cost.num_bytes:,.2f}" if cost.num_bytes else "-"
        body += (
            f"<tr><td>{key}{escape(total.key)}</td><td>{total.count:,}</td>"
            f"<td>{1e3 * total.seconds / num_steps:.3f}</td>"
            f'<td class="share" style="--part:{100 * total.share:.1f}%">{100 * total.share:.1f} %'
            f"</td><td>{total.gigabytes_per_second:,.1f}</td>"
            f"<td>{total.gigaflops_per_second:,.1f}</td><td>{intensity}</td></tr>"
        )
    head = _head("", "calls", "ms a step", "share", "GB/s", "GFLOP/s", "FLOP/byte")
    return f"<table><caption>{caption}</caption>{head}<tbody>{body}</tbody></table>"


def _head(*columns: str) -> str:
    return f"<thead><tr>{''.join(f'<th>{column}</th>' for column in columns)}</tr></thead>"


def _key(colour: int) -> str:
    return f'<span class="key" style="background:var(--c{colour})"></span>'


def _timeline_data(profile: Profile, ops: list[str]) -> str:
    """JSON for the page's script, times in microseconds from the first step on: steps [name, start,
    length]; spans [op, layer or -1, start, length, bytes, flops]; views, steps to look at first."""
    decode: list[Span] = []
    num_steps = 0
    for span in profile.decode:
        num_steps += span.track == "steps"
        if num_steps > MAX_DECODE_STEPS:
            break
        decode.append(span)
    shown = [*profile.prefill, *decode]
    zero = min((span.start_s for span in shown), default=0.0)

    def place(span: Span) -> list[float]:
        return [round(1e6 * (span.start_s - zero), 3), round(1e6 * span.duration_s, 3)]

    data: dict[str, Any] = {
        "ops": ops,
        "steps": [[span.name, *place(span)] for span in _steps(shown)],
        "spans": [
            [
                ops.index(span.name),
                -1 if span.layer is None else span.layer,
                *place(span),
                span.cost.num_bytes,
                span.cost.num_flops,
            ]
            for span in _ops(shown)
        ],
        "views": [
            [f"a {name} step", *place(found[len(found) // 2])]
            for name, spans in (("prefill", profile.prefill), ("decode", decode))
            if (found := _steps(spans))
        ],
    }
    # Within a script element nothing may look like its end.
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
