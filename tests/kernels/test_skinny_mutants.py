"""Bugs planted in the products of 9 to 64 tokens: each must be found by a call that passes
without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from nanocupy.ops.launch_skinny import SkinnyTuning
from tests.kernels.skinny_runs import ENTRIES, SMALL, check_op, make_call
from tests.ops.cases import DTYPES
from tests.shim import build
from tests.shim.build import KERNELS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HEADERS = ("epilogues.cuh", "skinny_parts.cuh", "skinny_norm.cuh", "skinny.cuh")
SPLIT = replace(SMALL, splits=4)
NORM = replace(SMALL, fold_norm=True)
SPLIT_NORM = replace(NORM, splits=4)
STAY = replace(SMALL, inputs_stay=True)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the sources. Found by `op` on weights [outputs, inputs]."""

    name: str
    old: str
    new: str
    op: str = "norm_linear"
    rows: int = 17
    outputs: int = 150
    inputs: int = 776
    tuning: SkinnyTuning = SMALL


MUTANTS = [
    Mutant(
        "one group too few waited for",
        "cp_async_wait<STAGES - 2>();",
        "cp_async_wait<STAGES - 1>();",
    ),
    Mutant(
        "one group too few waited for at first",
        "cp_async_wait<STAGES - 1>();",
        "cp_async_wait<STAGES>();",
    ),
    Mutant(
        "a step copied over the first",
        "if (!ring_is_full) {",
        "{",
    ),
    Mutant(
        "no barrier before a step",
        "block_sync();  // the step is there",
        "// the step is there",
    ),
    Mutant(
        "no barrier before sums are added up",
        "merge.send(own);\n            block_sync();",
        "merge.send(own);",
    ),
    Mutant(
        "the ring is a step longer than its room",
        "if (++ahead_stage == STAGES) ahead_stage = 0;",
        "if (++ahead_stage > STAGES) ahead_stage = 0;",
    ),
    Mutant(
        "a step is replaced before it is used",
        "own.multiply(from, INPUTS_STAY",
        "share.copy_weights(ring + stage * STAGE_BYTES, tile, step);\n"
        "            own.multiply(from, INPUTS_STAY",
    ),
    Mutant("sums of the tile before", "        own.clear();\n", ""),
    Mutant(
        "the last partial step left out",
        "const int steps = (matrix.num_inputs + K_STEP - 1) / K_STEP;",
        "const int steps = matrix.num_inputs / K_STEP;",
    ),
    Mutant(
        "weights beyond a row's end",
        "output < matrix.num_outputs && input < matrix.num_inputs;",
        "output < matrix.num_outputs;",
    ),
    Mutant(
        "rows beyond the matrix",
        "output < matrix.num_outputs && input < matrix.num_inputs;",
        "input < matrix.num_inputs;",
    ),
    Mutant(
        "inputs beyond a row's end",
        "row < matrix.num_rows && input < matrix.num_inputs;",
        "row < matrix.num_rows;",
    ),
    Mutant(
        "tokens beyond the batch read",
        "row < matrix.num_rows && input < matrix.num_inputs;",
        "input < matrix.num_inputs;",
    ),
    Mutant(
        "tokens beyond the batch stored",
        "inside && item.token + 1 < share.matrix.num_rows;",
        "inside;",
    ),
    Mutant(
        "outputs beyond the matrix stored",
        "&& item.output < share.matrix.num_outputs;",
        ";",
        outputs=37,
    ),
    Mutant(
        "a tile too few",
        "num_tiles = (matrix.num_outputs + OUTPUTS - 1) / OUTPUTS;",
        "num_tiles = matrix.num_outputs / OUTPUTS;",
    ),
    Mutant(
        "gate and up exchanged",
        "PAIRS && row % 16 >= 8 ?",
        "PAIRS && row % 16 < 8 ?",
        op="norm_swiglu",
    ),
    Mutant("the gate's row for up", "item.row + 8, second", "item.row, second", op="norm_swiglu"),
    Mutant(
        "the other half of the inputs of a fragment",
        "weight_turn = turn_of(lane >> 4);",
        "weight_turn = turn_of(1 - (lane >> 4));",
    ),
    Mutant(
        "tokens of a fragment in another order",
        "(TOKENS == 8 ? 0 : lane >> 4) * 8) * ROW_BYTES;",
        "(TOKENS == 8 ? 0 : 1 - (lane >> 4)) * 8) * ROW_BYTES;",
    ),
    Mutant(
        "of 8 tokens the first inputs twice",
        "pair[half], pair[half + 1]);",
        "pair[0], pair[1]);",
        rows=8,
    ),
    Mutant(
        "of 8 tokens the next inputs not asked for",
        "(EIGHT_WIDE ? lane >> 4 : 0) * 32;",
        "0 * 32;",
        rows=8,
    ),
    Mutant(
        "every warp the first inputs",
        "const int first = warp_k() * WARP_K_TILES * 2;",
        "const int first = 0;",
    ),
    Mutant(
        "late items with the addend of an early one",
        "if (late.valid[j]) addend[j] = epilogue.fetch(late.output, late.token + j);",
        "addend[j] = addends[0][j];",
        op="linear_add",
        rows=64,
        tuning=replace(SMALL, out_tile=64, warps_k=1),
    ),
    Mutant(
        "addends of the first tile",
        "finish.fetch(tile);",
        "if (tile == share.first_tile) finish.fetch(tile);",
        op="linear_add",
    ),
    Mutant(
        "a rank's steps from the start",
        "(first_step + step) * K_STEP;\n#pragma unroll\n        for (int i = 0; i < (TOTAL + "
        "BLOCK_THREADS - 1) / BLOCK_THREADS; ++i) {\n            const int index = i * "
        "BLOCK_THREADS + threadIdx.x;\n            if (TOTAL % BLOCK_THREADS != 0 && index >= "
        "TOTAL) break;\n            const int row = index / PIECES, piece = index % PIECES;\n"
        "            const int input = first_input",
        "step * K_STEP;\n#pragma unroll\n        for (int i = 0; i < (TOTAL + "
        "BLOCK_THREADS - 1) / BLOCK_THREADS; ++i) {\n            const int index = i * "
        "BLOCK_THREADS + threadIdx.x;\n            if (TOTAL % BLOCK_THREADS != 0 && index >= "
        "TOTAL) break;\n            const int row = index / PIECES, piece = index % PIECES;\n"
        "            const int input = first_input",
        tuning=SPLIT,
    ),
    Mutant(
        "sent before all blocks have their inbox",
        "if (!NORM_INPUTS) cluster_wait();",
        "",
        tuning=SPLIT,
    ),
    Mutant(
        "added up before the inbox is full",
        "wait_for_inbox(merge.inbox);",
        "",
        tuning=SPLIT,
    ),
    Mutant(
        "more expected than is sent",
        "num_sources() * own_pairs() * OUT_TILE * 8;",
        "num_sources() * slots() * OUT_TILE * 8;",
        tuning=SPLIT,
    ),
    Mutant(
        "a rank's pairs side by side",
        "item.token = 2 * (item.slot * merge.ranks + merge.rank);",
        "item.token = 2 * (item.slot + merge.own_pairs() * merge.rank);",
        tuning=SPLIT,
    ),
    Mutant(
        "a source in another's place",
        "const int source = rank * WARPS_K + WarpSums::warp_k();",
        "const int source = rank + WarpSums::warp_k();",
        tuning=SPLIT,
    ),
    Mutant(
        "normalised before the inputs are there",
        "cp_async_wait<0>();\n    block_sync();",
        "block_sync();",
        tuning=NORM,
    ),
    Mutant(
        "no barrier before the squares",
        "cp_async_wait<0>();\n    block_sync();",
        "cp_async_wait<0>();",
        tuning=NORM,
    ),
    Mutant(
        "squares before all lanes' are there",
        "warp_sync();  // a warp alone",
        "// a warp alone",
        tuning=NORM,
    ),
    Mutant(
        "squares of other ranks not waited for",
        "wait_for_inbox(inbox);",
        "",
        tuning=SPLIT_NORM,
    ),
    Mutant(
        "squares of the own rank alone",
        "for (int r = 0; r < ranks; ++r) {\n                float squares[2];",
        "for (int r = 0; r < 1; ++r) {\n                float squares[2];",
        tuning=SPLIT_NORM,
    ),
    Mutant(
        "squares sent before all blocks have their inbox",
        "if (share.ranks > 1) cluster_wait();",
        "",
        tuning=SPLIT_NORM,
    ),
    Mutant(
        "the norm's weights from the start",
        "const int input = share.first_step * K_STEP + i * 8;",
        "const int input = i * 8;",
        tuning=SPLIT_NORM,
    ),
    Mutant(
        "the norm's weights beyond their end",
        "const bool valid = input < matrix.num_inputs;\n            cp_async_16_or_zero(weights",
        "const bool valid = true;\n            cp_async_16_or_zero(weights",
        tuning=NORM,
    ),
    Mutant(
        "the mean of the own inputs",
        "/ share.matrix.num_inputs + share.matrix.eps",
        "/ (share.num_steps * K_STEP) + share.matrix.eps",
        tuning=SPLIT_NORM,
    ),
    Mutant(
        "inputs that stay, but the first",
        "stayed + step * INPUT_BYTES : from",
        "stayed : from",
        tuning=STAY,
    ),
    Mutant(
        "the rest of the inputs left out",
        "i < STAGES - 1 ? min(step + 1, share.num_steps) : share.num_steps;",
        "min(step + 1, share.num_steps);",
        tuning=STAY,
    ),
]


