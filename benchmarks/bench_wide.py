"""Products of up to 256 tokens: microseconds by matrix and build, beside others, and whole layers.

    python -m benchmarks.bench_wide [--rows 64,128] [--shape qwen3-0.6b,llama-3.1-8b]
        [--only TEXT] [--sweep] [--layer-only] [--compile]

First a table of matrices. Each column of a build is the op, its norm included, as it runs in a
step: launches of a captured graph that may each start before the one before has ended. "cublas" is
the product alone; "old" the op without these products: by skinny.cu up to 32 tokens, else a norm,
cuBLAS and what follows; "=" the launch of the default. With `--sweep` every tile, number of splits
and of sharers is run, and the fastest are shown as tile/splits/sharers, with what wide_cost.py
says. Then layers: their four products in a row, each reading what the one before wrote, by the old
way, the plan's builds, each product's best build of the table, and the default, which takes them
just where launch_wide.py says so. Every build is checked against float64 on sampled outputs, and
overlapped launches against single ones, bit by bit, before they are timed. `--compile` fills the
cache of kernels and needs no GPU.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import replace

import numpy as np

from benchmarks import bench_skinny
from benchmarks.bench_skinny import H100, Skinny, attempt, cell
from benchmarks.gemv_device import CODES, MODELS, Bench, Product, products_of
from nanocupy.cuda.compiler import Compiler
from nanocupy.ops.launch_skinny import DEFAULT_TUNING as SKINNY
from nanocupy.ops.launch_wide import (
    ALWAYS,
    DEFAULT_TUNING,
    FILE,
    NEVER,
    OUT_TILES,
    SHARERS,
    SPLITS,
    WideLaunch,
    WideTuning,
    plan_wide,
)
from nanocupy.ops.wide_cost import WideShape

DTYPE = "bfloat16"
DEFAULT = ALWAYS
VARIANTS = {
    "default": DEFAULT,
    "split 1": replace(DEFAULT, splits=1),
    "split 2": replace(DEFAULT, splits=2),
    "split 4": replace(DEFAULT, splits=4),
    "split 8": replace(DEFAULT, splits=8),
    "tile 64": replace(DEFAULT, out_tile=64),
    "tile 128": replace(DEFAULT, out_tile=128),
    "tile 192": replace(DEFAULT, out_tile=192),
    "tile 256": replace(DEFAULT, out_tile=256),
    "inputs 4": replace(DEFAULT, input_stages=4),
    "share 1": replace(DEFAULT, sharers=1),
    "share 2": replace(DEFAULT, sharers=2),
    "share 4": replace(DEFAULT, sharers=4),
    "sh 112": replace(DEFAULT, shared_kb=112),
    "sh 224": replace(DEFAULT, shared_kb=224),
}
SWEEP = {"default": DEFAULT} | {
    f"{tile}/{splits}/{sharers}": replace(DEFAULT, out_tile=tile, splits=splits, sharers=sharers)
    for tile in OUT_TILES for splits in SPLITS for sharers in SHARERS if splits * sharers <= 8
}  # fmt: skip
SHOWN = 8  # of a sweep


def plan_of(product: Product, rows: int, tuning: WideTuning, card: tuple[int, int]) -> WideLaunch:
    return plan_wide(
        product.outputs, product.inputs, rows, card[0], pairs=product.pairs,
        max_shared_bytes=card[1], tuning=tuning,
    )  # fmt: skip


def builds_of(
    models: list[str], rows_list: list[int], variants: dict[str, WideTuning],
    card: tuple[int, int],
) -> list[tuple[str, dict[str, int]]]:  # fmt: skip
    found = {}
    for product in {p for model in models for p in products_of(model)}:
        for rows in rows_list:
            for tuning in variants.values():
                macros = plan_of(product, rows, tuning, card).macros
                found[tuple(sorted(macros.items()))] = (FILE, {"SCALAR": CODES[DTYPE], **macros})
    few = [rows for rows in rows_list if rows <= SKINNY.max_rows]
    return [*found.values(), *bench_skinny.builds_of(models, few, {"": SKINNY}, card)]


class Wide(Skinny):
    """The device, and the ops for the batches of one model."""

    def __init__(self, bench: Bench, model: str, rows: int) -> None:
        super().__init__(bench, model, rows, "wide_tuning", wgmma=True)
        # The same for every build: making them takes longer than running it.
        self.made = functools.cache(super().buffers)

    def buffers(self, product: Product) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.made(product)

    def times(self, product: Product, variants: dict[str, WideTuning]) -> dict[str, float | str]:
        """us by variant; those that have the default's launch are not run again."""
        default = plan_of(product, self.rows, DEFAULT, self.card)
        found: dict[str, float | str] = {}
        for name, tuning in variants.items():
            launch = plan_of(product, self.rows, tuning, self.card)
            if tuning != DEFAULT and launch == default:
                found[name] = "="
            elif tuning.out_tile and tuning.splits and name != told(launch):
                found[name] = ""  # there is no such build
            elif product.op == "lm_head" and not name.startswith(
                ("default", "tile 128", "tile 256", "share", "128/1/", "256/1/")
            ):
                found[name] = ""
            else:
                found[name] = attempt(lambda t=tuning: self.op_us(product, t))
        return found


def told(launch: WideLaunch) -> str:
    return f"{launch.macros['OUT_TILE']}/{launch.splits}/{launch.macros['SHARERS']}"


