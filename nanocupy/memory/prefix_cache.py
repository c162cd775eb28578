"""What full blocks hold, so that a prompt that begins alike need not compute it again.

A block's content is its tokens and all before them: an entry names its block, its tokens and the
entry of the block before. A hash leads to an entry, but never decides: tokens and the entry before
must be the same, up to the root, which is the rotary base (`Request.rope_base`). Two contents of
one hash are not both kept; the first stays. The cache knows requests and ids, no arrays, and not
who holds which block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nanocupy.engine.request import Request

Tokens = tuple[int, ...]


def chained_hash(before: int, tokens: Tokens) -> int:
    """Hash of a block, given the hash of the block before it."""
    return hash((before, tokens))


@dataclass(slots=True)  # not frozen: those are dear to make, and a step makes some
class _Entry:
    """One cached block; never changed. parent: the number of the entry before it, or the root's,
    which is negative. Numbers are never used twice, so the entry of a block that was overwritten
    has no children any more."""

    number: int
    block_id: int
    hash: int
    parent: int
    tokens: Tokens


@dataclass
class PrefixCounters:
    """num_lookups: times a prompt was looked up; num_hits: those that found something; tokens that
    were looked up, and those that need not be computed."""

    num_lookups: int = 0
    num_hits: int = 0
    num_tokens: int = 0
    num_tokens_saved: int = 0


class PrefixCache:
    """Cached blocks of `block_size` tokens."""

    def __init__(
        self, block_size: int, hash_block: Callable[[int, Tokens], int] = chained_hash
    ) -> None:
        self.block_size = block_size
        self.counters = PrefixCounters()
        self._hash_block = hash_block
        self._by_hash: dict[int, _Entry] = {}
        self._by_block: dict[int, _Entry] = {}
        self._next_number = 0

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._by_block

    def __len__(self) -> int:
        return len(self._by_block)

    def lookup(self, request: Request, first_block: int = 0) -> list[int]:
        """Cached blocks that continue `request` from block `first_block` on, all before it being
        cached; never so many that no token is left to compute. Call `take` for those used."""
        entry_number = self._root(request) if not first_block else request.cache_parent
        block_ids: list[int] = []
        if entry_number is None:
            return block_ids
        for index in range(first_block, (request.num_known_tokens - 1) // self.block_size):
            entry = self._by_hash.get(self.block_hash(request, index))
            if entry is None or not self._is(entry, entry_number, request, index):
                break
            block_ids.append(entry.block_id)
            entry_number = entry.number
        return block_ids

    def take(self, request: Request, block_ids: list[int]) -> None:
        """Note that the blocks a lookup found are the request's next ones."""
        if block_ids:
            request.num_cached_blocks += len(block_ids)
            request.cache_parent = self._by_block[block_ids[-1]].number

    def store(self, request: Request) -> None:
        """Remember the request's full blocks, as far as they are computed and their ids known."""
        num_tokens = min(request.num_computed_tokens, request.num_known_tokens)
        num_full = num_tokens // self.block_size
        if num_full <= request.num_cached_blocks:
            return
        for index in range(request.num_cached_blocks, num_full):
            request.cache_parent = self._store_one(request, index)
        request.num_cached_blocks = num_full

    def entries(self, block_ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
        """(block, number of its entry) of those that have one; contents differ where numbers do."""
        by_block = self._by_block
        return tuple((b, by_block[b].number) for b in block_ids if b in by_block)

    def forget(self, block_id: int) -> None:
        """The block will be overwritten, or holds what nobody should use. What continues it is not
        found either from now on, as its parent's number is no entry's."""
        del self._by_hash[self._by_block.pop(block_id).hash]

    def reset(self, request: Request) -> None:
        """The request has given its blocks back."""
        request.num_cached_blocks = 0
        request.cache_parent = None

    def block_hash(self, request: Request, index: int) -> int:
        """Chained hash of the request's full block `index`; its ids must be known."""
        hashes = request.block_hashes
        while len(hashes) <= index:
            before = hashes[-1] if hashes else self._root(request)
            hashes.append(self._hash_block(before, self._tokens(request, len(hashes))))
        return hashes[index]

    def check_integrity(self) -> None:
        """Assert that both tables have the same entries."""
        assert len(self._by_hash) == len(self._by_block), "an entry is in one table only"
        for block_id, entry in self._by_block.items():
            assert entry.block_id == block_id, "an entry is another block's"
            assert self._by_hash[entry.hash] is entry, "an entry is in one table only"

    def check_tokens(self, request: Request) -> None:
        """Assert that no block of the request is remembered for other tokens than it holds."""
        for index, block_id in enumerate(request.block_ids):
            entry = self._by_block.get(block_id)
            if entry is not None:
                assert entry.tokens == self._tokens(request, index), "a cached block is another's"

    def _store_one(self, request: Request, index: int) -> int | None:
        """The number of the entry for block `index`, made where there is none; None where there
        can be none: another content has its hash, or the block before has no entry."""
        parent = self._root(request) if index == 0 else request.cache_parent
        if parent is None:
            return None
        tokens = self._tokens(request, index)
        hashes = request.block_hashes
        if 0 < index == len(hashes):  # the common case: the tokens are taken once
            hashes.append(self._hash_block(hashes[-1], tokens))
        block_hash, block_id = self.block_hash(request, index), request.block_ids[index]
        entry = self._by_hash.get(block_hash)
        if entry is not None:
            return entry.number if entry.parent == parent and entry.tokens == tokens else None
        assert block_id not in self._by_block, "a block is remembered twice"
        number = self._next_number
        self._next_number += 1
        entry = _Entry(number, block_id, block_hash, parent, tokens)
        self._by_hash[block_hash] = self._by_block[block_id] = entry
        return number

    def _is(self, entry: _Entry, parent: int, request: Request, index: int) -> bool:
        return entry.parent == parent and entry.tokens == self._tokens(request, index)

    def _tokens(self, request: Request, index: int) -> Tokens:
        start = index * self.block_size
        return tuple(request.token_slice(start, start + self.block_size))

    @staticmethod
    def _root(request: Request) -> int:
        return -1 - request.rope_base
