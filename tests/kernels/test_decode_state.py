"""The kernels that put the host's words, and a step's tokens, where the next step reads them."""

from __future__ import annotations

import numpy as np
import pytest

from nanocupy.ops import launch_shapes

I32 = np.int32


@pytest.mark.parametrize("count", [1, 31, 200])
def test_resolve_tokens(backend, count: int) -> None:
    rng = np.random.default_rng(count)
    sampled = rng.integers(0, 99, 40).astype(I32)
    sampled[3] = -1  # a row without a token
    token_ids = rng.integers(-40, 99, count).astype(I32)
    wanted = [t if t >= 0 else max(int(sampled[-1 - t]), 0) for t in token_ids.tolist()]
    shape = launch_shapes.advance_decode_state(count)
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
    shape = launch_shapes.advance_decode_state(count)
    args = (updates, state, I32(count))
    backend.run("decode_state.cu", "apply_updates", shape, args, (1,), SCALAR=0)
    assert (state == wanted).all()
