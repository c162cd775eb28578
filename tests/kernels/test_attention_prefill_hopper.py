"""Prefill attention by warpgroup products: what can be told without a GPU, which is where it runs,
how it is launched, and how it compiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import DeviceTraits, OpSizes
from nanocupy.ops.launch_attention_prefill import (
    WGMMA_ENTRY,
    WGMMA_FILE,
    WgmmaTile,
    launch_attention_prefill_wgmma,
    wgmma_tile,
)
from nanocupy.ops.tensor_maps import TensorMaps, cache_view, query_view
from tests.kernels.test_attention_prefill import attention_case
from tests.ops.cases import DTYPES

assert WGMMA_FILE == "attention_prefill_hopper.cu"


def test_where_it_runs() -> None:
    assert wgmma_tile(128, 1, 16, 2, 2) == WgmmaTile()
    for block_size in (8, 16, 32, 64, 128, 256):
        assert wgmma_tile(64, 128, block_size, 1, 1)
    for block_size in (1, 4, 12, 24, 48, 192):
        assert wgmma_tile(64, 1, block_size, 2, 2) is None
    for head_size in (32, 80, 96, 256):
        assert wgmma_tile(head_size, 1, 16, 2, 2) is None
    assert wgmma_tile(128, 129, 16, 2, 2) is None
    assert wgmma_tile(64, 192, 16, 2, 2)
    assert wgmma_tile(64, 193, 16, 2, 2) is None
    assert wgmma_tile(128, 1, 16, 0, 0) is None
    assert wgmma_tile(128, 1, 16, 2, 0) is None


def test_blocks_fit_and_boxes_are_what_the_copy_engine_takes() -> None:
    for head_size in (64, 128):
        for group in (1, 3, 4, 7, 100, 128):
            tile = wgmma_tile(head_size, group, 16, 2, 2)
            assert tile is not None
            assert tile.shared_bytes(head_size) + 1024 <= 227 << 10  # barriers lie beside it
            box = tile.query_box(group)
            assert box[1] * box[2] == tile.rows(group)
            most = 64 * tile.warpgroups
            assert most - group < tile.rows(group) <= most
            assert max(box) <= 256
            for block_size in (8, 16, 128, 512):
                keys = tile.cache_box(head_size, block_size)
                assert 8 * keys[1] * -(-tile.keys // block_size) == max(
                    tile.keys, min(block_size, tile.keys)
                )
                assert max(keys) <= 256


def test_the_grid_is_no_more_than_the_card_or_the_work() -> None:
    def grid(*counts: int) -> int:
        launch = launch_attention_prefill_wgmma(
            *counts, 8, 2, 64, tile=WgmmaTile(), num_multiprocessors=132
        )
        return launch.grid[0]

    assert grid(0, 3) == grid(5, 0) == 0
    assert grid(1, 1) == 2
    assert grid(33, 1) == 4  # 132 rows of each head: up to two tiles
    assert grid(100_000, 7) == 132


def test_views_are_the_same_values_elsewhere() -> None:
    cache = np.arange(3 * 2 * 16 * 128).reshape(3, 2, 16, 128)
    view = cache_view(cache)
    q = np.arange(5 * 6 * 128).reshape(5, 6, 128)
    for n, g, p, d in np.random.default_rng(0).integers(0, (3, 2, 16, 128), (50, 4)):
        assert view[n * 2 + g, p // 8, d // 64, p % 8, d % 64] == cache[n, g, p, d]
        assert query_view(q)[d // 64, n, g, d % 64] == q[n, g, d]
    assert np.shares_memory(view, cache)


class _Pointer:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class _Placed:
    """An array with an address."""

    def __init__(self, array: np.ndarray, ptr: int) -> None:
        self.array, self.data, self.dtype = array, _Pointer(ptr), "f2"
        self.shape, self.strides = array.shape, array.strides

    def reshape(self, *shape: int) -> np.ndarray:
        return self.array.reshape(*shape)


def test_a_map_is_made_once_for_an_address_and_shape() -> None:
    made: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def make(array: np.ndarray, box: tuple[int, ...], what: str) -> int:
        made.append((array.shape, box))
        return len(made)

    maps, q = TensorMaps(make), np.zeros((5, 6, 128))
    tile = WgmmaTile()
    assert [maps.queries(_Placed(q, 64), tile, 3) for _ in range(3)] == [1, 1, 1]
    assert maps.queries(_Placed(q[:4], 64), tile, 3) == 2
    assert maps.queries(_Placed(q, 128), tile, 3) == 3
    assert maps.cache(_Placed(np.zeros((2, 1, 16, 64)), 64), tile) == 4
    assert made[0] == ((2, 5, 6, 64), (1, 42, 3, 64))
    assert made[3] == ((2, 2, 1, 8, 64), (1, 2, 1, 8, 64))


def test_a_map_of_a_matrix_is_of_its_shape_and_box() -> None:
    """At one address may lie inputs of any number of tokens, and tiles differ in height."""
    made: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def make(array: _Placed, box: tuple[int, ...], what: str) -> int:
        made.append((array.shape, box))
        return len(made)

    maps, matrix = TensorMaps(make), np.zeros((48, 128))
    wanted = [
        ((48, 128), (64, 64)), ((48, 128), (16, 64)), ((40, 128), (64, 64)), ((24, 256), (64, 64)),
    ]  # fmt: skip
    for _ in range(2):  # all are kept
        for number, (shape, box) in enumerate(wanted, 1):
            placed = _Placed(matrix.reshape(-1)[: shape[0] * shape[1]].reshape(shape), 64)
            assert maps.matrix(placed, box) == number
    assert made == wanted
    assert maps.matrix(_Placed(matrix, 1 << 20), (64, 64)) == 5


class _Launches:
    """Kernels and tensor maps that only say what was asked of them."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.args: tuple[Any, ...] = ()

    def get(self, file: str, entry: str, **macros: int) -> Any:
        self.entries.append(entry)
        return self

    def launch(self, grid: Any, block: Any, args: Any, *rest: Any, **options: Any) -> None:
        self.args = args

    def queries(self, *args: Any) -> str:
        return "queries"

    def cache(self, *args: Any) -> str:
        return "cache"


