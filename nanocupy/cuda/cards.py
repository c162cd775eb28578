"""What the cards of an architecture have, for compiling kernels where there is none.

Which builds of a kernel a card needs depends a little on how many multiprocessors it has. Those of
a card that is not listed are mostly the same, and what is missing is compiled when it first runs.
"""

from __future__ import annotations

import re

from nanocupy.errors import ConfigError
from nanocupy.ops.cuda_sizes import DeviceTraits

# Compute capability -> (KiB of shared memory a block can have, multiprocessors of common cards).
_CARDS: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {
    (7, 5): (64, (36, 40, 46, 68, 72)),
    (8, 0): (163, (56, 108)),
    (8, 6): (99, (28, 46, 68, 72, 82, 84)),
    (8, 9): (99, (24, 46, 58, 76, 128, 142)),
    (9, 0): (227, (114, 132)),
    (10, 0): (227, (148,)),
    (12, 0): (99, (36, 70, 84, 170, 188)),
}
# (compute capability, multiprocessors) -> DeviceTraits.memory_bytes_per_cycle of cards that get a
# build of their own by it: GH200 and H100 NVL, H200; B200.
_QUICK_MEMORIES = {((9, 0), 132): (2031.0, 2431.0), ((10, 0), 148): (3904.0,)}


def capability_of(arch: str) -> tuple[int, int]:
    """(9, 0) of "sm_90a", "90" or "9.0". Raises ConfigError for what is not known here."""
    digits = re.fullmatch(r"(?:sm_)?(\d{1,2})\.?(\d)[af]?", arch)
    capability = (int(digits[1]), int(digits[2])) if digits else None
    if capability not in _CARDS:
        known = ", ".join(f"sm_{major}{minor}" for major, minor in _CARDS)
        raise ConfigError(f"architecture {arch!r} is not known; known: {known}")
    return capability


def common_cards(capability: tuple[int, int]) -> list[DeviceTraits]:
    """The traits of cards of a capability that `capability_of` gives."""
    shared_kib, counts = _CARDS[capability]
    return [
        DeviceTraits(
            capability, count, shared_kib << 10, wgmma=capability == (9, 0),
            memory_bytes_per_cycle=bytes_per_cycle,
        )
        for count in counts
        for bytes_per_cycle in (0.0, *_QUICK_MEMORIES.get((capability, count), ()))
    ]  # fmt: skip
