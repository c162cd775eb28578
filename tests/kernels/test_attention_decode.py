"""Decode attention against the reference: on the CPU (host shim), and marked gpu on a device.

The launches come from nanocupy/ops/launch_attention_decode.py, with small cards made up so that the
contexts of these small cases are cut into many parts. What is planted must be found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanocupy.ops.launch_attention_decode import (
    FILE,
    MERGE_ENTRY,
    DecodeLaunch,
    DecodeTuning,
    launch_attention_decode,
)
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.backends import CODES, assert_close, cache_macro
from tests.ops import cases
from tests.ops.cases import CASES, DTYPES, Call, Case
from tests.shim import build
from tests.shim.driver import KernelFault, host_kernel

WRITTEN = (9, 10, 11, 12)  # out, partial_values, partial_states, counters
PLAIN_AND_MMA = ("attention_decode", "attention_decode_mma")
KERNELS = Path(build.KERNELS)

one_part = DecodeTuning(num_items=1)
many_parts = DecodeTuning(num_items=40, least_part_tokens=64, least_mma_rows=1)


@dataclass(frozen=True)
class Launch:
    """A grid, as the backends want it."""

    grid: tuple[int, ...]
    block: int
    shared_bytes: int


def attention_case(name: str, *args: Any, **kwargs: Any) -> Case:
    return Case("attention", name, cases._attention(*args, **kwargs))


def most_queries(call: Call) -> int:
    """The queries a sequence that the kernels are built for; longer sequences they leave alone."""
    return 1 if call.arguments["max_queries"] <= 1 else 8


def launch_for(
    call: Call, tuning: DecodeTuning | None, queries: int, force_plain: bool = False
) -> DecodeLaunch:
    a = call.arguments
    code = CODES[a["q"].dtype.name]
    cache = code if a["key_scales"] is None else CODES[a["key_cache"].dtype.name]
    return launch_attention_decode(
        len(a["kv_lens"]),
        a["q"].shape[1],
        a["key_cache"].shape[1],
        a["q"].shape[2],
        queries=queries,
        max_context=int(a["kv_lens"].max(initial=1)),
        scalar=code,
        cache=cache,
        compute_capability=(9, 0),
        num_multiprocessors=6,
        max_shared_bytes=227 << 10,
        force_plain=force_plain,
        tuning=tuning,
    )


def kernel_arguments(call: Call, launch: DecodeLaunch) -> list[Any]:
    a = call.arguments
    num_kv_heads, block_size = a["key_cache"].shape[1:3]
    counters = None if launch.merge else np.zeros(launch.counters_shape, np.uint32)
    numbers = (
        len(a["kv_lens"]), num_kv_heads, a["q"].shape[1] // num_kv_heads, block_size,
        a["block_tables"].shape[1], launch.num_items, launch.least_part, launch.num_row_tiles,
    )  # fmt: skip
    return [
        a["q"], a["key_cache"], a["value_cache"], a["key_scales"], a["value_scales"],
        a["query_starts"], a["kv_lens"], a["block_tables"], np.float32(a["scale"]),
        a["out"].copy(),
        np.full(launch.partial_values_shape, np.nan, np.float32),
        np.full(launch.partial_states_shape, np.nan, np.float32),
        counters, *(np.int32(n) for n in numbers),
    ]  # fmt: skip


def run(backend: Any, call: Call, launch: DecodeLaunch, **macros: int) -> np.ndarray:
    """The output of the launches; what must hold of the counters is checked."""
    args = kernel_arguments(call, launch)
    q = call.arguments["q"]
    macros = {
        **launch.macros, "SCALAR": CODES[q.dtype.name], "HEAD_SIZE": q.shape[2],
        **cache_macro(call), **macros,
    }  # fmt: skip
    shape = Launch(launch.grid, launch.block, launch.shared_bytes)
    backend.run(FILE, launch.entry, shape, args, WRITTEN, **macros)
    if launch.merge is not None:
        merge = Launch(launch.merge.grid, launch.merge.block, launch.merge.shared_bytes)
        backend.run(FILE, MERGE_ENTRY, merge, args, WRITTEN, **macros)
    else:
        assert not args[12].any(), "the counters are not ready for the next launch"
    return args[9]


def wanted(call: Call) -> np.ndarray:
    a = call.arguments
    out = np.full(a["out"].shape, np.nan)
    reference = NumpyOps(np.float64)
    reference.attention(**{**a, "out": out})
    return out


def check(
    backend: Any, case: Case, storage: np.dtype, tuning: DecodeTuning | None = many_parts,
    force_plain: bool = False, entry: str | None = None, queries: int = 0, **macros: int,
) -> None:  # fmt: skip
    call = case.build(storage)
    queries = queries or most_queries(call)
    launch = launch_for(call, tuning, queries, force_plain)
    assert entry in (None, launch.entry)
    if force_plain:
        macros["FORCE_PLAIN"] = 1
    out = run(backend, call, launch, **macros)
    starts = call.arguments["query_starts"]
    skipped = np.zeros(out.shape, bool)
    for begin, end in pairwise(starts):
        if end - begin > queries:
            skipped[begin:end] = True
            assert np.isnan(out[begin:end].astype(np.float32)).all(), "not this kernel's to write"
    assert_close(out, wanted(call), str(case), ignored=skipped)


SHARED = [case for case in CASES if case.op == "attention"]


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_shared_cases(backend: Any, case: Case, storage: np.dtype) -> None:
    check(backend, case, storage, queries=8)


GROUPS = [(2, 2), (4, 1), (7, 1), (16, 2), (16, 1), (40, 2)]
AROUND = [(1, n) for n in (1, 15, 16, 17, 63, 64, 65, 130, 300)]
RAGGED = [(3, 40), (0, 9), (8, 8), (1, 1), (8, 150), (5, 64), (2, 65), (0, 0), (7, 67)]


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gqa_on_tensor_cores(backend: Any, heads: int, kv_heads: int, dtype: str) -> None:
    case = attention_case(f"gqa-{heads}-{kv_heads}", AROUND, heads, kv_heads, 64)
    check(backend, case, DTYPES[dtype], entry="attention_decode_mma")


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (7, 1), (16, 1)])
def test_gqa_plain(backend: Any, heads: int, kv_heads: int, storage: np.dtype) -> None:
    case = attention_case(f"gqa-{heads}-{kv_heads}", AROUND, heads, kv_heads, 64)
    check(backend, case, storage, force_plain=True, entry="attention_decode")


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1), (7, 1)])
@pytest.mark.parametrize("force_plain", [False, True])
def test_ragged_queries(backend: Any, heads: int, kv_heads: int, force_plain: bool) -> None:
    """Up to 64 rows of a key/value head: several row tiles, in a block and over the grid."""
    case = attention_case(f"ragged-{heads}-{kv_heads}", RAGGED, heads, kv_heads, 64)
    entry = PLAIN_AND_MMA[not force_plain]
    check(backend, case, DTYPES["bfloat16"], force_plain=force_plain, entry=entry)


@pytest.mark.parametrize(
    ("head_size", "heads"),
    [(16, 4), (64, 2), (80, 4), (96, 2), (128, 2), (128, 4), (256, 4)],
)
def test_head_sizes_on_tensor_cores(backend: Any, head_size: int, heads: int) -> None:
    """8 queries: 16 rows with 2 heads; with 4, two row tiles share each read, of 256 none does."""
    case = attention_case(f"mma-{head_size}", [(3, 70), (8, 17)], heads, 1, head_size)
    check(backend, case, DTYPES["bfloat16"], entry="attention_decode_mma")


@pytest.mark.parametrize(
    ("head_size", "dtype"),
    [(64, "float16"), (80, "bfloat16"), (96, "float32"), (128, "bfloat16"), (128, "float32"),
     (250, "float32"), (256, "float32"), (256, "float16")],
)  # fmt: skip
def test_head_sizes_plain(backend: Any, head_size: int, dtype: str) -> None:
    case = attention_case(f"plain-{head_size}", [(3, 70), (2, 17)], 3, 1, head_size)
    check(backend, case, DTYPES[dtype], force_plain=True, entry="attention_decode")


@pytest.mark.parametrize("block_size", [1, 5, 16, 24, 128])
@pytest.mark.parametrize("force_plain", [False, True])
def test_block_sizes(backend: Any, block_size: int, force_plain: bool) -> None:
    lens = {n for k in (1, 3) for n in (k * block_size - 1, k * block_size, k * block_size + 1)}
    sequences = [(1 + n % 2, n) for n in sorted(lens | {64, 129}) if n > 1]
    case = attention_case(f"p{block_size}", sequences, 4, 2, 64, block_size)
    check(backend, case, DTYPES["float16"], force_plain=force_plain)


@pytest.mark.parametrize(("warps", "stages"), [(1, 2), (2, 4), (4, 2), (8, 3)])
@pytest.mark.parametrize("merge_kernel", [False, True])
def test_shapes_of_blocks(backend: Any, warps: int, stages: int, merge_kernel: bool) -> None:
    tuning = replace(many_parts, warps=warps, stages=stages, merge_kernel=merge_kernel)
    case = attention_case("block-shapes", [(1, 700), (4, 130), (1, 20)], 4, 1, 64)
    check(backend, case, DTYPES["bfloat16"], tuning, entry="attention_decode_mma")


@pytest.mark.parametrize("merge_kernel", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 3, 5])
def test_many_parts_merge(backend: Any, merge_kernel: bool, heads: int) -> None:
    """More parts than lanes, rows fewer and more than warps; float32 holds the merge to 1e-5."""
    tuning = DecodeTuning(num_items=60, least_part_tokens=64, merge_kernel=merge_kernel)
    case = attention_case("many-parts", [(1, 2600), (2, 260)], heads, 1, 16)
    check(backend, case, DTYPES["float32"], tuning, entry="attention_decode")


@pytest.mark.parametrize("entry", PLAIN_AND_MMA)
def test_parts_do_not_change_the_answer(backend: Any, entry: str) -> None:
    """One part and many, against the reference; and the default choice for this small card."""
    case = attention_case("parts", [(1, 600), (1, 33)], 4, 1, 64)
    force_plain = entry == "attention_decode"
    for tuning in (one_part, many_parts, None):
        check(backend, case, DTYPES["bfloat16"], tuning, force_plain, entry)


@pytest.mark.parametrize("entry", PLAIN_AND_MMA)
def test_peaked_scores(backend: Any, entry: str) -> None:
    case = attention_case("peaked", [(1, 200), (3, 90)], 4, 1, 64, q_scale=30.0)
    check(backend, case, DTYPES["float16"], force_plain=entry == "attention_decode", entry=entry)


@pytest.mark.parametrize("entry", PLAIN_AND_MMA)
def test_padding_sequences_are_zero(backend: Any, entry: str) -> None:
    """A captured launch has rows for sequences that are not there: length 0, tables of garbage."""
    case = attention_case("padding", [(1, 50), (1, 1), (1, 1)], 4, 1, 64)
    call = case.build(DTYPES["bfloat16"])
    expected = wanted(call)
    call.arguments["kv_lens"][1:] = 0
    call.arguments["block_tables"][1:] = cases.FAR_BLOCK
    force_plain = entry == "attention_decode"
    launch = launch_for(call, many_parts, 1, force_plain)
    out = run(backend, call, launch, FORCE_PLAIN=int(force_plain)).astype(np.float64)
    assert_close(out[:1].astype(DTYPES["bfloat16"]), expected[:1])
    assert (out[1:] == 0).all()


def test_more_sequences_than_lanes(backend: Any) -> None:
    rng = np.random.default_rng(3)
    sequences = [(int(rng.integers(0, 3)), int(n)) for n in rng.integers(2, 150, 70)]
    case = attention_case("many-sequences", sequences, 4, 2, 16)
    for items in (70, 150):
        tuning = DecodeTuning(num_items=items, least_part_tokens=64)
        check(backend, case, DTYPES["float32"], tuning)


@pytest.mark.parametrize("items", [9, 10, 17, 1000])
def test_parts_never_outnumber_items(backend: Any, items: int) -> None:
    """Every sequence is whole, however unequal the lengths; too few items would leave NaN."""
    lens = [1, 2000, 64, 65, 700, 1, 129, 640, 5]
    case = attention_case("unequal", [(1, n) for n in lens], 1, 1, 4)
    tuning = DecodeTuning(num_items=items, least_part_tokens=64)
    check(backend, case, DTYPES["float32"], tuning)


@pytest.mark.parametrize("shared_kb", [64, 99, 163, 227])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_launches_fit_every_card(shared_kb: int, head_size: int) -> None:
    for heads, queries, sequences in ((8, 1, 1), (32, 8, 3), (32, 2, 256), (64, 1, 4000)):
        launch = launch_attention_decode(
            sequences, heads, 8, head_size, queries=queries, max_context=1 << 20, scalar=2, cache=2,
            compute_capability=(8, 0) if shared_kb > 64 else (7, 5), num_multiprocessors=108,
            max_shared_bytes=shared_kb << 10,
        )  # fmt: skip
        rows = heads // 8 * queries
        uses_mma = launch.entry == "attention_decode_mma"
        assert uses_mma == (shared_kb > 64)
        assert launch.shared_bytes <= shared_kb << 10
        tile_rows = 16 * launch.macros["ROW_TILES"] if uses_mma else launch.macros["TILE_ROWS"]
        assert launch.grid == (8 * launch.num_row_tiles, launch.num_items)
        assert rows <= launch.num_row_tiles * tile_rows < rows + tile_rows
        assert sequences <= launch.num_items <= 65535
        if uses_mma:  # as the kernel asserts: a warp's sums take the place of its ring
            ring = launch.macros["STAGES"] * 2 * 16 * head_size * 2
            assert ring >= tile_rows * (head_size + 8) * 4


# ------------------------------------------------------------------------------ planted bugs

PLANTED = {
    "missing wait for copies": ("cp_async_wait<STAGES - 2>();", ""),
    "copies of a wrong stage": ("attend(ring + step % STAGES", "attend(ring + (step + 1) % STAGES"),
    "missing barrier after the queries": (" = bits;\n    }\n    block_sync();", " = bits;\n    }"),
    "missing barrier before the warps meet": (
        "}\n    block_sync();\n    const Partials partials = {partial_values, partial_states};\n"
        "    float* all",
        "}\n    const Partials partials = {partial_values, partial_states};\n    float* all"),
    "missing barrier before the last block is known": (
        "block_sync();\n    if (others_come) return;", "if (others_come) return;"),
    "barrier that not all reach": (
        "device_fence();\n    block_sync();\n    if (threadIdx.x == 0) {",
        "device_fence();\n    if (threadIdx.x == 0) {\n        block_sync();"),
    "mask hides the query itself": (
        "if (position + column > limit", "if (position + column >= limit"),
    "mask shows the next position": (
        "if (position + column > limit[m][h])", "if (position + column > limit[m][h] + 1)"),
    "mask too late": ("STEP_TOKENS - 1 > tile.first_limit", "STEP_TOKENS - 2 > tile.first_limit"),
    "values beyond the end are read": (
        "cp_async_16_or_zero(keys + TILE + to, value_cache + from, token < left)",
        "cp_async_16(keys + TILE + to, value_cache + from)"),
    "block table by row": ("block_table[column]", "block_table[row]"),
    "block table of another width": (
        "(work.sequence) * table_width", "(work.sequence) * num_items"),
    "cache without its heads": ("(block * num_kv_heads + group) * block_size", "(block + group) "
                                "* num_kv_heads * block_size"),
    "heads and queries swapped": (
        "row % batch.heads_per_group", "row / batch.heads_per_group % batch.heads_per_group"),
    "parts overlap": ("(units * work.part / work.num_parts) * PART_TOKENS",
                      "(units * work.part / work.num_parts) * (PART_TOKENS - 1)"),
    "counter one too many": ("(work.num_parts - 1)", "(work.num_parts)"),
    "parts merged without their maxima": ("warp_sum(own.sum * weight)", "warp_sum(own.sum)"),
    "warps merged without their maxima": (
        "weight = softmax_weight(states[w][row].max, max)", "weight = 1.0f"),
}  # fmt: skip


class PlantedBackend:
    """The shim, with another text for the kernels; what it gives in two orders of threads."""

    def __init__(self, source: str) -> None:
        self._source = source

    def run(self, file: str, entry: str, shape: Launch, args: Any, written: Any, **macros: int):
        kernel = host_kernel(file, entry, source=self._source, **macros)
        again = [arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args]
        kernel(shape.grid, shape.block, *again, shared_bytes=shape.shared_bytes, order=1)
        kernel(shape.grid, shape.block, *args, shared_bytes=shape.shared_bytes)
        assert all(args[i].tobytes() == again[i].tobytes() for i in written)


@cache
def whole_source() -> str:
    """The kernels with their own headers in the text, so that bugs can be planted in all."""
    source = (KERNELS / FILE).read_text()
    for name in ("attention_decode_codes.cuh", "attention_decode_mma.cuh", "attention_decode.cuh"):
        source = source.replace(f'#include "{name}"', (KERNELS / name).read_text())
    return source


@cache
def planting_call() -> tuple[Call, DecodeLaunch]:
    """Many parts, many warps, ragged queries, a part-filled last block: any slip shows."""
    sequences = [(1, 2500), (3, 81), (4, 40), (2, 5)]
    call = attention_case("planted", sequences, 8, 2, 32, 8).build(DTYPES["float16"])
    tuning = DecodeTuning(num_items=50, least_part_tokens=64, warps=2, merge_kernel=False)
    return call, launch_for(call, tuning, 4)


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("bug", ["none", *PLANTED])
def test_planted_bugs_are_found(bug: str) -> None:
    call, launch = planting_call()
    source = whole_source()
    if bug != "none":
        old, new = PLANTED[bug]
        assert old in source, "the kernel has changed: plant this bug anew"
        source = source.replace(old, new)
    try:
        out = run(PlantedBackend(source), call, launch)
        assert_close(out, wanted(call))
    except (KernelFault, AssertionError):
        assert bug != "none"
    else:
        assert bug == "none", "not found"
