"""What must hold of requests between steps. Pure Python; for tests."""

from __future__ import annotations

from collections.abc import Iterable

from nanocupy.engine.request import Request, RequestState
from nanocupy.memory.block_pool import BlockPool


def check_waiting(pool: BlockPool, requests: Iterable[Request]) -> None:
    """Assert that those who wait have no blocks but what is swapped out, and that whole."""
    for request in requests:
        assert request.state in (RequestState.WAITING, RequestState.PREEMPTED)
        assert not request.block_ids, "a request that waits has blocks"
        num_blocks = pool.blocks_for(request.num_computed_tokens)
        assert len(request.host_block_ids) == num_blocks, "swapped out in part"


def check_running(pool: BlockPool, requests: Iterable[Request], max_preemptions: int) -> None:
    """Assert that those who run have blocks for what is computed, and those who keep their places
    for all that can come."""
    for request in requests:
        assert request.state is RequestState.RUNNING
        keeps_place = request.num_preemptions >= max_preemptions
        num_tokens = request.max_total_tokens if keeps_place else request.num_computed_tokens
        assert len(request.block_ids) >= pool.blocks_for(num_tokens), "tokens without a block"
        assert request.num_preemptions <= max_preemptions
