"""Bugs planted in the products of 9 to 64 tokens with packed codes: each must be found by a call
that passes without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from nanocupy.ops.launch_quantized_stream import StreamTuning
from tests.kernels.quantized_stream_runs import ENTRIES, SMALL, check_op, make_call
from tests.ops.cases import DTYPES
from tests.shim import build
from tests.shim.build import KERNELS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HEADERS = ("quantized_stream.cuh", "quantized_stream_parts.cuh")
SPLIT = replace(SMALL, splits=4)
TWO_CHUNKS = replace(SMALL, out_tile=64)
TALL = replace(SMALL, out_tile=192)


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
    tuning: StreamTuning = SMALL


MUTANTS = [
    Mutant(
        "a step that is not waited for",
        "cp_async_wait<STAGES - 2>();",
        "cp_async_wait<STAGES - 1>();",
    ),
    Mutant(
        "the first step not waited for",
        "if (step == 0) {\n            cp_async_wait<STAGES - 1>();",
        "if (step == 0) {\n            cp_async_wait<STAGES>();",
        kind="int8",
    ),
    Mutant(
        "the first inputs not waited for",
        "if (INPUT_LEAD) {\n        cp_async_wait<STAGES - 1>();",
        "if (INPUT_LEAD) {\n        cp_async_wait<STAGES>();",
    ),
    Mutant("the first inputs of other threads", "block_sync();  // the first inputs are there", ""),
    Mutant(
        "no barrier before a step",
        "block_sync();  // the step is there, and nobody reads the one before any more",
        "",
    ),
    Mutant(
        "inputs no further ahead than codes",
        "constexpr int INPUT_LEAD = WEIGHT_KIND == 1 ? 1 : 0;",
        "constexpr int INPUT_LEAD = 0;",
    ),
    Mutant(
        "sums of inputs stored over those in use",
        "own_group_sums + (step + 1) % 2 * GROUP_SUMS",
        "own_group_sums + step % 2 * GROUP_SUMS",
    ),
    Mutant(
        "sums where others still read the ring",
        "block_sync();                         // nobody reads the ring any more",
        "",
    ),
    Mutant(
        "the other blocks not waited for",
        "        cluster_wait();  // nor in the other blocks, whose inboxes are there\n",
        "",
        tuning=SPLIT,
    ),
    Mutant("sums not waited for", "        wait_for_inbox(merge.inbox);\n", "", tuning=SPLIT),
    Mutant(
        "sums of a block alone not waited for",
        "merge.send(own);\n        block_sync();",
        "merge.send(own);",
    ),
    Mutant("no unit", "StepProduct::scale(own, codes.unit);", ""),
    Mutant(
        "a chunk beyond the inputs multiplied",
        "if (WARPS_K == 1 || step < codes_of.num_steps) {",
        "{",
        inputs=384,
        tuning=TWO_CHUNKS,
    ),
    Mutant(
        "a chunk for all warps of a step",
        "min(num_steps, (num_chunks - chunk + WARPS_K - 1) / WARPS_K);",
        "min(num_steps, (num_chunks - share.first_step * WARPS_K + WARPS_K - 1) / WARPS_K);",
        inputs=384,
        tuning=TWO_CHUNKS,
    ),
    Mutant(
        "codes of the first steps in every block",
        "chunk = share.first_step * WARPS_K + WarpSums::warp_k();",
        "chunk = WarpSums::warp_k();",
        tuning=SPLIT,
    ),
    Mutant(
        "inputs of the first steps in every block",
        "input = (first_step + step) * K_STEP + piece * 8;",
        "input = step * K_STEP + piece * 8;",
        tuning=SPLIT,
    ),
    Mutant(
        "codes to where others are read",
        "step + STAGES - 1, slot_before<STAGES, STEP_CODE_BYTES>(codes_place)",
        "step + STAGES - 1, codes_place",
    ),
    Mutant(
        "inputs to where others are read",
        "slot_before<INPUT_SLOTS, INPUT_BYTES>(inputs_place)",
        "inputs_place",
    ),
    Mutant(
        "a ring that does not go round",
        "return place == (SLOTS - 1) * SLOT_BYTES ? 0 : place + SLOT_BYTES;",
        "return place == SLOTS * SLOT_BYTES ? 0 : place + SLOT_BYTES;",
    ),
    Mutant(
        "strips of the first tile",
        "share.first_tile * (OUT_TILE / STRIP) +",
        "",
    ),
    Mutant(
        "the second strip is the first",
        "source += strip_bytes;",
        "",
        tuning=TALL,
    ),
    Mutant("a strip beyond the matrix copied", "if (s < num_strips) {", "{", outputs=100),
    Mutant(
        "every chunk for every warp of a step",
        "from + step * (WARPS_K * CHUNK_BYTES);",
        "from + step * CHUNK_BYTES;",
        tuning=TWO_CHUNKS,
    ),
    Mutant(
        "odd tokens not exchanged when read",
        "inputs + (lane_id() & 4 ? -64 : 64);",
        "inputs + 64;",
    ),
    Mutant(
        "inputs beyond the matrix",
        "own < matrix.num_rows && input < matrix.num_inputs;",
        "own < matrix.num_rows;",
        inputs=1440 + 32,
    ),
    Mutant(
        "tokens beyond the batch",
        "own < matrix.num_rows && input < matrix.num_inputs;",
        "input < matrix.num_inputs;",
    ),
    Mutant(
        "the first turn's token for all",
        "offset += TURN_TOKENS * matrix.num_inputs;",
        "",
    ),
    Mutant(
        "sums of the first tokens alone",
        "turn * WARPS_N + WarpSums::warp_n();",
        "WarpSums::warp_n();",
        rows=50,
        tuning=TWO_CHUNKS,
    ),
    Mutant(
        "sums of the first chunk's groups",
        "to += WarpSums::warp_k() * (GROUPS * TOKENS) +",
        "to +=",
        tuning=TWO_CHUNKS,
    ),
    Mutant("half of a group summed", "p < (g + 1) * PARTS; ++p", "p < (g + 1) * PARTS; p += 2"),
    Mutant(
        "halves of 16 inputs exchanged in one of two",
        "(lane_id() & 2) / 2 == half",
        "(lane_id() & 2) / 2 != half",
        group_size=16,
    ),
    Mutant("the next group's scale", "+ number * (STRIP * 4) +", "+ (number + 1) % GROUPS * 64 +"),
    Mutant(
        "rows' scales exchanged",
        "fmaf(scales[i / 2], group",
        "fmaf(scales[1 - i / 2], group",
        kind="int8",
    ),
    Mutant("the offset of the wrong row", "fmaf(offsets[i / 2],", "fmaf(offsets[1 - i / 2],"),
    Mutant(
        "sums of the wrong token", "inputs[i % 2], sums[n][i]);", "inputs[1 - i % 2], sums[n][i]);"
    ),
    Mutant("the codes' bias left in", "fmaf(-CODE_BIAS, scales[r],", "fmaf(0.0f, scales[r],"),
    Mutant(
        "a group that goes on",
        "if (q * QUARTER % GROUP == 0) clear(group[s]);",
        "if (q == 0) clear(group[s]);",
        kind="int8",
    ),
    Mutant(
        "later tokens times the first inputs",
        "inputs_of(inputs, other, q, first + n);",
        "inputs_of(inputs, other, q, n);",
        rows=50,
    ),
    Mutant(
        "copies not waited for when few are left",
        "            cp_async_commit();\n        }\n        const int next_inputs",
        "        }\n        const int next_inputs",
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
    """quantized_stream.cu with its own headers in it."""
    source = (KERNELS / "quantized_stream.cu").read_text()
    for header in HEADERS:
        text = re.sub(r"^#pragma once\n", "", (KERNELS / header).read_text(), flags=re.M)
        source = source.replace(f'#include "{header}"\n', text)
    return source


@pytest.fixture(scope="module")
def make_backend() -> Callable[[str], Any]:
    from tests.kernels.backends import ShimBackend

    return lambda source: ShimBackend((0, 1, 5), {"quantized_stream.cu": source})


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
