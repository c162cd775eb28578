"""Decode attention: GB/s of keys and values read, beside the card's read rate and torch's SDPA.

    python -m benchmarks.bench_attention_decode [--record] [--variants] [--plain]
    python -m benchmarks.bench_attention_decode --kv all [--record] [--variants]

One query a sequence, blocks of 16 in shuffled tables. Every time is of graphs of several launches
over rotating caches of more than 256 MB; every launch's result is checked against float64 on
sampled rows first. The ceiling is a kernel that only reads, in the same run. `--variants` times
other shapes of blocks and other cuts of the context in one table. `--kv` reads quantised caches
instead (int8, fp8, or all of them), beside one of 16 bits in the same run: GB/s of codes and
scales, and the time.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.read_ceiling import graph_times_ms, read_ceiling
from benchmarks.records import write_record
from nanocupy.ops.launch_attention_decode import (
    FILE,
    MERGE_ENTRY,
    DecodeLaunch,
    DecodeTuning,
    launch_attention_decode,
)

BLOCK_SIZE = 16
BFLOAT16 = 2  # code of the kernels' SCALAR
KV_CODES = {"bfloat16": BFLOAT16, "int8": 3, "fp8": 4}  # of their CACHE
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
COLD_BYTES = 256 << 20
RUNS = 9
RUN_MS = 4.0
TOLERANCE = 1.6e-2

SHAPES = ((4, 2), (4, 4), (4, 6), (2, 3), (2, 4), (2, 6), (1, 6), (8, 2), (8, 3))
VARIANTS = {
    "default": DecodeTuning(),
    **{f"{w} warps, {s} stages": DecodeTuning(warps=w, stages=s) for w, s in SHAPES},
    **{f"{n} waves": DecodeTuning(waves=n) for n in (1, 2, 8, 16)},
    **{f"parts from {n}": DecodeTuning(least_part_tokens=n) for n in (64, 128, 512, 1024)},
    "one part": DecodeTuning(num_items=1),
    "merge kernel": DecodeTuning(merge_kernel=True),
    "merged by the last": DecodeTuning(merge_kernel=False),
    "tensor cores": DecodeTuning(least_mma_rows=1),
    "plain": DecodeTuning(least_mma_rows=1 << 30),
}


@dataclass(frozen=True)
class Problem:
    sequences: int
    tokens: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    kv: str = "bfloat16"

    @property
    def name(self) -> str:
        group = self.heads // self.kv_heads
        kind = "attention-decode" if self.kv == "bfloat16" else f"kv/{self.kv}"
        return f"{kind}/gqa{group}/d{self.head_size}/s{self.sequences}/t{self.tokens}"

    @property
    def cache_bytes(self) -> int:
        """Of keys and values; codes have a scale of 16 bits for each row."""
        row_bytes = 2 * self.head_size if self.kv == "bfloat16" else self.head_size + 2
        return 2 * self.sequences * self.tokens * self.kv_heads * row_bytes

    @property
    def num_bytes(self) -> int:
        """Keys and values, queries and results, once."""
        return self.cache_bytes + 2 * 2 * self.sequences * self.heads * self.head_size

    @property
    def flops(self) -> int:
        return 4 * self.sequences * self.tokens * self.heads * self.head_size

    @property
    def num_sets(self) -> int:
        return max(2, -(-COLD_BYTES // self.cache_bytes) + 1)

    @property
    def num_calls(self) -> int:
        """Launches in a graph: some milliseconds' worth at 3 TB/s."""
        return max(self.num_sets, min(200, round(RUN_MS / (self.num_bytes / 3e12 * 1e3))))


PROBLEMS = (
    *(Problem(s, t) for s, t in ((32, 8192), (1, 131072), (128, 512), (8, 2048), (1, 512))),
    *(Problem(32, 8192, heads) for heads in (16, 8, 56)),
    Problem(32, 8192, head_size=64),
)
KV_SHAPES = (Problem(32, 8192), Problem(1, 131072), Problem(128, 512), Problem(32, 8192, 56),
             Problem(32, 8192, head_size=64))  # fmt: skip


