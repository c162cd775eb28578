"""Philox4x32-10, the counter-based random numbers behind every draw.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The
same counter and key give the same bits on every backend, in any order.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counters: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Four random words a row: counters uint32 [n, 4], seeds uint64 [n] -> uint32 [n, 4].

    The low half of the seed is the first key word.
    """
    c0, c1, c2, c3 = counters.astype(np.uint64).T
    seeds = np.asarray(seeds, dtype=np.uint64)
    k0, k1 = seeds & _LOW, seeds >> _32
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0 = (k0 + np.uint64(_WEYL_0)) & _LOW
        k1 = (k1 + np.uint64(_WEYL_1)) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniforms(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) for each row, of 53 random bits: seeds uint64 [n], counters [n, 2]."""
    padded = np.zeros((len(seeds), 4), np.uint32)
    padded[:, :2] = counters
    words = philox4x32(padded, seeds).astype(np.uint64)
    return ((words[:, 0] >> np.uint64(5)) * 67108864.0 + (words[:, 1] >> np.uint64(6))) / 2.0**53
