"""How the ops on a GPU launch: kernels by file and macros, with the workspaces they share.

What a kernel is launched for is not its part: see `cuda_products`, `cuda_attention`,
`cuda_sampling` and `cuda_ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from nanocupy.ops.cuda_sizes import TYPE_CODES, DeviceTraits, OpSizes
from nanocupy.ops.interface import Array
from nanocupy.ops.launch_gemv import GemvTuning, default_tuning
from nanocupy.ops.launch_quantized import DEFAULT_TUNING as DEFAULT_QUANTIZED
from nanocupy.ops.launch_quantized import QuantizedTuning
from nanocupy.ops.launch_quantized_stream import DEFAULT_TUNING as DEFAULT_STREAM
from nanocupy.ops.launch_quantized_stream import StreamTuning
from nanocupy.ops.launch_quantized_wide import DEFAULT_TUNING as DEFAULT_WIDE_CODES
from nanocupy.ops.launch_quantized_wide import WideCodesTuning
from nanocupy.ops.launch_shapes import LaunchShape
from nanocupy.ops.launch_skinny import DEFAULT_TUNING, SkinnyTuning
from nanocupy.ops.launch_tall import DEFAULT_TUNING as DEFAULT_TALL
from nanocupy.ops.launch_tall import TallTuning
from nanocupy.ops.launch_wide import DEFAULT_TUNING as DEFAULT_WIDE
from nanocupy.ops.launch_wide import WideTuning
from nanocupy.ops.tensor_maps import TensorMaps


class Kernels(Protocol):
    """Gives kernels by file, entry and macros, as `cuda.kernels.KernelLoader` does; `driver` makes
    tensor maps, where kernels are launched that take some."""

    driver: Any

    def get(self, file: str, entry: str, **macros: int | str) -> Any: ...


class CudaLauncher:
    """Launches on the stream that is current; nothing is allocated.

    kernels      launches on the stream that is current
    matmul       (x, w, out, beta): out = x @ w.T + beta * out, float32 sums, on the same stream
    workspaces   as `workspace_plan` says
    """

    def __init__(
        self,
        kernels: Kernels,
        matmul: Callable[..., None],
        workspaces: Mapping[str, Array],
        sizes: OpSizes,
        traits: DeviceTraits,
        gemv_tuning: GemvTuning | None = None,
        skinny_tuning: SkinnyTuning = DEFAULT_TUNING,
        quantized_tuning: QuantizedTuning = DEFAULT_QUANTIZED,
        stream_tuning: StreamTuning = DEFAULT_STREAM,
        wide_tuning: WideTuning = DEFAULT_WIDE,
        tall_tuning: TallTuning = DEFAULT_TALL,
        wide_codes_tuning: WideCodesTuning = DEFAULT_WIDE_CODES,
    ) -> None:
        self._kernels = kernels
        self._matmul = matmul
        self._workspaces = workspaces
        self._sizes = sizes
        self._traits = traits
        plain = traits.force_plain
        self._gemv_tuning = gemv_tuning or default_tuning(
            traits.compute_capability, traits.max_shared_bytes, tensor=not plain
        )
        self._skinny_tuning = skinny_tuning
        self._quantized_tuning = quantized_tuning
        self._stream_tuning = stream_tuning
        self._wide_tuning = wide_tuning
        self._tall_tuning = tall_tuning
        self._wide_codes_tuning = wide_codes_tuning
        # Every kernel waits by itself for the one before, so each may start before that has ended.
        self._overlap = not plain and traits.compute_capability >= (9, 0)
        self._starts_alone = False  # whether the next must not
        self._made_maps: TensorMaps | None = None
        self._types = {
            "SCALAR": TYPE_CODES[sizes.dtype],
            **({"FORCE_PLAIN": 1} if plain else {}),
        }
        self._row_types = self._types_of(sizes.dtype, wide=True)
        self._embed_dtype = sizes.embed_dtype or sizes.dtype
        self._head_dtype = sizes.lm_head_dtype or sizes.dtype
        self._cache_types = {
            **self._types,
            **type_macro("CACHE", sizes.cache_dtype, sizes.dtype),
            "HEAD_SIZE": sizes.head_size,
        }

    def _launch(self, file: str, entry: str, shape: LaunchShape, *args: Any, **macros: int) -> None:
        if 0 not in shape.grid:
            kernel = self._kernels.get(file, entry, **macros)
            overlap = self._overlap and not self._starts_alone
            self._starts_alone = False
            kernel.launch(
                shape.grid, (shape.block,), args, shape.shared_bytes,
                cluster=shape.cluster, overlap_previous=overlap, resident=shape.resident,
            )  # fmt: skip

    def _types_of(self, dtype: str, *, wide: bool = False) -> dict[str, int]:
        """The macros of a build whose weights are of `dtype`; wide: it reads or writes the residual
        stream."""
        residual = type_macro("RESIDUAL", self._sizes.residual_dtype, dtype) if wide else {}
        return self._types | {"SCALAR": TYPE_CODES[dtype]} | residual

    @property
    def _maps(self) -> TensorMaps:
        """Made where a kernel takes any: that needs the driver."""
        if self._made_maps is None:
            self._made_maps = TensorMaps(self._kernels.driver.tensor_map)
        return self._made_maps

    def _workspace(self, name: str, *shape: int) -> Array:
        """The start of a workspace in this shape."""
        return self._workspaces[name][: math.prod(shape)].reshape(shape)


def type_macro(macro: str, dtype: str, scalar: str) -> dict[str, int]:
    """The macro of a type that differs from SCALAR; where it does not, one module serves both."""
    return {} if dtype == scalar else {macro: TYPE_CODES[dtype]}
