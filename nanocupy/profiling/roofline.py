"""A roofline: every op by the work that it does on a byte, under what the machine does at best."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nanocupy.cuda.device import Device

_WIDTH, _HEIGHT = 1000, 430
_LEFT, _RIGHT, _TOP, _BOTTOM = 96, 20, 16, 44
_LABEL_GAP = 14  # units between two labels, of which a line of text needs 12
_RUNS = 5


@dataclass(frozen=True)
class Roof:
    """What a machine does at best: bytes a second of memory, operations a second of a product."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Dot:
    """An op: FLOP/byte, FLOP/s, its share of the time of its kind of step, its colour's number, and
    whether it is of decode steps, which are drawn as rings."""

    name: str
    intensity: float
    flops_per_s: float
    share: float
    colour: int
    is_decode: bool


def measure_roof(device: Device | None, dtype: str) -> Roof:
    """Of a device (the rate at which it fills memory, and its product of large matrices of
    `dtype`), or of this CPU (the rate at which it reads, and its product in float32)."""
    return _roof_of_cpu() if device is None else _roof_of_device(device, dtype)


def _roof_of_cpu() -> Roof:
    matrix, vector = np.ones((8192, 8192), np.float32), np.ones((8192, 1), np.float32)
    square = np.ones((1024, 1024), np.float32)

    def best(function: Any) -> float:
        times = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    read_s, product_s = best(lambda: matrix @ vector), best(lambda: square @ square)
    return Roof(matrix.nbytes / read_s, 2 * 1024**3 / product_s)


def _roof_of_device(device: Device, dtype: str) -> Roof:
    from nanocupy.cuda.arena import ArenaPlan, BufferSpec

    n = 4096
    specs = [BufferSpec(name, (n, n), dtype, "roof") for name in ("x", "w", "out")]
    specs.append(BufferSpec("memory", (1 << 28,), "uint8", "roof"))
    memory = device.allocate(ArenaPlan(specs))
    x, w, out, large = (memory.view(spec.name) for spec in specs)

    def best(start: Any) -> float:
        marks = [device.mark()]
        for _ in range(_RUNS + 1):  # the first loads what it needs
            start()
            marks.append(device.mark())
        device.synchronize("measuring the device")
        times = [device.seconds(mark) for mark in marks]
        return min(b - a for a, b in pairwise(times[1:]))

    for array in (x, w):
        device.fill(array, 0x3C)  # an ordinary number in every float type
    fill_s, product_s = best(lambda: device.fill(large, 0)), best(lambda: device.matmul(x, w, out))
    return Roof(large.nbytes / fill_s, 2 * n**3 / product_s)


def draw_roofline(dots: Sequence[Dot], roof: Roof | None) -> str:
    """The SVG element. Both axes are logarithmic; a dot's area grows with its share of the time."""
    dots = [dot for dot in dots if dot.intensity > 0 and dot.flops_per_s > 0]
    if not dots:
        return "<p>No op that computes was timed.</p>"
    xs = [dot.intensity for dot in dots]
    ys = [dot.flops_per_s for dot in dots]
    if roof is not None:
        xs.append(roof.flops_per_s / roof.bytes_per_s)
        ys.append(roof.flops_per_s)
    x_range, y_range = _decades(xs), _decades(ys)

    def x_of(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * _part(value, x_range)

    def y_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * _part(value, y_range)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Roofline of all ops">']
    for power in range(x_range[0], x_range[1] + 1):
        x = x_of(10.0**power)
        parts.append(_line(x, _TOP, x, _HEIGHT - _BOTTOM))
        parts.append(_text(x, _HEIGHT - _BOTTOM + 16, f"{10.0**power:g}", "middle"))
    for power in range(y_range[0], y_range[1] + 1):
        y = y_of(10.0**power)
        parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_text(_LEFT - 8, y + 4, _rate(10.0**power), "end"))
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 8, "FLOP/byte", "middle"))
    if roof is not None:
        left, right = 10.0 ** x_range[0], 10.0 ** x_range[1]
        ridge = roof.flops_per_s / roof.bytes_per_s
        start = max(left, 10.0 ** y_range[0] / roof.bytes_per_s)
        points = [(start, start * roof.bytes_per_s)]
        points += [(ridge, roof.flops_per_s), (right, roof.flops_per_s)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="roof" points="{path}"/>')
    return "".join([*parts, *_dots(dots, x_of, y_of), "</svg>"])


def _dots(dots: Sequence[Dot], x_of: Any, y_of: Any) -> list[str]:
    """Circles, the large ones first; labels beside them, moved down where they would meet."""
    circles: list[str] = []
    labels: list[str] = []
    placed: list[tuple[float, float]] = []
    for dot in sorted(dots, key=lambda dot: -dot.share):
        x, y, radius = x_of(dot.intensity), y_of(dot.flops_per_s), 4 + 14 * math.sqrt(dot.share)
        paint = f"fill:var(--c{dot.colour});fill-opacity:.85"
        if dot.is_decode:
            paint = f"fill:none;stroke:var(--c{dot.colour});stroke-width:3"
        kind = "decode" if dot.is_decode else "prefill"
        about = (
            f"{dot.name}, {kind}: {_rate(dot.flops_per_s)}, {dot.intensity:.3g} FLOP/byte, "
            f"{100 * dot.share:.1f} % of the time"
        )
        circles.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" style="{paint}">'
            f"<title>{escape(about)}</title></circle>"
        )
        label_x, label_y = x + radius + 5, y + 4
        flip = label_x > _WIDTH - 130
        if flip:
            label_x = x - radius - 5
        while any(abs(label_x - a) < 110 and abs(label_y - b) < _LABEL_GAP for a, b in placed):
            label_y += 2
        placed.append((label_x, label_y))
        anchor = "end" if flip else "start"
        labels.append(_text(label_x, label_y, dot.name, anchor, "name"))
    return circles + labels


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around the values, two or more."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _part(value: float, decades: tuple[int, int]) -> float:
    return (math.log10(value) - decades[0]) / (decades[1] - decades[0])


def _rate(flops_per_s: float) -> str:
    for size, unit in ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")):
        if flops_per_s >= size:
            return f"{flops_per_s / size:.4g} {unit}"
    return f"{flops_per_s:.4g} FLOP/s"


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "axis") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(text)}</text>'
