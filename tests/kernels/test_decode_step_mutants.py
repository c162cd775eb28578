"""Bugs planted in the decode step of one launch: each must be found."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from tests.kernels.test_decode_step import CASES, ShimStep, check, make
from tests.shim import build
from tests.shim.build import KERNELS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the sources, where it is `times` times; found by the case of that name
    in test_decode_step."""

    name: str
    old: str
    new: str
    case: str = "two, norms of q and k"
    times: int = 1


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


def sources(old: str = "", new: str = "", times: int = 1) -> str:
    """The kernel's text with its own headers in place, changed."""
    seen = set()

    def include(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return text_of(name).replace("#pragma once", "")

    def text_of(name: str) -> str:
        return re.sub(r'#include "(decode_step_\w+\.cuh)"', include, (KERNELS / name).read_text())

    text = text_of("decode_step.cu")
    if old:
        assert text.count(old) == times, f"{old!r} is {text.count(old)} times in the sources"
    return text.replace(old, new) if old else text


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_planted_bugs_are_found(mutant: Mutant) -> None:
    from tests.shim.driver import KernelFault

    model, tuning = make(CASES[mutant.case], "bfloat16")
    found = []
    for order in (0, 1):
        check(model, model.launch(ShimStep(order, sources()), tuning))
        planted = ShimStep(order, sources(mutant.old, mutant.new, mutant.times))
        try:
            check(model, model.launch(planted, tuning))
        except (KernelFault, AssertionError) as exc:
            found.append(str(exc).splitlines()[0])
    assert found, "no step noticed it"
