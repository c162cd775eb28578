"""Which kernels a product of 9 tokens and more takes, and that every way gives the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nanocupy.ops.cuda_sizes import OpSizes
from nanocupy.ops.launch_skinny import SkinnyTuning
from nanocupy.ops.launch_tall import ENTRY as TALL_ENTRY
from nanocupy.ops.launch_tall import TallTuning
from nanocupy.ops.launch_wide import ALWAYS, WideRange, WideTuning
from nanocupy.ops.launch_wide import NEVER as NEVER_WIDE
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.backends import TOLERANCES, assert_close
from tests.kernels.skinny_runs import ENTRIES, make_call
from tests.kernels.wide_runs import ENTRIES as WIDE_ENTRIES
from tests.ops.cases import DTYPES
from tests.shim import build
from tests.shim.device import MODERN, OLD, shim_ops

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HOPPER = replace(MODERN, wgmma=True)
NEVER = {"skinny_tuning": SkinnyTuning(max_rows=0)}


def launched(
    op: str,
    rows: int,
    inputs: int,
    traits: Any = MODERN,
    dtype: str = "bfloat16",
    residual: str = "",
    outputs: int = 45,
    bias: bool = True,
    **tunings: Any,
) -> list[str]:
    """The kernels that the op launched, its result compared with the reference."""  # fmt: skip
    storage = DTYPES[dtype]
    wide = DTYPES[residual or dtype]
    call = make_call(op, storage, rows, outputs, inputs, bias=bias, residual=wide)
    sizes = OpSizes(
        max_tokens=rows + 3, max_num_seqs=rows, max_rows=rows, max_context=64, hidden_size=inputs,
        intermediate_size=outputs, vocab_size=outputs, num_heads=4, num_kv_heads=2, head_size=64,
        dtype=dtype, residual_dtype=residual or dtype, cache_dtype=dtype,
    )  # fmt: skip
    (name,) = call.written
    before = call.arguments[name]
    wanted = before.copy() if op.startswith("norm") else before.astype(np.float64)
    ops = shim_ops(sizes, traits, **tunings)
    out = before.copy()
    getattr(ops, op)(**(call.arguments | {name: out}))
    getattr(NumpyOps(np.float64), op)(**(call.arguments | {name: wanted}))
    assert_close(out, wanted, op, tolerance=2 * TOLERANCES[dtype])
    return ops._kernels.launched


@pytest.mark.parametrize("op", ENTRIES)
@pytest.mark.parametrize("rows", [9, 17, 32])
def test_more_than_eight_rows_take_tensor_cores(op: str, rows: int) -> None:
    """With the norm folded in, but for the head's, which takes some rows."""
    norm = ["rms_norm_rows"] if op == "lm_head" else []
    assert launched(op, rows, 264) == [*norm, ENTRIES[op]]


@pytest.mark.parametrize("op", ["norm_linear", "norm_swiglu"])
def test_the_norm_apart(op: str) -> None:
    tuning = SkinnyTuning(fold_norm=False)
    assert launched(op, 20, 264, skinny_tuning=tuning) == ["rms_norm_rows", ENTRIES[op]]


@pytest.mark.parametrize("op", ["norm_linear", "linear_add", "norm_swiglu"])
def test_a_wide_residual_stream(op: str) -> None:
    norm = [] if op == "linear_add" else ["rms_norm_rows"]
    assert launched(op, 12, 264, residual="float32") == [*norm, ENTRIES[op]]


@pytest.mark.parametrize("op", ENTRIES)
@pytest.mark.parametrize(
    ("rows", "inputs", "how"),
    [
        (33, 264, {}),
        (9, 260, {}),
        (9, 264, {"traits": OLD}),
        (9, 264, {"dtype": "float32"}),
        (9, 264, NEVER),
    ],
    ids=["rows", "inputs", "card", "type", "tuning"],
)
def test_what_goes_to_cublas(op: str, rows: int, inputs: int, how: dict[str, Any]) -> None:
    assert ENTRIES[op] not in launched(op, rows, inputs, **how)


@pytest.mark.parametrize("op", WIDE_ENTRIES)
@pytest.mark.parametrize("rows", [33, 64, 130])
def test_still_more_rows_take_warpgroup_products(op: str, rows: int) -> None:
    norm = [] if op == "linear_add" else ["rms_norm_rows"]
    wanted = [*norm, WIDE_ENTRIES[op]]
    assert launched(op, rows, 264, HOPPER, outputs=152, wide_tuning=ALWAYS) == wanted


