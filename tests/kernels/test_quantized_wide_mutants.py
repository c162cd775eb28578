"""Bugs planted in the products of up to 64 tokens with packed codes by warpgroups: each must be
found by a call that passes without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from nanocupy.ops.launch_quantized_wide import WideCodesTuning
from tests.kernels.quantized_wide_runs import ENTRIES, SMALL, check_op, make_call
from tests.ops.cases import DTYPES
from tests.shim import build
from tests.shim.build import KERNELS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HEADERS = ("quantized_wide.cuh", "quantized_wide_parts.cuh")
SPLIT = replace(SMALL, splits=4)
TWO_STRIPS = replace(SMALL, out_tile=128)  # of a warp
TWO_GROUPS = replace(SMALL, out_tile=128, warpgroups=2)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the sources. Found by `op` on weights [outputs, inputs]."""

    name: str
    old: str
    new: str
    op: str = "norm_linear"
    kind: str = "int4"
    group_size: int | None = 32
    rows: int = 17
    outputs: int = 150
    inputs: int = 1440
    tuning: WideCodesTuning = SMALL


MUTANTS = [
    Mutant(
        "chunks not waited for",
        "cp_async_wait<STAGES * ROW_TILES - 1>();",
        "cp_async_wait<STAGES * ROW_TILES>();",
    ),
    Mutant("scales of other lanes", "warp_sync();  // other lanes copied scales", ""),
    Mutant("inputs not waited for", "mbarrier_wait(bars->full + place.stage, place.parity);", ""),
    Mutant(
        "inputs of the round before",
        "mbarrier_wait(bars->full + place.stage, place.parity);",
        "mbarrier_wait(bars->full + place.stage, 0);",
    ),
    Mutant(
        "a place is filled before it is free",
        "mbarrier_wait(bars->free + place.stage, place.parity ^ 1);",
        "",
    ),
    Mutant(
        "the place at work is free",
        "mbarrier_arrive(bars->free + stage_before);",
        "mbarrier_arrive(bars->free + place.stage);",
    ),
    Mutant(
        "a place is free when one of two groups has read it",
        "mbarrier_init(bars->free + i, WARPS_N);",
        "mbarrier_init(bars->free + i, 4);",
        tuning=TWO_GROUPS,
    ),
    Mutant(
        "inputs of one of the warps that fetch",
        "mbarrier_init(bars->full + i, FETCH_WARPS);",
        "mbarrier_init(bars->full + i, 1);",
    ),
    Mutant(
        "inputs that have not landed",
        "cp_async_wait<INPUTS_AHEAD>();",
        "cp_async_wait<INPUTS_AHEAD + 1>();",
    ),
    Mutant(
        "sums of inputs that other lanes copied",
        "        warp_sync();\n        if (WEIGHT_KIND == 1) sum(",
        "        if (WEIGHT_KIND == 1) sum(",
    ),
    Mutant(
        "registers written while products use them",
        "wgmma_wait<1>();  // the registers of the unit before the last are free",
        "",
        group_size=128,
        inputs=1408,
    ),
    Mutant(
        "a group's products not waited for",
        "wgmma_wait<0>();\n                    hold_registers(group);\n",
        "hold_registers(group);\n",
    ),
    Mutant(
        "the last products not waited for",
        "wgmma_wait<0>();\n    hold_registers(group);",
        "hold_registers(group);",
    ),
    Mutant(
        "the last group is lost",
        "    pending.add(own.sums[ROW_TILES - 1], group);\n}",
        "}",
        inputs=1408,
    ),
    Mutant("sums of a group go on", "!begins || k > 0);", "1);"),
    Mutant(
        "a group begins with each unit",
        "!begins || k > 0);",
        "k > 0);",
        group_size=128,
        inputs=1408,
    ),
    Mutant(
        "the sums of the strip after", "(m + ROW_TILES - 1) % ROW_TILES", "m", tuning=TWO_STRIPS
    ),
    Mutant(
        "the second strip is the first",
        "unsigned char* const source = from + m * strip_bytes;",
        "unsigned char* const source = from;",
        tuning=TWO_STRIPS,
    ),
    Mutant(
        "a strip beyond the matrix copied",
        "if (steps_left > 0 && m < num_strips) {",
        "if (steps_left > 0) {",
        tuning=TWO_STRIPS,
    ),
    Mutant(
        "codes of the first chunks in every block",
        "share.first_step * CHUNK_BYTES + lane_id()",
        "lane_id()",
        tuning=SPLIT,
    ),
    Mutant(
        "inputs of the first chunks in every block",
        "(share.first_step + step) * CHUNK + lane * 2;",
        "step * CHUNK + lane * 2;",
        tuning=SPLIT,
    ),
    Mutant("strips of the first tile", "share.first_tile * (OUT_TILE / STRIP) +", ""),
    Mutant("the same chunk again", "        from += CHUNK_BYTES;\n", ""),
    Mutant(
        "a ring that does not go round",
        "place = place == RING_BYTES - STAGE_CODES ? 0 : place + STAGE_CODES;",
        "place = place == RING_BYTES ? 0 : place + STAGE_CODES;",
    ),
    Mutant(
        "words in their natural order",
        "(lane / 16 * 4 + lane % 4) * 16 + lane / 4 % 4 * 4;",
        "lane * 4;",
    ),
    Mutant("pieces not exchanged", "(place ^ row * 16);", "place;"),
    Mutant("sums of pieces not exchanged", "((q % 2 * 4 + t) ^ row) * 16", "(q % 2 * 4 + t) * 16"),
    Mutant("eight tokens in the place of others", "to + octet * ATOM;", "to;"),
    Mutant(
        "the halves of a chunk alike",
        "from + HALF, row < rows",
        "from, row < rows",
    ),
    Mutant(
        "inputs beyond the matrix", "input + HALF < matrix.num_inputs;", "true;", inputs=1440 + 32
    ),
    Mutant(
        "tokens beyond the batch",
        "cp_async_4_or_zero(at, from, row < rows && inside);",
        "cp_async_4_or_zero(at, from, inside);",
    ),
    Mutant(
        "sums of every other eight tokens alone",
        "if (octet >= OCTETS) break;",
        "if (octet >= FETCH_WARPS) break;",
    ),
    Mutant("half of a group summed", "parts[q][0][0] + parts[q][1][0];", "parts[q][0][0];"),
    Mutant(
        "the sums of another stage",
        "const float* const chunk_sums = first_sums + place.stage * GROUP_SUMS;",
        "const float* const chunk_sums = first_sums;",
    ),
    Mutant(
        "the sums of the first group",
        "inputs = inputs_of_chunk + number * TOKENS;",
        "inputs = inputs_of_chunk;",
    ),
    Mutant(
        "the scale of the first group",
        "ld_shared_8(scales_of_row + number * (STRIP * 4));",
        "ld_shared_8(scales_of_row);",
    ),
    Mutant(
        "rows' scales exchanged",
        "fmaf(scale[i / 2], group",
        "fmaf(scale[1 - i / 2], group",
        kind="int8",
    ),
    Mutant("the offset of the wrong row", "fmaf(offset[i / 2],", "fmaf(offset[1 - i / 2],"),
    Mutant("sums of the wrong token", "own[i % 2], sums[n][i]);", "own[1 - i % 2], sums[n][i]);"),
    Mutant("the codes' bias left in", "fmaf(-WIDE_BIAS, scale[r],", "fmaf(0.0f, scale[r],"),
    Mutant("codes of the first vector", "chunk + code_vector(quarter) * 512);", "chunk);"),
    Mutant(
        "products with other inputs",
        "input / HALF * HALF_BYTES + input % HALF * 2)",
        "input % HALF * 2)",
    ),
    Mutant("no unit", "own.sums[m][n][i] *= packed.unit;", ";"),
    Mutant(
        "sums where others still read the rings",
        "barrier_sync(1, BLOCK_THREADS);  // nobody reads a ring any more",
        "",
        tuning=TWO_GROUPS,
    ),
    Mutant(
        "the other blocks not waited for",
        "        cluster_wait();  // nobody reads a ring any more, and all inboxes are there\n",
        "",
        tuning=SPLIT,
    ),
    Mutant(
        "warps that fetch leave early",
        "            wait_for_inbox(merge.inbox);  // others store to this block until then\n",
        "",
        tuning=SPLIT,
    ),
    Mutant(
        "sums not waited for",
        "        wait_for_inbox(merge.inbox);\n    } else {",
        "    } else {",
        tuning=SPLIT,
    ),
    Mutant(
        "sums of a block alone not waited for",
        "merge.send(own);\n        barrier_sync(1, BLOCK_THREADS);",
        "merge.send(own);",
    ),
]


