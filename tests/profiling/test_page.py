"""`nanocupy profile --html`: one page that stands alone, with the profile's numbers in it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanocupy import cli
from nanocupy.bench.shapes import SHAPES
from nanocupy.profiling.cost import Cost
from nanocupy.profiling.page import MAX_DECODE_STEPS, write_page
from nanocupy.profiling.profile import Profile
from nanocupy.profiling.roofline import Dot, Roof, draw_roofline, measure_roof
from nanocupy.profiling.timeline import Span
from tests.checkpoint.tiny import tiny_config
from tests.shim import build

# HTML's elements without an end tag.
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The text of the page by element, once every element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.data = ""
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.is_data = dict(attrs).get("id") == "data"

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open, f"<{tag}/> is no HTML outside of an SVG"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.data += data if self.is_data else ""
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data


def step(start: float, tokens: int, seqs: int, *ops: Span) -> list[Span]:
    whole = Span(f"{tokens} tokens", None, start, 1e-3, track="steps", num_tokens=tokens)
    return [whole, *ops]


def some_profile(num_decode: int = 1) -> Profile:
    prefill = step(
        10.0, 64, 2,
        Span("attend", 0, 10.0, 4e-4, Cost(2_000_000, 80_000_000)),
        Span("attend", 1, 10.0005, 2e-4, Cost(1_000_000, 40_000_000)),
        Span("<lm>&", None, 10.0008, 2e-4, Cost(4_000_000, 8_000_000)),
    )  # fmt: skip
    decode: list[Span] = []
    for number in range(num_decode):
        start = 10.002 + number * 0.001
        decode += step(start, 2, 2, Span("attend", 0, start, 1e-4, Cost(500_000, 1_000_000)))
    memory = {"weights": 3 << 20, "kv cache": 1 << 20}
    return Profile(prefill, decode, [(10.0, memory), (10.1, memory)])


def page_of(tmp_path: Path, profile: Profile, title: str = "Profile of x") -> Page:
    path = tmp_path / "page.html"
    write_page(path, profile, title, "on a <device> & more", Roof(50e9, 2e12))
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://|@import|url\(", text)
    page = Page(text)
    assert page.links == []
    return page


def test_the_numbers_are_in_the_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, some_profile(), 'Profile of "</script>"')
    assert 'Profile of "</script>"' in page.text
    assert "on a <device> & more" in page.text
    rows = {tuple(row) for row in page.rows}
    # Calls, ms a step, share, GB/s, GFLOP/s, FLOP/byte: by hand.
    assert ("attend", "2", "0.600", "75.0 %", "5.0", "200.0", "40.00") in rows
    assert ("<lm>&", "1", "0.200", "25.0 %", "20.0", "40.0", "2.00") in rows
    assert ("attend", "1", "0.100", "100.0 %", "5.0", "10.0", "2.00") in rows
    assert ("layer 1", "1", "0.200", "25.0 %", "5.0", "200.0", "40.00") in rows
    assert ("weights", "3,145,728", "3.0", "75.0 %") in rows
    assert "64,000.0prefill: tokens/s" in page.text
    assert "50 GB/s of memory, 2,000 GFLOP/s" in page.text
    data = json.loads(page.data)
    assert data["ops"] == ["attend", "<lm>&"]
    assert data["steps"] == [["64 tokens", 0, 1000], ["2 tokens", 2000, 1000]]
    assert data["spans"][1] == [0, 1, 500, 200, 1_000_000, 40_000_000]
    assert data["spans"][2][:2] == [1, -1]
    assert data["views"] == [["a prefill step", 0, 1000], ["a decode step", 2000, 1000]]


def test_of_many_steps_the_first_are_drawn(tmp_path: Path) -> None:
    page = page_of(tmp_path, some_profile(20))
    data = json.loads(page.data)
    assert len(data["steps"]) == 1 + MAX_DECODE_STEPS
    assert len(data["spans"]) == 3 + MAX_DECODE_STEPS
    assert f"Of 20 decode steps, the first {MAX_DECODE_STEPS} are drawn" in page.text
    assert "20" in [row[1] for row in page.rows if row[0] == "attend"]


def test_the_roofline_is_to_scale() -> None:
    dots = [
        Dot("reads", 1.0, 1e10, 0.5, 0, True),
        Dot("computes", 100.0, 1e12, 0.25, 1, False),
        Dot("moves", 0.0, 0.0, 0.25, 2, True),  # has no place on a logarithmic axis
    ]
    svg = ElementTree.fromstring(draw_roofline(dots, Roof(1e11, 1e13)))
    reads, computes = svg.findall("circle")
    assert "none" in reads.get("style", "")
    assert computes.findtext("title") == (
        "computes, prefill: 1 TFLOP/s, 100 FLOP/byte, 25.0 % of the time"
    )
    roof = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    # Both dots have a tenth of what the roof allows: equally far below it, on a logarithmic axis.
    x_of = {1.0: float(reads.get("cx")), 100.0: float(computes.get("cx"))}
    (x0, y0), (x1, y1), (x2, y2) = roof
    assert (x0, x1, x2) == pytest.approx((x_of[1.0], x_of[100.0], x_of[100.0]))
    assert y1 == y2
    below = [float(reads.get("cy")) - y0, float(computes.get("cy")) - y1]
    assert below[0] == pytest.approx(below[1], abs=0.2)
    assert below[0] > 50
    assert draw_roofline(dots[2:], None) == "<p>No op that computes was timed.</p>"


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
def test_the_roof_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.shim.device import ShimDevice

    class SlowDevice(ShimDevice):
        """Every fill takes a second, every product ten."""

        now = 0.0

        def fill(self, array, byte):
            self.now += 1

        def matmul(self, x, w, out, beta=0.0):
            assert x.shape == w.shape == out.shape
            self.now += 10

        def mark(self):
            return self.now

    roof = measure_roof(SlowDevice(), "float16")
    assert roof == Roof(float(1 << 28), 2 * 4096**3 / 10)
    cpu = measure_roof(None, "float32")
    assert 1e8 < cpu.bytes_per_s < 1e13
    assert 1e8 < cpu.flops_per_s < 1e15


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(SHAPES, "smollm2-135m", tiny_config(max_context=64))
    argv = ["profile", "--device", "cpu", "--prompt", "9", "--output", "3", "--html"]
    path = tmp_path / "page.html"
    assert cli.main([*argv, str(path)]) == 0
    assert f"page written to {path}" in capsys.readouterr().out.replace("\n", "")
    page = Page(path.read_text(encoding="utf-8"))
    assert "Profile of smollm2-135m" in page.text
    assert "on cpu: 1 prompt of 9 tokens, 3 tokens of output" in page.text
    assert {"norm_swiglu", "layer 1", "weights"} <= {row[0] for row in page.rows}
    assert cli.main([*argv, str(tmp_path / "none" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
