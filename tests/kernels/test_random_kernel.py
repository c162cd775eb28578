"""`fill_normal`: the values it must have, and that they are normal."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.ops import philox
from nanocupy.ops.launch_shapes import LaunchShape
from tests.kernels.backends import CODES, assert_close


def expected(count: int, deviation: float, seed: int) -> np.ndarray:
    """Box-Muller in float64 over the same words."""
    quads = -(-count // 4)
    counters = np.zeros((quads, 4), np.uint32)
    counters[:, 0] = np.arange(quads)
    words = philox.philox4x32(counters, np.full(quads, seed, np.uint64)).reshape(-1, 2) >> 8
    radius = deviation * np.sqrt(-2 * np.log((words[:, 0].astype(np.float64) + 1) / 2**24))
    angle = words[:, 1] * (2 * np.pi / 2**24)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1)[:count]


@pytest.mark.parametrize("count", [1, 2, 3, 1021, 4096])
def test_values(backend, storage, count):
    out = np.full(count, np.nan).astype(storage)
    args = (out, np.int64(count), np.float32(0.5), np.uint64(11))
    macros = {"SCALAR": CODES[storage.name]}
    backend.run("random.cu", "fill_normal", LaunchShape((3,), 64), args, (0,), **macros)
    assert_close(out, expected(count, 0.5, 11), "values")


def test_moments():
    values = expected(200_000, 1.0, 5)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**4).mean() - 3) < 0.1