def sweep_line(product: Product, wide: Wide, times: dict[str, float | str]) -> str:
    """The fastest, and what was guessed."""
    shape = WideShape(product.weight_rows, product.inputs, wide.card[0])
    timed = sorted((us, name) for name, us in times.items() if isinstance(us, float))
    parts = []
    for us, name in timed[:SHOWN]:
        launch = plan_of(product, wide.rows, SWEEP[name], wide.card)
        tile, splits, sharers = map(int, told(launch).split("/"))
        guess = shape.cost(launch.macros["TOKENS"], tile, splits, sharers)
        parts.append(f"{name} {us:.2f} ({guess:.1f})")
    return "    " + ", ".join(parts)


def matrices_table(bench: Bench, wide: Wide, variants: dict[str, WideTuning]) -> list[WideTuning]:
    """Prints it; returns the best tuning of each matrix."""
    print(f"{wide.model}, {wide.rows} tokens, us")
    sweep = variants is SWEEP
    names = ["cublas", "old", *(["default"] if sweep else variants)]
    print(f"{'weights':22s} {'MB':>6s} {'GB/s':>5s}" + "".join(f"{name:>9s}" for name in names))
    best = []
    for product in products_of(wide.model):
        num_bytes = product.weight_rows * product.inputs * bench.dtype.itemsize
        peers = [
            attempt(lambda p=product: bench.cublas_us(p, wide.rows)),
            attempt(lambda p=product: wide.op_us(p, NEVER)),
        ]
        times = wide.times(product, variants)
        timed = {name: us for name, us in times.items() if isinstance(us, float)}
        least = min(timed, key=timed.__getitem__, default="")
        best.append(variants.get(least, DEFAULT))
        plan = plan_of(product, wide.rows, DEFAULT, wide.card)
        print(
            f"{product.label:22s} {num_bytes / 1e6:6.1f} "
            f"{num_bytes / timed.get(least, float('inf')) / 1e3:5.0f}"
            + "".join(map(cell, [*peers, *([times["default"]] if sweep else times.values())]))
            + f"  {told(plan)}, stages {plan.weight_stages}/{plan.input_stages}, best {least}",
            flush=True,
        )
        if sweep:
            print(sweep_line(product, wide, times), flush=True)
    return best


def layers_table(bench: Bench, wide: Wide, best: list[WideTuning], read: float) -> None:
    num_bytes = bench.dtype.itemsize * sum(
        p.weight_rows * p.inputs for p in products_of(wide.model)[:4]
    )
    print(f"{wide.model}, {wide.rows} tokens, a layer's products and norms")
    print(f"{'':10s} {'us/layer':>9s} {'GB/s':>6s} {'share':>6s}")
    rows = {"old": [NEVER], "plan": [DEFAULT], **({"best": best[:4]} if best else {})}
    rows["default"] = [DEFAULT_TUNING]
    for name, tunings in rows.items():
        us = attempt(lambda t=tunings: wide.layer_us(*t, check=t[0] is not NEVER))
        rate = num_bytes / us / 1e3 if isinstance(us, float) else 0.0
        print(f"{name:10s} {cell(us)} {rate:6.0f} {rate / read:6.1%}", flush=True)
    print(f"{'read alone':10s} {num_bytes / read / 1e3:9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="64,128", help="batch sizes, 1 to 256")
    parser.add_argument("--shape", default="qwen3-0.6b,llama-3.1-8b", help="models, of " +
                        ", ".join(sorted(MODELS)))  # fmt: skip
    parser.add_argument("--only", default="", help="variants whose name has this text")
    parser.add_argument("--sweep", action="store_true", help="every tile, split and sharing")
    parser.add_argument("--layer-only", action="store_true", help="no table of matrices")
    parser.add_argument("--compile", action="store_true", help="fill the kernels' cache and end")
    args = parser.parse_args()
    rows_list = [int(part) for part in args.rows.split(",")]
    models = args.shape.split(",")
    unknown = sorted(set(models) - set(MODELS))
    if unknown or not all(1 <= rows <= 256 for rows in rows_list):
        parser.error(f"no such shape or batch: {', '.join(unknown) or args.rows}")
    variants = {name: t for name, t in VARIANTS.items() if name == "default" or args.only in name}
    if args.sweep:
        variants = SWEEP
    if args.layer_only:
        variants = {"default": DEFAULT}
    if args.compile:
        builds = builds_of(models, rows_list, variants, H100)
        builds += [(file, {"SCALAR": CODES[DTYPE]}) for file in ("norm.cu", "activation.cu")]
        compiler = Compiler()
        compiler.compile_all(builds, arch="90a")
        print(f"{len(builds)} builds in {compiler.cache}")
        return
    bench = Bench(DTYPE)
    if bench.loader.arch != "sm_90a":
        parser.exit(2, f"these products need compute capability 9.0, not {bench.loader.arch}\n")
    card = bench.loader.num_multiprocessors, bench.loader.max_shared_bytes
    bench.loader.prefetch(builds_of(models, rows_list, variants, card))
    read = bench.pool.nbytes / bench.read_us(bench.pool.nbytes) / 1e3
    print(f"{bench.name}, {DTYPE}, streaming read {read:.0f} GB/s")
    for model in models:
        for rows in rows_list:
            wide = Wide(bench, model, rows)
            best = [] if args.layer_only else matrices_table(bench, wide, variants)
            layers_table(bench, wide, best, read)


if __name__ == "__main__":
    main()
