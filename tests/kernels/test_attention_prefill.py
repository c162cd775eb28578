"""Prefill attention against the reference: on the CPU (host shim), and marked gpu on a device.

Besides the shared cases: chunks that begin and end at every offset around tiles and blocks, many
sequences a launch, launches captured for more than comes, and planted bugs, which must be found.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanocupy.ops.launch_attention_prefill import (
    FILE,
    PLAIN_FILE,
    PrefillTile,
    default_tile,
    launch_attention_prefill,
    max_shared_bytes,
    uses_tensor_cores,
)
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.backends import CODES, ShimBackend, assert_close, cache_macro
from tests.ops import cases
from tests.ops.cases import CASES, DTYPES, Call, Case
from tests.shim import build
from tests.shim.driver import KernelFault, host_kernel

OUT = 8  # position of the argument that is written
SHARED = [case for case in CASES if case.op == "attention"]
SMALL = PrefillTile(2, 16, 16, queries_stay=True)
PLAIN = None


def attention_case(name: str, *args: Any, **kwargs: Any) -> Case:
    return Case("attention", name, cases._attention(*args, **kwargs))


def arguments(call: Call) -> list[Any]:
    a = call.arguments
    heads, (_, kv_heads, block_size, _) = a["q"].shape[1], a["key_cache"].shape
    sizes = len(a["kv_lens"]), heads, kv_heads, block_size, a["block_tables"].shape[1]
    names = (
        "q", "key_cache", "value_cache", "key_scales", "value_scales", "query_starts", "kv_lens",
        "block_tables", "out",
    )  # fmt: skip
    return [
        *(a[name] for name in names), np.float32(a["scale"]), *(np.int32(size) for size in sizes)
    ]  # fmt: skip


def run(backend: Any, call: Call, tile: PrefillTile | None, macros: dict | None = None) -> None:
    """Launch on `call`, whose "out" is filled. tile None: the plain kernel."""
    a = call.arguments
    num_tokens, heads, head_size = a["q"].shape
    cache = cache_macro(call)
    launch = launch_attention_prefill(
        num_tokens, len(a["kv_lens"]), heads, a["key_cache"].shape[1], head_size, tile=tile,
        cache=cache.get("CACHE", 0),
    )  # fmt: skip
    named = {"SCALAR": CODES[a["q"].dtype.name], "HEAD_SIZE": head_size, **cache}
    named |= launch.macros if macros is None else macros
    backend.run(launch.file, launch.entry, launch, arguments(call), (OUT,), **named)


@cache
def reference(case: Case, dtype: str) -> np.ndarray:
    a = dict(case.build(DTYPES[dtype]).arguments)
    a["out"] = np.full(a["out"].shape, np.nan)
    NumpyOps(np.float64).attention(**a)
    return a["out"]


def check(
    backend: Any, case: Case, dtype: str, tile: PrefillTile | None, macros: dict | None = None
) -> np.ndarray:
    call = case.build(DTYPES[dtype])
    run(backend, call, tile, macros)
    out = call.arguments["out"]
    assert_close(out, reference(case, dtype), f"{case} {dtype}")
    return out


# ------------------------------------------------------------------------------ shared cases


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_plain_kernel_on_shared_cases(backend, storage: np.dtype, case: Case) -> None:
    check(backend, case, storage.name, PLAIN)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_tensor_cores_on_the_shared_case_of_every_head_size(backend, head_size, dtype) -> None:
    (case,) = [case for case in SHARED if case.name == f"d{head_size}"]
    check(backend, case, dtype, default_tile(head_size))


AROUND = [(1, n) for n in (1, 15, 16, 17, 33, 70)]
MIXED = [(1, 17), (5, 5), (0, 12), (7, 40), (1, 1), (16, 48), (0, 0), (1, 31)]
WHOLE = [(n, n) for n in (1, 15, 16, 17, 35)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1), (8, 2), (7, 1)])
@pytest.mark.parametrize("sequences", [AROUND, MIXED, WHOLE], ids=["around", "mixed", "whole"])
def test_tensor_cores_on_ragged_batches(backend, sequences, heads, kv_heads) -> None:
    case = attention_case(f"ragged-{sequences}", sequences, heads, kv_heads, 64)
    check(backend, case, "bfloat16", SMALL)


# ------------------------------------------------------------------------------ borders


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "dtype"),
    [(2, 2, 64, "bfloat16"), (4, 1, 128, "bfloat16"), (3, 1, 80, "float16"), (1, 1, 96, "float16"),
     (8, 1, 256, "bfloat16")],
)  # fmt: skip
def test_chunks_around_the_borders_of_tiles_and_blocks(
    backend, heads, kv_heads, head_size, dtype
) -> None:
    """Every tile's default shape; queries and prefixes end just before, on and behind a border."""
    tile = default_tile(head_size)
    queries = tile.rows * kv_heads // heads  # in a tile; where it isn't whole, rows are cut
    counts = sorted({1, queries - 1, queries, queries + 1, 2 * queries + 1})
    prefixes = (0, 1, 15, tile.keys - 1, tile.keys, tile.keys + 1)
    sequences = [(n, n + p) for i, n in enumerate(counts) for p in prefixes[i % 2 :: 2]]
    case = attention_case(f"borders-{head_size}", sequences, heads, kv_heads, head_size)
    check(backend, case, dtype, tile)


