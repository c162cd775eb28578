"""`CudaOps` on the host shim, over the cases that all backends share: which kernel, which launch,
which arguments, in which order. The kernels themselves have tests of their own."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from nanocupy.kv_types import FP8
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import DeviceTraits, OpSizes
from nanocupy.ops.interface import Ops
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.backends import TOLERANCES, assert_close
from tests.ops.cases import (
    CASES,
    DTYPES,
    Case,
    assert_codes_close,
    guarded,
    guards_intact,
    inner,
)
from tests.shim import build
from tests.shim.device import MODERN, OLD, shim_ops

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

HEAD_SIZES = (64, 80, 96, 128, 256)


def sizes_for(arguments: dict[str, np.ndarray], storage: str) -> OpSizes:
    """Sizes that hold this one call."""

    def dim(name: str, axis: int, default: int) -> int:
        array = arguments.get(name)
        return default if array is None else max(1, array.shape[axis])

    queries = [arguments[n] for n in ("q", "q_out", "q_scratch") if n in arguments]
    heads, head_size = queries[0].shape[1:] if queries else (4, 64)
    return OpSizes(
        max_tokens=max(
            [1, *(len(a) for n, a in arguments.items() if n in ("x", "q", "qkv", "token_ids"))]
        ),
        max_num_seqs=dim("kv_lens", 0, 1),
        max_rows=max(dim("rows", 0, 1), dim("logits", 0, 1)),
        max_context=int(max([1, *arguments.get("kv_lens", ())])),
        hidden_size=max(dim("x", -1, 8), dim("residual", -1, 8)),
        intermediate_size=dim("out", -1, 8),
        vocab_size=dim("logits", -1, 8),
        num_heads=heads,
        num_kv_heads=dim("key_cache", 1, 1),
        head_size=head_size,
        dtype=storage,
        residual_dtype=next(
            (arguments[n].dtype.name for n in ("residual", "x") if n in arguments),
            arguments["out"].dtype.name if "table" in arguments else storage,
        ),
        cache_dtype=cache_dtype_of(arguments, storage),
        max_queries=8,
        embed_dtype=arguments["table"].dtype.name if "table" in arguments else None,
        lm_head_dtype=arguments["weight"].dtype.name if "rows" in arguments else None,
    )


def cache_dtype_of(arguments: dict[str, np.ndarray], storage: str) -> str:
    if arguments.get("key_scales") is None:
        return storage
    return "int8" if arguments["key_cache"].dtype == np.int8 else FP8


@pytest.mark.parametrize(
    ("storage", "traits"), [("bfloat16", MODERN), ("float32", OLD)], ids=["modern", "old"]
)
@pytest.mark.parametrize("case", [c for c in CASES if c.op != "sample"], ids=str)
def test_case(case: Case, storage: str, traits: DeviceTraits) -> None:
    call = case.build(DTYPES[storage])
    arguments = call.arguments
    expected = {name: arguments[name].copy() for name in call.written}
    wide = {
        name: value.astype(np.float64)
        if name in call.written and value.dtype.kind == "f"
        else value
        for name, value in (arguments | expected).items()
    }
    # The reference rounds where storage does, so it writes into the storage type.
    getattr(NumpyOps(np.float64), case.op)(**(wide | expected))
    buffers = {name: guarded(arguments[name]) for name in call.written}
    outputs = {name: inner(buffer) for name, buffer in buffers.items()}
    ops = shim_ops(sizes_for(arguments, storage), traits)
    getattr(ops, case.op)(**(arguments | outputs))
    for name in call.written:
        assert guards_intact(buffers[name]), name
        if outputs[name].size:
            ignored = call.ignored.get(name)
            if outputs[name].dtype in (np.int8, np.uint8):
                assert_codes_close(outputs[name], expected[name], ignored)
                continue
            limit = 2 * TOLERANCES[call.head_dtype.name if call.head_dtype is not None else storage]
            assert_close(
                outputs[name], expected[name], name, ignored, limit
            )  # twice: the reference is rounded too


def test_signatures_are_the_interfaces() -> None:
    for name in Ops.__abstractmethods__:
        wanted = list(inspect.signature(getattr(Ops, name)).parameters)
        for backend in (NumpyOps, CudaOps):
            assert list(inspect.signature(getattr(backend, name)).parameters) == wanted, name
