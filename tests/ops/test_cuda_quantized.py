"""Which kernels a product with a quantised weight takes, and that every way gives the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nanocupy.ops import cuda_quantized
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import OpSizes, step_launch, workspace_plan
from nanocupy.ops.launch_quantized import PackedFormat, packed_format
from nanocupy.ops.numpy_ops import NumpyOps
from nanocupy.ops.packed_matrix import PackedMatrix, packed_row_order, scale_unit
from nanocupy.quantized import QuantizedMatrix
from tests.kernels.backends import TOLERANCES, assert_close
from tests.kernels.quantized_runs import ENTRIES, make_call
from tests.kernels.quantized_stream_runs import ENTRIES as STREAM_ENTRIES
from tests.kernels.quantized_wide_runs import ENTRIES as WIDE_ENTRIES
from tests.ops.cases import DTYPES
from tests.shim import build
from tests.shim.device import MODERN, OLD, _ShimKernel, shim_ops

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HOPPER = replace(MODERN, wgmma=True)


def packed_on(ops: CudaOps, weight: QuantizedMatrix, pairs: bool) -> PackedMatrix:
    form = packed_format(weight.kind, weight.shape[1], weight.group_size)
    assert form is not None
    out = np.full(form.packed_shape(*weight.shape, pairs), 0xFF, np.uint8)
    rows = weight.rows(packed_row_order(weight.shape[0])) if pairs else weight
    unit = scale_unit(weight)
    ops.pack_quantized(
        rows.codes.view(np.uint8), rows.scales, rows.offsets, weight.group_size, form, unit, out
    )
    return PackedMatrix(out, unit, form, weight.shape, pairs, weight.input_order)


def launched(
    op: str,
    rows: int,
    traits: Any = MODERN,
    *,
    kind: str = "int4",
    group_size: int | None = 32,
    inputs: int = 264 + 24,
    dtype: str = "bfloat16",
    residual: str = "",
    ordered: bool = False,
) -> list[str]:
    """The kernels that the op launched, its result compared with the reference."""
    storage, wide = DTYPES[dtype], DTYPES[residual or dtype]
    call = make_call(op, storage, kind, group_size, rows, 45, inputs, bias=True, residual=wide)
    weight = call.arguments["weight"]
    if ordered:
        order = np.random.default_rng(7).permutation(inputs).astype(np.int32)
        weight = call.arguments["weight"] = replace(weight, input_order=order)
    sizes = OpSizes(
        max_tokens=rows + 3, max_num_seqs=rows, max_rows=rows, max_context=64, hidden_size=inputs,
        intermediate_size=45, vocab_size=45, num_heads=4, num_kv_heads=2, head_size=64,
        dtype=dtype, residual_dtype=residual or dtype, cache_dtype=dtype,
        dequantized_size=90 * inputs, ordered_width=inputs if ordered else 0,
    )  # fmt: skip
    (name,) = call.written
    before = call.arguments[name]
    wanted = before.copy() if op.startswith("norm") else before.astype(np.float64)
    ops = shim_ops(sizes, traits)
    packed = packed_on(ops, weight, op == "norm_swiglu")
    ops._kernels.launched.clear()
    out = before.copy()
    getattr(ops, op)(**(call.arguments | {name: out, "weight": packed}))
    getattr(NumpyOps(np.float64), op)(**(call.arguments | {name: wanted}))
    assert_close(out, wanted, op, tolerance=2 * TOLERANCES[dtype])
    return ops._kernels.launched


@pytest.mark.parametrize("op", ENTRIES)
def test_few_rows_multiply_codes_with_the_norm_folded_in(op: str) -> None:
    for rows, kind, group_size in ((1, "int8", 32), (8, "int4", 32), (3, "fp8", None)):
        assert launched(op, rows, kind=kind, group_size=group_size) == [ENTRIES[op]]


@pytest.mark.parametrize("op", ENTRIES)
def test_more_rows_take_a_norm_before_and_a_launch_for_each_32(op: str) -> None:
    norm = [] if op == "linear_add" else ["rms_norm_rows"]
    for rows, kind, count in ((9, "int4", 1), (17, "int8", 1), (33, "int8", 2), (64, "int4", 2)):
        assert launched(op, rows, kind=kind) == [*norm, *[STREAM_ENTRIES[op]] * count]


@pytest.mark.parametrize("op", ENTRIES)
def test_up_to_16_rows_of_bytes_take_the_kernel_of_few(op: str) -> None:
    norm = [] if op == "linear_add" else ["rms_norm_rows"]
    for rows, kind, group_size in ((9, "int8", 32), (16, "fp8", None)):
        assert launched(op, rows, kind=kind, group_size=group_size) == [*norm, ENTRIES[op]]


@pytest.mark.parametrize("op", ENTRIES)
def test_batches_take_warpgroups(op: str) -> None:
    norm = [] if op == "linear_add" else ["rms_norm_rows"]
    for rows, kind, group_size in (
        (9, "int4", 32), (16, "int4", 32), (17, "int8", 32), (33, "int4", 32), (64, "fp8", None),
    ):  # fmt: skip
        names = launched(op, rows, HOPPER, kind=kind, group_size=group_size)
        assert names == [*norm, WIDE_ENTRIES[op]]
    assert launched(op, 8, HOPPER) == [ENTRIES[op]]
    assert launched(op, 16, HOPPER, kind="int8") == [*norm, ENTRIES[op]]
    for how in ({"dtype": "float16"}, {"group_size": 16}):
        assert launched(op, 17, HOPPER, **how) == [*norm, STREAM_ENTRIES[op]]
    if op == "lm_head":  # of any number
        assert launched(op, 65, HOPPER) == [*norm, *[WIDE_ENTRIES[op]] * 2]


@pytest.mark.parametrize("op", ENTRIES)
def test_many_rows_unpack_the_matrix_first(op: str) -> None:
    names = launched(op, 65)
    if op == "lm_head":  # whatever their number
        assert names == ["rms_norm_rows", *[STREAM_ENTRIES[op]] * 3]
    else:
        assert names[0] == "dequantize_rows"
        assert not {ENTRIES[op], STREAM_ENTRIES[op]} & set(names)


@pytest.mark.parametrize("op", ENTRIES)
@pytest.mark.parametrize("rows", [1, 9, 65])
def test_an_order_of_inputs_is_followed(op: str, rows: int) -> None:
    names = launched(op, rows, ordered=True)
    assert names[0] == "dequantize_rows" or "gather_inputs" in names


@pytest.mark.parametrize("op", ENTRIES)
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_old_cards_and_float32_unpack_always(op: str, kind: str) -> None:
    for rows in (1, 9):
        for traits, dtype in ((OLD, "float16"), (MODERN, "float32")):
            names = launched(op, rows, traits, kind=kind, dtype=dtype, ordered=rows == 9)
            assert names[0] == "dequantize_rows"


@pytest.mark.parametrize("op", ENTRIES)
def test_no_product_starts_before_its_matrix_is_unpacked(op: str, monkeypatch) -> None:
    """Products read weights before they wait for the kernel in front of them."""
    found: list[tuple[str, bool]] = []
    launch = _ShimKernel.launch

    def noted(self, *args: Any, **options: Any) -> None:
        found.append((self._entry, options["overlap_previous"]))
        launch(self, *args, **options)

    monkeypatch.setattr(_ShimKernel, "launch", noted)
    launched(op, 1, dtype="float32")
    assert [name for name, overlaps in found if not overlaps] == [found[-1][0]]
    found.clear()
    launched(op, 12)
    assert all(overlaps for _, overlaps in found)


def test_a_launch_is_planned_once() -> None:
    cuda_quantized._plan.cache_clear()
    launched("linear_add", 5)
    before = cuda_quantized._plan.cache_info()
    launched("linear_add", 5)
    after = cuda_quantized._plan.cache_info()
    assert (after.misses, after.currsize) == (before.misses, 1)
    assert after.hits > before.hits


@pytest.mark.parametrize("op", ENTRIES)
def test_a_wider_residual_stream(op: str) -> None:
    for rows in (2, 12):
        launched(op, rows, residual="float32")
    launched(op, 20, HOPPER, residual="float32")


def test_whole_steps_with_quantised_weights() -> None:
    sizes = OpSizes(
        max_tokens=4, max_num_seqs=4, max_rows=4, max_context=64, hidden_size=1024,
        intermediate_size=3072, vocab_size=4096, num_heads=16, num_kv_heads=8, head_size=128,
        dtype="bfloat16", residual_dtype="bfloat16", cache_dtype="bfloat16",
    )  # fmt: skip
    traits = replace(MODERN, num_multiprocessors=132)
    floats = step_launch(sizes, traits, 1)
    assert floats is not None
    assert not floats.macros.keys() & {"WEIGHT_KIND", "HAS_HEAD"}
    coded_head = step_launch(replace(sizes, coded_head=True), traits, 1)
    assert coded_head is not None
    assert coded_head.macros == {**floats.macros, "HAS_HEAD": 0}
    form = PackedFormat("int4", 64)
    quantised = replace(sizes, dequantized_size=100, layer_format=form)
    codes = step_launch(quantised, traits, 1)
    assert codes is not None
    assert codes.macros.items() >= form.macros.items()
    assert step_launch(replace(quantised, coded_head=True), traits, 1) == codes
    mixed = replace(quantised, layers_alike=False, layer_format=None)
    assert step_launch(mixed, traits, 1) is None
    assert "step_words" not in workspace_plan(mixed, traits)
    assert workspace_plan(quantised, traits)["dequantized"] == ((100,), "bfloat16")
