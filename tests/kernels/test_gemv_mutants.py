"""Bugs planted in the small-batch products: each must be found by a call that passes without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from nanocupy.ops.launch_gemv import MAX_SHARED_BYTES, TILE_STEP, scratch_bytes
from tests.kernels.gemv_runs import SMALL, check_op, make_call
from tests.ops.cases import DTYPES
from tests.shim import build
from tests.shim.build import KERNELS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HEADERS = ("epilogues.cuh", "gemv_input.cuh", "gemv_products.cuh", "gemv.cuh")


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the sources. Found by `op` on weights [outputs, inputs]; tiled: with
    room for the smallest tile of inputs alone."""

    name: str
    old: str
    new: str
    op: str = "norm_linear"
    outputs: int = 37
    inputs: int = 520
    dtype: str = "float32"
    rows: int = 2
    splits: int = 1
    tiled: bool = False


MUTANTS = [
    Mutant(
        "no barrier after the inputs are in place",
        "start_as<CROSSED, false, 1, GROUPS>();\n        }\n        block_sync();",
        "start_as<CROSSED, false, 1, GROUPS>();\n        }",
    ),
    Mutant(
        "no barrier after the sums of squares",
        "part of the norm's weights\n            block_sync();",
        "part of the norm's weights",
    ),
    Mutant("no wait for the norm's weights", "cp_async_wait<GROUPS>();", ""),
    Mutant(
        "no barrier before the next tile",
        "block_sync();\n                input.template load",
        "input.template load",
        op="linear_add",
        inputs=1032,
        tiled=True,
    ),
    Mutant(
        "no barrier after the next tile",
        "(tile);\n                block_sync();",
        "(tile);",
        op="linear_add",
        inputs=1032,
        tiled=True,
    ),
    Mutant(
        "parts without chunks take a batch",
        "} while (part.chunk >= part.end && part.pass < num_passes);",
        "} while (false);",
        inputs=1032,
        splits=2,
        tiled=True,
    ),
    Mutant(
        "no barrier before the parts are merged",
        "block_sync();\n        const int group_output =",
        "const int group_output =",
        splits=4,
    ),
    Mutant(
        "parts of the next passes while these are merged",
        "if (pass + 1 < share.num_passes) block_sync();",
        "",
        splits=2,
        outputs=70,
    ),
    Mutant(
        "a thread's second output with the addend of its first",
        "if (i >= BLOCK_THREADS) addends[0]",
        "if (i < 0) addends[0]",
        op="linear_add",
        dtype="bfloat16",
        rows=8,
        splits=2,
        outputs=48,
    ),
    Mutant("one batch too few waited for", "RING_BATCHES - 1>();", "RING_BATCHES>();"),
    Mutant(
        "a batch is replaced before it is used",
        "product.multiply(stream.oldest(), tile_chunk, left);",
        "stream.bring(share, product);\n"
        "                product.multiply(stream.oldest(), tile_chunk, left);",
    ),
    Mutant(
        "the ring is a batch longer than its room",
        "        place = place + Product::VECTORS <",
        "        place = place + Product::VECTORS <=",
    ),
    Mutant(
        "the last partial chunk left out",
        "num_chunks = (num_inputs + Product::CHUNK - 1) / Product::CHUNK;",
        "num_chunks = num_inputs / Product::CHUNK;",
    ),
    Mutant(
        "weights beyond a row's end",
        "exist = num_inputs - lane_id() * WIDE - k;",
        "exist = num_inputs + 128 - lane_id() * WIDE - k;",
    ),
    Mutant(
        "inputs not padded with zeros",
        "if (k - lane_id() * SPAN >= end) break;",
        "if (k >= end) break;",
        op="linear_add",
    ),
    Mutant(
        "rows beyond the matrix read",
        "min(unit(pass) * OUTPUTS + (PAIRS ? r / 2 : r), num_outputs - 1)",
        "unit(pass) * OUTPUTS + (PAIRS ? r / 2 : r)",
    ),
    Mutant(
        "bytes beyond the matrix asked for in L2",
        "const int end = min(part.end * Product::CHUNK, share.num_inputs);",
        "const int end = part.end * Product::CHUNK + 4096;",
        outputs=6,
        inputs=776,
    ),
    Mutant(
        "outputs of the next block stored",
        "own_output(pass, v) < end_output;",
        "own_output(pass, v) <= end_output;",
        op="linear_add",
    ),
    Mutant(
        "gate and up exchanged",
        "PAIRS && r % 2 ? num_outputs",
        "PAIRS && r % 2 == 0 ? num_outputs",
        op="norm_swiglu",
    ),
    Mutant(
        "bias of gate for up",
        "to_float(bias[num_outputs + output])",
        "to_float(bias[output])",
        op="norm_swiglu",
    ),
    Mutant(
        "operands of the tensor cores in another order",
        "pairs[4] = {v.x, v.y, v.z, v.w}",
        "pairs[4] = {v.x, v.z, v.y, v.w}",
        dtype="bfloat16",
        rows=3,
    ),
    Mutant(
        "the half of a result that means nothing",
        "values[1] = (sums[0][1] + sums[1][3])",
        "values[1] = (sums[0][1] + sums[1][1])",
        dtype="bfloat16",
        rows=1,
    ),
]


