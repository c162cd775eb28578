"""Bugs planted in the decode step of one launch: each must be found."""

from __future__ import annotations

import pytest

from tests.kernels.decode_step_mutants import Mutant, assert_is_found
from tests.shim import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

MUTANTS = [
    Mutant(
        "no wait for room in the ring",
        "mbarrier_wait(&memory.is_free[place.stage], place.phase ^ 1);",
        "",
        "inputs beyond a stage",
        times=2,  # once of codes
    ),
    Mutant(
        "no wait for a stage of weights",
        "mbarrier_wait(&memory.is_full[own.stage], own.phase);",
        "",
        times=2,
    ),
    Mutant(
        "a row of weights is not announced",
        "mbarrier_arrive_expecting(full, rows * bytes)",
        "mbarrier_arrive_expecting(full, (rows - 1) * bytes)",
    ),
    Mutant(
        "words of any moment are taken",
        "return static_cast<uint32_t>(word >> 32) ^ moment;",
        "return 0;",
    ),
    Mutant(
        "the share of another product",
        "step_memory().shares[product.kind];",
        "step_memory().shares[QKV];",
    ),
    Mutant(
        "no barrier before sums are added up",
        "        users_sync();\n        float sum = 0.0f, second",
        "        float sum = 0.0f, second",
    ),
    Mutant(
        "no barrier between the sums of squares",
        "if (lane_id() == 0) sums[warp_id()] = sum;\n    users_sync();",
        "if (lane_id() == 0) sums[warp_id()] = sum;",
    ),
    Mutant(
        "the newest position is another part's",
        "newest / STEP_TOKENS % item.parts == item.part;",
        "item.part == 1;",
        "several parts",
    ),
    Mutant(
        "all keys go to the first sequence's slot",
        "memory.slots[item.sequence], item.group",
        "memory.slots[0], item.group",
    ),
    Mutant(
        "the block table of the first sequence",
        "static_cast<int64_t>(item.sequence) * a.table_width;",
        "0;",
        "parts of two",
    ),
    Mutant(
        "a part's last warps are left out",
        "(steps - item.part + item.parts - 1) / item.parts",
        "(steps - item.part) / item.parts",
        "several parts",
    ),
    Mutant(
        "no barrier before the warps' sums are merged",
        "    users_sync();\n    const int steps =",
        "    const int steps =",
        "several parts",
    ),
    Mutant("lower sums of the wrong lane", "shuffle_xor(lower, 2)", "shuffle_xor(lower, 1)"),
    Mutant(
        "gate and up change places",
        "row / 2 + row % 2 * product.num_outputs",
        "row / 2 + (1 - row % 2) * product.num_outputs",
    ),
    Mutant(
        "sums of the other group",
        "0 : unit % 2 * GROUP_WARPS",
        "0 : 0",
        "biases, an odd vocabulary",
    ),
    Mutant(
        "the norm of the layer before",
        "request_norm(is_last ? final_norm : next.attention_norm, hidden_size);",
        "request_norm(next.attention_norm, hidden_size);",
    ),
    Mutant(
        "the last part of a context is not merged",
        "part < parts; part += PARTS_AHEAD",
        "part < parts - 1; part += PARTS_AHEAD",
        "several parts",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_planted_bugs_are_found(mutant: Mutant) -> None:
    assert_is_found(mutant)
