"""Prefill attention by warpgroup products, on a GPU of compute capability 9.0.

The kernel has no twin on the host: here are chunks around every border, launches for more than
comes, every build of it, bits that company must not change, and planted bugs.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import DeviceTraits, OpSizes
from nanocupy.ops.launch_attention_prefill import (
    WGMMA_FILE,
    WgmmaTile,
    launch_attention_prefill_wgmma,
    wgmma_tile,
)
from nanocupy.ops.numpy_ops import NumpyOps
from nanocupy.ops.tensor_maps import TensorMaps
from tests.kernels.backends import CODES, assert_close, device_loader
from tests.kernels.test_attention_prefill import SHARED, attention_case, reference, text_of
from tests.ops.cases import DTYPES, FAR_BLOCK, Call, Case, guarded, guards_intact, inner

pytestmark = pytest.mark.gpu
OUT = "out"


class Runner:
    """The kernel on device 0, each array in an allocation of its own between guard rows."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.loader = device_loader()
        if self.loader.arch != "sm_90a":
            pytest.skip(f"wgmma needs compute capability 9.0, this card is {self.loader.arch}")

    def run(self, call: Call, tile: WgmmaTile | None = None, loader: Any = None) -> None:
        """Launch on `call`, whose "out" is filled; twice, and both must give the same bits."""
        a = call.arguments
        num_tokens, heads, head_size = a["q"].shape
        _, kv_heads, block_size, _ = a["key_cache"].shape
        scalar, group = CODES[a["q"].dtype.name], heads // kv_heads
        tile = tile or wgmma_tile(head_size, group, block_size, scalar, scalar)
        assert tile is not None
        launch = launch_attention_prefill_wgmma(
            num_tokens, len(a["kv_lens"]), heads, kv_heads, head_size, tile=tile,
            num_multiprocessors=self.loader.num_multiprocessors,
        )  # fmt: skip
        macros = {"SCALAR": scalar, "HEAD_SIZE": head_size, **launch.macros}
        kernel = (loader or self.loader).get(launch.file, launch.entry, **macros)
        numbers = len(a["kv_lens"]), heads, kv_heads, block_size, a["block_tables"].shape[1]
        names = ("q", "key_cache", "value_cache", "query_starts", "kv_lens", "block_tables", OUT)
        results = []
        for _ in range(2):
            wholes = {name: self.cupy.asarray(guarded(a[name])) for name in names}
            q, keys, values, *rest = (inner(whole) for whole in wholes.values())
            maps = TensorMaps(self.loader.driver.tensor_map)
            counter = self.cupy.zeros(1, np.uint32)
            kernel.launch(
                launch.grid, (launch.block,),
                [maps.queries(q, tile, group), maps.cache(keys, tile), maps.cache(values, tile),
                 *rest, counter, np.float32(a["scale"]), *(np.int32(n) for n in numbers)],
                launch.shared_bytes,
            )  # fmt: skip
            self.cupy.cuda.Device().synchronize()
            assert int(counter[0]) == 0, "the next launch would miss tiles"
            assert all(guards_intact(self.cupy.asnumpy(whole)) for whole in wholes.values())
            results.append(self.cupy.asnumpy(inner(wholes[OUT])))
        assert results[0].tobytes() == results[1].tobytes(), "two runs differ"
        a[OUT][...] = results[0]

    def check(self, case: Case, dtype: str, tile: WgmmaTile | None = None, **more: Any) -> None:
        call = case.build(DTYPES[dtype])
        self.run(call, tile, **more)
        assert_close(call.arguments[OUT], reference(case, dtype), f"{case} {dtype}")


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


# ------------------------------------------------------------------------------ every border

