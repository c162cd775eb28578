"""Products of 9 to 32 tokens with quantised weights against the NumPy ops in float64, and against
themselves.

Each variant of the macros meets every op at sizes that leave a rest everywhere: outputs in a strip
and a tile, inputs in a chunk, chunks in a part of the inputs, a ring and a cluster, tokens in
a build's room.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from nanocupy.ops.launch_quantized import packed_format
from nanocupy.ops.launch_quantized_stream import (
    DEFAULT_TUNING,
    MAX_BATCH,
    MAX_ROWS,
    MIN_ROWS,
    StreamTuning,
    part_rows,
    plan_stream,
    stream_rows,
    uses_stream,
)
from tests.kernels.quantized_stream_runs import (
    ENTRIES,
    SMALL,
    Storage,
    check_op,
    launch_op,
    make_call,
    pack,
)
from tests.ops.cases import DTYPES

OPS = tuple(ENTRIES)


@dataclass(frozen=True)
class Variant:
    """A build, and whether the residual stream is float32."""

    storage: Storage
    rows: int
    tuning: StreamTuning = SMALL
    wide: bool = False

    def __str__(self) -> str:
        named = {k: v for k, v in vars(self.tuning).items() if v != getattr(SMALL, k)}
        extra = "".join(f"-{name}{int(value)}" for name, value in named.items())
        return f"{self.storage}-m{self.rows}{'-wide' if self.wide else ''}{extra}"


def small(**changes: Any) -> StreamTuning:
    return replace(SMALL, **changes)


VARIANTS = [
    Variant(Storage("int4", 128), 32),
    Variant(Storage("int4", 128), 31, small(out_tile=192, splits=2)),
    Variant(Storage("int4", 32), 17, small(out_tile=64, splits=4, warps_k=2), wide=True),
    Variant(Storage("int4", 64, "float16"), 9, small(out_tile=32, stages=3, warps_k=8)),
    Variant(Storage("int4", 16), 30, small(out_tile=256, splits=8)),
    Variant(Storage("int4", 48, "float16"), 12, small(out_tile=256, splits=2, warp_strips=4)),
    Variant(Storage("int4", 256), 25, small(out_tile=64, strips=1, warp_strips=1)),
    Variant(Storage("int4", 128), 16, small(out_tile=48, strips=1, warp_strips=3, stages=4)),
    Variant(Storage("int4", 128), 24, small(out_tile=64, splits=2, warps_k=4)),
    Variant(Storage("int8", 128), 32, small(out_tile=128, strips=1, warp_strips=2), wide=True),
    Variant(Storage("int8", 32, "float16"), 11, small(splits=4)),
    Variant(Storage("int8", 16), 28, small(out_tile=48, strips=1, warp_strips=1, warps_k=2)),
    Variant(Storage("int8", 64), 20, small(out_tile=64, splits=8, stages=3)),
    Variant(
        Storage("int8", None, "float16"), 16, small(out_tile=128, splits=2, strips=1, warp_strips=4)
    ),
    Variant(Storage("fp8", None), 32, small(out_tile=64, splits=2)),
    Variant(Storage("fp8", 128, "float16"), 16, small(out_tile=128, warp_strips=4, warps_k=2)),
    Variant(Storage("fp8", 32), 9, small(out_tile=32, splits=4)),
]
# outputs, inputs (as multiples of the group, about), bias
SIZES = [(1, 16, True), (37, 384, False), (300, 1160, True), (120, 2400, False)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_variant(backend, op: str, variant: Variant) -> None:
    storage = variant.storage
    residual = DTYPES["float32"] if variant.wide else None
    for outputs, inputs, bias in SIZES:
        group = storage.group_size or 8
        inputs = max(1, inputs // group) * group
        call = make_call(
            op, DTYPES[storage.dtype], storage.kind, storage.group_size, variant.rows, outputs,
            inputs, bias=bias, residual=residual if op == "linear_add" else None,
        )  # fmt: skip
        check_op(backend.run, op, call, storage.dtype, tuning=variant.tuning)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [9, 16, 17, 31, 32])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("op", OPS)
def test_as_launched_on_a_device(backend, op: str, kind: str, rows: int) -> None:
    if backend.name != "gpu":
        pytest.skip("the sizes of a model")
    for outputs, inputs, dtype, group_size in (
        (2200, 4096, "bfloat16", 128), (1024, 3072, "float16", 32), (776, 14336, "bfloat16", 128),
        (4133, 512, "bfloat16", 16), (1536, 896, "float16", 64),
    ):  # fmt: skip
        group = None if kind == "fp8" else group_size
        call = make_call(op, DTYPES[dtype], kind, group, rows, outputs, inputs, bias=True)
        check_op(
            backend.run, op, call, dtype, tuning=DEFAULT_TUNING, num_multiprocessors=132
        )  # fmt: skip


# ----------------------------------------------------------------------------- what may not matter


def results(backend, op: str, kind: str, rows_list, tunings) -> list[np.ndarray]:
    """Of one call, its first rows each time."""
    group_size = None if kind == "fp8" else 32
    call = make_call(op, DTYPES["bfloat16"], kind, group_size, 32, 150, 1440, bias=True)
    packed = pack(backend.run, call.arguments["weight"], op == "norm_swiglu", "bfloat16")
    (name,) = call.written
    found = []
    for rows in rows_list:
        for tuning in tunings:
            arguments = dict(call.arguments)
            part = "rows" if "rows" in arguments else "x"
            arguments[part] = arguments[part][:rows]
            arguments[name] = arguments[name][:rows].copy()
            launch_op(backend.run, op, arguments, "bfloat16", packed=packed, tuning=tuning)
            found.append(arguments[name])
    return found


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("op", OPS)
def test_the_batch_does_not_change_a_bit(backend, op: str, kind: str) -> None:
    for tuning in (small(splits=2), small(out_tile=64, splits=4, warps_k=2)):
        whole, *others = results(backend, op, kind, (32, 9, 16, 17, 31), [tuning])
        for few in others:
            assert few.tobytes() == whole[: len(few)].tobytes()


@pytest.mark.parametrize("op", OPS)
def test_tiles_strips_and_rings_do_not_change_a_bit(backend, op: str) -> None:
    tunings = [
        small(splits=2), small(splits=2, out_tile=64), small(splits=2, out_tile=128, warp_strips=4),
        small(splits=2, strips=1), small(splits=2, stages=5),
    ]  # fmt: skip
    for kind in ("int4", "int8"):
        first, *others = results(backend, op, kind, (17,), tunings)
        assert all(other.tobytes() == first.tobytes() for other in others)


def test_infinity_and_nan_stay_in_their_token(backend) -> None:
    call = make_call("linear_add", DTYPES["bfloat16"], "int4", 32, 17, 37, 288)
    call.arguments["x"][3, 263] = np.inf
    call.arguments["x"][3, 100] = np.nan
    after = {**call.arguments, "residual": call.arguments["residual"].copy()}
    launch_op(backend.run, "linear_add", after, "bfloat16")
    finite = np.isfinite(after["residual"].astype(np.float32))
    assert not finite[3].any()
    assert np.delete(finite, 3, axis=0).all()


# ------------------------------------------------------------------------------ the plan

# outputs, inputs, whether of gate and up: of Qwen3-0.6B, Llama-3.2-1B, Llama-3.1-8B
SHAPES = [
    (4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False),
    (3072, 2048, False), (2048, 2048, False), (8192, 2048, True), (2048, 8192, False),
    (6144, 4096, False), (4096, 4096, False), (14336, 4096, True), (4096, 14336, False),
    (128256, 4096, False), (896, 4864, False),
]  # fmt: skip
FORMATS = [("int4", 128), ("int4", 32), ("int4", 16), ("int8", 128), ("int8", 16), ("fp8", None)]


def plan(kind: str, group: int | None, outputs: int, inputs: int, rows: int = 32, **more: Any):
    form = packed_format(kind, inputs, group or inputs)
    assert form is not None
    return plan_stream(form, outputs, inputs, rows, 132, **more)


@pytest.mark.parametrize(("kind", "group"), FORMATS)
@pytest.mark.parametrize(
    ("clusters", "shared_kb"), [(True, 227), (False, 163), (False, 99), (True, 99)]
)
def test_what_is_said_to_have_room_has(
    kind: str, group: int | None, clusters: bool, shared_kb: int
) -> None:
    card = {"clusters": clusters, "max_shared_bytes": shared_kb << 10}
    for outputs, inputs, pairs in SHAPES:
        most = stream_rows(packed_format(kind, inputs, group or inputs), inputs, **card)
        assert most in (0, 16, MAX_ROWS)
        if clusters and shared_kb == 227:
            assert most == MAX_ROWS
        for rows in (MIN_ROWS, 16, 17, MAX_ROWS):
            if rows > most:
                with pytest.raises(ValueError, match="shared memory"):
                    plan(kind, group, outputs, inputs, rows, pairs=pairs, **card)
                continue
            launch = plan(kind, group, outputs, inputs, rows, pairs=pairs, **card)
            macros = launch.macros
            assert launch.shared_bytes <= shared_kb << 10
            assert launch.grid[0] % launch.cluster == 0
            assert clusters or launch.cluster == 1
            assert launch.block == 32 * macros["WARPS_N"] * macros["WARPS_K"] <= 512
            assert macros["OUT_TILE"] % (16 * macros["WARPS_N"] * macros["STRIPS"]) == 0
            assert macros["STAGES"] >= 2
            assert launch.cluster <= -(-inputs // 128)
            if macros["MIN_BLOCKS"] == 2:
                assert 2 * launch.shared_bytes <= 226 << 10


def test_the_matrices_of_a_large_model_fill_the_device() -> None:
    """In one turn, and no multiprocessor reads more than an eighth above its share."""
    for kind, group in FORMATS:
        for outputs, inputs, pairs in SHAPES[8:12]:
            launch = plan(kind, group, outputs, inputs, pairs=pairs)
            tile = launch.macros["OUT_TILE"]
            assert launch.grid[0] <= 132
            assert 132 * tile <= 1.13 * launch.cluster * outputs * (2 if pairs else 1)


def test_launches_of_a_batch_have_one_length() -> None:
    for rows, each in ((9, 9), (32, 32), (33, 17), (50, 25), (64, 32), (65, 22)):
        assert part_rows(rows, 32) == each
    assert part_rows(33, 16) == 11


def test_what_is_taken_and_what_is_refused() -> None:
    for kind, least in (("int4", MIN_ROWS), ("int8", 17), ("fp8", 17)):
        taken = [rows for rows in range(100) if uses_stream(rows, kind)]
        assert taken == list(range(least, MAX_BATCH + 1))
        assert uses_stream(1, kind, StreamTuning(min_rows=1))
        assert not uses_stream(32, kind, StreamTuning(min_rows=MAX_BATCH + 1))
    assert plan("int4", 32, 0, 64).grid == (0,)
    for rows, inputs in ((0, 64), (MAX_ROWS + 1, 64), (1, 12)):
        with pytest.raises(ValueError, match="quantized kernels"):
            plan_stream(packed_format("int4", 64, 32), 8, inputs, rows, 132)


def test_the_plan_knows_the_kernels_constants() -> None:
    from tests.shim.build import KERNELS

    text = (KERNELS / "quantized_stream_parts.cuh").read_text()
    named = set(re.findall(r"^// (\w+(?:, \w+)*)  +\S", text, re.MULTILINE))
    named = {name for names in named for name in names.split(", ") if name.isupper()}
    assert set(plan("int4", 128, 64, 1024).macros) == named


# ------------------------------------------------------------------------------ the compiler


@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("int4", 32), ("int8", 128)])
@pytest.mark.parametrize("rows", [16, 32])
def test_little_spills_on_hopper(kind: str, group: int, rows: int) -> None:
    """Some bytes at most, of what is used outside the loop."""
    pytest.importorskip("cupy")
    from nanocupy.cuda.compiler import Compiler

    compiler = Compiler(cache=None, options=("--ptxas-options=-v",))
    for outputs, inputs, pairs in SHAPES[8:12]:
        macros = plan(kind, group, outputs, inputs, rows, pairs=pairs).macros
        log = compiler.compile("quantized_stream.cu", {"SCALAR": 2, **macros}, arch="90a").log
        found = re.findall(
            r"properties for quantized\w+\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
            log,
        )
        assert len(found) == 4, log
        assert all(int(count) <= 64 for pair in found for count in pair), log
