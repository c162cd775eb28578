"""Bugs planted in the small-batch products: each must be found by a call that passes without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.kernels.gemv_runs import SMALL, check_op, make_call
from tests.ops.cases import DTYPES
from tests.shim import build
from tests.shim.build import KERNELS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HEADERS = ("gemv_input.cuh", "gemv_products.cuh", "gemv.cuh")


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the sources. Found by `op` on weights [outputs, inputs]."""

    name: str
    old: str
    new: str
    op: str = "norm_linear"
    outputs: int = 37
    inputs: int = 520
    dtype: str = "float32"
    rows: int = 2
    splits: int = 1
    shared_bytes: int = 96 << 10


MUTANTS = [
    Mutant(
        "no barrier after the inputs are in place",
        "input.load(place.tile);\n            block_sync();",
        "input.load(place.tile);",
    ),
    Mutant(
        "no barrier after the sums of squares",
        "input.start();\n    block_sync();",
        "input.start();",
    ),
    Mutant(
        "no barrier before the next tile is asked for",
        "block_sync();\n                input.request(place.tile);",
        "input.request(place.tile);",
        op="linear_add",
        inputs=1032,
        shared_bytes=2 * 4 * 300,
    ),
    Mutant(
        "no barrier before the parts are merged",
        "                block_sync();\n                if (finishes_shared) {",
        "                if (finishes_shared) {",
        splits=4,
    ),
    Mutant(
        "one buffer for the parts of all passes",
        "partial[place.pass % 2]",
        "partial[0]",
        splits=2,
        outputs=70,
    ),
    Mutant(
        "no wait for copied inputs",
        "cp_async_commit();\n            cp_async_wait<0>();",
        "cp_async_commit();",
        op="linear_add",
    ),
    Mutant(
        "no wait for the parked norm weights",
        "if constexpr (PARKED) cp_async_wait<0>();",
        "",
    ),
    Mutant(
        "one input beyond the last partial chunk",
        "return min(place.end * CHUNK, matrix.num_inputs);",
        "return min(place.end * CHUNK, matrix.num_inputs + 1);",
        inputs=517,
    ),
    Mutant(
        "the last partial chunk left out",
        "const int num_chunks = (matrix.num_inputs + CHUNK - 1) / CHUNK;",
        "const int num_chunks = matrix.num_inputs / CHUNK;",
    ),
    Mutant(
        "inputs not padded with zeros",
        "cp_async_16_or_zero(row(m) + k, p, k < end);",
        "if (k < end) cp_async_16(row(m) + k, p);",
        op="linear_add",
    ),
    Mutant(
        "rows beyond the matrix read",
        "min(unit * OUTPUTS + (PAIRS ? r / 2 : r), matrix.num_outputs - 1)",
        "unit * OUTPUTS + (PAIRS ? r / 2 : r)",
    ),
    Mutant(
        "outputs of the next block stored",
        "own_output(v) < end_output;",
        "own_output(v) <= end_output;",
        op="linear_add",
    ),
    Mutant(
        "gate and up exchanged",
        "PAIRS && r % 2 ? matrix",
        "PAIRS && r % 2 == 0 ? matrix",
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
        "low[4] = {v.x, 0, v.y, 0}, high[4] = {v.z, 0, v.w, 0}",
        "low[4] = {v.x, 0, v.z, 0}, high[4] = {v.y, 0, v.w, 0}",
        dtype="bfloat16",
        rows=3,
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
    how = {"k_splits": mutant.splits, "max_shared_bytes": mutant.shared_bytes, "tuning": tuning}
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