def sources(op: str, old: str = "", new: str = "") -> str:
    """The kernel of one op with its headers in one text, and `old` in it replaced."""
    headers = "\n".join((KERNELS / name).read_text() for name in HEADERS)
    for name in HEADERS:
        headers = headers.replace(f'#include "{name}"', "")
    headers = headers.replace("#pragma once", "")
    text = (KERNELS / "skinny.cu").read_text().replace('#include "skinny.cuh"', headers)
    # Without the other kernels it builds in a fraction of the time.
    for entry in build.entries(text):
        if entry != ENTRIES[op]:
            whole = rf'extern "C" __global__ [^{{}}]*\b{entry}\([^{{]*\{{.*?\n\}}\n'
            text = re.sub(whole, "", text, flags=re.DOTALL)
    assert build.entries(text) == [ENTRIES[op]]
    if old:
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in the sources"
    return text.replace(old, new) if old else text


def runner(source: str, order: int) -> Callable[..., None]:
    def run(
        file: str, entry: str, shape: Any, args: list[Any], written: tuple[int], **macros: int
    ) -> None:
        from tests.shim.driver import host_kernel

        kernel = host_kernel(file, entry, source=source, **macros)
        kernel(
            shape.grid, shape.block, *args, shared_bytes=shape.shared_bytes, order=order,
            cluster=shape.cluster,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_planted_bugs_are_found(mutant: Mutant) -> None:
    from tests.shim.driver import KernelFault

    sound, planted = sources(mutant.op), sources(mutant.op, mutant.old, mutant.new)
    found = []
    for order in (0, 1):

        def run_one(source: str, order: int = order) -> None:
            call = make_call(
                mutant.op, DTYPES["bfloat16"], mutant.rows, mutant.outputs, mutant.inputs,
                bias=True,
            )  # fmt: skip
            check_op(runner(source, order), mutant.op, call, tuning=mutant.tuning)

        run_one(sound)
        try:
            run_one(planted)
        except (KernelFault, AssertionError) as exc:
            found.append(str(exc).splitlines()[0])
    assert found, "no call noticed it"