@pytest.mark.parametrize("op", WIDE_ENTRIES)
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_warpgroup_products_go_before_those_of_few_rows(op: str, rows: int) -> None:
    """Where they are to be taken at all."""
    norm = [] if op == "linear_add" else ["rms_norm_rows"]
    wanted = [*norm, WIDE_ENTRIES[op]]
    assert launched(op, rows, 264, HOPPER, outputs=152, wide_tuning=ALWAYS) == wanted


@pytest.mark.parametrize("op", WIDE_ENTRIES)
def test_a_wide_residual_stream_of_many_rows(op: str) -> None:
    norm = [] if op == "linear_add" else ["rms_norm_rows"]
    wanted = [*norm, WIDE_ENTRIES[op]]
    how = {"residual": "float32", "outputs": 152, "wide_tuning": ALWAYS}
    assert launched(op, 70, 264, HOPPER, **how) == wanted


@pytest.mark.parametrize("op", WIDE_ENTRIES)
def test_gate_and_up_count_as_both(op: str) -> None:
    """As large a matrix as of twice the outputs."""
    megabytes = 152 * 264 * 2 / 1e6
    ranges = (WideRange(least_mb=1.5 * megabytes),)
    found = launched(op, 40, 264, HOPPER, outputs=152, wide_tuning=WideTuning(ranges=ranges))
    assert (WIDE_ENTRIES[op] in found) == (op == "norm_swiglu")


@pytest.mark.parametrize("op", WIDE_ENTRIES)
@pytest.mark.parametrize(
    ("rows", "inputs", "how"),
    [
        (257, 264, {}),
        (40, 260, {}),
        (40, 264, {"outputs": 44}),
        (40, 264, {"traits": MODERN}),
        (40, 264, {"traits": replace(HOPPER, force_plain=True)}),
        (40, 264, {"dtype": "float32"}),
        (40, 264, {"wide_tuning": NEVER_WIDE}),
        (65, 264, {"wide_tuning": WideTuning(ranges=(WideRange(max_rows=64),))}),
        (8, 264, {"wide_tuning": WideTuning(ranges=(WideRange(min_rows=9),))}),
        (40, 264, {"wide_tuning": WideTuning(ranges=(WideRange(least_mb=1),))}),
    ],
    ids=[
        "many", "inputs", "outputs", "card", "plain", "type", "off", "fewer", "more", "small",
    ],
)  # fmt: skip
def test_what_goes_to_others(op: str, rows: int, inputs: int, how: dict[str, Any]) -> None:
    how = {"traits": HOPPER, "outputs": 48, "wide_tuning": ALWAYS, **how}
    assert WIDE_ENTRIES[op] not in launched(op, rows, inputs, **how)


TALL = TallTuning(min_rows=257)


def test_gate_and_up_of_prompts_take_one_product() -> None:
    how = {"outputs": 136, "tall_tuning": TALL, "bias": False}
    assert launched("norm_swiglu", 300, 456, HOPPER, **how) == ["rms_norm_rows", TALL_ENTRY]
    found = launched("norm_swiglu", 257, 520, HOPPER, dtype="float16", residual="float32", **how)
    assert found == ["rms_norm_rows", TALL_ENTRY]


@pytest.mark.parametrize("op", ["norm_linear", "linear_add"])
def test_other_products_of_prompts_do_not(op: str) -> None:
    how = {"outputs": 136, "tall_tuning": TALL, "bias": False}
    assert TALL_ENTRY not in launched(op, 300, 456, HOPPER, **how)


@pytest.mark.parametrize(
    ("rows", "inputs", "how"),
    [
        (260, 448, {}),
        (260, 460, {}),
        (260, 456, {"outputs": 44}),
        (260, 456, {"bias": True}),
        (260, 456, {"traits": MODERN}),
        (260, 456, {"traits": replace(HOPPER, force_plain=True)}),
        (260, 456, {"dtype": "float32"}),
        (260, 456, {"tall_tuning": TallTuning(min_rows=261)}),
        (260, 456, {"tall_tuning": TallTuning()}),
    ],
    ids=["few", "inputs", "outputs", "bias", "card", "plain", "type", "rows", "default"],
)
def test_which_prompts_go_to_cublas(rows: int, inputs: int, how: dict[str, Any]) -> None:
    how = {"traits": HOPPER, "outputs": 48, "tall_tuning": TALL, "bias": False, **how}
    found = launched("norm_swiglu", rows, inputs, **how)
    assert TALL_ENTRY not in found
    assert found[-1] == "swiglu_rows"
