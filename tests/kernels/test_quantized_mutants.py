"""Bugs planted in the products with quantised weights: each must be found by a call that passes
without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from nanocupy.ops.launch_quantized import QuantizedTuning
from tests.kernels.quantized_runs import ENTRIES, SMALL, check_op, make_call
from tests.ops.cases import DTYPES
from tests.shim import build
from tests.shim.build import KERNELS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HEADERS = (
    "epilogues.cuh", "quantized_format.cuh", "quantized_input.cuh", "quantized_sums.cuh",
    "quantized.cuh", "quantized_whole.cuh",
)  # fmt: skip
PLAIN = replace(SMALL, fold_norm=False)
TILED = replace(PLAIN, tile_segments=1)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the sources of the product. Found by `op` on weights [outputs,
    inputs]."""

    name: str
    old: str
    new: str
    op: str = "norm_linear"
    kind: str = "int4"
    group_size: int | None = 32
    rows: int = 5
    outputs: int = 150
    inputs: int = 2304
    tuning: QuantizedTuning = TILED  # PLAIN: inputs lie in shared memory whole


MUTANTS = [
    Mutant(
        "one chunk too few waited for",
        "cp_async_wait<STAGES - STRIPS>();",
        "cp_async_wait<STAGES - STRIPS + 1>();",
    ),
    Mutant(
        "a chunk copied over while lanes read it",
        "                warp_sync();\n#pragma unroll\n                for (int s = 0; s < STRIPS; "
        "++s) stream.bring();",
        "#pragma unroll\n                for (int s = 0; s < STRIPS; ++s) stream.bring();",
    ),
    Mutant(
        "no barrier before sums meet",
        "stream.bring();\n                block_sync();",
        "stream.bring();",
    ),
    Mutant(
        "sums stored over by the next pass",
        "buffer ^= 1;",
        "",
    ),
    Mutant(
        "the same of many tokens",
        "                } else {\n                    block_sync();\n                }",
        "                }",
        rows=17,
    ),
    Mutant("the next group's scale", "+ number * (STRIP * 4) +", "+ (number + 1) % GROUPS * 64 +"),
    Mutant(
        "rows' scales exchanged",
        "sum = fmaf(scales[i / 2],",
        "sum = fmaf(scales[1 - i / 2],",
        kind="int8",
    ),
    Mutant(
        "the offset of the wrong row",
        "fmaf(offsets[i / 2],",
        "fmaf(offsets[1 - i / 2],",
    ),
    Mutant("inputs' sums of the wrong token", "inputs[i % 2], sum);", "inputs[1 - i % 2], sum);"),
    Mutant(
        "nibbles in another order",
        "and_or(word >> (4 * i), 0x000f000fu",
        "and_or(word >> (4 * (i ^ 1)), 0x000f000fu",
    ),
    Mutant("the codes' bias left in", "fmaf(-CODE_BIAS, scales[r],", "fmaf(0.0f, scales[r],"),
    Mutant(
        "bytes in another order",
        "if (i % 2) word >>= 8;",
        "if (i % 2 == 0) word >>= 8;",
        kind="int8",
    ),
    Mutant("no sign", "and_or(word, 0x00800080u, Pair::ONES));", "Pair::ONES);", kind="int8"),
    Mutant("no sign of fp8", "word & 0x80008000u);", "0);", kind="fp8", group_size=None),
    Mutant(
        "fp8 bytes in another order",
        "if (i % 2 == 0) word <<= 8;",
        "if (i % 2) word <<= 8;",
        kind="fp8",
        group_size=None,
    ),
    Mutant(
        "the other half's word",
        "const bool upper = WEIGHT_KIND == 1 && quarter % 2;",
        "const bool upper = false;",
    ),
    Mutant(
        "halves of 16 inputs exchanged",
        "(lane_id() & 2) / 2 == half",
        "(lane_id() & 2) / 2 != half",
        group_size=16,
    ),
    Mutant(
        "inputs of the tile's start",
        "inputs[n] = own_inputs[n] + (tile_chunk + warp_id()) * CHUNK;",
        "inputs[n] = own_inputs[n] + warp_id() * CHUNK;",
        tuning=replace(PLAIN, tile_segments=2),
    ),
    Mutant(
        "a tile used before it is there",
        "in_tile = tile;\n                block_sync();",
        "in_tile = tile;",
        tuning=TILED,
    ),
    Mutant(
        "inputs of many tokens not waited for",
        "cp_async_wait<0>();",
        "cp_async_wait<1>();",
        rows=17,
    ),
    Mutant("a tile that is not loaded", "if (tile != in_tile) {", "if (false) {", tuning=TILED),
    Mutant(
        "warps without a chunk counted",
        "min(WARPS, share.num_chunks - segment * WARPS)",
        "WARPS",
    ),
    Mutant("segments forgotten", "if (segment > 0) value = kept + value;", ""),
    Mutant(
        "sums of another pass",
        "so_far + (strip - first) / STRIPS * Items::PASS_FLOATS + threadIdx.x;",
        "so_far + threadIdx.x;",
        tuning=TILED,
    ),
    Mutant(
        "up for gate",
        "one.row + v * 8;",
        "one.row + (1 - v) * 8;",
        op="norm_swiglu",
    ),
    Mutant(
        "addends of the first tokens for the others",
        "addend = epilogue.fetch(one.output, one.token);",
        "addend = addends[0];",
        op="linear_add",
        rows=32,
    ),
    Mutant(
        "a token's inputs one row on",
        "const int token = min(n * 8 + lane_id() / 4, num_rows - 1);",
        "const int token = min(n * 8 + lane_id() / 4 + 1, num_rows - 1);",
    ),
    Mutant(
        "squares before they are there",
        "        block_sync();\n        int known = -1;",
        "        int known = -1;",
        tuning=SMALL,
    ),
    Mutant(
        "the first token's norm for all",
        "if (turn.token != known) {",
        "if (known < 0) {",
        tuning=SMALL,
        inputs=1152,
    ),
    Mutant(
        "whole: one turn of copies too few waited for",
        "cp_async_wait<RING_TURNS - 1>();",
        "cp_async_wait<RING_TURNS>();",
        tuning=PLAIN,
    ),
    Mutant(
        "whole: chunks copied over while lanes read them",
        "            warp_sync();  // all lanes have read it\n",
        "",
        tuning=PLAIN,
    ),
    Mutant(
        "whole: no barrier before sums meet",
        "        block_sync();  // all warps' sums are there\n",
        "",
        tuning=PLAIN,
    ),
    Mutant("whole: sums stored over", "buffer = 1 - buffer;", "", tuning=PLAIN),
    Mutant(
        "whole: the same of many tokens",
        "block_sync();  // nobody reads the sums any more",
        "",
        rows=17,
        outputs=300,
        inputs=640,
        tuning=PLAIN,
    ),
    Mutant(
        "whole: sums go on to the next strips",
        "own.clear_all();\n        const",
        "const",
        tuning=PLAIN,
    ),
    Mutant(
        "whole: the sums of the first inputs for all",
        "input_sums += WARPS * (GROUPS * TOKENS);",
        "",
        tuning=PLAIN,
    ),
    Mutant(
        "whole: a chunk that is not there",
        "if (chunk < num_chunks) own.multiply",
        "own.multiply",
        tuning=PLAIN,
    ),
    Mutant(
        "whole: the next strips from the wrong place",
        "share.num_segments * (WARPS * CHUNK_BYTES);",
        "share.num_chunks * CHUNK_BYTES;",
        tuning=PLAIN,
    ),
    Mutant(
        "whole: up for gate",
        "one.row + 8 * v;",
        "one.row + 8 * (1 - v);",
        op="norm_swiglu",
        tuning=PLAIN,
    ),
    Mutant(
        "a block's strips from the start",
        "static_cast<int64_t>(share.first_strip) * share.num_chunks;",
        "0;",
    ),
]


def passes(mutant: Mutant, backend: Any) -> bool:
    from tests.shim.driver import KernelFault

    group = mutant.group_size
    call = make_call(
        mutant.op, DTYPES["bfloat16"], mutant.kind, group, mutant.rows, mutant.outputs,
        mutant.inputs, bias=True,
    )  # fmt: skip
    try:
        check_op(backend.run, mutant.op, call, "bfloat16", tuning=mutant.tuning)
    except (AssertionError, KernelFault):
        return False
    return True


def inlined() -> str:
    """quantized.cu with its own headers in it."""
    source = (KERNELS / "quantized.cu").read_text()
    for _ in HEADERS:
        for header in HEADERS:
            text = re.sub(r"^#pragma once\n", "", (KERNELS / header).read_text(), flags=re.M)
            line = f'#include "{header}"\n'
            if line in source:
                before, _, after = source.partition(line)
                source = before + text + after.replace(line, "")
    return source


@pytest.fixture(scope="module")
def make_backend() -> Callable[[str], Any]:
    from tests.kernels.backends import ShimBackend

    return lambda source: ShimBackend((0, 1, 5), {"quantized.cu": source})


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
