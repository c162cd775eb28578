"""Runs products of batches with packed codes, by any kernels: launch, arguments, and what must
come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanocupy.ops.launch_quantized import packed_format
from nanocupy.ops.numpy_ops import NumpyOps
from tests.kernels.backends import CODES, TOLERANCES, Mapped, assert_close
from tests.kernels.gemv_runs import Run
from tests.kernels.quantized_runs import NUM_MULTIPROCESSORS, pack
from tests.kernels.skinny_runs import normed_input
from tests.ops.cases import Call


@dataclass(frozen=True)
class BatchKernels:
    """A file's entries by op, what plans their launches, and a tuning for small cases. maps_inputs:
    they come as a tensor map."""

    file: str
    entries: Mapping[str, str]
    plan: Callable[..., Any]
    small: Any
    maps_inputs: bool = False

    def launch_op(
        self,
        run: Run,
        op: str,
        arguments: dict[str, Any],
        dtype: str,
        *,
        tuning: Any = None,
        num_multiprocessors: int = NUM_MULTIPROCESSORS,
        packed: tuple[np.ndarray, float] | None = None,
        **macros: int,
    ) -> None:
        """Run the kernel of `op`; `macros` go to the build. packed: of the weight, where known."""
        weight = arguments["weight"]
        pairs = op == "norm_swiglu"
        target = arguments["residual" if op == "linear_add" else "out"]
        rows, num_outputs = target.shape
        num_inputs = weight.shape[1]
        form = packed_format(weight.kind, num_inputs, weight.group_size)
        assert form is not None
        plan = self.plan(
            form, num_outputs, num_inputs, rows, num_multiprocessors, pairs=pairs,
            tuning=tuning or self.small,
        )  # fmt: skip
        codes, unit = packed or pack(run, weight, pairs, dtype)
        storage = arguments["x" if op == "linear_add" else "norm_weight"].dtype
        x = arguments["x"]
        if op != "linear_add":
            norm = {name: arguments[name] for name in ("norm_weight", "eps")}
            rows_of = {"rows": arguments["rows"]} if "rows" in arguments else {}
            x = normed_input({"x": x, "weight": arguments["norm_weight"], **norm, **rows_of})
        inputs = Mapped(x, plan.input_box) if self.maps_inputs else x
        args: list[Any] = [inputs, codes, np.float32(unit)]
        args += [] if op == "lm_head" else [arguments["bias"]]
        args += [target, *map(np.int32, (rows, num_outputs, num_inputs))]
        built = {"SCALAR": CODES[storage.name], **plan.macros, **macros}
        if op == "linear_add" and target.dtype != storage:
            built["RESIDUAL"] = CODES[target.dtype.name]
        run(self.file, self.entries[op], plan, args, (len(args) - 4,), **built)

    def check_op(self, run: Run, op: str, call: Call, dtype: str, **how: Any) -> np.ndarray:
        """Launch and compare with the reference in float64; returns what the kernel gave."""
        (name,) = call.written
        before = call.arguments[name]
        got = {**call.arguments, name: before.copy()}
        exact = op in ("linear_add", "lm_head")  # the output's dtype rounds nothing inside
        wanted = {**call.arguments, name: before.astype(np.float64) if exact else before.copy()}
        self.launch_op(run, op, got, dtype, **how)
        getattr(NumpyOps(np.float64), op)(**wanted)
        limit = TOLERANCES[dtype] if op == "lm_head" else None
        assert_close(got[name], wanted[name], op, tolerance=limit)
        return got[name]
