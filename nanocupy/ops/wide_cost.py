"""What a product of `launch_wide` takes, guessed: by which tile, splits and sharers are chosen.

Rates are of an H100, taken from such products with 128 tokens; but for the merge's, which are a
guess. Only what they say of one choice beside another matters.
"""

from __future__ import annotations

from dataclasses import dataclass

# KB (1000 bytes) a microsecond and multiprocessor: from memory, and from L2 (weights that came from
# memory pass through it too), while all read; what one takes in, while fewer do: 87 of 16 that did
# (10.7 us for 0.79 MB each, 15.2 for 1.18), 55 of 64. Tensor cores multiply that many pairs.
_MEMORY_RATE, _L2_RATE, _INTAKE_RATE, _PRODUCT_RATE = 21.0, 43.0, 65.0, 3.5e6
# Microseconds of a kernel beside its copies: its start, the first copy, the last store.
_KERNEL_US = 1.7
# A merge: of what a block sends to others, and of their barrier and the last on its way.
_CLUSTER_RATE, _MERGE_US = 25.0, 0.7
# Where blocks end and others take their place.
_TURN_US = 1.0
_MANY_TURNS = 3  # after which it does not matter where the last blocks end
# Of blocks that get the same inputs and so keep step, for each but the first.
_SHARE_US = 0.7
# Of all multiprocessors, those that clusters of so many find, one block on each.
_PLACED = {1: 1.0, 2: 1.0, 4: 0.91, 8: 0.85}
# Warpgroups: two such blocks are on a multiprocessor, one copies while the other ends.
_TWO_BLOCKS = 2


def warpgroups(tile: int, tokens: int) -> int:
    """That a block of `tile` rows of weights has."""
    return tile // 64 * (2 if tokens > 128 else 1)


@dataclass(frozen=True)
class WideShape:
    """Weights [weight_rows, num_inputs] on a card."""

    weight_rows: int
    num_inputs: int
    num_multiprocessors: int

    @property
    def num_steps(self) -> int:
        return -(-self.num_inputs // 64)

    def num_tiles(self, tile: int) -> int:
        return -(-self.weight_rows // tile)

    def cost(self, tokens: int, tile: int, splits: int, sharers: int) -> float:
        """Microseconds."""
        all_blocks = -(-self.num_tiles(tile) // sharers) * sharers * splits
        places = self.num_multiprocessors * _PLACED[splits * sharers]
        share = all_blocks / places
        turns = share if share > _MANY_TURNS else -(-share // 1)
        inputs = -(-self.num_steps // splits) * 64  # of a block
        intake = turns * 2 * inputs * (tile + tokens) / _INTAKE_RATE / 1e3
        products = turns * inputs * tile * tokens / _PRODUCT_RATE
        asked = all_blocks * 2 * inputs * (tile + tokens / sharers)
        from_l2 = asked / self.num_multiprocessors / _L2_RATE / 1e3
        stored = 2 * self.weight_rows * self.num_inputs
        from_memory = stored / self.num_multiprocessors / _MEMORY_RATE / 1e3
        sent = 4 * tile * tokens * (splits - 1) / splits / 1e3
        merge = sent / _CLUSTER_RATE + _MERGE_US if splits > 1 else 0.0
        ends = turns * (merge + (sharers - 1) * _SHARE_US)
        if warpgroups(tile, tokens) > _TWO_BLOCKS:
            ends += (turns - 1) * _TURN_US
        # What is not waited for costs a little too.
        parts = intake, products, from_l2, from_memory
        return _KERNEL_US + max(parts) + sum(parts) / 100 + ends
