"""Products of up to 64 tokens with quantised weights by warpgroups against the NumPy ops in
float64, and against themselves.

On the shim with twins of warpgroups' products, on a device of compute capability 9.0 with the real
ones. Each variant of the macros meets every op at sizes that leave a rest everywhere: outputs in
a strip and a tile, inputs in a chunk, chunks in both rings and a cluster, tokens in a build's room.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from nanocupy.ops.launch_quantized import packed_format
from nanocupy.ops.launch_quantized_wide import (
    ALIGNMENT,
    DEFAULT_TUNING,
    LEAST_GROUP,
    MAX_INPUT_STAGES,
    MAX_ROWS,
    MIN_INPUT_STAGES,
    NEVER,
    OPERANDS,
    TOKENS,
    WideCodesTuning,
    fetch_warps,
    plan_wide_codes,
    uses_wide_codes,
)
from tests.kernels.quantized_wide_runs import (
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
    tuning: WideCodesTuning = SMALL
    wide: bool = False

    def __str__(self) -> str:
        named = {k: v for k, v in vars(self.tuning).items() if v != getattr(SMALL, k)}
        extra = "".join(f"-{name}{int(value)}" for name, value in named.items())
        return f"{self.storage}-m{self.rows}{'-wide' if self.wide else ''}{extra}"


def small(**changes: Any) -> WideCodesTuning:
    return replace(SMALL, **changes)


VARIANTS = [
    Variant(Storage("int4", 128), 32),
    Variant(Storage("int4", 128), 31, small(out_tile=128, warpgroups=2, splits=2)),
    Variant(Storage("int4", 64), 18, small(out_tile=128, splits=4), wide=True),
    Variant(Storage("int4", 32), 64, small(out_tile=256, warpgroups=2, stages=3)),
    Variant(Storage("int4", 256), 48, small(out_tile=192, warpgroups=3, splits=8)),
    Variant(Storage("int4", 128), 33, small(out_tile=64, input_stages=5)),
    Variant(Storage("int4", 128), 9, small(out_tile=256, warpgroups=4, input_stages=7), wide=True),
    Variant(Storage("int4", 96), 30, small(out_tile=128, warpgroups=2, splits=2, input_stages=6)),
    Variant(Storage("int8", 128), 32, small(out_tile=128, splits=2), wide=True),
    Variant(Storage("int8", 32), 50, small(splits=4, stages=4)),
    Variant(Storage("int8", 64), 20, small(out_tile=128, warpgroups=2, splits=8, stages=3)),
    Variant(Storage("int8", None), 16, small(out_tile=256, input_stages=6)),
    Variant(Storage("fp8", None), 64, small(out_tile=64, splits=2)),
    Variant(Storage("fp8", 128), 15, small(out_tile=128, warpgroups=2, stages=3)),
    Variant(Storage("fp8", 32), 40, small(out_tile=64, splits=4)),
]
# outputs, inputs (as multiples of the group, about), bias
SIZES = [(1, 32, True), (37, 384, False), (300, 1160, True), (120, 2400, False)]


@pytest.fixture
def run(backend) -> Any:
    if not backend.has_wgmma:
        pytest.skip("warpgroup products need compute capability 9.0")
    return backend.run


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_variant(run, op: str, variant: Variant) -> None:
    storage = variant.storage
    residual = DTYPES["float32"] if variant.wide else None
    for outputs, inputs, bias in SIZES:
        group = storage.group_size or 8
        inputs = max(1, inputs // group) * group
        call = make_call(
            op, DTYPES[storage.dtype], storage.kind, storage.group_size, variant.rows, outputs,
            inputs, bias=bias, residual=residual if op == "linear_add" else None,
        )  # fmt: skip
        check_op(run, op, call, storage.dtype, tuning=variant.tuning)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 17, 33, 64])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("op", OPS)
def test_as_launched_on_a_device(run, backend, op: str, kind: str, rows: int) -> None:
    if backend.name != "gpu":
        pytest.skip("the sizes of a model")
    for outputs, inputs, dtype, group_size in (
        (2200, 4096, "bfloat16", 128), (1024, 3072, "bfloat16", 32),
        (776, 14336, "bfloat16", 128), (4133, 512, "bfloat16", 32), (1536, 896, "bfloat16", 64),
        (14336 if op == "norm_swiglu" else 6144, 4096, "bfloat16", 128),
    ):  # fmt: skip
        group = None if kind == "fp8" else group_size
        call = make_call(op, DTYPES[dtype], kind, group, rows, outputs, inputs, bias=True)
        check_op(run, op, call, dtype, tuning=DEFAULT_TUNING, num_multiprocessors=132)


# ----------------------------------------------------------------------------- what may not matter


def results(run, op: str, kind: str, rows_list, tunings) -> list[np.ndarray]:
    """Of one call, its first rows each time."""
    group_size = None if kind == "fp8" else 64
    call = make_call(op, DTYPES["bfloat16"], kind, group_size, 64, 150, 1408, bias=True)
    packed = pack(run, call.arguments["weight"], op == "norm_swiglu", "bfloat16")
    (name,) = call.written
    found = []
    for rows in rows_list:
        for tuning in tunings:
            arguments = dict(call.arguments)
            part = "rows" if "rows" in arguments else "x"
            arguments[part] = arguments[part][:rows]
            arguments[name] = arguments[name][:rows].copy()
            launch_op(run, op, arguments, "bfloat16", packed=packed, tuning=tuning)
            found.append(arguments[name])
    return found


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("op", OPS)
def test_the_batch_does_not_change_a_bit(run, op: str, kind: str) -> None:
    """Nor does the room of the build that it takes."""
    for tuning in (small(), small(out_tile=128, splits=4)):
        whole, *others = results(run, op, kind, (64, 9, 17, 32, 33, 48), [tuning])
        for few in others:
            assert few.tobytes() == whole[: len(few)].tobytes()


@pytest.mark.parametrize("op", OPS)
def test_tiles_and_rings_do_not_change_a_bit(run, op: str) -> None:
    tunings = [
        small(splits=2), small(splits=2, out_tile=128), small(splits=2, out_tile=128, warpgroups=2),
        small(splits=2, stages=5), small(splits=2, input_stages=7), small(splits=2, out_tile=192),
    ]  # fmt: skip
    for kind in ("int4", "int8"):
        first, *others = results(run, op, kind, (17,), tunings)
        assert all(other.tobytes() == first.tobytes() for other in others)


def test_infinity_and_nan_stay_in_their_token(run) -> None:
    call = make_call("linear_add", DTYPES["bfloat16"], "int4", 32, 17, 37, 288)
    call.arguments["x"][3, 263] = np.inf
    call.arguments["x"][3, 100] = np.nan
    after = {**call.arguments, "residual": call.arguments["residual"].copy()}
    launch_op(run, "linear_add", after, "bfloat16")
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
FORMATS = [("int4", 128), ("int4", 32), ("int8", 128), ("int8", 64), ("fp8", None)]


def plan(kind: str, group: int | None, outputs: int, inputs: int, rows: int = 32, **more: Any):
    form = packed_format(kind, inputs, group or inputs)
    assert form is not None
    return plan_wide_codes(form, outputs, inputs, rows, 132, **more)


@pytest.mark.parametrize(("kind", "group"), FORMATS)
@pytest.mark.parametrize(("outputs", "inputs", "pairs"), SHAPES)
def test_plans_of_real_shapes(
    kind: str, group: int | None, outputs: int, inputs: int, pairs: bool
) -> None:
    first = plan(kind, group, outputs, inputs, MAX_ROWS, pairs=pairs)
    for rows in (1, 16, 17, 32, 33, 48, 49, 64):
        launch = plan(kind, group, outputs, inputs, rows, pairs=pairs)
        macros = launch.macros
        tile, tokens, warpgroups = (macros[n] for n in ("OUT_TILE", "TOKENS", "WARPGROUPS"))
        assert rows <= tokens <= rows + 15
        assert launch.cluster == first.cluster, "sums would depend on the batch"
        assert launch.cluster <= min(8, -(-inputs // 128))
        assert launch.grid[0] == -(-outputs * (2 if pairs else 1) // tile) * launch.cluster
        assert tile % (64 * warpgroups) == 0
        fetching = fetch_warps(tokens)
        assert launch.block == 128 * warpgroups + 32 * fetching <= 640
        assert macros["STAGES"] >= 2
        assert MIN_INPUT_STAGES <= macros["INPUT_STAGES"] <= MAX_INPUT_STAGES
        form = packed_format(kind, inputs, group or inputs)
        assert form is not None
        rings = macros["STAGES"] * tile // 16 * form.chunk_bytes
        rings += macros["INPUT_STAGES"] * tokens * 256
        rings += tokens * 1536 // form.group if kind == "int4" else 0
        slots = -(-tokens // 2 // launch.cluster)
        inbox = 8 * tile * launch.cluster * slots
        assert launch.shared_bytes == 128 + max(1024 + rings, inbox) <= 227 << 10


def test_what_is_taken_and_what_is_refused() -> None:
    form = packed_format("int4", 1024, 128)
    few = packed_format("int4", 1024, 16)
    assert form is not None
    assert few is not None
    bytes_form = packed_format("int8", 1024, 128)
    assert bytes_form is not None
    for kind_form, first in ((form, 9), (bytes_form, 17)):
        taken = [n for n in range(100) if uses_wide_codes(kind_form, n, "bfloat16", wgmma=True)]
        assert taken == list(range(first, MAX_ROWS + 1))
    assert not uses_wide_codes(form, 48, "bfloat16", wgmma=False)
    assert not uses_wide_codes(form, 48, "float16", wgmma=True)
    assert not uses_wide_codes(few, 48, "bfloat16", wgmma=True)
    assert not uses_wide_codes(form, 48, "bfloat16", wgmma=True, tuning=NEVER)
    assert uses_wide_codes(form, 1, "bfloat16", wgmma=True, tuning=WideCodesTuning(min_rows=1))
    assert plan("int4", 32, 0, 64).grid == (0,)
    for rows, inputs in ((0, 64), (MAX_ROWS + 1, 64), (1, 12)):
        with pytest.raises(ValueError, match="quantized kernels"):
            plan_wide_codes(form, 8, inputs, rows, 132)
    with pytest.raises(ValueError, match="groups of 16"):
        plan_wide_codes(few, 8, 1024, 32, 132)
    with pytest.raises(ValueError, match="shared memory"):
        plan("int4", 128, 64, 1024, 64, max_shared_bytes=48 << 10)


def test_the_plan_knows_the_kernels_constants() -> None:
    from tests.shim.build import KERNELS

    text = (KERNELS / "quantized_wide_parts.cuh").read_text()
    named = set(re.findall(r"^// (\w+(?:, \w+)*)  +\S", text, re.MULTILINE))
    named = {name for names in named for name in names.split(", ") if name.isupper()}
    assert set(plan("int4", 128, 64, 1024).macros) == named
    found = re.search(r"int FETCH_WARPS = (.+) \? (\d+) : (\d+);", text)
    assert found is not None
    for tokens in TOKENS:
        is_many = eval(found[1], {"TOKENS": tokens})
        assert fetch_warps(tokens) == int(found[2 if is_many else 3])
    assert f"// INPUT_STAGES  chunks of inputs, in both their rings: {MIN_INPUT_STAGES} to " in text
    assert f"GROUP >= {LEAST_GROUP})" in text
    assert f"int OPERANDS = {OPERANDS};" in text
    assert f"int ATOM = {ALIGNMENT};" in text


# ------------------------------------------------------------------------------ the compiler


@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("int4", 32), ("int8", 128)])
@pytest.mark.parametrize("rows", [16, 32, 48, 64])
def test_little_spills(kind: str, group: int, rows: int) -> None:
    """Some bytes at most, of what is used outside the loop. And products run on while the next are
    started."""
    pytest.importorskip("cupy")
    from nanocupy.cuda.compiler import Compiler
    from nanocupy.errors import NanocupyError

    try:
        compiler = Compiler(cache=None, options=("--ptxas-options=-v",))
    except NanocupyError as exc:
        pytest.skip(f"no NVRTC: {exc}")
    plans = [
        plan(kind, group, outputs, inputs, rows, pairs=pairs).macros
        for outputs, inputs, pairs in SHAPES[8:12]
    ]
    for macros in {tuple(m.items()): m for m in plans}.values():
        log = compiler.compile("quantized_wide.cu", {"SCALAR": 2, **macros}, arch="90a").log
        found = re.findall(
            r"properties for quantized\w+\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
            log,
        )
        assert len(found) == 4, log
        assert all(int(count) <= 24 for pair in found for count in pair), log
        assert "C75" not in log, "the compiler serialised the products"
