"""Products on a GPU, with the norm, bias, activation and residual that belong to them.

A few rows take kernels with everything folded in; some more take tensor-core kernels with all or
all but the norm, where these are the faster on 9.0a up to 256 rows; still more take cuBLAS between
a norm before and what follows, but for gate and up of prompts on 9.0a, whose kernel writes what
SwiGLU makes of them alone. The rounding points are the same. A quantised weight is multiplied
as it is (`cuda_quantized`) or, for larger batches, unpacked to the storage type first.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.cuda_launch import type_macro
from nanocupy.ops.cuda_quantized import QuantizedProducts
from nanocupy.ops.cuda_sizes import ITEMSIZES
from nanocupy.ops.interface import Array
from nanocupy.ops.launch_gemv import MAX_ROWS, GemvLaunch, plan_gemv
from nanocupy.ops.launch_shapes import LaunchShape
from nanocupy.ops.launch_skinny import FILE as SKINNY
from nanocupy.ops.launch_skinny import SkinnyLaunch, plan_skinny, uses_skinny
from nanocupy.ops.launch_tall import ENTRY as TALL_ENTRY
from nanocupy.ops.launch_tall import FILE as TALL
from nanocupy.ops.launch_tall import plan_tall, uses_tall
from nanocupy.ops.launch_wide import FILE as WIDE
from nanocupy.ops.launch_wide import plan_wide, uses_wide
from nanocupy.ops.packed_matrix import PackedMatrix

_i32, _f32 = np.int32, np.float32
# Planned once: a model has few shapes, and steps that are no graphs ask for the same again.
_plan_wide = functools.cache(plan_wide)


class ProductOps(QuantizedProducts):
    """The ops of `Ops` that multiply by a weight."""

    def norm_linear(self, x, norm_weight, eps, weight, bias, out) -> None:
        num_rows = len(x)
        if isinstance(weight, PackedMatrix):
            if self._multiplies_codes(num_rows):
                norm = norm_weight, eps
                self._quantized("quantized_linear", x, norm, weight, bias, out)
                return
            weight = self._unpacked(weight)
        wide = self._is_wide(x, out)
        if self._is_skinny(x) and not wide:
            self._skinny_normed("skinny_linear", x, norm_weight, eps, weight, bias, out)
        elif 0 < num_rows <= MAX_ROWS and not wide:
            self._gemv(
                "norm_linear_rows", num_rows, *weight.shape, x, norm_weight, _f32(eps), weight,
                bias, out,
            )  # fmt: skip
        elif num_rows:
            normed = self._workspace("normed", *x.shape)
            self._norm_rows(x, None, norm_weight, eps, normed)
            if wide:
                self._wide("wide_linear", normed, weight, bias, out)
            else:
                self._product_with_bias(normed, weight, bias, out)

    def linear_add(self, x, weight, bias, residual) -> None:
        num_rows = len(x)
        if isinstance(weight, PackedMatrix):
            if self._multiplies_codes(num_rows):
                self._quantized("quantized_linear_add", x, None, weight, bias, residual)
                return
            weight = self._unpacked(weight)
        if self._is_wide(x, residual):
            self._wide("wide_linear_add", x, weight, bias, residual)
        elif self._is_skinny(x):
            plan = self._skinny_plan(x, residual)
            self._skinny("skinny_linear_add", plan, x, weight, bias, residual)
        elif 0 < num_rows <= MAX_ROWS:
            self._gemv("linear_add_rows", num_rows, *weight.shape, x, weight, bias, residual)
        elif num_rows and bias is None:
            self._matmul(x, weight, residual, 1.0)
        elif num_rows:
            product = self._workspace("product", *residual.shape)
            self._matmul(x, weight, product, 0.0)
            self._launch(
                "activation.cu", "add_residual_rows", shapes.add_rows(*residual.shape),
                product, bias, residual, _i32(residual.shape[1]),
                **self._row_types, **type_macro("PRODUCT", "float32", self._sizes.dtype),
            )  # fmt: skip

    def norm_swiglu(self, x, norm_weight, eps, weight, bias, out) -> None:
        num_rows, width = out.shape
        if isinstance(weight, PackedMatrix):
            if self._multiplies_codes(num_rows):
                norm = norm_weight, eps
                self._quantized("quantized_swiglu", x, norm, weight, bias, out)
                return
            weight = self._unpacked(weight)
        wide = self._is_wide(x, out, pairs=True)
        if self._is_skinny(x) and not wide:
            self._skinny_normed("skinny_swiglu", x, norm_weight, eps, weight, bias, out)
        elif 0 < num_rows <= MAX_ROWS and not wide:
            self._gemv(
                "norm_swiglu_rows", num_rows, width, x.shape[1], x, norm_weight, _f32(eps),
                weight, bias, out, pairs=True,
            )  # fmt: skip
        elif num_rows:
            normed = self._workspace("normed", *x.shape)
            self._norm_rows(x, None, norm_weight, eps, normed)
            if wide:
                self._wide("wide_swiglu", normed, weight, bias, out)
                return
            if self._is_tall(normed, bias, out):
                self._tall(normed, weight, out)
                return
            gate_up = self._workspace("gate_up", num_rows, 2 * width)
            self._product_with_bias(normed, weight, bias, gate_up)
            self._launch(
                "activation.cu", "swiglu_rows", shapes.swiglu_rows(num_rows, width),
                gate_up, None, out, _i32(width), **self._types,
            )  # fmt: skip

    def lm_head(self, x, rows, norm_weight, eps, weight, out) -> None:
        num_rows = len(rows)
        if isinstance(weight, PackedMatrix):
            if self._multiplies_codes(1):  # of any number: rows that are sampled are few
                self._quantized_logits(x, rows, norm_weight, eps, weight, out)
                return
            weight = self._unpacked(weight)
        dtype = self._head_dtype
        wide = self._is_wide(x[:num_rows], out, dtype=dtype)
        skinny = not wide and self._is_skinny(x[:num_rows], dtype)
        if 0 < num_rows <= MAX_ROWS and not wide and not skinny:
            self._gemv(
                "lm_head_rows", num_rows, *weight.shape, x, rows, norm_weight, _f32(eps), weight,
                out, dtype=dtype,
            )  # fmt: skip
        elif num_rows:
            normed = self._workspace("head_rows", num_rows, x.shape[1])
            self._norm_rows(x, rows, norm_weight, eps, normed, dtype)
            if skinny:
                plan = self._skinny_plan(normed, out)
                self._skinny("skinny_logits", plan, normed, weight, out, dtype=dtype)
            elif wide:
                self._wide("wide_logits", normed, weight, out)
            else:
                self._matmul(normed, weight, out, 0.0)

    # ----------------------------------------------------------------- their parts

    def _gemv(
        self, entry: str, rows: int, num_outputs: int, num_inputs: int, *args: Any,
        pairs: bool = False, dtype: str | None = None,
    ) -> None:  # fmt: skip
        """A product of `rows` tokens, few, with all that is folded into it. dtype: of the weights,
        if not the storage type."""
        tuning = self._gemv_tuning
        dtype = dtype or self._sizes.dtype
        plan: GemvLaunch = plan_gemv(
            num_outputs, num_inputs, rows, self._traits.num_multiprocessors,
            weight_bytes=ITEMSIZES[dtype], norm=entry != "linear_add_rows", pairs=pairs,
            tuning=tuning, max_shared_bytes=self._traits.max_shared_bytes,
        )  # fmt: skip
        macros = self._types_of(dtype, wide=True) | tuning.macros(rows)
        self._launch(
            "gemv.cu", entry, LaunchShape(plan.grid, plan.block, plan.shared_bytes),
            *args, _i32(num_outputs), _i32(num_inputs), _i32(plan.k_tile), _i32(plan.k_splits),
            **macros,
        )  # fmt: skip

    def _is_skinny(self, x: Array, dtype: str | None = None) -> bool:
        return uses_skinny(
            *x.shape, ITEMSIZES[dtype or self._sizes.dtype], self._traits.compute_capability,
            force_plain=self._traits.force_plain, tuning=self._skinny_tuning,
        )  # fmt: skip

    def _skinny_plan(self, x: Array, out: Array, **how: bool) -> SkinnyLaunch:
        (num_rows, num_inputs), num_outputs = x.shape, out.shape[1]
        return plan_skinny(
            num_outputs, num_inputs, num_rows, self._traits.num_multiprocessors,
            clusters=self._traits.compute_capability >= (9, 0),
            max_shared_bytes=self._traits.max_shared_bytes, tuning=self._skinny_tuning, **how,
        )  # fmt: skip

    def _skinny_normed(
        self, entry: str, x: Array, norm_weight: Array, eps: float, weight: Array,
        bias: Array | None, out: Array,
    ) -> None:  # fmt: skip
        """A product of rms_norm(x), which it computes itself where it can."""
        same = self._sizes.residual_dtype == self._sizes.dtype
        plan = self._skinny_plan(x, out, norm=same, pairs=entry == "skinny_swiglu")
        if not plan.folds_norm:
            normed = self._workspace("normed", *x.shape)
            self._norm_rows(x, None, norm_weight, eps, normed)
            x = normed
        self._skinny(entry, plan, x, norm_weight, _f32(eps), weight, bias, out)

    def _skinny(
        self, entry: str, plan: SkinnyLaunch, x: Array, *args: Any, dtype: str | None = None
    ) -> None:
        """A product of x with what follows it folded in; args end with the array of results. dtype:
        of x and the weights, if not the storage type."""
        (num_rows, num_inputs), num_outputs = x.shape, args[-1].shape[1]
        # The residual's type matters to one of them; the others share a module where they can.
        types = self._types_of(dtype or self._sizes.dtype, wide=entry == "skinny_linear_add")
        self._launch(
            SKINNY, entry, LaunchShape(plan.grid, plan.block, plan.shared_bytes, plan.cluster),
            x, *args, _i32(num_rows), _i32(num_outputs), _i32(num_inputs), **types, **plan.macros,
        )  # fmt: skip

    def _is_wide(
        self, x: Array, out: Array, *, pairs: bool = False, dtype: str | None = None
    ) -> bool:
        """pairs: of gate and up; dtype: of x and the weights, if not the storage type."""
        (num_rows, num_inputs), num_outputs = x.shape, out.shape[1]
        if dtype not in (None, self._sizes.dtype):
            return False
        return uses_wide(
            num_rows, num_outputs, num_inputs, ITEMSIZES[self._sizes.dtype], pairs=pairs,
            wgmma=self._traits.wgmma and not self._traits.force_plain, tuning=self._wide_tuning,
        )  # fmt: skip

    def _wide(self, entry: str, x: Array, weight: Array, *args: Any) -> None:
        """As `_skinny`, by warpgroups; x and the weights go as tensor maps."""
        (num_rows, num_inputs), num_outputs = x.shape, args[-1].shape[1]
        plan = _plan_wide(
            num_outputs, num_inputs, num_rows, self._traits.num_multiprocessors,
            pairs=entry == "wide_swiglu", max_shared_bytes=self._traits.max_shared_bytes,
            tuning=self._wide_tuning,
        )  # fmt: skip
        maps = self._maps.matrix(x, plan.input_box), self._maps.matrix(weight, plan.weight_box)
        numbers = num_rows, num_outputs, num_inputs, plan.weight_stages, plan.input_stages
        types = self._row_types if entry == "wide_linear_add" else self._types
        self._launch(
            WIDE, entry, LaunchShape(plan.grid, plan.block, plan.shared_bytes, plan.cluster),
            *maps, *args, *map(_i32, numbers), **types, **plan.macros,
        )  # fmt: skip

    def _is_tall(self, x: Array, bias: Array | None, out: Array) -> bool:
        (num_rows, num_inputs), num_outputs = x.shape, out.shape[1]
        return uses_tall(
            num_rows, num_outputs, num_inputs, ITEMSIZES[self._sizes.dtype], bias=bias is not None,
            wgmma=self._traits.wgmma and not self._traits.force_plain, tuning=self._tall_tuning,
        )  # fmt: skip

    def _tall(self, x: Array, weight: Array, out: Array) -> None:
        (num_rows, num_inputs), num_outputs = x.shape, out.shape[1]
        plan = plan_tall(
            num_outputs, num_inputs, num_rows, self._traits.num_multiprocessors,
            max_shared_bytes=self._traits.max_shared_bytes, tuning=self._tall_tuning,
        )  # fmt: skip
        maps = self._maps.matrix(x, plan.input_box), self._maps.matrix(weight, plan.weight_box)
        self._launch(
            TALL, TALL_ENTRY, LaunchShape(plan.grid, plan.block, plan.shared_bytes, plan.cluster),
            *maps, out, *map(_i32, (num_rows, num_outputs, num_inputs, plan.group)),
            **self._types, **plan.macros,
        )  # fmt: skip

    def _product_with_bias(self, x: Array, weight: Array, bias: Array | None, out: Array) -> None:
        """out = x @ weight.T + bias, rounded once: the product is added to the bias."""
        if bias is not None:
            shape = shapes.add_rows(*out.shape)
            self._launch(
                "activation.cu", "fill_bias_rows", shape, bias, out, _i32(out.shape[1]),
                **self._types,
            )  # fmt: skip
        self._matmul(x, weight, out, 0.0 if bias is None else 1.0)
