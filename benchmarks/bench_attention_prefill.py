"""Prefill attention: TFLOP/s by prompt length, beside torch's FlashAttention-2 and cuDNN.

    python -m benchmarks.bench_attention_prefill [--record] [--variants] [--quick]

One sequence, causal, from an empty prefix, keys and values in shuffled blocks of 16. Flops are
4 * H * d * T**2 / 2. Every time is of graphs of several launches over rotating buffers of more than
200 MB; every shape is checked against float64 on sampled rows first. The ceiling is a bf16 product
of 8192 cubed by torch in the same run. `--variants` times other tiles in one table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.records import write_record
from nanocupy.ops.launch_attention_prefill import (
    PrefillLaunch,
    PrefillTile,
    WgmmaTile,
    default_tile,
    launch_attention_prefill,
    launch_attention_prefill_wgmma,
    wgmma_tile,
)
from nanocupy.ops.tensor_maps import TensorMaps

BLOCK_SIZE = 16
BFLOAT16 = 2  # code of the kernels' SCALAR
ROTATED_BYTES = 200 << 20
RUNS = 9
RUN_MS = 4.0
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

VARIANTS: dict[int, list[PrefillTile | WgmmaTile]] = {
    128: [
        WgmmaTile(),
        WgmmaTile(l2_bytes=16 << 20),
        WgmmaTile(l2_bytes=48 << 20),
        PrefillTile(4, 32, 64),
        PrefillTile(8, 32, 64, min_blocks=1),
    ],
    64: [
        WgmmaTile(3, stages=3),
        WgmmaTile(3, stages=4),
        WgmmaTile(2, stages=3),
        PrefillTile(4, 32, 64, queries_stay=True),
        PrefillTile(8, 32, 64, min_blocks=1, queries_stay=True),
    ],
}


@dataclass(frozen=True)
class Problem:
    tokens: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def name(self) -> str:
        group = self.heads // self.kv_heads
        gqa = f"gqa{group}/" if group > 1 else ""
        return f"attention-prefill/d{self.head_size}/causal/{gqa}t{self.tokens}"

    @property
    def flops(self) -> float:
        return 4 * self.heads * self.head_size * self.tokens**2 / 2

    @property
    def num_bytes(self) -> int:
        """Queries, keys, values and results, once."""
        return 2 * 2 * self.tokens * self.head_size * (self.heads + self.kv_heads)

    @property
    def num_sets(self) -> int:
        return -(-ROTATED_BYTES // self.num_bytes)

    @property
    def num_calls(self) -> int:
        """Launches in a graph: some milliseconds' worth, at 300 TFLOP/s."""
        return max(1, min(200, round(RUN_MS / (self.flops / 300e12 * 1e3))))


# ------------------------------------------------------------------------------ our kernel


