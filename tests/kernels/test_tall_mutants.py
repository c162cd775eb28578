"""Bugs planted in the product of gate and up for prompts: each must be found by a call that passes
without it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from nanocupy.ops.launch_tall import TallTuning
from tests.kernels.backends import ShimBackend
from tests.kernels.tall_runs import SMALL, check
from tests.ops.cases import DTYPES
from tests.shim import build
from tests.shim.build import KERNELS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

SHARED = replace(SMALL, sharers=2, group_rows=256)
FOUR = replace(SMALL, sharers=4, group_rows=512)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the sources. Found with weights [2 * outputs, inputs]."""

    name: str
    old: str
    new: str
    tuning: TallTuning = SMALL
    rows: int = 300
    outputs: int = 264
    inputs: int = 584
    multiprocessors: int = 2


MUTANTS = [
    Mutant("a stage is not waited for", "mbarrier_wait(bars->full + place.stage, place.parity);",
           ""),
    Mutant("a stage is filled before it is free",
           "mbarrier_wait(bars->free + place.stage, place.parity ^ 1);", ""),
    Mutant("a stage is free before it was read", "wgmma_wait<1>();", "wgmma_wait<2>();"),
    Mutant("the stage of the step at work is free", "if (!is_first) free_stage(before);",
           "if (!is_first) free_stage(place.stage);"),
    Mutant("the first step frees a stage again", "if (!is_first) free_stage(before);",
           "free_stage(before);"),
    Mutant("the last step frees none", "free_stage(before);\n        results.take(sums);",
           "results.take(sums);"),
    Mutant("the last products are not waited for",
           "wgmma_wait<0>();\n        hold_registers(sums);\n", ""),
    Mutant("sums of the tile before", "start_step(unit > 0);", "start_step(true);"),
    Mutant("the first step is lost", "start_step(unit > 0);", "start_step(unit > 1);"),
    Mutant("steps behind the results' are lost", "step = UNITS; step < num_steps;",
           "step = UNITS + 1; step < num_steps;"),
    Mutant("sums without the inputs of a step", "adds || k > 0);", "adds && k > 0);"),
    Mutant("the same inputs again", "operand_at(a, k * 32)", "operand_at(a, 0)"),
    Mutant("warpgroups of the same rows", "shared_address(ring) + warp / 4 * 64 * 128",
           "shared_address(ring)"),
    Mutant("rows of up are those of gate", "matrix.num_outputs + output);", "output);"),
    Mutant("inputs of the first step", "const int k = step * K_STEP;", "const int k = 0;"),
    Mutant("results of the tile that is at work", "        matrix.find(index, share, results.row, "
           "results.output);  // of what is taken next\n", ""),
    Mutant("the last tile is not stored", "for (int unit = 0; unit < UNITS; ++unit) results.store",
           "for (int unit = 0; unit < 0; ++unit) results.store"),
    Mutant("a part of the last tile is not stored",
           "for (int unit = 0; unit < UNITS; ++unit) results.store",
           "for (int unit = 1; unit < UNITS; ++unit) results.store"),
    Mutant("the second rows are the first", "const int h = unit / 4,", "const int h = 0,"),
    Mutant("the second rows in place of the first", "lane_row + 8 * h, at", "lane_row, at"),
    Mutant("outputs of the wrong lane", "(first + lane_id() % 4) * 8",
           "(first + 3 - lane_id() % 4) * 8"),
    Mutant("lanes do not exchange", "        exchange_four(four);\n", ""),
    Mutant("a row too many", "at_row < matrix.num_rows &&", "at_row <= matrix.num_rows &&"),
    Mutant("outputs too many", "&& at < matrix.num_outputs)", "&& at <= matrix.num_outputs)"),
    Mutant("gate and up are exchanged", "swiglu(gates[0], ups[0])", "swiglu(ups[0], gates[0])"),
    Mutant("up of the next output", "swiglu(gates[1], ups[1])", "swiglu(gates[1], ups[0])"),
    Mutant("the base of another exponential", "LOG2_E = 1.44", "LOG2_E = 1.54"),
    Mutant("up is not its part of the sums", "constexpr int UP = OUT_TILE / 8;",
           "constexpr int UP = 0;"),
    Mutant("a tile is left out", "index < num_tiles; index += clusters) {\n        int row",
           "index < num_tiles - 1; index += clusters) {\n        int row"),
    Mutant("rows of a tile that is in another group", "rows = min(group, row_tiles() - first)",
           "rows = group", replace(SMALL, group_rows=256)),
    Mutant("groups begin at the first tile", "((first + within % rows)", "((within % rows)"),
    Mutant("both have the same rows", "* SHARERS + share) * ROW_TILE", "* SHARERS) * ROW_TILE",
           SHARED),
    Mutant("half of the weights twice", "full, (1 << SHARERS) - 1, k, weight);",
           "full, (1 << SHARERS) - 1, k, output);", SHARED),
    Mutant("parts in the same place", "weights_to + part * 128,", "weights_to,", SHARED),
    Mutant("weights for one alone", "full, (1 << SHARERS) - 1, k,", "full, 1, k,", SHARED),
    Mutant("parts of up lie with those of gate", "output + part - OUT_TILE;", "output + part;",
           FOUR, rows=520, multiprocessors=4),
    Mutant("the second part of gate is the first", "? output + part\n", "? output\n", FOUR,
           rows=520, multiprocessors=4),
    Mutant("a stage is free when one of two blocks has read it", "WARPS * SHARERS);", "WARPS);",
           SHARED),
    Mutant("only the first is told that a stage is free",
           "if (lane < SHARERS) mbarrier_arrive_at_rank(bars->free + stage, lane);",
           "if (lane < SHARERS) mbarrier_arrive_at_rank(bars->free + stage, 0);", SHARED),
    Mutant("copies to a block that has not started",
           "        cluster_arrive();\n        cluster_wait();\n", "", SHARED),
    Mutant("a block ends while others need it", "if (SHARERS > 1) cluster_sync();", "", SHARED),
    Mutant("the second warpgroup never begins", "mbarrier_init(&bars->begun, 4);",
           "mbarrier_init(&bars->begun, 5);"),
    Mutant("more is expected than comes", "mbarrier_arrive_expecting(full, STAGE_BYTES);",
           "mbarrier_arrive_expecting(full, STAGE_BYTES + 16);"),
    Mutant("less is expected than comes", "mbarrier_arrive_expecting(full, STAGE_BYTES);",
           "mbarrier_arrive_expecting(full, STAGE_BYTES - 16);"),
]  # fmt: skip


def sources() -> str:
    text = (KERNELS / "tall.cu").read_text()
    header = (KERNELS / "tall.cuh").read_text().replace("#pragma once", "")
    assert text.count('#include "tall.cuh"') == 1
    return text.replace('#include "tall.cuh"', header)


def run(mutant: Mutant, text: str) -> None:
    backend = ShimBackend(orders=(0, 1, 1005), changed={"tall.cu": text})
    check(
        backend.run, DTYPES["bfloat16"], mutant.rows, mutant.outputs, mutant.inputs,
        tuning=mutant.tuning, num_multiprocessors=mutant.multiprocessors,
    )  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_bugs_are_found(mutant: Mutant) -> None:
    from tests.shim.driver import KernelFault

    text = sources()
    run(mutant, text)
    assert text.count(mutant.old) == 1, f"{text.count(mutant.old)} places match {mutant.old!r}"
    with pytest.raises((AssertionError, KernelFault)):
        run(mutant, text.replace(mutant.old, mutant.new))
