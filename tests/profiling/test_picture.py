"""The picture of docs/performance.md: what is drawn is what is recorded."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

from benchmarks import picture
from benchmarks.picture import BAR, LEFT, RIGHT, WIDTH, Bar, bars_of, draw
from benchmarks.records import FOLDER

SVG = "{http://www.w3.org/2000/svg}"


def test_bars_are_the_records_that_have_a_floor():
    records = [
        {"name": "decode/a-1b/bfloat16/b8", "value": 2.0, "ceiling": 0.5},
        {"name": "decode/a-1b/bfloat16/b9", "value": 2.0},
        {"name": "prefill/x<y/bfloat16/t64", "value": 3.0, "ceiling": 6.0},
    ]
    assert bars_of(records) == [Bar("a-1b, batch 8", 2.0, 0.5), Bar("x<y, tokens 64", 3.0, 6.0)]


def test_the_newest_records_of_the_card_are_drawn(tmp_path):
    file = tmp_path / "decode.jsonl"
    records = [
        {"name": name, "value": value, "device": device}
        for name, value, device in [
            ("a", 1.0, "NVIDIA H100 80GB HBM3"), ("b", 2.0, "NVIDIA H100 80GB HBM3"),
            ("a", 3.0, "NVIDIA H100 80GB HBM3"), ("b", 4.0, "NVIDIA H200"),
        ]
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, records)))
    assert {n: r["value"] for n, r in picture.newest(file).items()} == {"a": 3.0, "b": 2.0}


def test_lengths_and_numbers():
    bars = [Bar("a", 2.0, 0.5), Bar("x<y & z", 4.0, 8.0)]
    root = ElementTree.fromstring(draw({"group": bars}))
    room = WIDTH - LEFT - RIGHT
    widths = [float(rect.get("width")) for rect in root.iter(f"{SVG}rect")]
    assert widths == [room, room / 4, room, room]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts[:5] == ["group", "a", "2 (25 %)", "x<y & z", "4 (200 %)"]
    assert all(rect.get("height") == str(BAR) for rect in root.iter(f"{SVG}rect"))


def test_the_picture_in_the_docs_is_of_the_newest_records():
    groups = {
        title: bars_of(picture.newest(FOLDER / f"{file}.jsonl").values())
        for title, file in picture.GROUPS.items()
    }
    assert picture.TARGET.read_text(encoding="utf-8") == draw(groups)
