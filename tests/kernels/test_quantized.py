"""Products with quantised weights against the NumPy ops in float64, and against themselves.

Each variant of the macros meets every op at sizes that leave a rest everywhere: outputs in a
strip, strips in a pass and a round, inputs in a chunk, chunks in a segment, segments in a tile,
tokens in a build's room.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from nanocupy.ops import launch_quantized
from nanocupy.ops.launch_quantized import (
    DEFAULT_TUNING,
    MAX_TOKENS,
    QuantizedTuning,
    launch_tokens,
    packed_format,
    plan_quantized,
    uses_codes,
)
from tests.kernels.quantized_runs import (
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
TILED = replace(SMALL, tile_segments=1, fold_norm=False)
ONE, TWO = replace(SMALL, strips=1), replace(SMALL, strips=2)


@dataclass(frozen=True)
class Variant:
    """A build, and whether the residual stream is float32."""

    storage: Storage
    rows: int
    tuning: QuantizedTuning = SMALL
    wide: bool = False

    def __str__(self) -> str:
        named = {k: v for k, v in vars(self.tuning).items() if v != getattr(SMALL, k)}
        extra = "".join(f"-{name}{int(value)}" for name, value in named.items())
        return f"{self.storage}-m{self.rows}{'-wide' if self.wide else ''}{extra}"


VARIANTS = [
    Variant(Storage("int4", 128), 1),
    Variant(Storage("int4", 32, "float16"), 3),
    Variant(Storage("int4", 64), 8, replace(SMALL, fold_norm=False)),
    Variant(Storage("int4", 16), 2, ONE),
    Variant(Storage("int4", 48, "float16"), 9),
    Variant(Storage("int4", 256), 11, replace(TILED, strips=1)),
    Variant(Storage("int4", 128), 32, TILED),
    Variant(Storage("int4", 32), 17, wide=True),
    Variant(Storage("int8", 128), 1, wide=True),
    Variant(Storage("int8", 32, "float16"), 8, TILED),
    Variant(Storage("int8", 16), 13, TWO),
    Variant(Storage("int8", 64, "float16"), 31, replace(TILED, strips=2)),
    Variant(Storage("int8", None), 7, TWO),
    Variant(Storage("fp8", None), 1),
    Variant(Storage("fp8", None, "float16"), 16, TILED),
    Variant(Storage("fp8", 128), 5, TWO),
    Variant(Storage("fp8", 32, "float16"), 29),
]
# outputs, inputs (as multiples of the group, about), bias
SIZES = [(1, 16, True), (37, 384, False), (75, 1160, True), (20, 2400, False)]


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
@pytest.mark.parametrize("rows", [1, 5, 8, 16, 32])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("op", OPS)
def test_as_launched_on_a_device(backend, op: str, kind: str, rows: int) -> None:
    if backend.name != "gpu":
        pytest.skip("the sizes of a model")
    for outputs, inputs, dtype, group_size in (
        (2200, 4096, "bfloat16", 128), (1024, 3072, "float16", 32), (520, 14336, "bfloat16", 128),
        (4133, 512, "bfloat16", 16), (1536, 896, "float16", 64),
    ):  # fmt: skip
        group = None if kind == "fp8" else group_size
        call = make_call(op, DTYPES[dtype], kind, group, rows, outputs, inputs, bias=True)
        check_op(
            backend.run, op, call, dtype, tuning=DEFAULT_TUNING, num_multiprocessors=132
        )  # fmt: skip


# ----------------------------------------------------------------------------- what may not matter


def results(
    backend, op: str, kind: str, rows_list, hows, inputs: int = 2304
) -> dict[bool, list[np.ndarray]]:
    """Of one call, its first rows each time, normed beforehand so that the norm's bits agree; by
    whether the inputs lay in shared memory whole, which changes the order of sums."""
    group_size = None if kind == "fp8" else 32
    call = make_call(op, DTYPES["bfloat16"], kind, group_size, 32, 75, inputs, bias=True)
    packed = pack(backend.run, call.arguments["weight"], op == "norm_swiglu", "bfloat16")
    (name,) = call.written
    found: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for rows in rows_list:
        for how in hows:
            arguments = dict(call.arguments)
            for part in ("rows",) if "rows" in arguments else ("x",):
                arguments[part] = arguments[part][:rows]
            arguments[name] = arguments[name][:rows].copy()
            how = {"tuning": SMALL} | how
            how["tuning"] = replace(how["tuning"], fold_norm=False)
            whole = launch_op(backend.run, op, arguments, "bfloat16", packed=packed, **how)
            found[whole].append(arguments[name])
    return found


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("op", OPS)
def test_the_batch_does_not_change_a_bit(backend, op: str, kind: str) -> None:
    tiled = {"tuning": TILED}
    for how, rows in (({}, (8, 1, 3)), (tiled, (32, 1, 3, 8, 9, 16, 31))):
        for same in results(backend, op, kind, rows, [how]).values():
            for few in same[1:]:
                assert few.tobytes() == same[0][: len(few)].tobytes()


@pytest.mark.parametrize("op", OPS)
def test_tiles_grid_and_ring_do_not_change_a_bit(backend, op: str) -> None:
    hows: list[dict[str, Any]] = [
        {}, {"num_multiprocessors": 1}, {"num_multiprocessors": 50}, {"tuning": TILED},
        {"tuning": replace(SMALL, tile_segments=2)}, {"tuning": ONE}, {"tuning": TWO},
        {"tuning": replace(SMALL, ring_kb=100)}, {"max_shared_bytes": 70 << 10},
    ]  # fmt: skip
    for kind in ("int4", "int8"):
        found = results(backend, op, kind, (5,), hows)
        assert min(map(len, found.values())) > 1
        for same in found.values():
            assert all(result.tobytes() == same[0].tobytes() for result in same)


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


def plan(kind: str, group: int | None, outputs: int, inputs: int, rows: int = 1, **more: Any):
    form = packed_format(kind, inputs, group or inputs)
    assert form is not None
    return plan_quantized(form, outputs, inputs, rows, 132, **more)


@pytest.mark.parametrize(("kind", "group"), FORMATS)
@pytest.mark.parametrize("shared_kb", [227, 163, 99])
def test_every_card_has_room_for_every_batch(kind: str, group: int | None, shared_kb: int) -> None:
    for outputs, inputs, pairs in SHAPES:
        for rows in (1, 8, 16, launch_tokens(shared_kb << 10)):
            for norm in (False, True):
                launch = plan(
                    kind, group, outputs, inputs, rows, pairs=pairs, norm=norm,
                    max_shared_bytes=shared_kb << 10,
                )  # fmt: skip
                assert launch.shared_bytes <= shared_kb << 10
                assert launch.round_strips % launch.macros["STRIPS"] == 0
                assert launch.grid[0] <= 132
                assert not launch.folds_norm or (norm and rows <= 8)


def test_one_token_leaves_room_for_the_next_kernel() -> None:
    """Two blocks on a multiprocessor of an H100, each with 20 KB of codes on their way at least."""
    for kind, group in FORMATS:
        for outputs, inputs, pairs in SHAPES:
            launch = plan(kind, group, outputs, inputs, pairs=pairs, norm=inputs <= 4096)
            assert launch.shared_bytes <= 112 << 10
            assert launch.folds_norm == (inputs <= 4096)
            form = packed_format(kind, inputs, group or inputs)
            free = launch.macros["STAGES"] - launch.macros["STRIPS"]
            assert free * 8 * form.chunk_bytes >= 20 << 10
            assert group == 16 or launch.tile_segments * 1024 >= inputs


def test_what_is_taken_and_what_is_refused() -> None:
    for rows, weight_bytes, capability, plain, wanted in (
        (1, 2, (9, 0), False, True),
        (64, 2, (8, 0), False, True),
        (65, 2, (9, 0), False, False),
        (1, 4, (9, 0), False, False),
        (1, 2, (7, 5), False, False),
        (1, 2, (9, 0), True, False),
    ):
        assert uses_codes(rows, weight_bytes, capability, force_plain=plain) == wanted
    assert packed_format("int8", 96, 8) is None
    assert packed_format("fp8", 100, 100) is None  # no multiple of 8 inputs
    assert packed_format("int4", 96, 48).group == 16
    assert packed_format("int8", 4096, 4096).group == 128
    assert packed_format("int8", 96, 96).group == 128
    assert plan("int4", 32, 0, 64).grid == (0,)
    for rows, inputs in ((0, 64), (MAX_TOKENS + 1, 64), (1, 12)):
        with pytest.raises(ValueError, match="quantized kernels"):
            plan_quantized(packed_format("int4", 64, 32), 8, inputs, rows, 132)
    with pytest.raises(ValueError, match="shared memory"):
        plan("int4", 32, 64, 1024, 32, max_shared_bytes=16 << 10)


def test_the_plan_knows_the_kernels_constants() -> None:
    from tests.shim.build import KERNELS

    files = ("_format.cuh", "_input.cuh", "_sums.cuh", ".cuh", "_whole.cuh", ".cu")
    text = "".join((KERNELS / f"quantized{end}").read_text() for end in files)
    for name in ("STRIP", "CHUNK", "SPAN", "WARPS", "INPUT_PAD"):
        found = re.search(rf"constexpr int {name} = (\d+);", text)
        assert found is not None
        assert int(found[1]) == getattr(launch_quantized, name)
    macros = plan("int4", 128, 64, 1024).macros
    named = set(re.findall(r"#ifndef (\w+)\n#(?:define|error)", text))
    assert set(macros) == named


# ------------------------------------------------------------------------------ the compiler


@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("int4", 32), ("int8", 128)])
def test_little_spills_on_hopper(kind: str, group: int) -> None:
    """Some bytes at most, with registers for two blocks on a multiprocessor up to 8 tokens."""
    pytest.importorskip("cupy")
    from nanocupy.cuda.compiler import Compiler

    compiler = Compiler(cache=None, options=("--ptxas-options=-v",))
    for rows, norm in ((1, False), (1, True), (16, False), (32, False)):
        macros = plan(kind, group, 4096, 1024, rows, norm=norm).macros
        log = compiler.compile("quantized.cu", {"SCALAR": 2, **macros}, arch="90a").log
        found = re.findall(
            r"properties for quantized\w+\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
            log,
        )
        assert len(found) == 4, log
        assert all(int(count) <= 32 for pair in found for count in pair), log
