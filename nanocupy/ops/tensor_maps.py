"""Tensor maps of the arrays that kernels read through the copy engine, made once each.

Owns how q, the caches and matrices are seen as tensors of rows of 128 bytes. It knows no kernel,
and makes maps with what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanocupy.ops.interface import Array
from nanocupy.ops.launch_attention_prefill import WgmmaTile

# Buffers lie where they are as long as an engine runs: two caches and four matrices a layer, these
# for each height of tile, and inputs of products and a q for each token count.
MOST_MAPS = 4096


class TensorMaps:
    """make: (array, box, what) -> a tensor map, as `cuda.driver.Driver.tensor_map`."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._maps: dict[tuple[Any, ...], Any] = {}

    def queries(self, q: Array, tile: WgmmaTile, group: int) -> Any:
        """Of q [T, H, d], d a multiple of 64; group: heads that share keys."""
        return self._map(q, query_view, tile.query_box(group), "the map of q")

    def cache(self, cache: Array, tile: WgmmaTile) -> Any:
        """Of a cache [N, G, P, d], P a multiple of 8, d of 64."""
        box = tile.cache_box(cache.shape[3], cache.shape[2])
        return self._map(cache, cache_view, box, "the map of a KV cache")

    def matrix(self, matrix: Array, box: tuple[int, int]) -> Any:
        """Of a matrix [R, K], K a multiple of 8; the box has 64 columns."""
        return self._map(matrix, _itself, box, "the map of a matrix")

    def _map(self, array: Array, view: Callable[[Array], Array], box: tuple, what: str) -> Any:
        key = (array.data.ptr, array.shape, array.strides, array.dtype, box)
        found = self._maps.get(key)
        if found is None:
            if len(self._maps) >= MOST_MAPS:
                self._maps.clear()
            found = self._maps[key] = self._make(view(array), box, what=what)
        return found


def _itself(array: Array) -> Array:
    return array


def query_view(q: Array) -> Array:
    """q [T, H, d] as [d / 64, T, H, 64]."""
    num_tokens, num_heads, head_size = q.shape
    return q.reshape(num_tokens, num_heads, head_size // 64, 64).transpose(2, 0, 1, 3)


def cache_view(cache: Array) -> Array:
    """A cache [N, G, P, d] as [N * G, P / 8, d / 64, 8, 64]."""
    num_blocks, num_kv_heads, block_size, head_size = cache.shape
    rows = cache.reshape(num_blocks * num_kv_heads, block_size // 8, 8, head_size // 64, 64)
    return rows.transpose(0, 1, 3, 2, 4)