def passes(mutant: Mutant, backend: Any) -> bool:
    from tests.shim.driver import KernelFault

    call = make_call(
        mutant.op, DTYPES["bfloat16"], mutant.kind, mutant.group_size, mutant.rows, mutant.outputs,
        mutant.inputs, bias=True,
    )  # fmt: skip
    try:
        check_op(backend.run, mutant.op, call, "bfloat16", tuning=mutant.tuning)
    except (AssertionError, KernelFault):
        return False
    return True


def inlined() -> str:
    """quantized_wide.cu with its own headers in it."""
    source = (KERNELS / "quantized_wide.cu").read_text()
    for header in HEADERS:
        text = re.sub(r"^#pragma once\n", "", (KERNELS / header).read_text(), flags=re.M)
        source = source.replace(f'#include "{header}"\n', text)
    return source


@pytest.fixture(scope="module")
def make_backend() -> Callable[[str], Any]:
    from tests.kernels.backends import ShimBackend

    return lambda source: ShimBackend((0, 1, 5), {"quantized_wide.cu": source})


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_are_found(make_backend: Callable[[str], Any], mutant: Mutant) -> None:
    source = inlined()
    assert source.count(mutant.old) == 1, f"{source.count(mutant.old)} places"
    assert not passes(mutant, make_backend(source.replace(mutant.old, mutant.new)))


def test_what_they_are_planted_in_passes(make_backend: Callable[[str], Any]) -> None:
    backend = make_backend(inlined())
    seen = set()
    for mutant in MUTANTS:
        call = replace(mutant, name="", old="", new="")
        if call not in seen:
            seen.add(call)
            assert passes(call, backend), call
    assert set(ENTRIES) >= {mutant.op for mutant in MUTANTS}