AROUND = [(1, n) for n in (1, 63, 64, 65, 127, 128, 129, 300)]
MIXED = [(1, 17), (5, 5), (0, 12), (70, 400), (1, 1), (16, 48), (0, 0), (129, 257), (1, 31)]
WHOLE = [(n, n) for n in (1, 63, 64, 65, 127, 128, 129, 255, 257)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["d64", "d128"])
def test_shared_cases(runner: Runner, name: str, dtype: str) -> None:
    (case,) = [case for case in SHARED if case.name == name]
    runner.check(case, dtype)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(2, 2), (4, 1), (8, 2), (3, 1), (7, 1), (10, 2), (100, 1), (128, 1)]
)
@pytest.mark.parametrize("sequences", [AROUND, MIXED, WHOLE], ids=["around", "mixed", "whole"])
def test_ragged_batches(runner: Runner, sequences, heads, kv_heads) -> None:
    case = attention_case(f"ragged-{sequences}", sequences, heads, kv_heads, 128)
    runner.check(case, "bfloat16")


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_chunks_around_the_borders_of_tiles_and_blocks(runner: Runner, heads, head_size) -> None:
    tile = wgmma_tile(head_size, heads, 16, 1, 1)
    assert tile is not None
    queries = tile.rows(heads) // heads
    counts = sorted({1, queries - 1, queries, queries + 1, 2 * queries + 1})
    prefixes = (0, 1, 15, 63, 64, tile.keys - 1, tile.keys, tile.keys + 1)
    sequences = [(n, n + p) for i, n in enumerate(counts) for p in prefixes[i % 2 :: 2]]
    case = attention_case(f"borders-{head_size}", sequences, heads, 1, head_size)
    runner.check(case, "float16")


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128, 256])
def test_block_sizes(runner: Runner, block_size: int) -> None:
    sequences = [(5, 90), (140, 140), (33, 65), (200, 700)]
    for heads, head_size in ((4, 64), (2, 128)):
        case = attention_case(f"p{block_size}", sequences, heads, 2, head_size, block_size)
        runner.check(case, "bfloat16")


@pytest.mark.parametrize(
    "tile",
    [WgmmaTile(), WgmmaTile(keys=64, stages=4), WgmmaTile(warpgroups=3, stages=4),
     WgmmaTile(l2_bytes=1 << 16)],
    ids=["2-warpgroups", "64-keys", "4-stages", "a-head-at-a-time"],
)  # fmt: skip
def test_other_tiles(runner: Runner, tile: WgmmaTile) -> None:
    case = attention_case("tiles", [(1, 200), (390, 530), (330, 330)], 8, 4, 64)
    runner.check(case, "bfloat16", tile)


def test_large_scores_and_many_tiles_a_block(runner: Runner) -> None:
    case = attention_case("peaked", [(400, 700), (300, 300)], 24, 8, 64, q_scale=30.0)
    runner.check(case, "float16")
    runner.check(attention_case("tiles", [(1500, 1700)], 32, 32, 64), "bfloat16")


# ------------------------------------------------------------------------------ launches