# ------------------------------------------------------------------------------ our kernel


class Prepared:
    """A problem's buffers on the device: `num_sets` caches, each with a table of its own."""

    def __init__(self, problem: Problem) -> None:
        import cupy

        self.problem = p = problem
        bf16 = np.dtype(ml_dtypes.bfloat16)
        cupy.random.seed(0)

        def normal(*shape: int) -> Any:
            out = cupy.empty(shape, bf16)
            flat = out.reshape(-1)
            for at in range(0, flat.size, 1 << 26):
                part = flat[at : at + (1 << 26)]
                part[...] = cupy.random.standard_normal(part.size, dtype=np.float32).astype(bf16)
            return out

        columns = -(-p.tokens // BLOCK_SIZE)
        blocks = p.sequences * columns
        cache = (blocks + 1, p.kv_heads, BLOCK_SIZE, p.head_size)
        # Codes of about normal rows, by the byte: every row has a scale of its own.
        steps = np.clip(np.arange(256) - 128, -127, 127)
        bytes_of = cupy.asarray(
            steps.astype(np.int8) if p.kv == "int8" else steps.astype(E4M3).view(np.uint8)
        )

        def codes(*shape: int) -> Any:
            out = cupy.empty(shape, bytes_of.dtype)
            flat = out.reshape(-1)
            for at in range(0, flat.size, 1 << 26):
                part = flat[at : at + (1 << 26)]
                x = cupy.random.standard_normal(part.size, dtype=np.float32) * 40 + 128
                part[...] = bytes_of[cupy.clip(x, 0, 255).astype(np.int32)]
            return out

        def scales(*shape: int) -> Any:
            x = cupy.random.random(shape, dtype=np.float32)
            return ((x + np.float32(0.5)) / np.float32(40)).astype(bf16)

        is_quantized = p.kv != "bfloat16"
        made = codes if is_quantized else normal
        self.keys = [made(*cache) for _ in range(p.num_sets)]
        self.values = [made(*cache) for _ in range(p.num_sets)]
        self.key_scales, self.value_scales = (
            [scales(*cache[:3]) if is_quantized else None for _ in range(p.num_sets)]
            for _ in range(2)
        )
        self.queries = normal(p.sequences, p.heads, p.head_size)
        self.out = cupy.empty(self.queries.shape, bf16)
        rng = np.random.default_rng(0)
        self.tables = [
            1 + rng.permutation(blocks).astype(np.int32).reshape(p.sequences, columns)
            for _ in range(p.num_sets)
        ]
        self.device_tables = [cupy.asarray(table) for table in self.tables]
        self.query_starts = cupy.arange(p.sequences + 1, dtype=np.int32)
        self.kv_lens = cupy.full(p.sequences, p.tokens, np.int32)

    def arguments(self, index: int, launch: DecodeLaunch, workspace: tuple[Any, ...]) -> list[Any]:
        p = self.problem
        numbers = (
            p.sequences, p.kv_heads, p.heads // p.kv_heads, BLOCK_SIZE,
            self.tables[0].shape[1], launch.num_items, launch.least_part, launch.num_row_tiles,
        )  # fmt: skip
        return [
            self.queries, self.keys[index], self.values[index], self.key_scales[index],
            self.value_scales[index], self.query_starts, self.kv_lens, self.device_tables[index],
            np.float32(p.head_size**-0.5), self.out, *workspace,
            *(np.int32(n) for n in numbers),
        ]  # fmt: skip

    def _rows(self, cache: Any, scales: Any, group: int, blocks: Any) -> np.ndarray:
        """Keys or values of a sequence and head, float64 [tokens, d]."""
        p = self.problem

        def taken(array: Any, dtype: Any) -> np.ndarray:  # as plain integers
            plain = array.view(np.uint8 if array.itemsize == 1 else np.uint16)
            return plain[:, group].take(blocks, axis=0).get().view(dtype).astype(np.float64)

        bf16 = np.dtype(ml_dtypes.bfloat16)
        dtype = {"bfloat16": bf16, "int8": np.int8, "fp8": E4M3}[p.kv]
        rows = taken(cache, dtype).reshape(-1, p.head_size)
        if scales is not None:
            rows *= taken(scales, bf16).reshape(-1, 1)
        return rows[: p.tokens]

    def worst_error(self, index: int) -> float:
        """|error| / (|wanted| + rms of the row), over sampled rows."""
        import cupy

        p, worst = self.problem, 0.0
        rng = np.random.default_rng(1)
        for _ in range(6):
            b, head = int(rng.integers(p.sequences)), int(rng.integers(p.heads))
            group = head // (p.heads // p.kv_heads)
            blocks = self.device_tables[index][b]
            k = self._rows(self.keys[index], self.key_scales[index], group, blocks)
            v = self._rows(self.values[index], self.value_scales[index], group, blocks)
            query, got = (
                cupy.asnumpy(array[b, head]).astype(np.float64)
                for array in (self.queries, self.out)
            )
            scores = k @ query * p.head_size**-0.5
            weights = np.exp(scores - scores.max())
            wanted = weights @ v / weights.sum()
            error = np.abs(got - wanted) / (np.abs(wanted) + np.sqrt(np.mean(wanted**2)))
            worst = max(worst, float("inf") if np.isnan(error).any() else float(error.max()))
        return worst


def launch_of(loader: Any, problem: Problem, tuning: DecodeTuning) -> DecodeLaunch:
    return launch_attention_decode(
        problem.sequences, problem.heads, problem.kv_heads, problem.head_size,
        max_context=131072, scalar=BFLOAT16, cache=KV_CODES[problem.kv],
        compute_capability=loader.compute_capability,
        num_multiprocessors=loader.num_multiprocessors,
        max_shared_bytes=loader.max_shared_bytes, tuning=tuning,
    )  # fmt: skip


def module_of(problem: Problem, launch: DecodeLaunch) -> dict[str, int]:
    cache = {} if problem.kv == "bfloat16" else {"CACHE": KV_CODES[problem.kv]}
    return {"SCALAR": BFLOAT16, "HEAD_SIZE": problem.head_size, **cache, **launch.macros}


def ours(loader: Any, prepared: Prepared, tuning: DecodeTuning) -> tuple[list[float], Any]:
    """GB/s of each run, and the kernel. Raises RuntimeError where a result is wrong."""
    import cupy

    p = prepared.problem
    launch = launch_of(loader, p, tuning)
    kernel = loader.get(FILE, launch.entry, **module_of(p, launch))
    merge = loader.get(FILE, MERGE_ENTRY, **module_of(p, launch))
    workspace = (
        cupy.full(launch.partial_values_shape, np.nan, np.float32),
        cupy.full(launch.partial_states_shape, np.nan, np.float32),
        None if launch.merge else cupy.zeros(launch.counters_shape, np.uint32),
    )
    calls = []
    for i in range(p.num_sets):
        args = prepared.arguments(i, launch, workspace)
        main = kernel.prepare(launch.grid, (launch.block,), args, launch.shared_bytes)
        after = None
        if launch.merge:
            m = launch.merge
            after = merge.prepare(m.grid, (m.block,), args, m.shared_bytes)
        calls.append((main, after))

    def start(index: int, stream: Any) -> None:
        main, after = calls[index]
        kernel.start(main, stream)
        if after is not None:
            merge.start(after, stream)

    for index in (0, p.num_sets - 1):
        prepared.out.view(np.uint16).fill(0xFFFF)  # NaN
        cupy.cuda.Device().synchronize()
        start(index, cupy.cuda.get_current_stream())
        cupy.cuda.Device().synchronize()
        error = prepared.worst_error(index)
        if not error <= TOLERANCE:
            raise RuntimeError(f"{p.name}, {tuning}: error {error:.3g}, {TOLERANCE} is allowed")

    def body(stream: Any) -> None:
        for i in range(p.num_calls):
            start(i % p.num_sets, stream)

    return [p.num_bytes * p.num_calls / ms / 1e6 for ms in graph_times_ms(body)], kernel


# ------------------------------------------------------------------------------ the peer


def peer(prepared: Prepared) -> tuple[str, float] | None:
    """torch's best on keys and values without pages: (what it was, GB/s), None without torch.

    A group's query heads stand as queries of one head, which spares torch its copies of the keys.
    """
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    p = prepared.problem
    kv = [
        torch.randn(
            p.num_sets, p.sequences, p.kv_heads, p.tokens, p.head_size, device="cuda",
            dtype=torch.bfloat16,
        )
        for _ in range(2)
    ]  # fmt: skip
    group = p.heads // p.kv_heads
    shape = (p.sequences, p.kv_heads, group, p.head_size)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    best: tuple[str, float] | None = None
    for name, backend in (
        ("FlashAttention-2", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):
        try:
            with torch.no_grad(), sdpa_kernel([backend]):
                rate = _peer_rate(torch, p, q, *kv)
        except RuntimeError as exc:
            print(f"  torch SDPA {name} does not run: {str(exc).splitlines()[0][:80]}")
            continue
        if best is None or rate > best[1]:
            best = f"torch SDPA {name}", round(rate, 1)
    del kv, q
    torch.cuda.empty_cache()
    return best


def _peer_rate(torch: Any, problem: Problem, q: Any, keys: Any, values: Any) -> float:
    def launch() -> None:
        for i in range(problem.num_calls):
            j = i % problem.num_sets
            torch.nn.functional.scaled_dot_product_attention(q, keys[j], values[j])

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    times = []
    for _ in range(3 + RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return problem.num_bytes * problem.num_calls / statistics.median(times[3:]) / 1e6


# ------------------------------------------------------------------------------ tables


def main_table(loader: Any, tuning: DecodeTuning, record: bool) -> None:
    import cupy

    device = cupy.cuda.runtime.getDeviceProperties(loader.device)["name"].decode()
    ceiling = read_ceiling(loader)
    cupy.get_default_memory_pool().free_all_blocks()
    print(f"{device}: reads {ceiling:.0f} GB/s")
    print(f"{'GB/s':42s} {'ours':>7s} {'range':>12s} {'share':>6s} {'us':>8s} {'torch':>7s}")
    for problem in PROBLEMS:
        prepared = Prepared(problem)
        rates, _ = ours(loader, prepared, tuning)
        value = statistics.median(rates)
        beside = peer(prepared)
        del prepared
        cupy.get_default_memory_pool().free_all_blocks()
        print(
            f"{problem.name:42s} {value:7.0f} {min(rates):6.0f}-{max(rates):<5.0f} "
            f"{value / ceiling:6.1%} {problem.num_bytes / value / 1e3:8.1f} "
            f"{beside[1] if beside else float('nan'):7.0f}",
            flush=True,
        )
        if record:
            more: dict[str, Any] = {"bytes": problem.num_bytes, "flops": problem.flops}
            more |= {"ceiling": round(ceiling, 1), "share": round(value / ceiling, 4)}
            if beside:
                more |= {"peer": beside[0], "peer_value": beside[1]}
            write_record(
                "attention-decode", problem.name, rates, "GB/s", device=device, dtype="bfloat16",
                **more,
            )  # fmt: skip


def kv_table(loader: Any, kinds: tuple[str, ...], tuning: DecodeTuning, record: bool) -> None:
    """Quantised caches beside one of 16 bits: GB/s of what each holds, and microseconds."""
    import cupy

    device = cupy.cuda.runtime.getDeviceProperties(loader.device)["name"].decode()
    ceiling = read_ceiling(loader)
    cupy.get_default_memory_pool().free_all_blocks()
    print(f"{device}: reads {ceiling:.0f} GB/s")
    print(f"{'GB/s':42s} {'ours':>7s} {'range':>12s} {'share':>6s} {'us':>8s} {'of bf16':>8s}")
    for shape in KV_SHAPES:
        beside: tuple[float, float] | None = None
        for kind in ("bfloat16", *kinds):
            problem = replace(shape, kv=kind)
            prepared = Prepared(problem)
            rates, _ = ours(loader, prepared, tuning)
            del prepared
            cupy.get_default_memory_pool().free_all_blocks()
            value = statistics.median(rates)
            time_us = problem.num_bytes / value / 1e3
            beside = beside or (value, time_us)
            print(
                f"{problem.name:42s} {value:7.0f} {min(rates):6.0f}-{max(rates):<5.0f} "
                f"{value / ceiling:6.1%} {time_us:8.1f} {beside[1] / time_us:7.2f}x",
                flush=True,
            )
            if record and kind != "bfloat16":
                write_record(
                    "kv", problem.name, rates, "GB/s", device=device, dtype="bfloat16",
                    bytes=problem.num_bytes, flops=problem.flops, ceiling=round(ceiling, 1),
                    share=round(value / ceiling, 4), time_us=round(time_us, 2),
                    peer="the same kernel over bfloat16", peer_value=round(beside[0], 1),
                    peer_time_us=round(beside[1], 2), faster=round(beside[1] / time_us, 3),
                )  # fmt: skip


def variants_table(loader: Any, problems: tuple[Problem, ...]) -> None:
    import cupy

    fitting = {
        name: tuning
        for name, tuning in VARIANTS.items()
        if tuning.warps is None or launch_of(loader, problems[0], tuning).block == 32 * tuning.warps
    }
    loader.prefetch(
        (FILE, module_of(problem, launch_of(loader, problem, tuning)))
        for tuning in fitting.values()
        for problem in problems
    )
    rows: dict[str, list[str]] = {name: [] for name in fitting}
    facts: dict[str, str] = {}
    for problem in problems:
        prepared = Prepared(problem)
        for name, tuning in fitting.items():
            try:
                rates, kernel = ours(loader, prepared, tuning)
            except Exception as exc:
                rows[name].append(f"{type(exc).__name__}: {exc}"[:60])
                continue
            launch = launch_of(loader, problem, tuning)
            held = kernel.blocks_per_multiprocessor(launch.block, launch.shared_bytes)
            facts[name] = f"{kernel.num_registers:4d} {kernel.local_bytes:4d} {held:5d}"
            rows[name].append(f"{statistics.median(rates):8.0f} ({launch.num_items:4d} items)")
        del prepared
        cupy.get_default_memory_pool().free_all_blocks()
    print(f"{'GB/s':22s} {'regs':>4s} {'loc.':>4s} {'an SM':>5s}  " + "  ".join(
        f"{p.name.removeprefix('attention-decode/').replace('d128/', ''):>21s}" for p in problems
    ))  # fmt: skip
    for name, cells in rows.items():
        print(f"{name:22s} {facts.get(name, ''):15s}  " + "  ".join(f"{c:>21s}" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append to benchmarks/records")
    parser.add_argument("--variants", action="store_true", help="time other shapes, in one table")
    parser.add_argument("--plain", action="store_true", help="the path without tensor cores")
    parser.add_argument("--kv", choices=("int8", "fp8", "all"), help="quantised caches instead")
    args = parser.parse_args()
    from nanocupy.cuda.kernels import KernelLoader

    loader = KernelLoader()
    tuning = VARIANTS["plain"] if args.plain else DecodeTuning()
    if args.kv is not None:
        kinds = ("int8", "fp8") if args.kv == "all" else (args.kv,)
        kv_table(loader, kinds, tuning, args.record and not args.plain)
        if args.variants:
            variants_table(loader, tuple(replace(KV_SHAPES[0], kv=kind) for kind in kinds))
        return
    main_table(loader, tuning, args.record and not args.plain)
    if args.variants:
        variants_table(loader, PROBLEMS[:7])


if __name__ == "__main__":
    main()
