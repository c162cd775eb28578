"""Products of 3 to 64 tokens: microseconds by matrix and build, beside cuBLAS, and whole layers.

    python -m benchmarks.bench_skinny [--rows 16,32,64] [--shape qwen3-0.6b] [--only TEXT]
        [--layer-only] [--compile]

First a table of matrices. Each column of a build is the op, its norm included, as it runs in a
step: launches of a captured graph that may each start before the one before has ended. "cublas" is
the product alone; "old" the op of norm, cuBLAS and what follows. Then a table of layers: their four
products in a row, each reading what the one before wrote. Matrices take turns over a gigabyte, so
that none is in L2; every build is checked against float64 on sampled outputs, and overlapped
launches against single ones, bit by bit, before they are timed. `--compile` fills the cache of
kernels and needs no GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.gemv_device import CODES, EPS, MODELS, Bench, Product, products_of
from benchmarks.gemv_layers import Layers
from nanocupy.cuda.compiler import Compiler
from nanocupy.errors import CudaError
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sizes import DeviceTraits, OpSizes, workspace_plan
from nanocupy.ops.launch_skinny import FILE, SkinnyLaunch, SkinnyTuning, plan_skinny

DTYPE = "bfloat16"
DEFAULT = SkinnyTuning(max_rows=64)
NEVER = SkinnyTuning(max_rows=0)
VARIANTS = {
    "default": DEFAULT,
    "split 1": replace(DEFAULT, splits=1),
    "split 2": replace(DEFAULT, splits=2),
    "split 4": replace(DEFAULT, splits=4),
    "tile 64": replace(DEFAULT, out_tile=64),
    "tile 32": replace(DEFAULT, out_tile=32),
    "step 64": replace(DEFAULT, k_step=64),
    "step 128": replace(DEFAULT, k_step=128),
    "stay": replace(DEFAULT, inputs_stay=True),
    "ring 32": replace(DEFAULT, ring_kb=32),
    "sh 160": replace(DEFAULT, ring_kb=128, shared_kb=160),
    "sh 226": replace(DEFAULT, ring_kb=192, shared_kb=226),
    "warps k1": replace(DEFAULT, warps_k=1),
    "apart": replace(DEFAULT, fold_norm=False),
}
H100 = 132, 227 << 10  # multiprocessors, shared memory: what --compile plans for


def plan_of(
    product: Product, rows: int, tuning: SkinnyTuning, card: tuple[int, int]
) -> SkinnyLaunch:
    return plan_skinny(
        product.outputs, product.inputs, rows, card[0], pairs=product.pairs,
        norm=product.op.startswith("norm"), max_shared_bytes=card[1], tuning=tuning,
    )  # fmt: skip


def builds_of(
    models: list[str], rows_list: list[int], variants: dict[str, SkinnyTuning],
    card: tuple[int, int],
) -> list[tuple[str, dict[str, int]]]:  # fmt: skip
    found = {}
    for product in {p for model in models for p in products_of(model)}:
        for rows in rows_list:
            for tuning in variants.values():
                try:
                    macros = plan_of(product, rows, tuning, card).macros
                except ValueError:  # no room in shared memory
                    continue
                found[tuple(sorted(macros.items()))] = (FILE, {"SCALAR": CODES[DTYPE], **macros})
    return list(found.values())


class Skinny:
    """The device, and the ops for the batches of one model. tuning_name: of what CudaOps is made
    with; wgmma: the ops may take what only compute capability 9.0a has."""

    def __init__(
        self, bench: Bench, model: str, rows: int, tuning_name: str = "skinny_tuning",
        wgmma: bool = False,
    ) -> None:  # fmt: skip
        self.bench, self.model, self.rows = bench, model, rows
        loader, cupy = bench.loader, bench.cupy
        self.card = loader.num_multiprocessors, loader.max_shared_bytes
        traits = DeviceTraits(loader.compute_capability, *self.card, wgmma=wgmma)
        hidden, queries, keys, ffn, vocab = MODELS[model]
        sizes = OpSizes(
            max_tokens=rows, max_num_seqs=rows, max_rows=rows, max_context=4096,
            hidden_size=hidden, intermediate_size=ffn, vocab_size=vocab, num_heads=queries // 64,
            num_kv_heads=keys // 64, head_size=64, dtype=DTYPE, residual_dtype=DTYPE,
            cache_dtype=DTYPE,
        )  # fmt: skip
        plan = workspace_plan(sizes, traits)
        spaces = {
            name: cupy.zeros(shape, bench.dtype if dtype == DTYPE else np.dtype(dtype))
            for name, (shape, dtype) in plan.items()
        }
        matmul = bench.cublas.matmul

        def ops(tuning: Any) -> CudaOps:
            return CudaOps(loader, matmul, spaces, sizes, traits, **{tuning_name: tuning})

        self.ops: Callable[[Any], CudaOps] = ops
        self.chosen = cupy.arange(rows, dtype=np.int32)
        self.norm_host = bench.rng.uniform(0.5, 1.5, max(hidden, ffn)).astype(bench.dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (self.bench.rng.standard_normal(shape) * scale).astype(self.bench.dtype)

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

    def buffers(self, product: Product) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, the norm's weights, and what the result is written over; small where it is added to,
        as the sum goes on over all launches."""
        small = product.op == "linear_add"
        x = self.normal(self.rows, product.inputs, scale=1e-2 if small else 1.0)
        shape = (self.rows, product.outputs)
        before = self.normal(*shape, scale=1e-2) if small else np.full(shape, np.nan, np.float32)
        if not small and product.op != "lm_head":
            before = before.astype(self.bench.dtype)
        return x, self.norm_host[: product.inputs], before

    def op_us(self, product: Product, tuning: Any) -> float:
        """Of the op, checked first."""
        bench, cupy = self.bench, self.bench.cupy
        host = self.buffers(product)
        x, norm, out = (cupy.asarray(array) for array in host)
        matrices = bench.matrices(product)
        start = self.start_op(self.ops(tuning), product, x, norm, out)
        cupy.cuda.Device().synchronize()
        with bench.stream:
            start(matrices[0])
        bench.stream.synchronize()
        bench.check(product, host[0], host[1], host[2], matrices[0], out.get())
        guess = 5 + matrices[0].nbytes / 2e6
        return statistics.median(
            bench.microseconds(lambda i: start(matrices[i % len(matrices)]), guess)
        )

    # --------------------------------------------------------------- layers

    def layer_us(self, *tunings: Any, check: bool = True) -> float:
        """Of the four products of a layer and their norms, in a graph of all layers. tunings: one
        for all, or one for each product; check: overlapped launches against single ones."""
        layers = Layers(self.bench, self.model, self.rows)
        each = tunings * len(layers.products) if len(tunings) == 1 else tunings
        starts = [
            self.start_op(self.ops(tuning), product, source, layers.norm, target)
            for tuning, product, (source, target) in zip(
                each, layers.products, layers.buffers, strict=True
            )
        ]

        def run() -> None:
            for weights in layers.weights:
                for start, weight in zip(starts, weights, strict=True):
                    start(weight)

        layers.reset()
        with self.bench.stream:
            run()  # loads what a capture must find
        graph = layers.capture(run)
        if check:
            layers.check_overlap(run, graph)  # overlap is taken in captures alone
        return layers.graph_us(graph)