class Prepared:
    """Buffers of a problem on the device: `num_sets` of everything."""

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        import cupy
        import ml_dtypes

        self.problem = problem
        p, bf16 = problem, np.dtype(ml_dtypes.bfloat16)
        cupy.random.seed(seed)

        def normal(*shape: int) -> Any:
            out = cupy.empty(shape, bf16)
            for part in out:  # the float32 of one part at a time
                part[...] = cupy.random.standard_normal(part.shape, dtype=np.float32).astype(bf16)
            return out

        blocks = -(-p.tokens // BLOCK_SIZE)
        cache = (p.num_sets, blocks + 1, p.kv_heads, BLOCK_SIZE, p.head_size)
        self.queries = normal(p.num_sets, p.tokens, p.heads, p.head_size)
        self.keys, self.values = normal(*cache), normal(*cache)
        self.out = cupy.empty(self.queries.shape, bf16)
        rng = np.random.default_rng(seed)
        self.table = 1 + rng.permutation(blocks).astype(np.int32)[None]
        self.device_table = cupy.asarray(self.table)
        self.query_starts = cupy.asarray(np.array([0, p.tokens], np.int32))
        self.kv_lens = cupy.asarray(np.array([p.tokens], np.int32))
        self.counter = cupy.zeros(1, np.uint32)

    def arguments(self, index: int, tile: PrefillTile | WgmmaTile, maps: TensorMaps) -> list[Any]:
        p = self.problem
        sizes = 1, p.heads, p.kv_heads, BLOCK_SIZE, self.table.shape[1]
        arrays = [self.queries[index], self.keys[index], self.values[index]]
        counter = []
        if isinstance(tile, WgmmaTile):
            q, *caches = arrays
            arrays = [maps.queries(q, tile, p.heads // p.kv_heads)]
            arrays += [maps.cache(cache, tile) for cache in caches]
            counter = [self.counter]
        return [
            *arrays, self.query_starts, self.kv_lens, self.device_table, self.out[index], *counter,
            np.float32(p.head_size**-0.5), *(np.int32(size) for size in sizes),
        ]  # fmt: skip

    def worst_error(self) -> float:
        """|error| / (|wanted| + rms of the row), over sampled rows of the first set."""
        p, worst = self.problem, 0.0
        rng = np.random.default_rng(1)
        tokens = [0, p.tokens - 1, *rng.integers(0, p.tokens, 6)]
        for token, head in zip(tokens, rng.integers(0, p.heads, len(tokens)), strict=True):
            kv_head = head // (p.heads // p.kv_heads)
            blocks = self.table[0, : token // BLOCK_SIZE + 1]
            k, v = (
                cache[0, :, kv_head].get()[blocks].astype(np.float64).reshape(-1, p.head_size)
                for cache in (self.keys, self.values)
            )
            query, got = (
                array[0, token, head].get().astype(np.float64) for array in (self.queries, self.out)
            )
            scores = k[: token + 1] @ query * p.head_size**-0.5
            weights = np.exp(scores - scores.max())
            wanted = weights @ v[: token + 1] / weights.sum()
            error = np.abs(got - wanted) / (np.abs(wanted) + np.sqrt(np.mean(wanted**2)))
            worst = max(worst, float("inf") if np.isnan(error).any() else float(error.max()))
        return worst


def best_tile(loader: Any, problem: Problem) -> PrefillTile | WgmmaTile:
    """What the ops take on this card."""
    tile, group = None, problem.heads // problem.kv_heads
    if loader.arch == "sm_90a":
        tile = wgmma_tile(problem.head_size, group, BLOCK_SIZE, BFLOAT16, BFLOAT16)
    return tile or default_tile(problem.head_size)


def launch_of(loader: Any, problem: Problem, tile: PrefillTile | WgmmaTile) -> PrefillLaunch:
    p = problem
    counts = p.tokens, 1, p.heads, p.kv_heads, p.head_size
    if isinstance(tile, PrefillTile):
        return launch_attention_prefill(*counts, tile=tile)
    return launch_attention_prefill_wgmma(
        *counts, tile=tile, num_multiprocessors=loader.num_multiprocessors
    )


def ours(loader: Any, prepared: Prepared, tile: PrefillTile | WgmmaTile) -> tuple[list[float], Any]:
    """TFLOP/s of each run, and the kernel. Raises RuntimeError where the result is wrong."""
    import cupy

    p = prepared.problem
    launch, maps = launch_of(loader, p, tile), TensorMaps(loader.driver.tensor_map)
    kernel = loader.get(
        launch.file, launch.entry, SCALAR=BFLOAT16, HEAD_SIZE=p.head_size, **launch.macros
    )
    calls = [
        kernel.prepare(
            launch.grid,
            (launch.block,),
            prepared.arguments(i, tile, maps),
            shared_bytes=launch.shared_bytes,
        )
        for i in range(p.num_sets)
    ]
    prepared.out.view(np.uint16).fill(0xFFFF)  # NaN
    kernel.start(calls[0])
    cupy.cuda.Device().synchronize()
    error = prepared.worst_error()
    if not error <= 1.6e-2:
        raise RuntimeError(f"{p.name}, {tile}: error {error:.3g}, 0.016 is allowed")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        for i in range(p.num_calls):
            kernel.start(calls[i % p.num_sets], stream)
        graph = stream.end_capture()

    def run() -> float:
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        return cupy.cuda.get_elapsed_time(start, end)

    return _rates(run, p), kernel


def _rates(run_ms: Callable[[], float], problem: Problem) -> list[float]:
    for _ in range(3):
        run_ms()
    work = problem.flops * problem.num_calls / 1e9
    return [work / run_ms() for _ in range(RUNS)]


# ------------------------------------------------------------------------------ peers


def torch_or_none() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def _torch_rates(torch: Any, problem: Problem, call: Callable[[int], Any]) -> list[float]:
    """`call(i)` in a graph, as our own launches are; eagerly where it can't be captured."""
    for i in range(2):
        call(i % problem.num_sets)
    torch.cuda.synchronize()

    def launch() -> None:
        for i in range(problem.num_calls):
            call(i % problem.num_sets)

    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        launch = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()

    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return _rates(run, problem)


def peers(torch: Any, problem: Problem) -> dict[str, float]:
    """Median TFLOP/s of torch's attention by backend; those that fail are left out, and named."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    p = problem
    inputs = [
        torch.randn(p.num_sets, 1, heads, p.tokens, p.head_size, device="cuda").bfloat16()
        for heads in (p.heads, p.kv_heads, p.kv_heads)
    ]
    grouped = {"enable_gqa": True} if p.heads != p.kv_heads else {}

    def call(i: int) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            *(array[i] for array in inputs), is_causal=True, **grouped
        )

    found = {}
    chosen = ("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)
    for name, backend in chosen:
        try:
            with torch.no_grad(), sdpa_kernel([backend]):
                found[name] = statistics.median(_torch_rates(torch, p, call))
        except RuntimeError as exc:
            print(f"  {name} does not run: {str(exc).splitlines()[0][:90]}")
    inputs.clear()
    torch.cuda.empty_cache()
    return found


def matmul_ceiling(torch: Any) -> float:
    """TFLOP/s of one bf16 product of 8192 cubed."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    del a, b
    torch.cuda.empty_cache()
    return 2 * 8192**3 / statistics.median(times[3:]) / 1e9


# ------------------------------------------------------------------------------ tables


def lengths_table(loader: Any, torch: Any, problems: list[Problem], record: bool) -> None:
    import cupy

    device = cupy.cuda.runtime.getDeviceProperties(loader.device)["name"].decode()
    ceiling = matmul_ceiling(torch) if torch else None
    print(f"{device}; bf16 product: {ceiling or 0:.0f} TFLOP/s")
    print(f"{'TFLOP/s':40s} {'ours':>8s} {'range':>13s} {'fa2':>8s} {'cudnn':>8s}")
    for problem in problems:
        prepared = Prepared(problem)
        rates, _ = ours(loader, prepared, best_tile(loader, problem))
        del prepared
        cupy.get_default_memory_pool().free_all_blocks()
        beside = peers(torch, problem) if torch else {}
        value = statistics.median(rates)
        shown = "".join(f" {beside.get(name, float('nan')):8.1f}" for name in ("fa2", "cudnn"))
        spread = f"{min(rates):.0f}-{max(rates):.0f}"
        print(f"{problem.name:40s} {value:8.1f} {spread:>13s}{shown}", flush=True)
        if record:
            more: dict[str, Any] = {"bytes": problem.num_bytes, "flops": problem.flops}
            if ceiling:
                more |= {"ceiling": round(ceiling, 1), "share": round(value / ceiling, 4)}
            if "fa2" in beside:
                more |= {"peer": "torch SDPA FlashAttention-2", "peer_value": beside["fa2"]}
            if "cudnn" in beside:
                more["cudnn_value"] = beside["cudnn"]
            write_record(
                "attention-prefill", problem.name, rates, "TFLOP/s", device=device,
                dtype="bfloat16", **more,
            )  # fmt: skip


def name_of(tile: PrefillTile | WgmmaTile) -> str:
    steps = f"{tile.keys}x{tile.stages}"
    if isinstance(tile, WgmmaTile):
        return f"wgmma {4 * tile.warpgroups}x16 {steps} {tile.l2_bytes >> 20} MB"
    stay = " stay" if tile.queries_stay else ""
    return f"{tile.warps}x{tile.warp_rows} {steps}{stay} min{tile.min_blocks}"


def variants_table(loader: Any, lengths: tuple[int, ...]) -> None:
    import cupy

    for head_size, tiles in VARIANTS.items():
        if loader.arch != "sm_90a":
            tiles = [tile for tile in tiles if isinstance(tile, PrefillTile)]
        build = {"SCALAR": BFLOAT16, "HEAD_SIZE": head_size}
        loader.prefetch(
            (launch_of(loader, Problem(1, 1, 1, head_size), tile).file, build | tile.macros())
            for tile in tiles
        )
        rows: dict[PrefillTile | WgmmaTile, list[str]] = {tile: [] for tile in tiles}
        facts: dict[PrefillTile | WgmmaTile, str] = {}
        for tokens in lengths:
            prepared = Prepared(Problem(tokens, 32, 32, head_size))
            for tile in tiles:
                rates, kernel = ours(loader, prepared, tile)
                rows[tile].append(f"{statistics.median(rates):8.1f}")
                held = kernel.blocks_per_multiprocessor(tile.threads, tile.shared_bytes(head_size))
                facts[tile] = f"{kernel.num_registers:5d} {kernel.local_bytes:5d} {held:6d}"
            del prepared
            cupy.get_default_memory_pool().free_all_blocks()
        print(f"\nd{head_size}: warps x rows, keys x stages, more")
        print(f"{'tile':28s}  regs local blocks" + "".join(f" t{n:<7d}" for n in lengths))
        for tile in tiles:
            print(f"{name_of(tile):28s} {facts[tile]} {' '.join(rows[tile])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append to benchmarks/records")
    parser.add_argument("--variants", action="store_true", help="time other tiles, too")
    parser.add_argument("--quick", action="store_true", help="4096 and 16384 tokens only")
    options = parser.parse_args()
    from nanocupy.cuda.kernels import KernelLoader

    loader = KernelLoader()
    lengths = (4096, 16384) if options.quick else LENGTHS
    problems = [Problem(n, 32, 32, size) for size in (128, 64) for n in lengths]
    problems += [Problem(n, 32, 8, 128) for n in lengths[-2:]]
    lengths_table(loader, torch_or_none(), problems, options.record)
    if options.variants:
        variants_table(loader, (512, 4096, 16384))


if __name__ == "__main__":
    main()
