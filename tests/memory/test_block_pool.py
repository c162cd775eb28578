"""The block pool: nothing is lost, nothing is handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanocupy.errors import CapacityError
from nanocupy.memory.block_pool import NULL_BLOCK, BlockPool


@given(st.lists(st.integers(-8, 12), max_size=60), st.integers(2, 30))
def test_allocate_and_free_keep_integrity(actions, num_blocks):
    pool = BlockPool(num_blocks, 16)
    held: list[list[int]] = []
    for action in actions:
        if action < 0 and held:
            pool.free(held.pop(-action % len(held)))
        elif action > 0:
            free = pool.num_free
            if action > free:
                with pytest.raises(CapacityError, match=f"{action} cache blocks"):
                    pool.allocate(action)
                assert pool.num_free == free
            else:
                held.append(pool.allocate(action))
        pool.check_integrity()
        ids = [block_id for blocks in held for block_id in blocks]
        assert len(ids) == len(set(ids))
        assert NULL_BLOCK not in ids
        assert pool.num_free + len(ids) == num_blocks - 1


def test_freeing_twice_is_refused():
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(KeyError):
        pool.free(blocks)


def test_blocks_for():
    pool = BlockPool(4, 16)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_a_pool_that_holds_nothing_is_refused():
    with pytest.raises(CapacityError, match="1 blocks"):
        BlockPool(1, 16)
