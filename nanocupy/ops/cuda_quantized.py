"""Products with quantised weights on a GPU, and what brings such weights there.

Codes are multiplied as they are while a batch is small: by one kernel up to 8 tokens, or 16 with
codes of a byte; from there to 64 by warpgroups where the card has them, else by another in launches
of up to 32; for others the matrix is unpacked to the storage type, in a workspace, once for each
product.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.cuda_launch import CudaLauncher
from nanocupy.ops.cuda_sizes import ITEMSIZES
from nanocupy.ops.interface import Array
from nanocupy.ops.launch_quantized import (
    FILE,
    PACK_FILE,
    PackedFormat,
    QuantizedLaunch,
    launch_tokens,
    plan_quantized,
    uses_codes,
)
from nanocupy.ops.launch_quantized_stream import FILE as STREAM_FILE
from nanocupy.ops.launch_quantized_stream import (
    MAX_BATCH,
    StreamLaunch,
    part_rows,
    plan_stream,
    stream_rows,
    uses_stream,
)
from nanocupy.ops.launch_quantized_wide import FILE as WIDE_FILE
from nanocupy.ops.launch_quantized_wide import MAX_ROWS as MAX_WIDE_ROWS
from nanocupy.ops.launch_quantized_wide import plan_wide_codes, uses_wide_codes
from nanocupy.ops.launch_shapes import LaunchShape
from nanocupy.ops.packed_matrix import PackedMatrix

_i32, _i64, _f32 = np.int32, np.int64, np.float32
_PACK_WARPS = 8
# Planned once: a model has few shapes, and steps that are no graphs ask for the same again.
_plan = functools.cache(plan_quantized)
_stream_plan = functools.cache(plan_stream)
_stream_rows = functools.cache(stream_rows)
_wide_plan = functools.cache(plan_wide_codes)
_STREAM_ENTRIES = {
    "quantized_linear": "quantized_stream_linear",
    "quantized_linear_add": "quantized_stream_linear_add",
    "quantized_swiglu": "quantized_stream_swiglu",
    "quantized_logits": "quantized_stream_logits",
}
_WIDE_ENTRIES = {
    "quantized_linear": "quantized_wide_linear",
    "quantized_linear_add": "quantized_wide_linear_add",
    "quantized_swiglu": "quantized_wide_swiglu",
    "quantized_logits": "quantized_wide_logits",
}


class QuantizedProducts(CudaLauncher):
    """The part of the products that knows `PackedMatrix`."""

    # ----------------------------------------------------------------- loading

    def pack_quantized(
        self, codes: Array, scales: Array, offsets: Array | None, group_size: int,
        format: PackedFormat, unit: float, out: Array,
    ) -> None:  # fmt: skip
        """Rows of codes uint8, scales and offsets float32, as QuantizedMatrix has them and in the
        order of strips, to the packed strips `out`."""
        num_rows, num_inputs = len(codes), codes.shape[1] * (2 if format.kind == "int4" else 1)
        self._launch(
            PACK_FILE, "pack_quantized", _pack_shape(out, format), codes, scales, offsets, out,
            _f32(1 / unit), _i32(num_rows), _i32(num_inputs), _i32(group_size),
            **self._types, **format.macros,
        )  # fmt: skip

    def fill_quantized(self, weight: PackedMatrix, scale: float, offset: float, seed: int) -> None:
        """Random codes, each as likely, under one scale and, with int4, one offset."""
        if weight.format.kind == "int4":
            pair = np.array([scale, offset], np.float32) / np.float32(weight.unit)
            word = pair.astype(np.float16).view(np.uint32)[0]
        else:
            word = np.array([scale / weight.unit], np.float32).view(np.uint32)[0]
        num_vectors = weight.nbytes // 16
        grid = min(-(-num_vectors // 256), 32 * self._traits.num_multiprocessors)
        self._launch(
            PACK_FILE, "fill_quantized", LaunchShape((grid,), 256), weight.packed,
            _i64(num_vectors), word, np.uint64(seed), **self._types, **weight.format.macros,
        )  # fmt: skip

    # ----------------------------------------------------------------- products

    def _multiplies_codes(self, num_rows: int) -> bool:
        return uses_codes(
            num_rows, ITEMSIZES[self._sizes.dtype], self._traits.compute_capability,
            force_plain=self._traits.force_plain, tuning=self._quantized_tuning,
        )  # fmt: skip

    def _unpacked(self, weight: PackedMatrix) -> Array:
        """The matrix in the storage type, its inputs in their natural order, in a workspace."""
        num_outputs, num_inputs = weight.shape
        out = self._workspace("dequantized", num_outputs, num_inputs)
        self._launch(
            PACK_FILE, "dequantize_rows", _pack_shape(weight.packed, weight.format),
            weight.packed, weight.input_order, out, _f32(weight.unit), _i32(num_outputs),
            _i32(num_inputs), _i32(weight.pairs), **self._types, **weight.format.macros,
        )  # fmt: skip
        # Products read weights before they wait for the kernel in front, and these it writes.
        self._starts_alone = True
        return out

    def _quantized(
        self, entry: str, x: Array, norm: tuple[Array, float] | None, weight: PackedMatrix,
        bias: Array | None, out: Array,
    ) -> None:  # fmt: skip
        """A product with all that is folded into it. norm: weights and eps, where x is to be
        normalised."""
        if not len(x):
            return
        folds_norm = norm is not None and self._folds_norm(weight, len(x), out)
        if norm is not None and not folds_norm:
            normed = self._workspace("normed", *x.shape)
            self._norm_rows(x, None, *norm, normed)
            x = normed
        x = self._ordered(x, weight)
        # The residual's type matters to one of them; the others share a module where they can.
        wide = folds_norm or entry == "quantized_linear_add"
        before = () if norm is None else (norm[0], _f32(norm[1]))
        self._quantized_parts(
            entry, weight, x, before, (bias,), out, norm=folds_norm, wide=wide
        )  # fmt: skip

    def _quantized_logits(
        self, x: Array, rows: Array, norm_weight: Array, eps: float, weight: PackedMatrix,
        out: Array,
    ) -> None:  # fmt: skip
        num_rows = len(rows)
        if not num_rows:
            return
        norm = norm_weight, _f32(eps)
        if self._folds_norm(weight, num_rows, out):
            self._quantized_part(
                "quantized_logits", weight, x, (rows, *norm), (), out, norm=True, wide=True
            )
            return
        normed = self._workspace("head_rows", num_rows, x.shape[1])
        self._norm_rows(x, rows, norm_weight, eps, normed)
        normed = self._ordered(normed, weight)
        self._quantized_parts(
            "quantized_logits", weight, normed, (None, *norm), (), out, norm=False, wide=False
        )  # fmt: skip

    def _quantized_plan(
        self, weight: PackedMatrix, num_rows: int, out: Array, norm: bool
    ) -> QuantizedLaunch:
        most = launch_tokens(self._traits.max_shared_bytes)
        return _plan(
            weight.format, out.shape[1], weight.shape[1], min(num_rows, most),
            self._traits.num_multiprocessors, pairs=weight.pairs,
            norm=norm and num_rows <= most and weight.input_order is None,
            max_shared_bytes=self._traits.max_shared_bytes, tuning=self._quantized_tuning,
        )  # fmt: skip

    def _folds_norm(self, weight: PackedMatrix, num_rows: int, out: Array) -> bool:
        """Whether a product of rms_norm(x) computes that itself, which is then one launch."""
        if self._is_wide_codes(weight, num_rows) or self._stream_rows(weight, num_rows):
            return False
        return self._quantized_plan(weight, num_rows, out, True).folds_norm

    def _is_wide_codes(self, weight: PackedMatrix, num_rows: int) -> bool:
        """Whether warpgroups multiply the codes."""
        return uses_wide_codes(
            weight.format, min(num_rows, MAX_WIDE_ROWS), self._sizes.dtype,
            wgmma=self._traits.wgmma and not self._traits.force_plain,
            tuning=self._wide_codes_tuning,
        )  # fmt: skip

    def _stream_rows(self, weight: PackedMatrix, num_rows: int) -> int:
        """The most tokens of a launch, where codes stream past inputs in shared memory; else 0."""
        if not uses_stream(min(num_rows, MAX_BATCH), weight.format.kind, self._stream_tuning):
            return 0
        return _stream_rows(
            weight.format, weight.shape[1], clusters=self._traits.compute_capability >= (9, 0),
            max_shared_bytes=self._traits.max_shared_bytes, tuning=self._stream_tuning,
        )  # fmt: skip

    def _quantized_parts(
        self, entry: str, weight: PackedMatrix, x: Array, before: tuple[Any, ...],
        after: tuple[Any, ...], out: Array, *, norm: bool, wide: bool,
    ) -> None:  # fmt: skip
        """All launches of a product; the arguments as `_quantized_part` has them."""
        num_rows = len(x)
        is_wide = self._is_wide_codes(weight, num_rows)
        most = MAX_WIDE_ROWS if is_wide else self._stream_rows(weight, num_rows)
        each = part_rows(num_rows, most) if most else launch_tokens(self._traits.max_shared_bytes)
        for first in range(0, num_rows, each):
            part = slice(first, min(first + each, num_rows))
            if is_wide:
                self._wide_part(entry, weight, x[part], after, out[part], wide=wide)
            elif most:
                self._stream_part(
                    entry, weight, x[part], after, out[part], min(each, num_rows), wide=wide
                )
            else:
                self._quantized_part(
                    entry, weight, x[part], before, after, out[part], norm=norm, wide=wide
                )

    def _wide_part(
        self, entry: str, weight: PackedMatrix, x: Array, after: tuple[Any, ...], out: Array,
        *, wide: bool,
    ) -> None:  # fmt: skip
        """One launch, by warpgroups."""
        num_rows, num_outputs = out.shape
        plan = _wide_plan(
            weight.format, num_outputs, weight.shape[1], num_rows,
            self._traits.num_multiprocessors, pairs=weight.pairs,
            max_shared_bytes=self._traits.max_shared_bytes, tuning=self._wide_codes_tuning,
        )  # fmt: skip
        shape = LaunchShape(plan.grid, plan.block, plan.shared_bytes, plan.cluster)
        self._launch(
            WIDE_FILE, _WIDE_ENTRIES[entry], shape, self._maps.matrix(x, plan.input_box),
            weight.packed, _f32(weight.unit), *after, out, _i32(num_rows), _i32(num_outputs),
            _i32(weight.shape[1]),
            **(self._row_types if wide else self._types), **plan.macros,
        )  # fmt: skip

    def _stream_part(
        self, entry: str, weight: PackedMatrix, x: Array, after: tuple[Any, ...], out: Array,
        planned_rows: int, *, wide: bool,
    ) -> None:  # fmt: skip
        """One launch of up to `planned_rows` tokens, whose plan it takes."""
        num_rows, num_outputs = out.shape
        plan: StreamLaunch = _stream_plan(
            weight.format, num_outputs, weight.shape[1], planned_rows,
            self._traits.num_multiprocessors, pairs=weight.pairs,
            clusters=self._traits.compute_capability >= (9, 0),
            max_shared_bytes=self._traits.max_shared_bytes, tuning=self._stream_tuning,
        )  # fmt: skip
        shape = LaunchShape(plan.grid, plan.block, plan.shared_bytes, plan.cluster)
        self._launch(
            STREAM_FILE, _STREAM_ENTRIES[entry], shape, x, weight.packed, _f32(weight.unit),
            *after, out, _i32(num_rows), _i32(num_outputs), _i32(weight.shape[1]),
            **(self._row_types if wide else self._types), **plan.macros,
        )  # fmt: skip

    def _quantized_part(
        self, entry: str, weight: PackedMatrix, x: Array, before: tuple[Any, ...],
        after: tuple[Any, ...], out: Array, *, norm: bool, wide: bool,
    ) -> None:  # fmt: skip
        """One launch. before, after: its arguments between x and the weight, and the weight and
        out; norm: it normalises x; wide: it reads or writes the residual stream."""
        num_rows, num_outputs = out.shape
        types = self._row_types if wide else self._types
        plan = self._quantized_plan(weight, num_rows, out, norm)
        self._launch(
            FILE, entry, LaunchShape(plan.grid, plan.block, plan.shared_bytes),
            x, *before, weight.packed, _f32(weight.unit), *after, out, _i32(num_rows),
            _i32(num_outputs), _i32(weight.shape[1]), _i32(plan.tile_segments),
            _i32(plan.round_strips), **types, **plan.macros,
        )  # fmt: skip

    def _ordered(self, x: Array, weight: PackedMatrix) -> Array:
        """x with its columns in the order of the weight's."""
        if weight.input_order is None:
            return x
        out = self._workspace("ordered", *x.shape)
        self._launch(
            PACK_FILE, "gather_inputs",
            LaunchShape((len(x),), shapes.row_block(x.shape[1], 4)),
            x, weight.input_order, out, _i32(x.shape[1]), **self._types, **weight.format.macros,
        )  # fmt: skip
        return out

    def _norm_rows(
        self, x: Array, rows: Array | None, weight: Array, eps: float, out: Array,
        dtype: str | None = None,
    ) -> None:  # fmt: skip
        """dtype: of weight and out, if not the storage type."""
        shape = shapes.rms_norm_rows(len(out), x.shape[1])
        self._launch(
            "norm.cu", "rms_norm_rows", shape, x, rows, weight, _f32(eps), out, _i32(x.shape[1]),
            **self._types_of(dtype or self._sizes.dtype, wide=True),
        )  # fmt: skip


def _pack_shape(packed: Array, format: PackedFormat) -> LaunchShape:
    """A warp for each chunk of a packed matrix."""
    strips, strip_bytes = packed.shape
    num_chunks = strips * (strip_bytes // format.chunk_bytes)
    return LaunchShape((-(-num_chunks // _PACK_WARPS),), 32 * _PACK_WARPS)
