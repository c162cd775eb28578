"""Batches of 9 to 64 tokens with packed codes: ops and layers, beside the same in 16 bits.

Owns two tables of bench_quantized. Each column is the op as it runs in a step, its norm included:
launches of a captured graph that may each start before the one before has ended. "16 bits" is the
best of skinny.cu, of wide.cu and of a norm, cuBLAS and what follows; "before" are the kernels of up
to 8 tokens, "stream" those of quantized_stream.cu; both take 32 a launch. "wgmma" are the products
of warpgroups, quantized_wide.cu, and "now" is what a step takes. Then the four products of a layer
and their norms in a row, each reading what the one before wrote; "best" has each product's best
build of the first table. Matrices take turns over more than L2 holds. Every build is checked
against float64 on sampled outputs, and a layer's overlapped launches against single ones, bit by
bit.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.bench_skinny import builds_of as skinny_builds
from benchmarks.bench_wide import builds_of as wide_builds
from benchmarks.gemv_device import CODES, EPS, MODELS, ROTATED_BYTES, Product, products_of
from benchmarks.gemv_layers import Layers
from benchmarks.records import write_record
from nanocupy.errors import CudaError
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import DeviceTraits, OpSizes, workspace_plan
from nanocupy.ops.launch_quantized_stream import (
    DEFAULT_TUNING,
    FILE,
    MAX_BATCH,
    StreamTuning,
    uses_stream,
)
from nanocupy.ops.launch_quantized_wide import DEFAULT_TUNING as DEFAULT_WIDE
from nanocupy.ops.launch_quantized_wide import FILE as WIDE_FILE
from nanocupy.ops.launch_quantized_wide import NEVER as NEVER_WIDE
from nanocupy.ops.launch_quantized_wide import WideCodesTuning, uses_wide_codes
from nanocupy.ops.launch_skinny import SkinnyTuning
from nanocupy.ops.launch_wide import ALWAYS as ALWAYS_FLOATS
from nanocupy.ops.launch_wide import NEVER as NEVER_FLOATS
from nanocupy.ops.packed_matrix import PackedMatrix

if TYPE_CHECKING:
    from benchmarks.bench_quantized import QuantizedBench
    from nanocupy.ops.launch_quantized import PackedFormat


@dataclass(frozen=True)
class Build:
    """Which kernels multiply codes, and how they are launched."""

    stream: StreamTuning = DEFAULT_TUNING
    wide: WideCodesTuning = NEVER_WIDE


STREAM = replace(DEFAULT_TUNING, min_rows=1)  # for few tokens too
WGMMA = replace(DEFAULT_WIDE, min_rows=1)
NOW = Build(wide=DEFAULT_WIDE)
BUILDS = {
    "before": Build(StreamTuning(min_rows=MAX_BATCH + 1)),
    "stream": Build(STREAM),
    "wgmma": Build(wide=WGMMA),
    "now": NOW,
}
STREAM_VARIANTS = {
    "stream": Build(STREAM),
    "split 1": Build(replace(STREAM, splits=1)),
    "split 2": Build(replace(STREAM, splits=2)),
    "split 4": Build(replace(STREAM, splits=4)),
    "split 8": Build(replace(STREAM, splits=8)),
    "by 1 K": Build(replace(STREAM, warps_k=1)),
    "by 2 K": Build(replace(STREAM, warps_k=2)),
    "4 by 2 K": Build(replace(STREAM, splits=4, warps_k=2)),
    "8 warps": Build(replace(STREAM, warps=8)),
    "12 warps": Build(replace(STREAM, warps=12)),
    "strips 1": Build(replace(STREAM, strips=1)),
    "strips 2": Build(replace(STREAM, strips=2)),
    "stages 2": Build(replace(STREAM, stages=2)),
    "stages 4": Build(replace(STREAM, stages=4)),
    "alone": Build(replace(STREAM, shared_kb=0)),
}


def _wgmma(**changes: int) -> Build:
    return Build(wide=replace(WGMMA, **changes))


# tile / warpgroups / splits
VARIANTS = {
    "wgmma": _wgmma(),
    "split 1": _wgmma(splits=1),
    "split 2": _wgmma(splits=2),
    "split 4": _wgmma(splits=4),
    "split 8": _wgmma(splits=8),
    "1 group": _wgmma(warpgroups=1),
    "2 groups": _wgmma(warpgroups=2),
    "3 groups": _wgmma(warpgroups=3),
    "tile 64": _wgmma(out_tile=64),
    "tile 128": _wgmma(out_tile=128),
    "tile 192": _wgmma(out_tile=192),
    "tile 256": _wgmma(out_tile=256),
    "stages 3": _wgmma(stages=3),
    "stages 4": _wgmma(stages=4),
    "inputs 4": _wgmma(input_stages=4),
    "inputs 5": _wgmma(input_stages=5),
    "192/3/4": _wgmma(out_tile=192, warpgroups=3, splits=4),
    "256/4/4": _wgmma(out_tile=256, warpgroups=4, splits=4),
    "256/4/8": _wgmma(out_tile=256, warpgroups=4, splits=8),
    "256/4/1": _wgmma(out_tile=256, warpgroups=4, splits=1),
    "384/3/2": _wgmma(out_tile=384, warpgroups=3, splits=2),
}
NOT_WIDE = {"wide_tuning": NEVER_FLOATS}
FLOATS = (
    {"skinny_tuning": SkinnyTuning(max_rows=64), **NOT_WIDE},
    {"skinny_tuning": SkinnyTuning(max_rows=0), **NOT_WIDE},
    {"wide_tuning": ALWAYS_FLOATS},
)
NUM_LAYERS = 4  # of packed matrices: more than L2 holds


class Batches:
    """The device, and the ops for one batch of one model."""

    def __init__(self, bench: QuantizedBench, model: str, rows: int) -> None:
        self.bench, self.model, self.rows = bench, model, rows
        loader, cupy, dtype = bench.loader, bench.cupy, bench.dtype
        traits = DeviceTraits(
            loader.compute_capability, loader.num_multiprocessors, loader.max_shared_bytes,
            wgmma=loader.arch == "sm_90a",
        )  # fmt: skip
        hidden, queries, keys, ffn, vocab = MODELS[model]
        sizes = OpSizes(
            max_tokens=rows, max_num_seqs=rows, max_rows=rows, max_context=4096,
            hidden_size=hidden, intermediate_size=ffn, vocab_size=vocab, num_heads=queries // 64,
            num_kv_heads=keys // 64, head_size=64, dtype=dtype.name, residual_dtype=dtype.name,
            cache_dtype=dtype.name,
        )  # fmt: skip
        spaces = {
            name: cupy.zeros(shape, dtype if kind == dtype.name else np.dtype(kind))
            for name, (shape, kind) in workspace_plan(sizes, traits).items()
        }

        def ops(build: Build = NOW, **tunings: Any) -> CudaOps:
            return CudaOps(
                loader, bench.cublas.matmul, spaces, sizes, traits, stream_tuning=build.stream,
                wide_codes_tuning=build.wide, **tunings,
            )  # fmt: skip

        self.ops = ops
        self.chosen = cupy.arange(rows, dtype=np.int32)
        self.norm_host = bench.rng.uniform(0.5, 1.5, max(hidden, ffn)).astype(dtype)

    def start_op(
        self, ops: CudaOps, product: Product, x: Any, norm: Any, out: Any
    ) -> Callable[[Any], None]:
        """Runs the op with a matrix."""
        if product.op == "linear_add":
            return lambda weight: ops.linear_add(x, weight, None, out)
        if product.op == "lm_head":
            return lambda weight: ops.lm_head(x, self.chosen, norm, EPS, weight, out)
        run = getattr(ops, product.op)
        return lambda weight: run(x, norm, EPS, weight, None, out)

    def packed(self, product: Product, kind: str, num_bytes: int) -> tuple[Any, list[PackedMatrix]]:
        matrices = self.bench.packed_matrices(product, kind, num_bytes)
        shape = (product.weight_rows, product.inputs)
        return matrices, [
            PackedMatrix(packed, matrices.unit, matrices.format, shape, product.pairs)
            for packed in matrices.packed
        ]

    def op_us(
        self, product: Product, ops: CudaOps, weights: list[Any], check: Callable[..., None]
    ) -> float:
        """Of the op, checked first."""
        bench, cupy = self.bench, self.bench.cupy
        # Small where the result is added to, as the sum goes on over all launches.
        added = product.op == "linear_add"
        scale = 1e-2 if added else 1.0
        x_host = (bench.rng.standard_normal((self.rows, product.inputs)) * scale).astype(
            bench.dtype
        )
        before = np.full((self.rows, product.outputs), np.nan, np.float32)
        if added:
            before = bench.rng.standard_normal(before.shape) * scale
        if product.op != "lm_head":
            before = before.astype(bench.dtype)
        norm_host = self.norm_host[: product.inputs]
        x, norm, out = (cupy.asarray(array) for array in (x_host, norm_host, before))
        start = self.start_op(ops, product, x, norm, out)
        cupy.cuda.Device().synchronize()
        with bench.stream:
            start(weights[0])
        bench.stream.synchronize()
        check(product, x_host, norm_host, before, out.get())
        guess = 3 + weights[0].nbytes / 2e6
        return statistics.median(
            bench.microseconds(lambda i: start(weights[i % len(weights)]), guess)
        )

    def floats_op_us(self, product: Product) -> float:
        weights = self.bench.matrices(product)

        def check(product: Product, x: Any, norm: Any, before: Any, got: Any) -> None:
            self.bench.check(product, x, norm, before, weights[0], got)

        return min(self.op_us(product, self.ops(**how), weights, check) for how in FLOATS)

    def packed_op_us(self, product: Product, kind: str, builds: list[Build]) -> list[Any]:
        """Of each build, or why not."""
        matrices, weights = self.packed(product, kind, ROTATED_BYTES)

        def check(product: Product, x: Any, norm: Any, before: Any, got: Any) -> None:
            self.bench.check_quantized(product, x, norm, before, matrices, got)

        def one(build: Build) -> float:
            self.bench.batch_plan(product, kind, self.rows, build)  # or there is no such build
            return self.op_us(product, self.ops(build), weights, check)

        return [attempt(one, build) for build in builds]

    # --------------------------------------------------------------- layers

    def layer_us(self, ops: CudaOps | list[CudaOps], kind: str | None) -> float:
        """Of the four products of a layer and their norms; ops: of each; kind None: in 16 bits."""
        layers = Layers(self.bench, self.model, self.rows)
        if kind:
            products = [
                self.packed(p, kind, NUM_LAYERS * self.bench.packed_bytes(p, kind))[1]
                for p in layers.products
            ]
            layers.num_layers = min(map(len, products))
            layers.weights = [list(parts) for parts in zip(*products, strict=False)]
        starts = [
            self.start_op(own, product, source, layers.norm, target)
            for own, product, (source, target) in zip(
                ops if isinstance(ops, list) else [ops] * 4, layers.products, layers.buffers,
                strict=True,
            )
        ]  # fmt: skip

        def run() -> None:
            for weights in layers.weights:
                for start, weight in zip(starts, weights, strict=True):
                    start(weight)

        layers.reset()
        with self.bench.stream:
            run()  # loads what a capture must find
        graph = layers.capture(run)
        if kind:
            layers.check_overlap(run, graph)
        return layers.graph_us(graph)


def attempt(work: Callable[..., float], *args: Any) -> float | str:
    """What it gives, or the start of why not."""
    try:
        return work(*args)
    except ValueError:
        return "-"  # no such build
    except (CudaError, RuntimeError) as exc:
        return str(exc).splitlines()[0][:60]


def cell(value: float | str) -> str:
    return f"{value:9.2f}" if isinstance(value, float) else f" {value:>8s}"


def builds_of(
    bench: QuantizedBench, models: list[str], kinds: list[str], rows_list: list[int],
    builds: list[Build],
) -> list[tuple[str, dict[str, int]]]:  # fmt: skip
    """What must be compiled for these batches, but for the kernels before."""
    found = {}
    for kind in kinds:
        for product in (p for model in models for p in products_of(model)):
            for rows in rows_list:
                for build in builds:
                    try:
                        plan = bench.batch_plan(product, kind, rows, build)
                    except ValueError:
                        continue
                    if plan:
                        file, macros = plan
                        macros = {"SCALAR": CODES[bench.dtype.name], **macros}
                        found[file, tuple(sorted(macros.items()))] = (file, macros)
    card = bench.loader.num_multiprocessors, bench.loader.max_shared_bytes
    small = [(file, {"SCALAR": CODES[bench.dtype.name]}) for file in ("norm.cu", "activation.cu")]
    skinny = {"": FLOATS[0]["skinny_tuning"]}
    floats = [
        *skinny_builds(models, rows_list, skinny, card),
        *wide_builds(models, rows_list, {"": ALWAYS_FLOATS}, card),
    ]
    return [*found.values(), *floats, *small]


def batch_file(
    packed: PackedFormat, dtype: str, rows: int, build: Build, *, wgmma: bool
) -> str | None:
    """The file of kernels that a batch takes; None: those before."""
    if uses_wide_codes(packed, rows, dtype, wgmma=wgmma, tuning=build.wide):
        return WIDE_FILE
    return FILE if uses_stream(rows, packed.kind, build.stream) else None


def tables(
    bench: QuantizedBench, models: list[str], kinds: list[str], rows_list: list[int],
    *, head: bool, variants: dict[str, Build] | None, record: bool,
) -> None:  # fmt: skip
    """Print both tables, a line as soon as it is there."""
    builds = variants or BUILDS
    ceiling = bench.pool.nbytes / bench.read_us(bench.pool.nbytes) / 1e3
    print(f"{bench.name}, {bench.dtype.name}, streaming read {ceiling:.0f} GB/s; us with norms")
    for model in models:
        for rows in rows_list:
            batches = Batches(bench, model, rows)
            names = "".join(f"{name:>9s}" for name in ("read", "16 bits", *builds))
            print(f"{model}, {rows} tokens\n{'':32s}{names}")
            best: dict[str, list[Build]] = {kind: [] for kind in kinds}
            for number, product in enumerate(products_of(model)[: 5 if head else 4]):
                floats = attempt(batches.floats_op_us, product)
                for kind in kinds:
                    read = bench.packed_bytes(product, kind) / ceiling / 1e3
                    times = batches.packed_op_us(product, kind, list(builds.values()))
                    cells = "".join(map(cell, [read, floats, *times]))
                    print(f"{kind:5s} {product.label:26s}{cells}", flush=True)
                    timed = [(us, i) for i, us in enumerate(times) if isinstance(us, float)]
                    if timed and number < 4:
                        best[kind].append(list(builds.values())[min(timed)[1]])
            layer_lines(batches, kinds, builds, best, ceiling, record)


def layer_lines(
    batches: Batches,
    kinds: list[str],
    builds: dict[str, Build],
    best_builds: dict[str, list[Build]],
    ceiling: float,
    record: bool,
) -> None:
    """Of a layer, a line for each kind; best_builds: of each product; ceiling: of reads, GB/s."""
    bench, layer = batches.bench, products_of(batches.model)[:4]
    floats = [attempt(batches.layer_us, batches.ops(**how), None) for how in FLOATS]
    best = min((us for us in floats if isinstance(us, float)), default="-")
    for kind in kinds:
        num_bytes = sum(bench.packed_bytes(product, kind) for product in layer)
        read = num_bytes / ceiling / 1e3
        times = {
            name: attempt(batches.layer_us, batches.ops(build), kind)
            for name, build in builds.items()
        }
        cells = "".join(map(cell, [read, best, *times.values()]))
        chosen = [batches.ops(build) for build in best_builds[kind]]
        mixed = attempt(batches.layer_us, chosen, kind) if len(chosen) == 4 else "-"
        print(f"{kind:5s} {'a layer':26s}{cells}  best{cell(mixed)}", flush=True)
        now = times.get("now")
        if record and isinstance(now, float) and isinstance(best, float):
            write_record(
                "quantized", f"quantized-layer/{batches.model}/{kind}/m{batches.rows}", [now],
                "us", device=bench.name, dtype=bench.dtype.name, bytes=num_bytes,
                flops=2 * batches.rows * sum(p.weight_rows * p.inputs for p in layer),
                ceiling=round(read, 2), share=round(read / now, 4), peer="16-bit weights, us",
                peer_value=round(best, 2),
            )  # fmt: skip
