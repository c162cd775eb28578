"""The blocks of requests: taken as tokens come, found in the prefix cache, swapped, given back.

It does what the scheduler decides, and decides nothing. Pure Python: ids and counts.
"""

from __future__ import annotations

from collections.abc import Iterable

from nanocupy.engine.request import Request
from nanocupy.memory.block_pool import BlockPool
from nanocupy.memory.host_pool import HostPool
from nanocupy.memory.prefix_cache import PrefixCache

BlockPair = tuple[int, int]  # block of the cache, block of the host's pool


class KVMemory:
    """The pool, with its prefix cache where it has one, and the host's pool."""

    def __init__(self, pool: BlockPool, host_pool: HostPool | None = None) -> None:
        self.pool = pool
        self.cache: PrefixCache | None = pool.cache
        self.host_pool = host_pool or HostPool(0)

    def blocks_wanted(self, request: Request, num_tokens: int) -> int:
        """Blocks that `request` lacks to hold `num_tokens` tokens."""
        return max(0, self.pool.blocks_for(num_tokens) - len(request.block_ids))

    def grow(self, request: Request, num_tokens: int) -> None:
        """Give `request` blocks for `num_tokens` tokens; they must be free."""
        request.block_ids += self.pool.allocate(self.blocks_wanted(request, num_tokens))

    def attach(self, request: Request) -> int:
        """Let a request without blocks share those the prefix cache has for it. Returns how many
        tokens it need neither compute nor, if it is swapped out, copy back; `detach` undoes it."""
        assert not request.block_ids
        if not request.host_block_ids:
            request.taken_block_ids.clear()  # not before: a step in flight may still fail with them
        if self.cache is None or request.needs_whole_prompt:
            return 0
        self._share(request, self.cache.lookup(request))
        return len(request.block_ids) * self.pool.block_size

    def detach(self, request: Request) -> None:
        """Undo `attach`."""
        taken = request.taken_block_ids
        del taken[len(taken) - len(request.block_ids) :]
        self._give_back(request)

    def count_hit(self, request: Request, num_tokens: int) -> None:
        """Count a lookup that found `num_tokens` tokens, in the prefix cache's counters."""
        if self.cache is not None:
            counters = self.cache.counters
            counters.num_lookups += 1
            counters.num_tokens += request.num_known_tokens
            counters.num_hits += num_tokens > 0
            counters.num_tokens_saved += num_tokens

    def skip_cached(self, request: Request) -> None:
        """Move a running request that is about to begin a block past blocks that others have
        computed meanwhile."""
        cache, index = self.cache, len(request.block_ids)
        if cache is None or request.num_cached_blocks != index or request.needs_whole_prompt:
            return
        if request.num_computed_tokens != index * self.pool.block_size:
            return
        block_ids = cache.lookup(request, index)
        self._share(request, block_ids)
        num_tokens = len(block_ids) * self.pool.block_size
        request.num_computed_tokens += num_tokens
        cache.counters.num_tokens_saved += num_tokens

    def store(self, request: Request) -> None:
        """Remember the request's full blocks, as far as they are computed and known."""
        if self.cache is not None and not request.is_retry:
            self.cache.store(request)

    def forget(self, request: Request) -> None:
        """Have nobody find what this request has computed. Who holds it already keeps it."""
        if self.cache is not None:
            for block_id in set(request.block_ids).difference(request.taken_block_ids):
                if block_id in self.cache:
                    self.cache.forget(block_id)

    def suspects(self, request: Request) -> tuple[tuple[int, int], ...]:
        """What the request took from the prefix cache and is still there: blocks and entries."""
        return () if self.cache is None else self.cache.entries(request.taken_block_ids)

    def condemn(self, request: Request) -> None:
        """The request got tokens without its suspects, and none with them: have nobody find them.
        Blocks that nobody holds are free."""
        for block_id, number in request.suspects if self.cache is not None else ():
            if self.cache.entries([block_id]) == ((block_id, number),):
                self.cache.forget(block_id)
                self.pool.forgotten(block_id)

    def swap_out(self, request: Request) -> list[BlockPair] | None:
        """Exchange the request's blocks for blocks of the host. Returns the copies to make, or
        None, and changes nothing, where the host has too few."""
        num_blocks = self.pool.blocks_for(request.num_computed_tokens)
        host_block_ids = self.host_pool.allocate(num_blocks)
        if host_block_ids is None:
            return None
        pairs = list(zip(request.block_ids[:num_blocks], host_block_ids, strict=True))
        self._give_back(request)
        request.host_block_ids = host_block_ids
        return pairs

    def swap_in(self, request: Request, num_attached: int) -> tuple[list[BlockPair], list[int]]:
        """The copies that bring a request back that has blocks again, the first `num_attached` of
        them from the prefix cache; and its host blocks, to be freed when they are done."""
        num_blocks = self.pool.blocks_for(request.num_computed_tokens)
        host_block_ids, request.host_block_ids = request.host_block_ids, []
        pairs = zip(request.block_ids, host_block_ids, strict=False)
        return list(pairs)[num_attached:num_blocks], host_block_ids

    def drop(self, request: Request) -> None:
        """Give all blocks of the request back, those of the host too."""
        self._give_back(request)
        self.host_pool.free(request.host_block_ids)
        request.host_block_ids = []

    def check_integrity(
        self, requests: Iterable[Request], host_blocks_in_flight: Iterable[int]
    ) -> None:
        """Assert that all blocks are accounted for; `requests`: all that may have any."""
        requests = list(requests)
        self.pool.check_integrity(request.block_ids for request in requests)
        host = [block_id for request in requests for block_id in request.host_block_ids]
        self.host_pool.check_integrity([*host, *host_blocks_in_flight])
        for request in requests:
            assert not (request.block_ids and request.host_block_ids), "blocks here and there"
            if self.cache is not None:
                self.cache.check_tokens(request)

    def _share(self, request: Request, block_ids: list[int]) -> None:
        assert self.cache is not None
        self.pool.share(block_ids)
        self.cache.take(request, block_ids)
        request.taken_block_ids += block_ids
        request.block_ids += block_ids

    def _give_back(self, request: Request) -> None:
        self.pool.free(reversed(request.block_ids))
        request.block_ids = []
        if self.cache is not None:
            self.cache.reset(request)
