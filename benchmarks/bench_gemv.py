"""Small-batch products: GB/s of weights by matrix and batch, beside the read rate and cuBLAS.

    python -m benchmarks.bench_gemv [--record] [--variants] [--splits] [--rows 1,8] [--shape NAME]
    python -m benchmarks.bench_gemv --layer [--rows 1] [--shape NAME] [--only TEXT]

Every time is of a captured graph of many launches, whose matrices take turns over a pool of random
values of a gigabyte, so that none is in L2. Bytes are the weights' alone. Every build is checked
against float64 on sampled outputs before it is timed. The ceiling is a plain streaming read of the
pool in the same run, and beside it one of as many bytes as the matrix has; the peer is cuBLAS,
which does the product alone. `--variants` times other builds, `--splits` other shares of the
inputs, `--layer` the products of whole layers one after the other (benchmarks/gemv_layers.py).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable

from benchmarks.gemv_device import (
    CODES,
    FILE,
    MODELS,
    POOL_BYTES,
    Bench,
    Product,
    products_of,
)
from benchmarks.gemv_layers import layers_table
from benchmarks.records import write_record
from nanocupy.ops.launch_gemv import DEFAULT_TUNING, GemvTuning

VARIANTS = {
    "default": DEFAULT_TUNING,
    "tensor ahead 32": GemvTuning(tensor=True, l2_ahead_kb=32),
    "tensor ring 96": GemvTuning(tensor=True, ring_kb=96, resident_blocks=2, l2_ahead_kb=0),
    "lanes": GemvTuning(tensor=False, l2_ahead_kb=0),
    "lanes 4": GemvTuning(tensor=False, rows_per_warp=4, l2_ahead_kb=0),
    "lanes ring 96": GemvTuning(tensor=False, ring_kb=96, resident_blocks=2, l2_ahead_kb=0),
    "lanes 4 ring 96": GemvTuning(
        tensor=False, rows_per_warp=4, ring_kb=96, resident_blocks=2, l2_ahead_kb=0
    ),
    "ring 32": GemvTuning(ring_kb=32),
    "w16": GemvTuning(warps=16, resident_blocks=2),
}

# ------------------------------------------------------------------------------ tables


def main_table(bench: Bench, products: list[Product], rows_list: list[int], record: bool) -> None:
    ceiling = bench.pool.nbytes / bench.read_us(bench.pool.nbytes) / 1e3
    print(f"{bench.name}, {bench.dtype.name}")
    print(f"streaming read of {POOL_BYTES >> 20} MB: {ceiling:.0f} GB/s")
    print(
        f"{'m':>2s} {'weights':28s} {'MB':>7s} {'us':>8s} {'overlap':>8s} {'GB/s':>6s}"
        f" {'share':>6s} {'read us':>8s} {'cublas':>8s}"
    )
    for rows in rows_list:
        for product in products:
            num_bytes = product.weight_rows * product.inputs * bench.dtype.itemsize
            times = bench.ours_us(product, rows, DEFAULT_TUNING)
            overlapped = bench.ours_us(product, rows, DEFAULT_TUNING, overlap=True)
            read, peer = bench.read_us(num_bytes), bench.cublas_us(product, rows)
            us, overlap_us = statistics.median(times), statistics.median(overlapped)
            rate = num_bytes / us / 1e3
            print(
                f"{rows:2d} {product.label:28s} {num_bytes / 1e6:7.1f} {us:8.2f} {overlap_us:8.2f}"
                f" {rate:6.0f} {rate / ceiling:6.1%} {read:8.2f} {peer:8.2f}",
                flush=True,
            )
            if record:
                name = f"gemv/{product.weight_rows}x{product.inputs}/{bench.dtype.name}"
                write_record(
                    "gemv", name if rows == 1 else f"{name}/m{rows}",
                    [num_bytes / t / 1e3 for t in times], "GB/s", device=bench.name,
                    dtype=bench.dtype.name, bytes=num_bytes,
                    flops=2 * rows * product.weight_rows * product.inputs,
                    ceiling=round(ceiling, 1), share=round(rate / ceiling, 4), peer="cuBLAS",
                    peer_value=round(num_bytes / peer / 1e3, 1), op=product.op,
                    overlapped=round(num_bytes / overlap_us / 1e3, 1),
                    read_of_as_many_bytes=round(num_bytes / read / 1e3, 1),
                )  # fmt: skip


def matrix_of_times(
    title: str,
    names: list[str],
    products: list[Product],
    rows_list: list[int],
    time: Callable[[str, Product, int], float],
) -> None:
    """A table of µs, products down and `names` across; * marks a line's best."""
    for rows in rows_list:
        print(f"{title}, m = {rows}, us")
        print(f"{'':28s}" + "".join(f"{name:>11s}" for name in names))
        for product in products:
            times = [time(name, product, rows) for name in names]
            best = min(times)
            shown = "".join(f"{t:10.2f}{'*' if t == best else ' '}" for t in times)
            print(f"{product.label:28s}{shown}", flush=True)


