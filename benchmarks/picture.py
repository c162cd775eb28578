"""Draws docs/performance.svg from the newest records of one card: each result beside its floor.

    python -m benchmarks.picture

Plain SVG, readable on light and dark pages. It draws what is recorded and knows nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.records import FOLDER

TARGET = FOLDER.parent.parent / "docs" / "performance.svg"
GROUPS = {
    "milliseconds a decode step, context 128 to 384": "decode",
    "milliseconds from a prompt to its first token": "prefill",
}
CARD = "H100"
WIDTH, ROW, BAR, LEFT, RIGHT = 760, 24, 13, 190, 120
COLOR, FLOOR_COLOR, TEXT = "#3b82c4", "#9fb3c8", "#7a8699"


@dataclass(frozen=True)
class Bar:
    """One result: what it is of, its value and its floor, in the same unit."""

    label: str
    value: float
    floor: float


def newest(file: Path) -> dict[str, dict[str, object]]:
    """The last record of each name in a .jsonl file, of those that CARD gave."""
    records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {record["name"]: record for record in records if CARD in record["device"]}


def bars_of(records: Iterable[dict]) -> list[Bar]:
    """Those that have a floor; "decode/qwen3-0.6b/bfloat16/b8" becomes "qwen3-0.6b, batch 8"."""
    words = {"b": "batch", "t": "tokens"}
    found = []
    for record in records:
        if "ceiling" in record:
            _, shape, dtype, size = record["name"].split("/")
            _, _, codes = dtype.partition("-")  # bfloat16-int4: of weights in codes
            label = f"{shape}{f' {codes}' if codes else ''}, {words[size[0]]} {size[1:]}"
            found.append(Bar(label, record["value"], record["ceiling"]))
    return found


def draw(groups: dict[str, list[Bar]]) -> str:
    """The picture. What is to be seen is a result beside its floor, not one result beside another:
    every result's bar is of one length, and its floor a part of it."""
    rows: list[str] = []
    y = 30
    for title, bars in groups.items():
        rows.append(_text(0, y, title, bold=True))
        y += 12
        for bar in bars:
            room = WIDTH - LEFT - RIGHT
            floor = room * min(1.0, bar.floor / bar.value)
            rows.append(_text(LEFT - 8, y + BAR - 2, bar.label, anchor="end"))
            rows.append(_rect(LEFT, y, room, COLOR))
            rows.append(_rect(LEFT, y, floor, FLOOR_COLOR))
            numbers = f"{bar.value:,.3g} ({100 * bar.floor / bar.value:.0f} %)"
            rows.append(_text(LEFT + room + 8, y + BAR - 2, numbers))
            y += ROW
        y += 28
    legend = "pale: the floor (bytes over the read rate, or operations over the product rate)"
    rows.append(_text(LEFT, y - 10, legend))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" '
        'font-family="sans-serif" font-size="12">\n' + "\n".join(rows) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" fill="{TEXT}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
    )


def _rect(x: float, y: float, width: float, color: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2" fill="{color}"/>'


def main() -> None:
    groups = {
        title: bars_of(newest(FOLDER / f"{file}.jsonl").values()) for title, file in GROUPS.items()
    }
    TARGET.write_text(draw(groups), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
