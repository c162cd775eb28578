"""The pool of key/value cache blocks: ids handed out and taken back.

Block 0 is the null block: padding is written there, and nobody owns it. The pool knows ids only,
never what a block holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from nanocupy.errors import CapacityError

NULL_BLOCK = 0


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, the null block included."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise CapacityError(
                f"a cache of {num_blocks} blocks of {block_size} tokens holds no sequence; "
                "give it more memory"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(1, num_blocks))
        self._owned: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; raises CapacityError, and takes none, where fewer are free."""
        if count > len(self._free):
            raise CapacityError(f"{count} cache blocks wanted, {len(self._free)} free")
        block_ids = [self._free.popleft() for _ in range(count)]
        self._owned.update(block_ids)
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Give blocks back; they are reused in the order in which they are given."""
        for block_id in block_ids:
            self._owned.remove(block_id)
            self._free.append(block_id)

    def check_integrity(self) -> None:
        """Assert that every block but the null block is either free or owned, exactly once."""
        free = list(self._free)
        assert len(free) == len(set(free)), "a block is free twice"
        assert not set(free) & self._owned, "a block is free and owned"
        assert set(free) | self._owned == set(range(1, self.num_blocks)), "a block is lost"