def prefetch(bench: Bench, tunings: Iterable[GemvTuning], rows_list: list[int]) -> None:
    """Compile and load every build, at once."""
    code = CODES[bench.dtype.name]
    builds = [(FILE, {"SCALAR": code, **t.macros(rows)}) for t in tunings for rows in rows_list]
    bench.loader.prefetch(builds)


def variants_table(bench: Bench, products: list[Product], rows_list: list[int]) -> None:
    prefetch(bench, VARIANTS.values(), rows_list)
    for rows in rows_list:
        for name, tuning in VARIANTS.items():
            macros = {"SCALAR": CODES[bench.dtype.name], **tuning.macros(rows)}
            kernel = bench.loader.get(FILE, "norm_linear_rows", **macros)
            print(
                f"m {rows} {name:10s} {kernel.num_registers} registers, {kernel.local_bytes} local"
            )
    matrix_of_times(
        "builds, overlapped", list(VARIANTS), products, rows_list,
        lambda name, product, rows: statistics.median(
            bench.ours_us(product, rows, VARIANTS[name], overlap=True)
        ),
    )  # fmt: skip


def splits_table(bench: Bench, products: list[Product], rows_list: list[int]) -> None:
    splits = {"planned": None, **{f"{s} splits": s for s in (1, 2, 4, 8)}}
    small = [p for p in products if p.weight_rows * p.inputs < 64 << 20]
    matrix_of_times(
        "warps that share a unit", list(splits), small, rows_list,
        lambda name, product, rows: statistics.median(
            bench.ours_us(product, rows, DEFAULT_TUNING, overlap=True, k_splits=splits[name])
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append to benchmarks/records")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--splits", action="store_true")
    parser.add_argument("--layer", action="store_true", help="chains of a layer's products only")
    parser.add_argument("--only", default="", help="of --layer: variants whose name has this text")
    parser.add_argument("--rows", help="batch sizes, 1 to 8 (1,4,8; with --layer 1)")
    parser.add_argument("--shape", action="append", choices=sorted(MODELS))
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(CODES))
    args = parser.parse_args()
    text = args.rows or ("1" if args.layer else "1,4,8")
    rows_list = [int(part) for part in text.split(",")]
    if args.layer:
        chosen = {name: tuning for name, tuning in VARIANTS.items() if args.only in name}
        models = args.shape or ["qwen3-0.6b", "llama-3.2-1b"]
        bench = Bench(args.dtype)
        prefetch(bench, chosen.values(), rows_list)
        layers_table(bench, models, rows_list, chosen)
        return
    products: list[Product] = []
    for model in args.shape or MODELS:
        products += [p for p in products_of(model) if p not in products]
    bench = Bench(args.dtype)
    prefetch(bench, [DEFAULT_TUNING], rows_list)
    main_table(bench, products, rows_list, args.record)
    for wanted, table in ((args.variants, variants_table), (args.splits, splits_table)):
        if wanted:
            table(bench, products, rows_list)


if __name__ == "__main__":
    main()
