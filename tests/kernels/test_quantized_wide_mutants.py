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
THREE_STRIPS = replace(SMALL, out_tile=192, input_stages=7)
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
        "mbarrier_wait(bars->free + to.stage, to.parity ^ 1);",
        "",
        tuning=THREE_STRIPS,
    ),
    Mutant(
        "the place at work is free",
        "mbarrier_arrive_warp(bars->free + stage_before);",
        "mbarrier_arrive_warp(bars->free + place.stage);",
    ),
    Mutant(
        "a place is free when one of two groups has read it",
        "mbarrier_init(bars->free + i, WARPS_N * WARP_ARRIVALS);",
        "mbarrier_init(bars->free + i, 4);",
        tuning=TWO_GROUPS,
    ),
    Mutant(
        "inputs of one of the warps that fetch",
        "mbarrier_init(bars->full + i, FETCH_WARPS * WARP_ARRIVALS);",
        "mbarrier_init(bars->full + i, 1);",
    ),
    Mutant(
        "inputs that have not landed",
        "mbarrier_wait(bars->landed + from.stage, from.parity);",
        "",
    ),
    Mutant(
        "inputs that landed the round before",
        "mbarrier_wait(bars->landed + from.stage, from.parity);",
        "mbarrier_wait(bars->landed + from.stage, 0);",
    ),
    Mutant(
        "half of a chunk announced",
        "mbarrier_arrive_expecting(bars->landed + stage, INPUT_BYTES);",
        "mbarrier_arrive_expecting(bars->landed + stage, INPUT_BYTES / 2);",
    ),
    Mutant(
        "copies to where others still read",
        "                mbarrier_wait(bars->taken + from.stage, from.parity);\n",
        "",
    ),
    Mutant(
        "copies to where one of the warps that fetch has read",
        "mbarrier_init(bars->taken + i, FETCH_WARPS * WARP_ARRIVALS);",
        "mbarrier_init(bars->taken + i, WARP_ARRIVALS);",
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
        inputs=1408,
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
        "(share.first_step + step) * CHUNK;",
        "step * CHUNK;",
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
        "at + (first ^ 16), make_uint4(w[0].y, w[1].y, w[2].y, w[3].y)",
        "at + (first ^ 16), w[1]",
    ),
    Mutant("pieces not exchanged", "(quarter % 2 * 4 ^ row) * 16;", "quarter % 2 * 64;"),
    Mutant("pieces exchanged within two", "from + (first ^ t * 16)", "from + (first ^ t % 2 * 16)"),
    Mutant(
        "eight tokens in the place of others",
        "unsigned char* const at = to + i * APART;",
        "unsigned char* const at = to;",
        rows=50,
    ),
    Mutant("the same eight tokens for all warps", "fetch_warp * ATOM + quarter", "quarter"),
    Mutant("the halves of a chunk alike", "input + HALF, 0);", "input, 0);"),
    Mutant(
        "32 inputs in the place of others",
        "quarter / 2 * HALF_BYTES + row * 128",
        "row * 128",
        kind="int8",
    ),
    Mutant(
        "sums of eight tokens over others'",
        "to + i * (FETCH_WARPS * 8), total",
        "to, total",
        rows=50,
    ),
    Mutant(
        "sums of other groups' inputs", "== lane_id() % 4 * QUARTER / GROUP", "== lane_id() % 4 / 2"
    ),
    Mutant("half of a group summed", "parts[i][0][0] + parts[i][1][0],", "parts[i][0][0],"),
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
    Mutant("a code's neighbour", "word >> (i / 2 * 4 - 3)", "word >> (i / 2 * 4 + 1)"),
    Mutant("codes of the first vector", "chunk + code_vector(quarter) * 512);", "chunk);"),
    Mutant(
        "products with other inputs",
        "input / HALF * HALF_BYTES + input % HALF * 2)",
        "input % HALF * 2)",
    ),
    Mutant(
        "inputs seen before they are fenced",
        "            shared_to_async_fence();\n",
        "",
    ),
    Mutant(
        "sums where barriers are",
        "(matrix.num_rows + 1) / 2, &bars->inbox};",
        "(matrix.num_rows + 1) / 2, &bars->inbox - 8};",
    ),
    Mutant("no unit", "own.sums[m][n][i] *= packed.unit;", ";"),
    Mutant(
        "sums where others still read the rings",
        "barrier_sync(1, BLOCK_THREADS);  // nobody reads a ring any more",
        "",
        inputs=1184,  # the last chunk lies where sums do
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