# ------------------------------------------------------------------------------ tables


def attempt(work: Callable[[], float]) -> float | str:
    """What it gives, or the start of why not."""
    try:
        return work()
    except ValueError:
        return "-"  # no such build
    except (CudaError, RuntimeError) as exc:
        return str(exc).splitlines()[0][:90]


def cell(value: float | str) -> str:
    return f"{value:9.2f}" if isinstance(value, float) else f" {value:>8s}"


def matrices_table(bench: Bench, skinny: Skinny, variants: dict[str, SkinnyTuning]) -> None:
    names = ["cublas", "old", *variants]
    print(f"{skinny.model}, {skinny.rows} tokens, us")
    print(f"{'weights':22s} {'MB':>6s} {'GB/s':>5s}" + "".join(f"{name:>9s}" for name in names))
    for product in products_of(skinny.model):
        num_bytes = product.weight_rows * product.inputs * bench.dtype.itemsize
        times = [
            attempt(lambda p=product: bench.cublas_us(p, skinny.rows)),
            attempt(lambda p=product: skinny.op_us(p, NEVER)),
            *(
                attempt(lambda p=product, t=tuning: skinny.op_us(p, t))
                for tuning in variants.values()
            ),
        ]
        best = min((t for t in times[2:] if isinstance(t, float)), default=float("inf"))
        print(
            f"{product.label:22s} {num_bytes / 1e6:6.1f} {num_bytes / best / 1e3:5.0f}"
            + "".join(map(cell, times)),
            flush=True,
        )


def layers_table(bench: Bench, skinny: Skinny, variants: dict[str, SkinnyTuning], read: float):
    num_bytes = bench.dtype.itemsize * sum(
        p.weight_rows * p.inputs for p in products_of(skinny.model)[:4]
    )
    print(f"{skinny.model}, {skinny.rows} tokens, a layer's products and norms")
    print(f"{'':10s} {'us/layer':>9s} {'GB/s':>6s} {'share':>6s}")
    for name, tuning in {"cublas": NEVER, **variants}.items():
        us = attempt(lambda t=tuning: skinny.layer_us(t, check=t is not NEVER))
        rate = num_bytes / us / 1e3 if isinstance(us, float) else 0.0
        print(f"{name:10s} {cell(us)} {rate:6.0f} {rate / read:6.1%}", flush=True)
    print(f"{'read alone':10s} {num_bytes / read / 1e3:9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="16,32,64", help="batch sizes, 9 to 64")
    parser.add_argument("--shape", action="append", choices=sorted(MODELS))
    parser.add_argument("--only", default="", help="variants whose name has this text")
    parser.add_argument("--layer-only", action="store_true", help="no table of matrices")
    parser.add_argument("--compile", action="store_true", help="fill the kernels' cache and end")
    args = parser.parse_args()
    rows_list = [int(part) for part in args.rows.split(",")]
    models = args.shape or ["qwen3-0.6b", "llama-3.2-1b"]
    variants = {name: t for name, t in VARIANTS.items() if args.only in name}
    if args.compile:
        builds = builds_of(models, rows_list, variants, H100)
        builds.append(("norm.cu", {"SCALAR": CODES[DTYPE]}))
        builds.append(("activation.cu", {"SCALAR": CODES[DTYPE]}))
        compiler = Compiler()
        compiler.compile_all(builds, arch="90a")
        print(f"{len(builds)} builds in {compiler.cache}")
        return
    bench = Bench(DTYPE)
    card = bench.loader.num_multiprocessors, bench.loader.max_shared_bytes
    bench.loader.prefetch(builds_of(models, rows_list, variants, card))
    read = bench.pool.nbytes / bench.read_us(bench.pool.nbytes) / 1e3
    print(f"{bench.name}, {DTYPE}, streaming read {read:.0f} GB/s")
    for model in models:
        for rows in rows_list:
            skinny = Skinny(bench, model, rows)
            if not args.layer_only:
                matrices_table(bench, skinny, variants)
            layers_table(bench, skinny, variants, read)


if __name__ == "__main__":
    main()