@pytest.mark.parametrize(
    ("wgmma", "head_size", "block_size", "dtype", "entry"),
    [(True, 64, 16, "bfloat16", WGMMA_ENTRY), (True, 128, 32, "float16", WGMMA_ENTRY),
     (False, 64, 16, "bfloat16", "attention_prefill"), (True, 96, 16, "bfloat16",
     "attention_prefill"), (True, 64, 12, "bfloat16", "attention_prefill"),
     (True, 64, 16, "float32", "attention_prefill_plain")],
)  # fmt: skip
def test_which_kernel_the_op_takes(wgmma, head_size, block_size, dtype, entry) -> None:
    case = attention_case("op", [(20, 30), (3, 3)], 4, 2, head_size, block_size)
    a = case.build(DTYPES[dtype]).arguments
    sizes = OpSizes(23, 2, 1, 64, 8, 8, 8, 4, 2, head_size, dtype, dtype, dtype)
    launches = _Launches()
    traits = DeviceTraits((9, 0), 132, 227 << 10, wgmma=wgmma)
    ops = CudaOps(launches, None, {"counters": np.zeros(4, np.uint32)}, sizes, traits)  # type: ignore[arg-type]
    ops._made_maps = launches  # type: ignore[assignment]
    ops.attention(**a)
    assert launches.entries == [entry]
    numbers = [int(n) for n in launches.args[-5:]]
    assert numbers == [2, 4, 2, block_size, a["block_tables"].shape[1]]
    if entry == WGMMA_ENTRY:
        assert launches.args[:3] == ("queries", "cache", "cache")
        assert launches.args[7].shape == (1,)
        assert launches.args[6] is a["out"]


@pytest.mark.parametrize(
    ("scalar", "head_size"), [(2, 128), (1, 128), (2, 64)], ids=["bfloat16", "float16", "d64"]
)
def test_compiles_without_spills(scalar: int, head_size: int) -> None:
    """And with products that run on while others are started."""
    pytest.importorskip("cupy")
    from nanocupy.cuda.compiler import Compiler
    from nanocupy.errors import NanocupyError

    try:
        compiler = Compiler(cache=None, options=("--ptxas-options=-v",))
    except NanocupyError as exc:
        pytest.skip(f"no NVRTC: {exc}")
    tile = wgmma_tile(head_size, 1, 16, scalar, scalar)
    assert tile is not None
    macros = {"SCALAR": scalar, "HEAD_SIZE": head_size, **tile.macros()}
    log = compiler.compile(WGMMA_FILE, macros, arch="90a").log
    assert " 0 bytes spill stores" in log
    assert "C75" not in log, "the compiler serialised the products, or gave back no registers"