@pytest.mark.parametrize("count", [31, 33, 1100])
def test_many_sequences_a_launch(runner: Runner, count: int) -> None:
    """Most of them without queries: the search passes over them, in one, two and three rounds."""
    filled = {0: (2, 2), count // 2: (170, 200), count - 3: (33, 40), count - 2: (1, 3)}
    sequences = [filled.get(i, (0, i % 3)) for i in range(count)]
    runner.check(attention_case(f"many-{count}", sequences, 2, 1, 64), "float16")


def test_nothing_to_do(runner: Runner) -> None:
    """A launch captured for more, of a batch where nobody has a query."""
    call = attention_case("none", [(20, 30), (7, 7)], 2, 1, 64).build(DTYPES["bfloat16"])
    call.arguments["query_starts"][:] = 0
    runner.run(call)
    assert np.isnan(call.arguments[OUT].astype(np.float32)).all()


def test_a_launch_for_more_than_comes(runner: Runner) -> None:
    call = attention_case("captured", [(240, 250), (3, 3)], 4, 2, 64).build(DTYPES["bfloat16"])
    a = dict(call.arguments)
    a["q"] = np.concatenate([a["q"], np.full((229, 4, 64), np.nan).astype(a["q"].dtype)])
    a[OUT] = np.full((243 + 229, 4, 64), np.nan).astype(a["q"].dtype)
    a["query_starts"] = np.r_[a["query_starts"], [243] * 60].astype(np.int32)
    a["kv_lens"] = np.r_[a["kv_lens"], [0] * 60].astype(np.int32)
    padding = np.full((60, a["block_tables"].shape[1]), FAR_BLOCK, np.int32)
    a["block_tables"] = np.concatenate([a["block_tables"], padding])
    runner.run(Call(a, (OUT,)))
    wanted = np.full((243, 4, 64), np.nan)
    NumpyOps(np.float64).attention(**{**call.arguments, OUT: wanted})
    assert_close(a[OUT][:243], wanted)
    assert np.isnan(a[OUT][243:].astype(np.float32)).all()


@pytest.mark.parametrize("heads", [2, 4, 6])
def test_chunks_and_company_change_no_bit(runner: Runner, heads: int) -> None:
    """A prompt in one piece, in chunks, and beside others."""
    case = attention_case("whole", [(400, 400)], heads, 2, 128)
    whole = case.build(DTYPES["bfloat16"]).arguments
    runner.run(Call(whole, (OUT,)))
    for cuts in ([0, 7, 8, 130, 400], [0, 33, 128, 129, 300, 400]):
        out = np.full_like(whole[OUT], np.nan)
        for start, end in pairwise(cuts):
            piece = {
                **whole,
                "q": whole["q"][start:end].copy(),
                "query_starts": np.array([0, 0, end - start], np.int32),
                "kv_lens": np.array([0, end], np.int32),
                "block_tables": np.repeat(whole["block_tables"], 2, axis=0),
                OUT: np.full_like(out[start:end], np.nan),
            }
            runner.run(Call(piece, (OUT,)))
            out[start:end] = piece[OUT]
        assert out.tobytes() == whole[OUT].tobytes()


def test_the_op_in_a_graph(runner: Runner) -> None:
    """As the engine runs it: captured, with overlap, replayed for other lengths."""
    cupy = runner.cupy
    case = attention_case("graph", [(150, 180), (50, 50)], 4, 2, 64)
    a = case.build(DTYPES["bfloat16"]).arguments
    sizes = OpSizes(200, 2, 1, 256, 8, 8, 8, 4, 2, 64, *["bfloat16"] * 3)
    traits = DeviceTraits((9, 0), runner.loader.num_multiprocessors, 227 << 10, wgmma=True)
    workspaces = {"counters": cupy.zeros(4, np.uint32)}
    ops = CudaOps(runner.loader, None, workspaces, sizes, traits)  # type: ignore[arg-type]
    device = {n: cupy.asarray(v) if isinstance(v, np.ndarray) else v for n, v in a.items()}
    ops.attention(**device)
    first = cupy.asnumpy(device[OUT])
    assert_close(first, reference(case, "bfloat16"))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        for _ in range(3):
            ops.attention(**device)
        graph = stream.end_capture()
    device[OUT].view(np.uint16).fill(0xFFFF)
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    assert cupy.asnumpy(device[OUT]).tobytes() == first.tobytes()
    fewer = {
        "query_starts": np.array([0, 9, 12], np.int32),
        "kv_lens": np.array([100, 40], np.int32),
    }
    for name, value in fewer.items():
        device[name][:] = cupy.asarray(value)
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    wanted = np.full((12, 4, 64), np.nan)
    NumpyOps(np.float64).attention(**{**a, **fewer, "q": a["q"][:12], OUT: wanted})
    assert_close(cupy.asnumpy(device[OUT][:12]), wanted)


# ------------------------------------------------------------------------------ planted bugs

# None that a barrier depends on: the launch would hang.
BUGS = {
    "behind the end uncleared": ("end % copies.keys != 0", "false"),
    "clears too little": ("values, int row, int end) {", "values, int row, int end) {\n    ++row;"),
    "clears too much": ("values, int row, int end) {", "values, int row, int end) {\n    --row;"),
    "sees the next key": ("i % 2 > limit[h])", "i % 2 > limit[h] + 1)"),
    "does not see itself": ("i % 2 > limit[h])", "i % 2 >= limit[h])"),
    "masks too late": ("ends || j >= all_seen", "ends || j > all_seen"),
    "never rescaled": ("if (!warp_ballot(rows.factor", "if (true || !warp_ballot(rows.factor"),
    "sums of all tiles": ("sum = rows.sum[h] * rows.factor[h]", "sum = rows.sum[h]"),
    "heads mixed up": ("+ within - slot * heads_here;", "+ slot % heads_here;"),
    "wrong block": ("position -= KEY_TILE;", "position -= KEY_TILE / 2;"),
    "values of the wrong keys": ("k * 2 * HALVES * ATOM", "(k ^ 1) * 2 * HALVES * ATOM"),
}
BUG_CASE = attention_case("bugs", [(265, 379), (3, 348), (117, 117)], 6, 2, 128)


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_planted_bugs_are_found(runner: Runner, bug: str | None, tmp_path: Path) -> None:
    from nanocupy.cuda.compiler import Compiler, Sources
    from nanocupy.cuda.kernels import KernelLoader

    text = text_of(WGMMA_FILE)
    header = text_of("attention_prefill_hopper.cuh").replace("#pragma once", "")
    text = text.replace('#include "attention_prefill_hopper.cuh"', header)
    if bug is not None:
        old, new = BUGS[bug]
        assert text.count(old) == 1, f"{text.count(old)} places match {old!r}"
        text = text.replace(old, new)
    for name, header in Sources().headers().items():
        (tmp_path / name).write_text(header)
    (tmp_path / WGMMA_FILE).write_text(text)
    loader = KernelLoader(0, Compiler(Sources(tmp_path), tmp_path / "cubins"))
    if bug is None:
        runner.check(BUG_CASE, "bfloat16", loader=loader)
        return
    with pytest.raises(AssertionError):
        runner.check(BUG_CASE, "bfloat16", loader=loader)
