"""Gate and up of prompts, with SwiGLU: microseconds and TFLOP/s by model, tokens and build.

    python -m benchmarks.bench_prefill_products [--rows 1024,2048,8192,32768]
        [--shape qwen3-0.6b,llama-3.2-1b,llama-3.1-8b] [--only TEXT] [--rounds 3] [--compile]

"cublas" is the product alone, "old" cuBLAS and then swiglu_rows, what other cards do; the other
columns are builds of tall.cu, which is one launch. Each is a graph of many launches, the ways take
turns `--rounds` times, as the card's clock changes, and medians are shown. Matrices take turns.
Every build is checked against float64 on sampled outputs before it is timed. `--compile` fills the
cache of kernels and needs no GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.gemv_device import CODES, MODELS, TOLERANCES, Bench, Product
from nanocupy.cuda.compiler import Compiler
from nanocupy.cuda.driver import LaunchOptions
from nanocupy.ops import launch_shapes as shapes
from nanocupy.ops.launch_tall import DEFAULT_TUNING, ENTRY, FILE, TallTuning, plan_tall

DTYPE = "bfloat16"
VARIANTS = {
    "default": DEFAULT_TUNING,
    "share 1": replace(DEFAULT_TUNING, sharers=1),
    "share 4": replace(DEFAULT_TUNING, sharers=4),
    "together": replace(DEFAULT_TUNING, staggered=False),
    "stages 3": replace(DEFAULT_TUNING, stages=3),
    "group 1k": replace(DEFAULT_TUNING, group_rows=1024),
    "group 4k": replace(DEFAULT_TUNING, group_rows=4096),
    "group 8k": replace(DEFAULT_TUNING, group_rows=8192),
}
SAMPLED_ROWS, SAMPLED_OUTPUTS = 40, 60
Start = Callable[[int], None]


def gate_up_of(model: str) -> Product:
    hidden, ffn = MODELS[model][0], MODELS[model][3]
    return Product("norm_swiglu", ffn, hidden)


def tflops(product: Product, rows: int, us: float) -> float:
    return 2 * rows * product.weight_rows * product.inputs / us / 1e6


class Prompts:
    """The device's side of one product with `rows` tokens: the ways to start it."""

    def __init__(self, bench: Bench, product: Product, rows: int) -> None:
        cupy, dtype = bench.cupy, bench.dtype
        self.bench, self.product, self.rows = bench, product, rows
        # As a norm's results; of rows that repeat, which no product can tell.
        part = bench.rng.standard_normal((1000, product.inputs), dtype=np.float32).astype(dtype)
        few = cupy.asarray(part.view(bench.bits))
        self.x = few[cupy.arange(rows) % len(part)].view(dtype)
        self.x_host = part
        self.matrices = bench.matrices(product)
        self.gate_up = cupy.empty((rows, product.weight_rows), dtype)
        self.out = cupy.empty((rows, product.outputs), dtype)

    def cublas(self) -> Start:
        bench, matrices = self.bench, self.matrices
        return lambda i: bench.cublas.matmul(self.x, matrices[i % len(matrices)], self.gate_up)

    def old(self) -> Start:
        bench, product = self.bench, self.product
        shape = shapes.swiglu_rows(self.rows, product.outputs)
        kernel = bench.loader.get("activation.cu", "swiglu_rows", SCALAR=CODES[DTYPE])
        launch = kernel.prepare(
            shape.grid, (shape.block,),
            (self.gate_up, None, self.out, np.int32(product.outputs)), shape.shared_bytes,
        )  # fmt: skip
        multiply = self.cublas()

        def start(i: int) -> None:
            multiply(i)
            kernel.start(launch, bench.stream)

        return start

    def tall(self, tuning: TallTuning) -> Start:
        bench, product = self.bench, self.product
        plan = plan_tall(
            product.outputs, product.inputs, self.rows, bench.loader.num_multiprocessors,
            max_shared_bytes=bench.loader.max_shared_bytes, tuning=tuning,
        )  # fmt: skip
        kernel = bench.loader.get(FILE, ENTRY, SCALAR=CODES[DTYPE], **plan.macros)
        x = bench.loader.driver.tensor_map(self.x, plan.input_box)
        numbers = self.rows, product.outputs, product.inputs, plan.group
        options = LaunchOptions(cluster=(plan.cluster, 1, 1) if plan.cluster > 1 else None)
        launches = [
            kernel.prepare(
                plan.grid, (plan.block,),
                (x, bench.loader.driver.tensor_map(weight, plan.weight_box), self.out,
                 *map(np.int32, numbers)),
                plan.shared_bytes, options,
            )
            for weight in self.matrices
        ]  # fmt: skip
        return lambda i: kernel.start(launches[i % len(launches)], bench.stream)

    def check(self, start: Start) -> None:
        """Sampled outputs against float64; all must have been written. Raises RuntimeError."""
        bench, cupy, product = self.bench, self.bench.cupy, self.product
        self.out.view(bench.bits)[...] = 0xFFFF  # NaN
        cupy.cuda.Device().synchronize()
        with bench.stream:
            start(0)
        bench.stream.synchronize()
        got_bits = self.out.view(bench.bits)
        if bool((got_bits == 0xFFFF).any()):
            raise RuntimeError(f"{product.label}: outputs that were never written")
        last_row, last = self.rows - 1, product.outputs - 1
        sampled = bench.rng.integers(0, self.rows, SAMPLED_ROWS)
        rows = np.unique([0, last_row, *sampled])
        sampled = bench.rng.integers(0, product.outputs, SAMPLED_OUTPUTS)
        outputs = np.unique([0, 1, last - 1, last, *sampled])
        index = np.concatenate([outputs, product.outputs + outputs])
        bits = self.matrices[0].view(bench.bits)[cupy.asarray(index)].get()
        weight = bits.view(bench.dtype).astype(np.float64)
        x = self.x_host[rows % len(self.x_host)].astype(np.float64)
        sums = (x @ weight.T).astype(bench.dtype).astype(np.float64)
        gate, up = np.split(sums, 2, axis=1)
        wanted = gate / (1 + np.exp(-gate)) * up
        part = got_bits[cupy.asarray(rows)][:, cupy.asarray(outputs)].get().view(bench.dtype)
        rms = np.sqrt(np.mean(wanted**2, axis=1, keepdims=True))
        error = abs(part.astype(np.float64) - wanted) / (abs(wanted) + rms)
        if not error.max() <= TOLERANCES[bench.dtype.name]:
            raise RuntimeError(f"{product.label}: error {error.max():.3g}")


