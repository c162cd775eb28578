"""Host memory for blocks of preempted requests, and whether copying beats computing again.

Ids and estimates only; the runner has the memory, and makes the copies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

PreemptionMode = Literal["auto", "swap", "recompute"]


@dataclass(frozen=True)
class SwapCosts:
    """What preemption costs on this machine: bytes of one block over all layers, bytes a second
    between device and host, prompt tokens computed in a second."""

    block_bytes: int = 1 << 20
    copy_bytes_per_s: float = 20e9
    prefill_tokens_per_s: float = 20e3

    def swap_seconds(self, num_blocks: int) -> float:
        """There and back again."""
        return 2 * num_blocks * self.block_bytes / self.copy_bytes_per_s

    def recompute_seconds(self, num_tokens: int) -> float:
        return num_tokens / self.prefill_tokens_per_s


def prefers_swap(mode: PreemptionMode, costs: SwapCosts, num_blocks: int, num_tokens: int) -> bool:
    """Whether a request with `num_tokens` computed in `num_blocks` should be swapped out.
    num_tokens leaves out what the prefix cache will most likely still have."""
    if mode == "auto":
        return costs.swap_seconds(num_blocks) < costs.recompute_seconds(num_tokens)
    return mode == "swap"


class HostPool:
    """`num_blocks` blocks in host memory, 0 … num_blocks - 1; none at all is fine."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or None where fewer are free."""
        if count > len(self._free):
            return None
        block_ids = [self._free.pop() for _ in range(count)]
        self._held.update(block_ids)
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Give blocks back; KeyError for one that is not held."""
        for block_id in block_ids:
            self._held.remove(block_id)
            self._free.append(block_id)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that exactly the blocks `held` are, each once, and all others are free."""
        held = list(held)
        assert len(held) == len(set(held)), "a host block is held twice"
        assert set(held) == self._held, "a host block is held by nobody"
        assert len(self._free) == len(set(self._free)), "a host block is free twice"
        assert self._held.isdisjoint(self._free), "a host block is free and held"
        assert len(self._free) + len(held) == self.num_blocks, "a host block is lost"
