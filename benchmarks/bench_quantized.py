"""Products with quantised weights: µs and GB/s by matrix, kind and batch, beside the read rate.

    python -m benchmarks.bench_quantized [--kind int4] [--rows 1,8,32] [--shape NAME] [--record]
    python -m benchmarks.bench_quantized --variants [--stream] [--kind int4] [--rows 1]
        [--shape NAME]

Every time is of a captured graph of many launches, whose matrices take turns over more memory than
L2 holds. Every build is checked against float64 on sampled outputs before it is timed. Bytes are
the packed matrix's alone, scales included.

Up to 8 tokens: "overlap" is where each launch may start before the one in front has ended, as in a
step. Beside them stand a plain streaming read of as many bytes, and the product of the same matrix
in 16 bits, overlapped too. The norm is folded in where the plan does so; else it is not part of the
time. From 9 tokens on, or from 1 with --batches: quantized_batches.py, ops with their norms, and
whole layers.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.gemv_device import (
    CODES,
    EPS,
    MODELS,
    POOL_BYTES,
    ROTATED_BYTES,
    TOLERANCES,
    Bench,
    Product,
    products_of,
)
from benchmarks.quantized_batches import (
    BUILDS,
    STREAM_VARIANTS,
    Build,
    batch_file,
    builds_of,
    tables,
)
from benchmarks.quantized_batches import VARIANTS as BATCH_VARIANTS
from benchmarks.records import write_record
from nanocupy.ops.launch_gemv import DEFAULT_TUNING as GEMV_TUNING
from nanocupy.ops.launch_quantized import (
    DEFAULT_TUNING,
    FILE,
    KIND_CODES,
    MAX_TOKENS,
    PACK_FILE,
    PackedFormat,
    QuantizedLaunch,
    QuantizedTuning,
    packed_format,
    plan_quantized,
)
from nanocupy.ops.launch_quantized_stream import FILE as STREAM_FILE
from nanocupy.ops.launch_quantized_stream import MIN_ROWS, part_rows, plan_stream, stream_rows
from nanocupy.ops.launch_quantized_wide import FILE as WIDE_FILE
from nanocupy.ops.launch_quantized_wide import plan_wide_codes
from nanocupy.ops.numpy_ops import NumpyOps
from nanocupy.ops.packed_matrix import random_scales, unit_of_largest

ENTRIES = {
    "norm_linear": "quantized_linear",
    "linear_add": "quantized_linear_add",
    "norm_swiglu": "quantized_swiglu",
    "lm_head": "quantized_logits",
}
VARIANTS: dict[str, QuantizedTuning] = {
    "default": DEFAULT_TUNING,
    "strips 1": replace(DEFAULT_TUNING, strips=1),
    "strips 2": replace(DEFAULT_TUNING, strips=2),
    "ring 40": replace(DEFAULT_TUNING, ring_kb=40),
    "ring 86": replace(DEFAULT_TUNING, ring_kb=86, shared_kb=113),
    "alone": replace(DEFAULT_TUNING, ring_kb=136, shared_kb=227, resident_blocks=1),
    "blocks 1": replace(DEFAULT_TUNING, resident_blocks=1),
    "tile 1": replace(DEFAULT_TUNING, tile_segments=1, fold_norm=False),
    "no norm": replace(DEFAULT_TUNING, fold_norm=False),
}
GROUPS = {"int4": 128, "int8": 128, "fp8": None}


@dataclass(frozen=True)
class Matrices:
    """Packed matrices that take turns, all cut from the pool."""

    format: PackedFormat
    unit: float
    packed: list[Any]

    @property
    def num_bytes(self) -> int:
        return self.packed[0].nbytes


class QuantizedBench(Bench):
    """The device, with packed matrices of random codes."""

    def format(self, product: Product, kind: str) -> PackedFormat:
        form = packed_format(kind, product.inputs, GROUPS[kind] or product.inputs)
        if form is None:
            raise SystemExit(f"{product.label}: groups of {GROUPS[kind]} do not fit")
        return form

    def packed_bytes(self, product: Product, kind: str) -> int:
        form = self.format(product, kind)
        return math.prod(form.packed_shape(product.weight_rows, product.inputs, product.pairs))

    def packed_matrices(
        self, product: Product, kind: str, num_bytes: int = ROTATED_BYTES
    ) -> Matrices:
        """As many as have num_bytes, or half as many as the pool."""
        form = self.format(product, kind)
        shape = form.packed_shape(product.weight_rows, product.inputs, product.pairs)
        size = shape[0] * shape[1]
        count = max(1, min(POOL_BYTES // 2 // size, -(-num_bytes // size)))
        whole = self.cupy.empty((count, *shape), np.uint8)
        scale, offset = random_scales(kind, product.inputs**-0.5)
        unit = unit_of_largest(max(abs(scale), abs(offset))) if kind == "int4" else 1.0
        if kind == "int4":
            pair = (np.array([scale, offset], np.float32) / np.float32(unit)).astype(np.float16)
            word = pair.view(np.uint32)[0]
        else:
            word = np.array([scale], np.float32).view(np.uint32)[0]
        fill = self.loader.get(PACK_FILE, "fill_quantized", SCALAR=2, **form.macros)
        fill.launch((2048,), (256,), [whole, np.int64(whole.size // 16), word, np.uint64(1)])
        self.cupy.cuda.Device().synchronize()
        return Matrices(form, unit, list(whole))

    def batch_plan(
        self, product: Product, kind: str, rows: int, build: Build
    ) -> tuple[str, dict[str, int]] | None:
        """The file and macros of the launches of a batch; None: those of up to 8 tokens. Raises
        ValueError where there is no such build."""
        form = self.format(product, kind)
        wgmma = self.loader.arch == "sm_90a"
        file = batch_file(form, self.dtype.name, rows, build, wgmma=wgmma)
        num_multiprocessors = self.loader.num_multiprocessors
        most_bytes = self.loader.max_shared_bytes
        if file == WIDE_FILE:
            wide = plan_wide_codes(
                form, product.outputs, product.inputs, rows, num_multiprocessors,
                pairs=product.pairs, max_shared_bytes=most_bytes, tuning=build.wide,
            )  # fmt: skip
            return file, wide.macros
        if file != STREAM_FILE:
            return None
        clusters = self.loader.compute_capability >= (9, 0)
        most = stream_rows(
            form, product.inputs, clusters=clusters, max_shared_bytes=most_bytes,
            tuning=build.stream,
        )  # fmt: skip
        stream = plan_stream(
            form, product.outputs, product.inputs, part_rows(rows, most) if most else rows,
            num_multiprocessors, pairs=product.pairs, clusters=clusters,
            max_shared_bytes=most_bytes, tuning=build.stream,
        )  # fmt: skip
        return file, stream.macros

    def plan(self, product: Product, form: PackedFormat, rows: int, tuning: QuantizedTuning):
        return plan_quantized(
            form, product.outputs, product.inputs, rows, self.loader.num_multiprocessors,
            pairs=product.pairs, norm=product.op != "linear_add",
            max_shared_bytes=self.loader.max_shared_bytes, tuning=tuning,
        )  # fmt: skip

    def quantized_us(
        self,
        product: Product,
        matrices: Matrices,
        rows: int,
        tuning: QuantizedTuning,
        *,
        overlap: bool,
    ) -> list[float]:
        """Raises RuntimeError where the result is wrong."""
        from nanocupy.cuda.driver import LaunchOptions

        cupy, dtype = self.cupy, self.dtype
        plan: QuantizedLaunch = self.plan(product, matrices.format, rows, tuning)
        kernel = self.loader.get(FILE, ENTRIES[product.op], SCALAR=CODES[dtype.name], **plan.macros)
        # Small inputs for the sum that goes on over all launches.
        scale = 1e-2 if product.op == "linear_add" else 1.0
        x = (self.rng.standard_normal((rows, product.inputs)) * scale).astype(dtype)
        norm_weight = self.rng.uniform(0.5, 1.5, product.inputs).astype(dtype)
        out_dtype = np.dtype(np.float32) if product.op == "lm_head" else dtype
        before = np.full((rows, product.outputs), np.nan).astype(out_dtype)
        if product.op == "linear_add":
            before = (self.rng.standard_normal(before.shape) * 1e-2).astype(dtype)
        source = x
        if product.op != "linear_add" and not plan.folds_norm:
            source = NumpyOps(np.float64)._rms_norm(x, norm_weight, EPS).astype(dtype)
        device_x, device_norm, out = (cupy.asarray(a) for a in (source, norm_weight, before))
        sizes = (rows, product.outputs, product.inputs, plan.tile_segments, plan.round_strips)
        numbers = [np.int32(size) for size in sizes]
        options = LaunchOptions(overlap_previous=overlap)

        def prepare(packed: Any) -> Any:
            norm = device_norm, np.float32(EPS)
            weight = packed, np.float32(matrices.unit)
            args = {
                "norm_linear": (device_x, *norm, *weight, None, out),
                "norm_swiglu": (device_x, *norm, *weight, None, out),
                "linear_add": (device_x, *weight, None, out),
                "lm_head": (device_x, None, *norm, *weight, out),
            }[product.op]
            return kernel.prepare(
                plan.grid, (plan.block,), [*args, *numbers], plan.shared_bytes, options
            )

        launches = [prepare(packed) for packed in matrices.packed]
        cupy.cuda.Device().synchronize()
        kernel.start(launches[0], self.stream)
        self.stream.synchronize()
        self.check_quantized(product, x, norm_weight, before, matrices, out.get())

        def start(i: int) -> None:
            kernel.start(launches[i % len(launches)], self.stream)

        return self.microseconds(start, 2 + matrices.num_bytes / 3e6)

    def check_quantized(
        self, product: Product, x: Any, norm_weight: Any, before: Any, matrices: Matrices, got: Any
    ) -> None:
        """Sampled outputs against the reference in float64; all must have been written."""
        if np.isnan(got.astype(np.float32)).any():
            raise RuntimeError(f"{product.label}: NaN, or outputs that were never written")
        form, shape = matrices.format, (product.weight_rows, product.inputs)
        floats = self.cupy.empty(shape, np.float32)
        chunks = matrices.num_bytes // form.chunk_bytes
        unpack = self.loader.get(PACK_FILE, "dequantize_rows", SCALAR=0, **form.macros)
        numbers = map(np.int32, (*shape, product.pairs))
        args = [matrices.packed[0], None, floats, np.float32(matrices.unit), *numbers]
        unpack.launch((-(-chunks // 8),), (256,), args)
        self.cupy.cuda.Device().synchronize()
        last = product.outputs - 1
        index = np.unique([0, 1, last - 1, last, *self.rng.integers(0, last, 60)])
        rows = np.concatenate([index, product.outputs + index]) if product.pairs else index
        part = floats[self.cupy.asarray(rows)].get()
        del floats
        reference = NumpyOps(np.float64)
        wanted = before[:, index].astype(np.float64)
        if product.op == "linear_add":
            reference.linear_add(x, part, None, wanted)
        elif product.op == "lm_head":
            chosen = np.arange(len(x), dtype=np.int32)
            reference.lm_head(x, chosen, norm_weight, EPS, part, wanted)
        else:
            rounded = before[:, index].copy()
            getattr(reference, product.op)(x, norm_weight, EPS, part, None, rounded)
            wanted = rounded.astype(np.float64)
        rms = np.sqrt(np.mean(wanted**2, axis=1, keepdims=True))
        error = abs(got[:, index].astype(np.float64) - wanted) / (abs(wanted) + rms)
        if not error.max() <= TOLERANCES[self.dtype.name]:
            raise RuntimeError(f"{product.label}: error {error.max():.3g}")

    def floats_us(self, product: Product, rows: int) -> float:
        """The same product of 16-bit weights."""
        if rows <= 8:
            return statistics.median(self.ours_us(product, rows, GEMV_TUNING, overlap=True))
        return self.cublas_us(product, rows)


def prefetch(
    bench: QuantizedBench,
    products: list[Product],
    kinds: list[str],
    rows_list: list[int],
    tunings: Iterable[QuantizedTuning],
) -> None:
    """Compile and load every build, at once."""
    code, builds = CODES[bench.dtype.name], {}
    for kind in kinds:
        for product in products:
            form = bench.format(product, kind)
            for rows in rows_list:
                for tuning in tunings:
                    macros = {"SCALAR": code, **bench.plan(product, form, rows, tuning).macros}
                    builds[tuple(sorted(macros.items()))] = (FILE, macros)
    bench.loader.prefetch(list(builds.values()))


def main_table(
    bench: QuantizedBench, products: list[Product], kinds: list[str], rows_list: list[int],
    record: bool,
) -> None:  # fmt: skip
    ceiling = bench.pool.nbytes / bench.read_us(bench.pool.nbytes) / 1e3
    print(f"{bench.name}, {bench.dtype.name}")
    print(f"streaming read of {POOL_BYTES >> 20} MB: {ceiling:.0f} GB/s")
    print(
        f"{'kind':5s} {'m':>2s} {'weights':26s} {'MB':>7s} {'us':>8s} {'overlap':>8s} {'GB/s':>6s}"
        f" {'share':>6s} {'read us':>8s} {'16-bit':>8s}"
    )
    for rows in rows_list:
        for product in products:
            floats = bench.floats_us(product, rows)
            for kind in kinds:
                matrices = bench.packed_matrices(product, kind)
                times, overlapped = (
                    bench.quantized_us(product, matrices, rows, DEFAULT_TUNING, overlap=overlap)
                    for overlap in (False, True)
                )
                num_bytes = matrices.num_bytes
                read = bench.read_us(num_bytes)
                us, overlap_us = statistics.median(times), statistics.median(overlapped)
                rate = num_bytes / overlap_us / 1e3
                print(
                    f"{kind:5s} {rows:2d} {product.label:26s} {num_bytes / 1e6:7.1f} {us:8.2f}"
                    f" {overlap_us:8.2f} {rate:6.0f} {rate / ceiling:6.1%} {read:8.2f}"
                    f" {floats:8.2f}",
                    flush=True,
                )
                if record:
                    name = f"quantized/{product.weight_rows}x{product.inputs}/{kind}"
                    write_record(
                        "quantized", name if rows == 1 else f"{name}/m{rows}",
                        [num_bytes / t / 1e3 for t in overlapped], "GB/s", device=bench.name,
                        dtype=bench.dtype.name, bytes=num_bytes,
                        flops=2 * rows * product.weight_rows * product.inputs,
                        ceiling=round(ceiling, 1), share=round(rate / ceiling, 4),
                        peer="16-bit weights, us", peer_value=round(floats, 2), op=product.op,
                        us=round(overlap_us, 2), alone_us=round(us, 2),
                        read_of_as_many_bytes=round(num_bytes / read / 1e3, 1),
                    )  # fmt: skip
                del matrices


def variants_table(
    bench: QuantizedBench, products: list[Product], kinds: list[str], rows_list: list[int]
) -> None:
    """µs of overlapped launches, products down and variants across; * marks a line's best."""
    for rows in rows_list:
        for kind in kinds:
            print(f"{kind}, m = {rows}, us")
            print(f"{'':26s}" + "".join(f"{name:>11s}" for name in VARIANTS))
            for product in products:
                matrices = bench.packed_matrices(product, kind)
                times = [
                    statistics.median(
                        bench.quantized_us(product, matrices, rows, tuning, overlap=True)
                    )
                    for tuning in VARIANTS.values()
                ]
                best = min(times)
                shown = "".join(f"{t:10.2f}{'*' if t == best else ' '}" for t in times)
                print(f"{product.label:26s}{shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="append to benchmarks/records")
    parser.add_argument("--variants", action="store_true", help="times of other builds instead")
    parser.add_argument(
        "--stream", action="store_true", help="of quantized_stream.cu, from 9 tokens on"
    )
    parser.add_argument("--kind", action="append", choices=sorted(KIND_CODES))
    parser.add_argument("--rows", default="", help="batch sizes, 1 to 64 (1,8,32)")
    parser.add_argument("--shape", action="append", choices=sorted(MODELS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--batches", action="store_true", help="from 1 token on, what is from 9")
    parser.add_argument("--head", action="store_true", help="the LM head's matrix too")
    args = parser.parse_args()
    text = args.rows or ("1" if args.variants else "1,8,32")
    rows_list = [int(part) for part in text.split(",")]
    kinds = args.kind or ["int4", "int8", "fp8"]
    models = args.shape or ["llama-3.1-8b", "qwen3-0.6b"]
    products: list[Product] = []
    for model in models:
        products += [p for p in products_of(model) if p not in products]
    products = [p for p in products if args.head or p.op != "lm_head"]
    bench = QuantizedBench(args.dtype)
    few = [rows for rows in rows_list if rows < MIN_ROWS and not args.batches]
    many = [rows for rows in rows_list if rows not in few]
    tunings = list(VARIANTS.values()) if args.variants else [DEFAULT_TUNING]
    prefetch(bench, products, kinds, [min(rows, MAX_TOKENS) for rows in rows_list], tunings)
    if few and args.variants:
        variants_table(bench, products, kinds, few)
    elif few:
        main_table(bench, products, kinds, few, args.record)
    if many:
        variants = STREAM_VARIANTS if args.stream else BATCH_VARIANTS
        builds = variants if args.variants else BUILDS
        bench.loader.prefetch(builds_of(bench, models, kinds, many, list(builds.values())))
        tables(
            bench, models, kinds, many, head=args.head, record=args.record,
            variants=variants if args.variants else None,
        )  # fmt: skip


if __name__ == "__main__":
    main()