def sources(op: str, old: str = "", new: str = "") -> str:
    """The kernel of one op with its headers in one text, and `old` in it replaced."""
    headers = "\n".join((KERNELS / name).read_text() for name in HEADERS)
    for name in HEADERS:
        headers = headers.replace(f'#include "{name}"', "")
    headers = headers.replace("#pragma once", "")
    text = (KERNELS / "gemv.cu").read_text().replace('#include "gemv.cuh"', headers)
    # Without the other kernels it builds in a fraction of the time.
    for entry in build.entries(text):
        if entry != f"{op}_rows":
            whole = rf'extern "C" __global__ [^{{}}]*\b{entry}\([^{{]*\{{.*?\n\}}\n'
            text = re.sub(whole, "", text, flags=re.DOTALL)
    assert build.entries(text) == [f"{op}_rows"]
    if old:
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in the sources"
    return text.replace(old, new) if old else text


def runner(source: str, order: int) -> Callable[..., None]:
    def run(
        file: str, entry: str, shape: Any, args: list[Any], written: tuple[int], **macros: int
    ) -> None:
        from tests.shim.driver import host_kernel

        kernel = host_kernel(file, entry, source=source, **macros)
        kernel(shape.grid, shape.block, *args, shared_bytes=shape.shared_bytes, order=order)

    return run


def run_mutant(mutant: Mutant, source: str, order: int) -> None:
    storage = DTYPES[mutant.dtype]
    call = make_call(mutant.op, storage, mutant.rows, mutant.outputs, mutant.inputs, bias=True)
    tuning = replace(SMALL, unroll=2)
    fixed = tuning.ring_bytes(mutant.rows) + scratch_bytes(mutant.rows, tuning)
    smallest = fixed + 4 * (mutant.rows + 1) * (mutant.inputs // TILE_STEP + 1 + TILE_STEP + 32)
    most = smallest if mutant.tiled else MAX_SHARED_BYTES
    how = {"k_splits": mutant.splits, "max_shared_bytes": most, "tuning": tuning}
    check_op(runner(source, order), mutant.op, call, **how)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_planted_bugs_are_found(mutant: Mutant) -> None:
    from tests.shim.driver import KernelFault

    sound, planted = sources(mutant.op), sources(mutant.op, mutant.old, mutant.new)
    found = []
    for order in (0, 1):
        run_mutant(mutant, sound, order)
        try:
            run_mutant(mutant, planted, order)
        except (KernelFault, AssertionError) as exc:
            found.append(str(exc).splitlines()[0])
    assert found, "no call noticed it"
