"""The pool of key/value cache blocks: ids handed out, shared, taken back, remembered.

Block 0 is the null block: padding is written there, and nobody owns it. The pool counts how many
hold each block; what a block holds is the prefix cache's business. A block that nobody holds and
the prefix cache remembers is free too, and is handed out last, the one unused for longest first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

from nanocupy.errors import CapacityError
from nanocupy.memory.prefix_cache import PrefixCache

NULL_BLOCK = 0


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, the null block included. Without `cache`,
    blocks are forgotten when they are freed."""

    def __init__(self, num_blocks: int, block_size: int, cache: PrefixCache | None = None) -> None:
        if num_blocks < 2 or block_size < 1:
            raise CapacityError(
                f"a cache of {num_blocks} blocks of {block_size} tokens holds no sequence; "
                "give it more memory"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.cache = cache
        self._free = deque(range(1, num_blocks))
        self._remembered: OrderedDict[int, None] = OrderedDict()  # unused for longest first
        self._holders: dict[int, int] = {}  # block -> how many hold it

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free) + len(self._remembered)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def num_holders(self, block_id: int) -> int:
        return self._holders.get(block_id, 0)

    def num_sole(self, block_ids: Iterable[int]) -> int:
        """How many of a holder's blocks nobody else holds: freeing them makes room."""
        return sum(self._holders[block_id] == 1 for block_id in block_ids)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; raises CapacityError, and takes none, where fewer are free."""
        if count > self.num_free:
            raise CapacityError(f"{count} cache blocks wanted, {self.num_free} free")
        block_ids = []
        for _ in range(count):
            if self._free:
                block_id = self._free.popleft()
            else:
                block_id, _ = self._remembered.popitem(last=False)
                assert self.cache is not None
                self.cache.forget(block_id)
            self._holders[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Hold blocks that others hold, or that are only remembered, as well."""
        for block_id in block_ids:
            if block_id in self._holders:
                self._holders[block_id] += 1
            else:
                del self._remembered[block_id]
                self._holders[block_id] = 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Hold blocks no longer. Give the tail of a sequence first: blocks are reused in the order
        in which they are given, and a prefix is worth more than what follows it."""
        for block_id in block_ids:
            if self._holders[block_id] > 1:
                self._holders[block_id] -= 1
                continue
            del self._holders[block_id]
            if self.cache is not None and block_id in self.cache:
                self._remembered[block_id] = None
            else:
                self._free.append(block_id)

    def forgotten(self, block_id: int) -> None:
        """The prefix cache remembers the block no longer; nobody need hold it."""
        if block_id in self._remembered:
            del self._remembered[block_id]
            self._free.append(block_id)

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that every block but the null block is free, remembered or held, exactly once;
        with `tables`, all block tables there are, that the holders of each block are those."""
        free, remembered = list(self._free), set(self._remembered)
        held = set(self._holders)
        assert len(free) == len(set(free)), "a block is free twice"
        assert not set(free) & held, "a block is free and held"
        assert not remembered & (held | set(free)), "a remembered block is free or held"
        assert set(free) | remembered | held == set(range(1, self.num_blocks)), "a block is lost"
        if tables is not None:
            counted = Counter(block_id for table in tables for block_id in table)
            assert counted == self._holders, "a block is held by others than who holds it"
        if self.cache is not None:
            assert not any(block_id in self.cache for block_id in free), "a free block is cached"
            assert all(block_id in self.cache for block_id in remembered), "a block is not cached"
            self.cache.check_integrity()
