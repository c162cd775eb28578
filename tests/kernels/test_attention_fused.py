"""attention_decode_fused.cu against the ops it stands for: on the CPU (host shim), and on a device
(marked gpu). Clusters of every size; what is planted must be found."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanocupy.engine.step_inputs import query_bucket
from nanocupy.ops import launch_shapes
from nanocupy.ops.cuda_sizes import OpSizes, fused_bounds, fused_launch, kv_len_bound
from nanocupy.ops.launch_attention_fused import (
    ENTRY,
    FILE,
    FusedTuning,
    fused_shared_bytes,
    launch_attention_fused,
)
from nanocupy.ops.launch_shapes import LaunchShape
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.backends import CODES, ShimBackend, assert_close, cache_macro
from tests.ops import cases
from tests.ops.cases import CASES, DTYPES, Call, Case
from tests.shim import build
from tests.shim.device import MODERN, OLD
from tests.shim.driver import KernelFault

KERNELS = Path(build.KERNELS)
LENGTHS = [(1, n) for n in (1, 2, 15, 16, 17, 250)]
WRITTEN = (6, 7, 8, 9, 14)  # the cache's parts, out
PARTS = ("key_cache", "value_cache", "key_scales", "value_scales")
CLUSTERS = (1, 2, 4, 8)


def attend_case(name: str, *args: Any, **kwargs: Any) -> Case:
    return Case("attend", name, cases._attend(*args, **kwargs))


def run(
    backend: Any, call: Call, tuning: FusedTuning, queries: int | None = None
) -> tuple[Any, ...]:
    """The cache's parts and out after the launch; the call's own arrays stay. queries: most that a
    sequence may have; as many as one has."""
    a = call.arguments
    most = int(np.diff(a["query_starts"]).max(initial=1))
    (_, num_heads, head_size), (_, num_kv_heads, block_size) = (
        a["out"].shape,
        a["key_cache"].shape[:3],
    )
    launch = launch_attention_fused(
        len(a["kv_lens"]), num_heads, num_kv_heads, head_size,
        max_kv_len=int(a["kv_lens"].max(initial=0)), num_multiprocessors=6,
        max_shared_bytes=227 << 10, quantized=a["key_scales"] is not None, tuning=tuning,
        queries=queries or query_bucket(most),
    )  # fmt: skip
    parts = (None if a[name] is None else a[name].copy() for name in PARTS)
    numbers = (num_kv_heads, num_heads // num_kv_heads, block_size, a["block_tables"].shape[1])
    args = [
        a["qkv"], a["q_norm"], a["k_norm"], np.float32(a["eps"]), a["rope"], a["slots"],
        *parts, a["query_starts"], a["kv_lens"], a["block_tables"], np.float32(a["scale"]),
        a["out"].copy(), *map(np.int32, numbers),
    ]  # fmt: skip
    shape = LaunchShape(launch.grid, launch.block, launch.shared_bytes, launch.cluster)
    macros = {"SCALAR": CODES[a["out"].dtype.name], "HEAD_SIZE": head_size, **launch.macros}
    backend.run(FILE, ENTRY, shape, args, WRITTEN, **macros, **cache_macro(call))
    return *args[6:10], args[14]


def unfused(backend: Any, call: Call) -> tuple[Any, ...]:
    """The cache's parts after rope_write_kv, and the reference's attention over them."""
    a = dict(call.arguments)
    for name in call.written:
        a[name] = a[name].copy()
    num_tokens, num_heads, head_size = a["q_scratch"].shape
    num_kv_heads, block_size = a["key_cache"].shape[1:3]
    shape = launch_shapes.rope_write_kv(num_tokens, num_heads, num_kv_heads)
    numbers = (num_heads, num_kv_heads, block_size)
    args = (
        a["qkv"], a["q_norm"], a["k_norm"], np.float32(a["eps"]), a["rope"], a["slots"],
        *(a[name] for name in PARTS), a["q_scratch"], *map(np.int32, numbers),
    )  # fmt: skip
    macros = {"SCALAR": CODES[a["out"].dtype.name], "HEAD_SIZE": head_size, **cache_macro(call)}
    backend.run("rope.cu", "rope_write_kv", shape, args, (6, 7, 8, 9, 10), **macros)
    out = np.full(a["out"].shape, np.nan)
    NumpyOps(np.float64).attention(
        a["q_scratch"], *(a[name] for name in PARTS), a["query_starts"], a["kv_lens"],
        a["block_tables"], a["scale"], a["max_queries"], out,
    )  # fmt: skip
    return *(a[name] for name in PARTS), out


def check(backend: Any, case: Case, storage: str, **tuning: Any) -> None:
    call = case.build(DTYPES[storage])
    *parts, out = run(backend, call, FusedTuning(**tuning))
    *wanted_parts, wanted = unfused(backend, call)
    for name, part, wanted_part in zip(PARTS, parts, wanted_parts, strict=True):
        if part is not None:
            assert part.tobytes() == wanted_part.tobytes(), f"another {name}"
    assert_close(out, wanted, str(case))


GROUPS = [(2, 2), (2, 1), (4, 1), (7, 1), (16, 2)]
SHARED = [
    case
    for case in CASES
    if case.op == "attend" and "decode" in case.name and "d12" not in case.name
]


@pytest.mark.parametrize("case", SHARED, ids=str)
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_shared_cases(backend: Any, case: Case, storage: str) -> None:
    check(backend, case, storage)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_groups(backend: Any, heads: int, kv_heads: int, cluster: int) -> None:
    case = attend_case(f"gqa-{heads}-{kv_heads}", LENGTHS, heads, kv_heads, 64, norms="qk")
    check(backend, case, "bfloat16", cluster=cluster)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("head_size", [16, 64, 80, 96, 128, 256])
def test_head_sizes(backend: Any, head_size: int, cluster: int) -> None:
    case = attend_case(f"d{head_size}", [(1, 300), (1, 17), (1, 1)], 2, 1, head_size, norms="k")
    check(backend, case, "float16", cluster=cluster)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(("heads", "head_size"), [(4, 64), (7, 128), (16, 80), (8, 256), (2, 16)])
@pytest.mark.parametrize("codes", cases.CODES)
def test_quantised_caches(
    backend: Any, codes: str, heads: int, head_size: int, cluster: int
) -> None:
    """Groups, head sizes, and lengths whose newest position lies anywhere in a step."""
    name = f"{codes}-{heads}-{head_size}"
    case = attend_case(name, LENGTHS, heads, 1, head_size, norms="qk", codes=codes)
    check(backend, case, "float16" if head_size in (64, 256) else "bfloat16", cluster=cluster)


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize(("warps", "stages"), [(4, 3), (1, 2), (8, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("codes", cases.CODES)
def test_long_quantised_contexts(
    backend: Any, codes: str, cluster: int, warps: int, stages: int
) -> None:
    lens = [1000, 1025, 16 * cluster * warps, 16 * cluster * warps + 1, 640]
    case = attend_case(f"long-{codes}", [(1, n) for n in lens], 2, 1, 64, 5, codes=codes)
    check(backend, case, "float16", cluster=cluster, warps=warps, stages=stages)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(("warps", "stages"), [(4, 3), (1, 2), (8, 2), (4, 1)])
def test_long_contexts(backend: Any, cluster: int, warps: int, stages: int) -> None:
    """Many turns of every ring, and lengths around where the last step changes warps and blocks."""
    lens = [1000, 1024, 1025, 16 * cluster * warps, 16 * cluster * warps + 1, 640]
    case = attend_case("long", [(1, n) for n in lens], 2, 1, 64, norms="q")
    check(backend, case, "bfloat16", cluster=cluster, warps=warps, stages=stages)


@pytest.mark.parametrize("block_size", [1, 5, 16, 24, 128])
def test_block_sizes(backend: Any, block_size: int) -> None:
    lens = {n for k in (1, 3) for n in (k * block_size - 1, k * block_size, k * block_size + 1)}
    case = attend_case(
        f"p{block_size}", [(1, n) for n in sorted(lens) if n > 0], 4, 2, 64, block_size
    )
    check(backend, case, "float16", cluster=2)


def test_nothing_is_read_early_where_that_is_forbidden(backend: Any) -> None:
    case = attend_case("late", LENGTHS, 4, 2, 64, norms="qk")
    check(backend, case, "bfloat16", cluster=4, read_early=False)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_padding_and_sequences_without_queries(backend: Any, cluster: int) -> None:
    """Padding: length 0, a table of garbage, a slot of the null block. Its result is 0, and the
    cache stays. A sequence without queries has no row."""
    case = attend_case("padding", [(1, 50), (0, 30), (1, 1), (1, 1)], 4, 2, 64, norms="qk")
    call = case.build(DTYPES["bfloat16"])
    *_, wanted = unfused(backend, call)
    a = call.arguments
    a["kv_lens"][2:] = 0
    a["block_tables"][2:] = cases.FAR_BLOCK
    a["slots"][1:] = 3
    keys, values, *_, out = run(backend, call, FusedTuning(cluster=cluster))
    assert_close(out[:1], wanted[:1])
    assert (out[1:].astype(np.float64) == 0).all()
    new = tuple(int(n) for n in divmod(a["slots"][0], a["key_cache"].shape[2]))
    for after, before in ((keys, a["key_cache"]), (values, a["value_cache"])):
        after[new[0], :, new[1]] = before[new[0], :, new[1]]
        assert after.tobytes() == before.tobytes()


# Queries, context: the new positions lie in one step of 16, in two, are all there is, or end one.
SEVERAL = [(8, 8), (3, 20), (8, 250), (1, 33), (0, 30), (5, 16), (8, 132), (2, 2)]


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_several_queries(backend: Any, heads: int, kv_heads: int, cluster: int) -> None:
    name = f"queries-{heads}-{kv_heads}"
    case = attend_case(name, SEVERAL, heads, kv_heads, 64, norms="qk")
    check(backend, case, "bfloat16", cluster=cluster)


@pytest.mark.parametrize("most", [2, 3, 4])
@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("head_size", [16, 80, 128, 256])
def test_several_queries_of_other_sizes(
    backend: Any, head_size: int, cluster: int, most: int
) -> None:
    sequences = [(min(n, most), length) for n, length in SEVERAL]
    case = attend_case(f"queries-{most}-d{head_size}", sequences, 4, 2, head_size, 5)
    check(backend, case, "float16", cluster=cluster)


@pytest.mark.parametrize("cluster", [1, 8])
@pytest.mark.parametrize(("warps", "stages"), [(4, 3), (1, 2), (8, 2), (4, 1), (1, 1)])
def test_several_queries_of_long_contexts(
    backend: Any, cluster: int, warps: int, stages: int
) -> None:
    edge = 16 * cluster * warps
    lens = [1000, 1024, 1027, edge + 1, edge + 8, 2 * edge + 4]
    case = attend_case("long-queries", [(8 - i % 2, n) for i, n in enumerate(lens)], 4, 1, 64)
    check(backend, case, "bfloat16", cluster=cluster, warps=warps, stages=stages)


@pytest.mark.parametrize("cluster", [1, 2])
def test_sequences_with_more_queries_are_left_alone(backend: Any, cluster: int) -> None:
    case = attend_case("too-many", [(5, 40), (3, 30)], 4, 2, 64)
    call = case.build(DTYPES["bfloat16"])
    *_, wanted = unfused(backend, call)
    a = call.arguments
    *caches, out = run(backend, call, FusedTuning(cluster=cluster), queries=4)
    assert out[:5].tobytes() == a["out"][:5].tobytes()
    assert_close(out[5:], wanted[5:])
    size = a["key_cache"].shape[2]
    for after, name in zip(caches[:2], ("key_cache", "value_cache"), strict=True):
        for slot in a["slots"][:5]:
            block, row = divmod(int(slot), size)
            assert after[block, :, row].tobytes() == a[name][block, :, row].tobytes()


@pytest.mark.parametrize("cluster", [1, 2])
def test_padding_beside_several_queries(backend: Any, cluster: int) -> None:
    """A padded sequence has queries and no length: its results are 0, and the cache stays."""
    case = attend_case("padded-queries", [(4, 50), (3, 3)], 4, 2, 64)
    call = case.build(DTYPES["bfloat16"])
    *_, wanted = unfused(backend, call)
    a = call.arguments
    a["kv_lens"][1] = 0
    a["block_tables"][1] = cases.FAR_BLOCK
    keys, *_, out = run(backend, call, FusedTuning(cluster=cluster))
    assert_close(out[:4], wanted[:4])
    assert (out[4:].astype(np.float64) == 0).all()
    changed = (keys.view(np.uint16) != a["key_cache"].view(np.uint16)).any((1, 3))
    blocks = {tuple(int(n) for n in divmod(s, keys.shape[2])) for s in a["slots"][:4]}
    assert {tuple(where) for where in np.argwhere(changed).tolist()} == blocks


# ------------------------------------------------------------------------------ the launch


def sizes(**changes: Any) -> OpSizes:
    plain = OpSizes(
        max_tokens=64, max_num_seqs=64, max_rows=64, max_context=4096, hidden_size=64,
        intermediate_size=64, vocab_size=64, num_heads=8, num_kv_heads=4, head_size=64,
        dtype="bfloat16", residual_dtype="bfloat16", cache_dtype="bfloat16",
    )  # fmt: skip
    return replace(plain, **changes)


def test_only_what_the_kernel_can_do_is_fused() -> None:
    assert fused_bounds(sizes(), MODERN, 1)
    assert not fused_bounds(sizes(), OLD, 1)
    for changes in (
        {"head_size": 72}, {"num_heads": 68}, {"dtype": "float32"}, {"cache_dtype": "float16"}
    ):  # fmt: skip
        assert not fused_bounds(sizes(**changes), MODERN, 1), changes
        assert fused_launch(sizes(**changes), MODERN, 1, 1) is None


def test_the_bound_is_the_key_of_a_graph() -> None:
    """Contexts of one bound have one launch; an unknown length has the one that suits all."""
    for num_seqs in (1, 2, 8, 64, 130, 1000):
        bounds = fused_bounds(sizes(), MODERN, num_seqs)
        assert list(bounds) == sorted(set(bounds))
        for before, bound in pairwise((0, *bounds)):
            for kv_len in (before + 1, bound):
                assert kv_len_bound(sizes(), MODERN, num_seqs, kv_len) == bound
                launch = fused_launch(sizes(), MODERN, num_seqs, kv_len)
                assert launch == fused_launch(sizes(), MODERN, num_seqs, bound) is not None
        long = kv_len_bound(sizes(), MODERN, num_seqs, bounds[-1] + 1)
        assert long >= 4096
        for unfused_bound in (0, long, bounds[-1] + 1):
            assert fused_launch(sizes(), MODERN, num_seqs, unfused_bound) is None


def test_many_sequences_keep_one_launch_for_longer_contexts() -> None:
    """Blocks that one multiprocessor has in turn end beside others; a few would end alone."""
    assert (MODERN.num_multiprocessors, sizes().num_kv_heads) == (6, 4)
    longest = [fused_bounds(sizes(), MODERN, num_seqs)[-1] for num_seqs in (2, 4, 5, 11, 12)]
    assert longest == [1024, 1024, 2048, 2048, 4096]


def test_several_queries_are_fused_where_they_are_few_and_short() -> None:
    many = replace(MODERN, num_multiprocessors=132)
    wide = sizes(num_heads=32, num_kv_heads=8, head_size=128, max_queries=8)
    assert fused_bounds(wide, many, 1, 8)[-1] == 1024  # two blocks each
    assert fused_bounds(wide, many, 2, 8)[-1] == 512
    assert not fused_bounds(wide, many, 3, 8)
    assert not fused_bounds(replace(wide, cache_dtype="int8"), many, 1, 8)
    launch = fused_launch(wide, many, 1, 300, 8)
    assert launch is not None
    assert (launch.grid, launch.cluster, launch.macros["QUERIES"]) == ((16, 8), 2, 8)
    assert fused_launch(wide, many, 1, 1025, 8) is None
    assert fused_launch(wide, many, 1, 0, 8) is None


@pytest.mark.parametrize("shared_kb", [99, 227])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_launches_fit(shared_kb: int, head_size: int) -> None:
    for heads, num_seqs in ((8, 1), (32, 5), (64, 40), (128, 4000)):
        launch = launch_attention_fused(
            num_seqs, heads, 8, head_size, max_kv_len=4096, num_multiprocessors=132,
            max_shared_bytes=shared_kb << 10,
        )  # fmt: skip
        warps, stages = launch.block // 32, launch.macros["STAGES"]
        shape = head_size, heads // 8, warps, stages, launch.cluster
        assert fused_shared_bytes(*shape) == launch.shared_bytes <= shared_kb << 10
        assert fused_shared_bytes(*shape, quantized=True) < launch.shared_bytes
        assert launch.grid == (8 * launch.cluster, num_seqs)


# ------------------------------------------------------------------------------ planted bugs

PLANTED = {
    "keys beyond the end are copied": ("int left = fresh_from -", "int left = 16 + fresh_from -"),
    "missing wait for copies": ("cp_async_wait<STAGES - 1>();", ""),
    "missing barrier before the heads are used": (
        "        block_sync();\n\n        rows.start", "        rows.start"),
    "the newest key is forgotten": ("*reinterpret_cast<uint4*>(keys + to) = from[0];", ""),
    "the newest key is in the value's place": ("from[QUERIES * ROW_CHUNKS]", "from[0]"),
    "sent before all blocks have started": ("if (CLUSTERED && ranks > 1) cluster_wait();", ""),
    "merged before it is there": ("wait_for_inbox(merge.inbox);", ""),
    "fewer bytes expected": ("(8 + 4 * own_columns())", "(4 * own_columns())"),
    "columns to the wrong block": ("put(n & (ranks - 1)", "put((n + 1) & (ranks - 1)"),
    "sources in another order": (
        "source = warp_id() * ranks + rank", "source = rank * num_warps() + warp_id()"),
    "sources that saw nothing": (
        "max(0, sources), (ROW", "num_warps() * ranks, (ROW"),
    "parts merged without their maxima": (
        "weight = softmax_weight(state[0], max)", "weight = 1.0f"),
    "heads of another group": ("? group * merge.rows + task", "? task"),
    "norm of q for k": ("normalize_pairs(x, k_weight, eps)", "normalize_pairs(x, q_weight, eps)"),
}  # fmt: skip


QUANTIZED_PLANTED = {
    "the newest scale is forgotten": ("fresh_scales[lane_id()];", "from_float<scale_t>(0.02f);"),
    "the newest key's codes are the value's": ("from[CODE_CHUNKS]", "from[0]"),
    "scales are written elsewhere": (
        "[slot / HEAD_SIZE] = scale", "[(slot / HEAD_SIZE) ^ 1] = scale"),
    "queries unsorted": ("low / 16 * 2 + low % 2) + low % 16 / 2", "low / 8) + low % 8"),
    "results unsorted": (
        "sorted_column(chunk, pair % 4 * 2)]", "chunk * 8 + pair % 4 * 2]"),
    "second results unsorted": (
        "sorted_column(chunk, pair % 4 * 2 + 1)]", "chunk * 8 + pair % 4 * 2 + 1]"),
    "the last scales are never stored": ("if (step >= num_steps) copies.finish();", ""),
    "scales that nobody waits for": ("if (STAGES == 1) copies.finish();", ""),
}  # fmt: skip


QUERIES_PLANTED = {
    "a query sees those behind it": (
        "max(0, kv_lens[sequence] - behind)", "kv_lens[sequence]"),
    "keys of the query alone": ("at < 0 || at", "i < number * ROW_CHUNKS || at < 0 || at"),
    "new positions of other blocks are not left out": ("(at < 0 || at >= STEP_TOKENS)", "(at < 0)"),
    "angles of the query for all": ("if (QUERIES > 1 && kind == 1) {", "if (false) {"),
    "heads of the query for all": ("from -= static_cast<int64_t>(back)", "from -= 0 * back"),
    "the slot gets the first query's": ("if (back == 0) cache", "if (back == number) cache"),
    "positions of this step are read from the cache": (
        "fresh_from = newest - number", "fresh_from = newest"),
    "values lie where keys do": ("(kind - 1) * QUERIES + row", "(kind - 1) + row"),
}  # fmt: skip


@cache
def planting_call(codes: str = "", queries: bool = False) -> Call:
    sequences = [(1, 700), (1, 81), (1, 1)]
    if queries:
        sequences = [(8, 700), (5, 81), (3, 3)]
    case = attend_case("planted", sequences, 6, 2, 64, 8, norms="qk", codes=codes)
    return case.build(DTYPES["float16"])


def plant(bugs: dict[str, tuple[str, str]], bug: str, call: Call, stages: int) -> None:
    source = (KERNELS / FILE).read_text()
    if bug != "none":
        old, new = bugs[bug]
        assert old in source, "the kernel has changed: plant this bug anew"
        source = source.replace(old, new)
    backend = ShimBackend((0, 1), {FILE: source})
    *caches, wanted = unfused(ShimBackend(), call)
    try:
        *got, out = run(backend, call, FusedTuning(cluster=4, warps=2, stages=stages))
        assert_close(out, wanted)
        for a, b in zip(caches, got, strict=True):
            assert a is b is None or a.tobytes() == b.tobytes()
    except (KernelFault, AssertionError):
        assert bug != "none"
    else:
        assert bug == "none", "not found"


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("bug", ["none", *PLANTED])
def test_planted_bugs_are_found(bug: str) -> None:
    plant(PLANTED, bug, planting_call(), 2)


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("bug", ["none", *QUANTIZED_PLANTED])
def test_planted_bugs_with_codes_are_found(bug: str) -> None:
    plant(QUANTIZED_PLANTED, bug, planting_call("int8"), 1 if "nobody waits" in bug else 2)


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("bug", ["none", *QUERIES_PLANTED])
def test_planted_bugs_of_several_queries_are_found(bug: str) -> None:
    plant(QUERIES_PLANTED, bug, planting_call(queries=True), 2)