def times(bench: Bench, product: Product, rows: int, variants: dict[str, TallTuning],
          rounds: int) -> dict[str, float | str]:  # fmt: skip
    """us by way; the start of why not where it failed."""
    prompts = Prompts(bench, product, rows)
    ways: dict[str, Start] = {"cublas": prompts.cublas(), "old": prompts.old()}
    found: dict[str, float | str] = {}
    prompts.check(ways["old"])
    for name, tuning in variants.items():
        try:
            start = prompts.tall(tuning)
            prompts.check(start)
            ways[name] = start
        except (ValueError, RuntimeError) as exc:
            found[name] = str(exc).splitlines()[0][:60]
    guess = 2 * rows * product.weight_rows * product.inputs / 600e6 + 3
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, start in ways.items():
            measured[name] += bench.microseconds(start, guess)
    return found | {name: statistics.median(us) for name, us in measured.items()}


def print_table(bench: Bench, model: str, rows_list: list[int], variants: dict[str, TallTuning],
                rounds: int) -> None:  # fmt: skip
    product = gate_up_of(model)
    names = ["cublas", "old", *variants]
    print(f"{model}, {product.label}, us and TFLOP/s")
    print(f"{'tokens':>7s}" + "".join(f"{name:>15s}" for name in names) + "   old/default")
    for rows in rows_list:
        us = times(bench, product, rows, variants, rounds)
        line = f"{rows:7d}"
        for name in names:
            value: Any = us[name]
            line += (
                f"{value:10.1f} {tflops(product, rows, value):4.0f}"
                if isinstance(value, float) else f"  {value}"
            )  # fmt: skip
        old, new = us["old"], us["default"]
        if isinstance(old, float) and isinstance(new, float):
            line += f"   {old / new:8.3f}"
        print(line, flush=True)
        bench.cupy.get_default_memory_pool().free_all_blocks()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1024,2048,8192,32768", help="tokens")
    parser.add_argument("--shape", default="qwen3-0.6b,llama-3.2-1b,llama-3.1-8b",
                        help="models, of " + ", ".join(sorted(MODELS)))  # fmt: skip
    parser.add_argument("--only", default="", help="variants whose name has this text")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--compile", action="store_true", help="fill the kernels' cache and end")
    args = parser.parse_args()
    parts = args.rows.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        parser.error(f"--rows is {args.rows!r}; it must be numbers of tokens, as in 1024,2048")
    rows_list = [int(part) for part in parts]
    models = args.shape.split(",")
    unknown = sorted(set(models) - set(MODELS))
    if unknown or min(rows_list) < 1 or args.rounds < 1:
        parser.error(f"no such shape, or no tokens, or no turn: {', '.join(unknown) or args.rows}")
    variants = {name: t for name, t in VARIANTS.items() if name == "default" or args.only in name}
    builds = [
        (FILE, {"SCALAR": CODES[DTYPE], **plan_tall(128, 1024, 1024, 132, tuning=t).macros})
        for t in variants.values()
    ] + [("activation.cu", {"SCALAR": CODES[DTYPE]})]
    if args.compile:
        compiler = Compiler()
        compiler.compile_all(builds, arch="90a")
        print(f"{len(builds)} builds in {compiler.cache}")
        return
    bench = Bench(DTYPE)
    if bench.loader.arch != "sm_90a":
        parser.exit(2, f"this product needs compute capability 9.0, not {bench.loader.arch}\n")
    bench.loader.prefetch(builds)
    print(f"{bench.name}, {DTYPE}")
    for model in models:
        print_table(bench, model, rows_list, variants, args.rounds)


if __name__ == "__main__":
    main()
