"""Bugs planted in the products of 9 to 32 tokens with packed codes: each must be found by a call
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
TWO_WARPS = replace(SMALL, out_tile=64, warps_k=2)  # that share the inputs
TWO_PASSES = replace(SMALL, out_tile=128, warp_strips=4)


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
        "chunks not waited for",
        "if (turn >= EARLY_STAGES) cp_async_wait<STAGES - 1>();",
        "if (turn >= EARLY_STAGES) cp_async_wait<STAGES>();",
    ),
    Mutant(
        "the first chunks behind the inputs not waited for",
        "if (turn >= EARLY_STAGES) cp_async_wait<STAGES - 1>();",
        "if (turn >= EARLY_STAGES + 1) cp_async_wait<STAGES - 1>();",
        kind="int8",
        inputs=256,
        tuning=replace(SMALL, stages=4),
    ),
    Mutant(
        "chunks of the second strips not waited for",
        "++turn) {\n            cp_async_wait<STAGES - 1>();",
        "++turn) {\n            cp_async_wait<STAGES>();",
        kind="int8",
        tuning=TWO_PASSES,
    ),
    Mutant(
        "a part of the inputs not waited for",
        "INPUT_PARTS - 1 - part + STAGES",
        "INPUT_PARTS - part + STAGES",
    ),
    Mutant(
        "parts counted without the chunks between them",
        "wait_for_groups<MOST - 1>(count);",
        "cp_async_wait<MOST - 1>();",
    ),
    Mutant("inputs of other threads", "block_sync();  // this part of the inputs is there", ""),
    Mutant("sums of inputs of other warps", "block_sync();  // and its sums", ""),
    Mutant(
        "a part's inputs that end early",
        "min(first + part_turns * WARPS_K, num_chunks)",
        "min(first + part_turns * WARPS_K, num_chunks - 1)",
    ),
    Mutant(
        "a group of copies too few where a warp has no chunk",
        "cp_async_commit();\n            }\n        }",
        "}\n        }",
        inputs=128 * 9,
        tuning=TWO_WARPS,
    ),
    Mutant(
        "sums where others still read the inputs",
        "block_sync();                          // nobody reads the inputs any more",
        "",
        tuning=TWO_PASSES,
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
    Mutant("no unit", "ChunkProduct::scale(own, codes.unit);", ""),
    Mutant(
        "a chunk beyond the inputs multiplied",
        "if (turn < own_turns) {",
        "if (turn < num_turns) {",
        inputs=384,
        tuning=TWO_WARPS,
    ),
    Mutant(
        "as many chunks for all warps",
        "(share.num_steps - WarpSums::warp_k() + WARPS_K - 1) / WARPS_K;",
        "(share.num_steps + WARPS_K - 1) / WARPS_K;",
        inputs=384,
        tuning=TWO_WARPS,
    ),
    Mutant(
        "codes of the first chunks in every block",
        "chunk = share.first_step + WarpSums::warp_k();",
        "chunk = WarpSums::warp_k();",
        tuning=SPLIT,
    ),
    Mutant(
        "inputs of the first chunks in every block",
        "input = (share.first_step + chunk) * CHUNK + piece * 8;",
        "input = chunk * CHUNK + piece * 8;",
        tuning=SPLIT,
    ),
    Mutant(
        "a ring that does not go round",
        "place = place == WARP_RING_BYTES - SLOT_BYTES ? 0 : place + SLOT_BYTES;",
        "place = place == WARP_RING_BYTES ? 0 : place + SLOT_BYTES;",
    ),
    Mutant("the same chunk again", "from += WARPS_K * CHUNK_BYTES;", ""),
    Mutant(
        "every chunk for every warp",
        "from += WARPS_K * CHUNK_BYTES;",
        "from += CHUNK_BYTES;",
        tuning=TWO_WARPS,
    ),
    Mutant(
        "the inputs of a warp's first chunk for all",
        "own_inputs += WARPS_K * INPUT_BYTES;",
        "",
    ),
    Mutant(
        "the sums of a warp's first chunk for all",
        "own_group_sums += WARPS_K * GROUP_SUMS;",
        "",
    ),
    Mutant(
        "the second pass goes on along the inputs",
        "        own_inputs = first_inputs;\n",
        "",
        kind="int8",
        tuning=TWO_PASSES,
    ),
    Mutant(
        "the second pass goes on along the sums",
        "        own_group_sums = first_sums;\n",
        "",
        tuning=TWO_PASSES,
    ),
    Mutant("the second pass adds to the first", "pass * STRIPS,", "0,", tuning=TWO_PASSES),
    Mutant(
        "the second pass with the first strips",
        "static_cast<int64_t>(STRIPS) * strip_bytes -",
        "static_cast<int64_t>(0) -",
        tuning=TWO_PASSES,
    ),
    Mutant(
        "strips of the first tile",
        "share.first_tile * (OUT_TILE / STRIP) +",
        "",
    ),
    Mutant("the second strip is the first", "source += strip_bytes;", ""),
    Mutant("a strip beyond the matrix copied", "if (s < num_strips) {", "{", outputs=100),
    Mutant(
        "strips beyond the matrix in a second pass copied",
        "num_strips -= STRIPS;",
        "",
        outputs=232,
        tuning=TWO_PASSES,
    ),
    Mutant(
        "odd tokens not exchanged when read",
        "inputs + (lane_id() & 4 ? -64 : 64);",
        "inputs + 64;",
    ),
    Mutant(
        "inputs beyond the matrix",
        "token < matrix.num_rows && input < matrix.num_inputs;",
        "token < matrix.num_rows;",
        inputs=1440 + 32,
    ),
    Mutant(
        "tokens beyond the batch",
        "token < matrix.num_rows && input < matrix.num_inputs;",
        "input < matrix.num_inputs;",
    ),
    Mutant(
        "sums of the first tokens alone",
        "i % TOKEN_TILES,\n",
        "0,\n",
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
        "chunks copied over before all lanes have read them",
        "warp_sync();  // all lanes have read it",
        "",
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
