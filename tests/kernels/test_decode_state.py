"""What puts the host's words, and a step's tokens, where the next step reads them."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.ops import launch_shapes
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.small_ops import place_arguments, run_argmax, run_sample

I32 = np.int32


@pytest.mark.parametrize("count", [1, 31, 200])
def test_resolve_tokens(backend, count: int) -> None:
    rng = np.random.default_rng(count)
    sampled = rng.integers(0, 99, 40).astype(I32)
    sampled[3] = -1  # a row without a token
    token_ids = rng.integers(-40, 99, count).astype(I32)
    wanted = [t if t >= 0 else max(int(sampled[-1 - t]), 0) for t in token_ids.tolist()]
    shape = launch_shapes.one_thread_each(count)
    args = (token_ids, sampled, I32(count))
    backend.run("decode_state.cu", "resolve_tokens", shape, args, (0,), SCALAR=0)
    assert token_ids.tolist() == wanted


@pytest.mark.parametrize("count", [1, 33, 500])
def test_apply_updates(backend, count: int) -> None:
    rng = np.random.default_rng(count)
    state = rng.integers(0, 1000, 700).astype(I32)
    places = rng.permutation(700)[:count]
    updates = np.stack([places, rng.integers(-9, 9, count)], 1).astype(I32)
    wanted = state.copy()
    wanted[places] = updates[:, 1]
    shape = launch_shapes.one_thread_each(count)
    args = (updates, state, I32(count))
    backend.run("decode_state.cu", "apply_updates", shape, args, (1,), SCALAR=0)
    assert (state == wanted).all()


@pytest.mark.parametrize(
    "how",
    [("argmax", 1), ("argmax", 3), ("sample", 1), ("sample", 4)],
    ids=lambda h: f"{h[0]}{h[1]}",
)
def test_places_move_on(backend, how: tuple[str, int]) -> None:
    """Many steps of ragged sequences, beside a plain loop; free places and full tables stay. Rows
    are drawn greedily or not; one has no token."""
    rng = np.random.default_rng(2)
    num, columns, size, vocab = 90, 3, 4, 70
    tables = rng.permutation(np.arange(1, num * columns + 1)).astype(I32).reshape(num, columns)
    kv_lens = rng.integers(0, columns * size + 1, num).astype(I32)
    kv_lens[:4] = 0, columns * size, columns * size - 1, 2
    state = {
        "token_ids": rng.integers(0, 99, num).astype(I32),
        "positions": np.maximum(kv_lens - 1, 0).astype(I32),
        "kv_lens": kv_lens,
        "slots": np.zeros(num, I32),
        "rope_lens": rng.integers(1, 20, num).astype(I32),
        "counters": np.stack([kv_lens, np.arange(num)], 1).astype(np.uint32),
    }
    options = {
        "temperature": rng.choice([0, 1], num).astype(np.float32),
        "top_k": rng.choice([-1, 5], num).astype(I32),
        "top_p": rng.choice([1, 0.7], num).astype(np.float32),
        "min_p": np.zeros(num, np.float32),
        "seeds": np.arange(num, dtype=np.uint64),
    }
    for _ in range(5):
        logits = rng.standard_normal((num, vocab)).astype(np.float32)
        logits[3] = np.nan
        wanted = {name: array.copy() for name, array in state.items()}
        sampled = np.full(num, -7, I32)
        places = place_arguments(block_tables=tables, **state, block_size=size)
        if how[0] == "argmax":
            sampled = run_argmax(backend, logits, how[1], places)
        else:
            run_sample(
                backend, logits.dtype, None, logits=logits, **options, counters=None,
                out=sampled, ranks=how[1], places=places,
            )  # fmt: skip
            drawn = np.full(num, -7, I32)
            NumpyOps().sample(logits, **options, counters=wanted["counters"], out=drawn)
            np.testing.assert_array_equal(sampled, drawn)
        assert sampled[3] == -1
        for b in np.flatnonzero(wanted["kv_lens"]):
            wanted["token_ids"][b] = max(sampled[b], 0)
            position = int(wanted["positions"][b]) + 1
            if position == columns * size:
                wanted["slots"][b] = position % size
                continue
            wanted["positions"][b], wanted["kv_lens"][b] = position, position + 1
            wanted["slots"][b] = tables[b, position // size] * size + position % size
            wanted["rope_lens"][b] = max(wanted["rope_lens"][b], position + 1)
            wanted["counters"][b, 0] += 1
        for name, array in state.items():
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)
