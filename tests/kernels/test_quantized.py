"""Products with quantised weights against the NumPy ops in float64, and against themselves."""

from __future__ import annotations

import pytest

from tests.kernels.quantized_runs import ENTRIES, Storage, check_op, make_call
from tests.ops.cases import DTYPES

OPS = tuple(ENTRIES)
STORAGES = [
    Storage("int4", 128), Storage("int4", 32, "float16"), Storage("int4", 64),
    Storage("int8", 128), Storage("int8", 32, "float16"), Storage("fp8", None),
    Storage("fp8", None, "float16"),
]  # fmt: skip
# outputs, inputs, tokens, bias
SIZES = [(37, 384, 1, True), (100, 1152, 5, False), (8, 128, 8, True)]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_kind(backend, op: str, storage: Storage) -> None:
    for outputs, inputs, rows, bias in SIZES:
        call = make_call(
            op, DTYPES[storage.dtype], storage.kind, storage.group_size, rows, outputs, inputs,
            bias=bias,
        )  # fmt: skip
        check_op(backend.run, op, call, storage.dtype)