def test_every_offset_of_a_chunk(backend) -> None:
    """Prefixes and chunks of 0 … 34 around key tiles of 16 and row tiles of 32."""
    sequences = [(1 + (7 * p) % 35, 1 + (7 * p) % 35 + p) for p in range(35)]
    case = attention_case("offsets", sequences, 2, 1, 64, 5)
    check(backend, case, "float16", SMALL)
    check(backend, attention_case("offsets-6", sequences, 2, 1, 6, 5), "float32", PLAIN)


@pytest.mark.parametrize("block_size", [1, 3, 7, 8, 24, 100])
def test_any_block_size(backend, block_size) -> None:
    case = attention_case(f"p{block_size}", [(5, 90), (40, 40), (33, 65)], 2, 1, 64, block_size)
    check(backend, case, "bfloat16", SMALL)
    check(backend, case, "float32", PLAIN)


@pytest.mark.parametrize("tile", [SMALL, PLAIN], ids=["tiles", "plain"])
@pytest.mark.parametrize("count", [31, 33, 1100])
def test_many_sequences_a_launch(backend, tile, count) -> None:
    """Most of them without queries: the search passes over them, in one, two and three rounds."""
    filled = {0: (2, 2), count // 2: (17, 20), count - 2: (33, 40), count - 1: (1, 3)}
    sequences = [filled.get(i, (0, i % 3)) for i in range(count)]
    case = attention_case(f"many-{count}", sequences, 2, 1, 64)
    check(backend, case, "float16", tile)


@pytest.mark.parametrize("tile", [SMALL, PLAIN], ids=["tiles", "plain"])
def test_a_launch_for_more_than_comes(backend, tile) -> None:
    """As a captured one: room for more tokens and sequences; the rest stays untouched."""
    call = attention_case("captured", [(40, 50), (3, 3)], 4, 2, 64).build(DTYPES["bfloat16"])
    a = dict(call.arguments)
    a["q"] = np.concatenate([a["q"], np.full((29, 4, 64), np.nan).astype(a["q"].dtype)])
    a["out"] = np.full((43 + 29, 4, 64), np.nan).astype(a["q"].dtype)
    a["query_starts"] = np.r_[a["query_starts"], [43] * 6].astype(np.int32)
    a["kv_lens"] = np.r_[a["kv_lens"], [0] * 6].astype(np.int32)
    padding = np.full((6, a["block_tables"].shape[1]), cases.FAR_BLOCK, np.int32)
    a["block_tables"] = np.concatenate([a["block_tables"], padding])
    run(backend, Call(a, ("out",)), tile)
    wanted = np.full((43, 4, 64), np.nan)
    NumpyOps(np.float64).attention(**{**call.arguments, "out": wanted})
    assert_close(a["out"][:43], wanted)
    assert np.isnan(a["out"][43:].astype(np.float32)).all()


@pytest.mark.parametrize("tile", [SMALL, PLAIN], ids=["tiles", "plain"])
def test_chunks_and_company_change_no_bit(backend, tile) -> None:
    """A prompt in one piece, in chunks, and beside others."""
    whole = attention_case("whole", [(70, 70)], 4, 2, 64).build(DTYPES["bfloat16"]).arguments
    run(backend, Call(whole, ("out",)), tile)
    for cuts in ([0, 7, 8, 70], [0, 33, 64, 70]):
        a = {**whole, "out": np.full_like(whole["out"], np.nan)}
        for start, end in pairwise(cuts):
            part = np.full_like(a["out"][start:end], np.nan)
            piece = {
                **whole,
                "q": whole["q"][start:end].copy(),
                "query_starts": np.array([0, 0, end - start], np.int32),
                "kv_lens": np.array([0, end], np.int32),
                "block_tables": np.repeat(whole["block_tables"], 2, axis=0),
                "out": part,
            }
            run(backend, Call(piece, ("out",)), tile)
            a["out"][start:end] = part
        assert a["out"].tobytes() == whole["out"].tobytes()


# ------------------------------------------------------------------------------ shapes of tiles

TILES = {
    "8x16": PrefillTile(8, 16, 64, min_blocks=1, queries_stay=True),
    "8x32": PrefillTile(8, 32, 64, min_blocks=1),
    "3-stages": PrefillTile(4, 16, 32, stages=3),
    "1-warp": PrefillTile(1, 32, 16, stages=4, queries_stay=True),
    "48-keys": PrefillTile(4, 32, 48),
}


@pytest.mark.parametrize("name", TILES)
def test_other_tiles(backend, name) -> None:
    case = attention_case("tiles", [(1, 200), (90, 130), (130, 130)], 2, 1, 64)
    check(backend, case, "bfloat16", TILES[name])


@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_the_source_defaults_are_the_default_tiles(backend, head_size) -> None:
    case = attention_case(f"defaults-{head_size}", [(70, 100), (2, 66)], 2, 1, head_size)
    check(backend, case, "bfloat16", default_tile(head_size), macros={})


def test_default_tiles_fit_every_card() -> None:
    for head_size in (64, 80, 96, 128, 256):
        tile = default_tile(head_size)
        static = 8 * tile.stages * tile.keys + 32  # offsets and the tile's own numbers
        assert tile.shared_bytes(head_size) + static <= max_shared_bytes((8, 6))
    assert max_shared_bytes((9, 0)) == 227 << 10


def test_which_kernel_runs_where() -> None:
    assert uses_tensor_cores(64, 2, 2, (8, 0))
    assert uses_tensor_cores(256, 1, 1, (9, 0))
    assert not uses_tensor_cores(64, 0, 0, (9, 0))
    assert not uses_tensor_cores(64, 2, 2, (7, 5))
    assert not uses_tensor_cores(64, 2, 2, (9, 0), force_plain=True)
    assert not uses_tensor_cores(60, 2, 2, (9, 0))


def test_the_grid_holds_every_tile() -> None:
    """Slots of sequences do not overlap and each has enough, whatever the lengths are."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = rng.integers(0, 60, rng.integers(1, 9))
        group, starts = int(rng.integers(1, 9)), np.cumsum([0, *counts])
        launch = launch_attention_prefill(
            int(starts[-1]), len(counts), 3 * group, 3, 64, tile=SMALL
        )
        first = starts * group // SMALL.rows + np.arange(len(starts))
        assert (np.diff(first) >= -(-counts * group // SMALL.rows)).all()
        assert launch.grid[0] >= 3 * first[-1] or starts[-1] == 0
    assert launch_attention_prefill(0, 3, 2, 1, 64, tile=None).grid == (0,)


# ------------------------------------------------------------------------------ planted bugs

LANDED = "block_sync();  // tile j is there, and nobody reads tile j - 1 or its offsets any more"
OFFSETS = "    block_sync();\n#pragma unroll\n    for (int stage = 0;"
RESULTS = "    }\n    warp_sync();\n    for (int i = lane"
MASK = "if (key > seen) scores"
BUGS = {
    "no wait": ("cp_async_wait<STAGES - 2>();", ""),
    "waits for the tile before": ("cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();"),
    "no barrier before a tile": (LANDED, ""),
    "no barrier before offsets": (OFFSETS, OFFSETS.replace("block_sync();", "")),
    "no barrier before results": (RESULTS, RESULTS.replace("warp_sync();", "")),
    "sees the next key": (MASK, "if (key > seen + 1) scores"),
    "does not see itself": (MASK, "if (key >= seen) scores"),
    "odd keys unmasked": ("if (key + 1 > seen)", "if (key + 1 > seen + 1)"),
    "masks too late": ("KEY_TILE - 1 > first_seen", "KEY_TILE - 2 > first_seen"),
    "rows behind the end": ("ahead < tile.num_keys", "ahead <= tile.num_keys"),
    "wrong stage": ("next = stage == 0 ? STAGES - 1 : stage - 1", "next = stage"),
    "offsets too early": ("(j + STAGES) * KEY_TILE + thread", "(j + 1) * KEY_TILE + thread"),
    "never rescaled": ("if (warp_ballot(is_raised))", "if (false)"),
    "sums of all tiles": ("row_sum[m][h] * factor[m][h] + sum", "row_sum[m][h] + sum"),
    "warps end too early": ("if (first_key <= last_seen)", "if (first_key < last_seen)"),
}
SHARED_BUGS = {
    "wrong column of the table": ("block = table[column]", "block = table[row]"),
    "head before block": ("block * num_kv_heads + kv_head", "kv_head * num_kv_heads + block"),
    "heads mixed up": ("kv_head * group + head) *", "head * num_heads / group + kv_head) *"),
    "shortest tiles twice": ("(num_tiles - 1 - index) * tile_rows", "(index / 2) * tile_rows"),
}
PLAIN_BUGS = {
    "no barrier before a tile": ("block_sync();  // nobody reads the tile before any more", ""),
    "no barrier behind the loads": ("        block_sync();\n\n        // Of 8", "        // Of 8"),
    "does not see itself": ("key <= seen[r] ?", "key < seen[r] ?"),
    "sees the next key": ("key <= seen[r] ?", "key <= seen[r] + 1 ?"),
    "rows behind the end": ("position < tile.num_keys;", "position <= tile.num_keys;"),
    "never rescaled": ("sums[r][p][i] *= factor", "sums[r][p][i] *= 1.0f"),
    "rows swapped": ("source = (lane_id() & ~(PLAIN_LANES - 1))", "source = 0"),
}
BUG_CASE = attention_case("bugs", [(65, 79), (3, 48), (17, 17)], 4, 2, 64)


def text_of(file: str) -> str:
    """The file with the headers of these kernels in their place, so that all can be changed."""
    text = (Path(build.KERNELS) / file).read_text()
    for name in ("attention_prefill_tile.cuh", "attention_prefill.cuh"):
        header = (Path(build.KERNELS) / name).read_text().replace("#pragma once", "")
        text = text.replace(f'#include "{name}"', header)
    return text


class ChangedSource(ShimBackend):
    """The shim, on a changed text of the kernels' file."""

    def __init__(self, source: str) -> None:
        self.source = source

    def run(self, file, entry, shape, args, written, **macros) -> None:
        kernel = host_kernel(file, entry, source=self.source, **macros)
        out = args[OUT]
        for order in (0, 1, 5):
            out[...] = np.nan
            kernel(
                shape.grid, shape.block, *args, shared_bytes=shape.shared_bytes, order=order
            )  # fmt: skip
            assert_close(out, reference(BUG_CASE, out.dtype.name))


def change(text: str, old: str, new: str) -> ChangedSource:
    assert text.count(old) == 1, f"{text.count(old)} places match {old!r}"
    return ChangedSource(text.replace(old, new))


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("bug", [*BUGS, *SHARED_BUGS])
def test_planted_bugs_are_found(bug: str) -> None:
    changed = change(text_of(FILE), *(BUGS | SHARED_BUGS)[bug])
    with pytest.raises((AssertionError, KernelFault)):
        check(changed, BUG_CASE, "bfloat16", SMALL)


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("bug", PLAIN_BUGS)
def test_planted_bugs_in_the_plain_kernel_are_found(bug: str) -> None:
    changed = change(text_of(PLAIN_FILE), *PLAIN_BUGS[bug])
    with pytest.raises((AssertionError, KernelFault)):
        check(changed, BUG_CASE, "float32", PLAIN)


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
def test_the_case_of_the_planted_bugs_passes_without_them() -> None:
    check(ChangedSource(text_of(FILE)), BUG_CASE, "bfloat16", SMALL)
    check(ChangedSource(text_of(PLAIN_FILE)), BUG_CASE, "float32", PLAIN)


# ------------------------------------------------------------------------------ NVRTC


@pytest.mark.parametrize(
    ("arch", "scalar", "head_size"),
    [("75", 1, 64), ("80", 2, 96), ("86", 1, 80), ("89", 2, 256), ("90a", 2, 64), ("90a", 2, 128),
     ("90a", 2, 256), ("90a", 0, 128), ("100", 2, 128), ("120", 1, 64)],
)  # fmt: skip
@pytest.mark.parametrize("cache", [None, 3, 4])
def test_compiles_without_spills(arch: str, scalar: int, head_size: int, cache: int | None) -> None:
    pytest.importorskip("cupy")
    from nanocupy.cuda.compiler import Compiler
    from nanocupy.errors import NanocupyError

    try:
        compiler = Compiler(cache=None, options=("--ptxas-options=-v",))
    except NanocupyError as exc:
        pytest.skip(f"no NVRTC: {exc}")
    plain = scalar == 0 or arch == "75"
    launch = launch_attention_prefill(
        1, 1, 1, 1, head_size, tile=PLAIN if plain else default_tile(head_size)
    )
    macros = {"SCALAR": scalar, "HEAD_SIZE": head_size, **launch.macros}
    if cache is not None:
        macros["CACHE"] = cache
    cubin = compiler.compile(launch.file, macros, arch=arch)
    stores = [int(line.split(" bytes spill stores")[0].split()[-1])
              for line in cubin.log.splitlines() if "bytes spill stores" in line]  # fmt: skip
    assert len(stores) == 1
    # A word a tile, against 256 products; where codes are widened first, some addresses more.
    assert stores[0] <= (16 if arch == "90a" and cache is None else 64)
