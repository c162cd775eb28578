"""The prefix cache beside a model that remembers every content, and the host's pool."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocupy.engine.request import Request
from nanocupy.memory.block_pool import BlockPool
from nanocupy.memory.host_pool import HostPool, SwapCosts, prefers_swap
from nanocupy.memory.kv_memory import KVMemory
from nanocupy.memory.prefix_cache import PrefixCache, chained_hash
from nanocupy.sampling_params import SamplingParams

SIZE = 2


def make_memory(num_blocks: int = 12, hash_block=chained_hash, host_blocks: int = 4) -> KVMemory:
    pool = BlockPool(num_blocks, SIZE, PrefixCache(SIZE, hash_block))
    return KVMemory(pool, HostPool(host_blocks))


def make_request(ids: list[int], rope_base: int = 0) -> Request:
    return Request("", ids, SamplingParams(), 0, 100, rope_base=rope_base)


def compute(memory: KVMemory, request: Request) -> int:
    """Run a whole prompt; returns how many tokens the cache had."""
    found = memory.attach(request)
    request.num_computed_tokens = found
    memory.grow(request, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    memory.store(request)
    return found


def test_a_prompt_finds_what_it_shares_and_computes_a_token():
    memory = make_memory()
    ids = [1, 2, 3, 4, 5, 6]
    first = make_request(ids)
    assert compute(memory, first) == 0
    assert compute(memory, make_request([*ids, 7])) == 6
    assert compute(memory, make_request(ids)) == 4  # its last token must be computed
    assert compute(memory, make_request([1, 2, 9, 4, 5, 6])) == 2
    assert compute(memory, make_request([9, 2, 3, 4, 5, 6])) == 0  # equal blocks, other beginning
    assert memory.pool.num_holders(first.block_ids[0]) == 4


def test_another_rotary_base_is_another_content():
    memory = make_memory()
    assert compute(memory, make_request([1, 2, 3], rope_base=16)) == 0
    assert compute(memory, make_request([1, 2, 3], rope_base=17)) == 0
    assert compute(memory, make_request([1, 2, 3], rope_base=16)) == 2


def test_what_was_not_used_for_longest_goes_first_and_tails_before_heads():
    memory = make_memory(num_blocks=7)
    old, new = make_request([1, 1, 2, 2, 3]), make_request([4, 4, 5, 5, 6])
    for request in (old, new):
        compute(memory, request)
    for request in (old, new):
        memory.drop(request)
    assert memory.pool.num_free == 6
    assert len(memory.cache) == 4

    def found() -> list[int]:
        return [len(memory.cache.lookup(make_request(r.prompt_ids))) for r in (old, new)]

    memory.pool.allocate(2)  # those that were never full
    assert found() == [2, 2]
    for left in ([1, 2], [0, 2], [0, 1], [0, 0]):
        memory.pool.allocate(1)
        assert found() == left
    memory.pool.check_integrity()


def test_generated_tokens_are_remembered_too():
    memory = make_memory()
    request = make_request([1, 2, 3])
    compute(memory, request)
    request.append(4)
    request.num_computed_tokens = 4
    memory.store(request)
    assert compute(memory, make_request([1, 2, 3, 4, 5])) == 4


def test_a_token_that_was_not_read_yet_is_not_remembered():
    memory = make_memory()
    request = make_request([1, 2, 3])
    compute(memory, request)
    request.num_tokens = request.num_computed_tokens = 4
    memory.grow(request, 4)
    memory.store(request)
    assert len(memory.cache) == 1
    request.append(4)
    assert request.num_tokens == 4
    memory.store(request)
    assert len(memory.cache) == 2


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ccccdso"), st.integers(0, 99), st.integers(1, 9)), max_size=50
    ),
    st.sampled_from([1, 3, 1 << 20]),
)
def test_found_blocks_hold_the_tokens(actions, num_hashes):
    """`contents` is what a device's memory would hold: all tokens up to a block's end."""
    memory = make_memory(10, lambda before, tokens: hash((before, tokens)) % num_hashes)
    contents: dict[int, tuple[int, ...]] = {}
    host: dict[int, tuple[int, ...]] = {}
    running: list[Request] = []
    swapped: list[Request] = []
    for action, choice, length in actions:
        ids = [(choice >> (i // 3)) % 2 for i in range(length)]
        if action == "c":
            request = make_request(ids, rope_base=choice % 2)
            found = memory.attach(request)
            if memory.blocks_wanted(request, length) > memory.pool.num_free:
                memory.detach(request)
                continue
            request.num_computed_tokens = found
            memory.grow(request, length)
            running.append(request)
        elif action == "d" and running:
            memory.drop(running.pop(choice % len(running)))
        elif action == "s" and running:
            request = running[choice % len(running)]
            pairs = memory.swap_out(request)
            if pairs is not None:
                host |= {h: contents[b] for b, h in pairs}
                running.remove(request)
                swapped.append(request)
        elif action == "o" and swapped:
            request = swapped[choice % len(swapped)]
            memory.attach(request)
            num_attached = len(request.block_ids)
            if memory.blocks_wanted(request, request.num_tokens) > memory.pool.num_free:
                memory.detach(request)
                continue
            memory.grow(request, request.num_tokens)
            pairs, host_block_ids = memory.swap_in(request, num_attached)
            contents |= {b: host[h] for b, h in pairs}
            memory.host_pool.free(host_block_ids)
            swapped.remove(request)
            running.append(request)
        for request in running:
            start = request.num_computed_tokens
            base, ids = request.rope_base, request.prompt_ids
            for index, block_id in enumerate(request.block_ids):
                wanted = (base, *ids[: (index + 1) * SIZE])
                if (index + 1) * SIZE > start:
                    contents[block_id] = wanted
                assert contents[block_id] == wanted
            request.num_computed_tokens = len(ids)
            memory.store(request)
        memory.check_integrity([*running, *swapped], [])
    for request in [*running, *swapped]:
        memory.drop(request)
    assert memory.pool.num_free == 9
    assert memory.host_pool.num_free == 4


def test_sharing_and_freeing():
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    assert pool.num_sole(blocks) == 1
    pool.free(blocks)
    assert pool.num_free == 2
    pool.check_integrity([blocks[:1]])
    with pytest.raises(AssertionError, match="held by others"):
        pool.check_integrity([blocks])
    pool.free(blocks[:1])
    with pytest.raises(KeyError):
        pool.free(blocks[:1])


def test_the_host_pool():
    pool = HostPool(3)
    assert pool.allocate(4) is None
    blocks = pool.allocate(2)
    pool.check_integrity(blocks)
    with pytest.raises(AssertionError, match="held by nobody"):
        pool.check_integrity([])
    pool.free(blocks)
    with pytest.raises(KeyError):
        pool.free(blocks[:1])
    assert HostPool(0).allocate(1) is None


def test_the_cheaper_way_is_taken():
    costs = SwapCosts(block_bytes=1_000_000, copy_bytes_per_s=1e9, prefill_tokens_per_s=1000)
    assert costs.swap_seconds(5) == pytest.approx(0.01)  # there and back
    assert prefers_swap("auto", costs, 5, 11)
    assert not prefers_swap("auto", costs, 5, 9)
    assert prefers_swap("swap", costs, 5, 0)
    assert not prefers_swap("recompute", costs, 5, 10**6)
