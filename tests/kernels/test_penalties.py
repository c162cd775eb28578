"""Penalties from a request's slot: the kernels against `numpy_ops.penalize` on lists."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.ops import launch_shapes
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.backends import assert_close

I32, HEAD = np.int32, 8


def slots_of(
    rng: np.random.Generator, vocab: int, num_slots: int, max_entries: int, borders=()
) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Records and counts of slots of every kind, and the lists that say the same, by slot.
    borders: tokens that all of them have a bias for."""
    records = np.full((num_slots, HEAD + 2 * max_entries), -7, I32)
    counts = np.zeros((num_slots, -(-vocab // 8) * 8), np.uint16)
    counts[0] = 9  # nobody's: it must not be read
    lists: list[dict] = [{}]
    for slot in range(1, num_slots):
        others = np.setdiff1d(np.arange(vocab), borders)
        biased = rng.permutation(others)[: rng.integers(0, max_entries // 2)]
        biased = rng.permutation([*borders, *biased]).astype(int)
        banned = rng.integers(0, vocab, rng.integers(0, max_entries // 2 - len(borders)))
        biases = rng.uniform(-9, 9, len(biased)).astype("f4")
        ban_left, is_counted = int(rng.integers(0, 3)), slot % 4 != 0
        rates = rng.uniform([0.7, -1, -0.5], [1.8, 2, 1]).astype("f4")
        record, floats = records[slot], records.view("f4")[slot]
        record[:3] = len(biased), len(banned), ban_left
        floats[3:6] = rates
        record[6] = is_counted
        entries = [*biased, *banned]
        record[HEAD : HEAD + 2 * len(entries) : 2] = entries
        floats[HEAD + 1 : HEAD + 2 * len(biased) : 2] = biases
        in_prompt = (rng.random(vocab) < 0.3) & is_counted
        drawn = rng.integers(1, 4, vocab) * (rng.random(vocab) < 0.3) * is_counted
        counts[slot, :vocab] = drawn + 0x8000 * in_prompt
        bias = np.zeros(vocab, "f4")
        bias[biased] = biases
        if ban_left:
            bias[banned] = -np.inf
        lists.append({"counts": drawn, "context": in_prompt | (drawn > 0), "bias": bias}
                     | {"rates": rates})  # fmt: skip
    return records, counts, lists


@pytest.mark.parametrize(
    ("vocab", "rows", "multiprocessors"), [(1, 2, 6), (37, 9, 6), (5000, 3, 6), (20001, 2, 132)]
)
def test_penalize_slots(backend, vocab: int, rows: int, multiprocessors: int) -> None:
    rng = np.random.default_rng(vocab)
    width = -(-vocab // 8) * 8
    shape = launch_shapes.penalize_slots(rows, width, multiprocessors)
    part = -(-width // 8 // shape.grid[1]) * 8
    records, counts, lists = slots_of(rng, vocab, 12, 60, range(part, vocab, part))
    slots = rng.permutation(12)[:rows].astype(I32)
    slots[0] = 0
    logits = (rng.standard_normal((rows, vocab)) * 3).astype("f4")
    wanted = logits.copy()
    for row, slot in zip(wanted, slots, strict=True):
        if slot:
            said = lists[slot]
            NumpyOps(np.float64).penalize(
                row[None], np.array([0, vocab]), np.arange(vocab), said["counts"], said["context"],
                said["bias"], *said["rates"][:, None],
            )  # fmt: skip
    args = logits, slots, records, counts, I32(vocab), I32(records.shape[1]), I32(width)
    backend.run("penalties.cu", "penalize_slots", shape, args, (0,), SCALAR=0)
    banned = np.isneginf(wanted)
    assert np.array_equal(np.isneginf(logits), banned)
    assert_close(np.where(banned, 0, logits), np.where(banned, 0, wanted), "logits", None, 1e-6)


@pytest.mark.parametrize("rows", [1, 31, 200])
def test_count_tokens(backend, rows: int) -> None:
    rng = np.random.default_rng(rows)
    vocab = 19
    records, counts, _ = slots_of(rng, vocab, rows + 3, 6)
    records[:, 2] = rng.integers(0, 3, len(records))
    slots = rng.permutation(rows + 3)[:rows].astype(I32)
    sampled = rng.integers(-1, vocab, rows).astype(I32)
    counts[slots[0], sampled[0]] = 0x7FFF + 0x8000  # as often as can be counted
    wanted_records, wanted = records.copy(), counts.copy()
    for slot, token in zip(slots, sampled, strict=True):
        if slot:
            wanted_records[slot, 2] = max(0, records[slot, 2] - 1)
            if token >= 0 and records[slot, 6] and counts[slot, token] & 0x7FFF < 0x7FFF:
                wanted[slot, token] += 1
    shape = launch_shapes.one_thread_each(rows)
    args = sampled, slots, records, counts, I32(rows), I32(records.shape[1]), I32(counts.shape[1])
    backend.run("penalties.cu", "count_tokens", shape, args, (2, 3), SCALAR=0)
    assert np.array_equal(records, wanted_records)
    assert np.array_equal(counts, wanted)


@pytest.mark.parametrize("count", [1, 300])
def test_set_token_counts(backend, count: int) -> None:
    rng = np.random.default_rng(count)
    counts = np.zeros(1000, np.uint16)
    tokens = rng.permutation(1000)[:count]
    pairs = np.stack([tokens, rng.integers(1, 1 << 16, count)], 1).astype(I32)
    wanted = counts.copy()
    wanted[tokens] = pairs[:, 1]
    shape = launch_shapes.one_thread_each(count)
    backend.run("penalties.cu", "set_token_counts", shape, (pairs, counts, I32(count)), (1,),
                SCALAR=0)  # fmt: skip
    assert np.array_equal(counts, wanted)
