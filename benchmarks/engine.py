"""The engine's own benches on a GPU, recorded beside what the card can do in the same run.

    python -m benchmarks.engine decode --shape qwen3-0.6b --batch 1,8,32,128
    python -m benchmarks.engine prefill --shape qwen3-0.6b --tokens 2048,8192
    python -m benchmarks.engine throughput --shape qwen3-0.6b --requests 256
    python -m benchmarks.engine speculative --shape llama-3.1-8b --draft-shape qwen2.5-0.5b
    python -m benchmarks.engine startup --shape qwen3-0.6b

What `nanocupy bench` measures, by the same functions, with random weights of a public shape. Each
result is appended to benchmarks/records/<what>.jsonl, with the floor as its ceiling: its bytes over
the rate of plain reads, or its operations over that of a large cuBLAS product, whichever is
more; a start has none, nor has anything on a CPU.
Guesses stand beside the floor of steps without them, which they can exceed.
Decode steps are also watched: the share of time in which the GPU is idle, and the host's time by
part. `--set NAME=VALUE` changes a setting of the engine; those changed stand in the record.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings, device_name, measure_ceilings
from benchmarks.records import write_record
from nanocupy.bench import idle, measure
from nanocupy.bench.measure import Measurement
from nanocupy.bench.model_file import write_random_model
from nanocupy.bench.shapes import SHAPES, random_checkpoint
from nanocupy.bench.speculative import speculative
from nanocupy.bench.startup import startup
from nanocupy.bench.throughput import Workload, throughput
from nanocupy.engine.backend import make_engine
from nanocupy.engine.config import SETTINGS, EngineConfig, require_known
from nanocupy.engine.engine import LLMEngine
from nanocupy.errors import ConfigError
from nanocupy.progress import byte_progress, count_progress, say

WHAT = ("decode", "prefill", "throughput", "speculative", "startup")
MAX_CHUNK = 8192  # tokens of a prompt computed in one step, unless --set says otherwise


@dataclass(frozen=True)
class Result:
    """A measurement, and what else its record says."""

    measurement: Measurement
    more: dict[str, Any]


def ceiling_of(result: Measurement, ceilings: Ceilings, num_tokens: int = 0) -> float:
    """The best value there could be, in the result's unit: milliseconds, or tokens a second of
    num_tokens in all."""
    seconds = ceilings.seconds(result.num_bytes, result.num_flops)
    return num_tokens / seconds if result.unit == "tok/s" else 1e3 * seconds


def record(what: str, result: Result, ceilings: Ceilings | None, device: str, dtype: str) -> str:
    """Write the record; what it says in a line. ceilings: None for what has none."""
    measured = result.measurement
    common = {
        "device": device,
        "dtype": dtype,
        "bytes": measured.num_bytes,
        "flops": measured.num_flops,
        **result.more,
    }
    if ceilings is None:
        written = write_record(what, measured.name, measured.values, measured.unit, **common)
        return _line(written)
    num_tokens = result.more.get("output_tokens", result.more.get("batch", 0))
    ceiling = ceiling_of(measured, ceilings, num_tokens)
    rates = measured.unit == "tok/s"
    share = measured.median / ceiling if rates else ceiling / measured.median
    written = write_record(
        what,
        measured.name,
        measured.values,
        measured.unit,
        ceiling=round(ceiling, 4),
        share=round(share, 4),
        read_gb_per_s=round(ceilings.bytes_per_s / 1e9, 1),
        product_tflops=round(ceilings.flops_per_s / 1e12, 1),
        **common,
    )
    return f"{_line(written)}, {share:.1%} of {ceiling:,.3f}"


def _line(written: dict[str, Any]) -> str:
    low, high = written["spread"]
    return (
        f"{written['name']:44s} {written['value']:12,.3f} {written['unit']}  "
        f"({low:,.3f} to {high:,.3f})"
    )


def results(args: argparse.Namespace, engine: LLMEngine, shape: str) -> Iterator[Result]:
    """What was asked for, one after the other."""
    dtype, settings = type_label(args), {"settings": args.settings} if args.settings else {}
    if args.what == "decode":
        for batch in args.batch:
            found = measure.decode(engine, shape, dtype, batch, args.repeats)
            watched = idle.decode_idle(engine, shape, dtype, batch)
            yield Result(found, watched.as_dict() | settings)
    elif args.what == "prefill":
        for num_tokens in args.tokens:
            found = measure.prefill(engine, shape, dtype, num_tokens, args.repeats)
            yield Result(found, settings)
    elif args.what == "speculative":
        for batch in args.batch:
            for guessed in speculative(
                engine, shape, dtype, batch, args.acceptance, adaptive=args.adaptive,
                repeats=args.repeats,
            ):  # fmt: skip
                yield Result(guessed.result, guessed.details() | {"batch": batch} | settings)
    else:
        with count_progress("output tokens") as report:
            busy = throughput(engine, shape, dtype, args.workload, args.repeats, report)
        found = busy.result
        if args.settings.get("two_streams"):  # a result of its own, beside that of one stream
            found = replace(found, name=f"{found.name}/two-streams")
        yield Result(found, busy.details() | settings)


def type_label(args: argparse.Namespace) -> str:
    """The dtype, and what the weights are quantised to if that was asked for."""
    weights = args.settings.get("weight_format", "auto")
    return args.dtype if weights in ("auto", "float") else f"{args.dtype}-{weights}"


def engine_for(args: argparse.Namespace, shape: str) -> LLMEngine:
    """An engine for the largest of what was asked for. Raises ConfigError, DeviceError."""
    num_seqs, chunk = 1, 0
    if args.what in ("decode", "speculative"):
        num_seqs = max(args.batch)
        context = measure.DECODE_PROMPT + measure.DECODE_OUTPUT
    elif args.what == "prefill":
        context, chunk = max(args.tokens) + 1, min(max(args.tokens), MAX_CHUNK)
    else:
        num_seqs = min(args.workload.num_requests, 256)
        context, chunk = args.workload.max_context, 2048
    settings = {
        "device": args.device,
        "dtype": args.dtype,
        "max_context": context,
        "max_num_seqs": num_seqs,
        "prefix_cache": False,
        **({"chunk_size": chunk} if chunk else {}),
        **args.settings,
    }
    draft = None
    if args.what == "speculative":
        settings |= {"speculate": "ngram"}
        if args.draft_shape is not None:
            settings |= {"speculate": "draft", "draft_model": args.draft_shape}
            own = SHAPES[args.draft_shape].with_(
                vocab_size=SHAPES[shape].vocab_size, eos_ids=SHAPES[shape].eos_ids
            )
            draft = random_checkpoint(args.draft_shape, args.dtype, seed=1, config=own)
    checkpoint = random_checkpoint(shape, args.dtype)
    return make_engine(checkpoint, EngineConfig(**settings), draft=draft)


def run_startup(args: argparse.Namespace) -> None:
    """The same for starts, each of which is a process of its own."""
    config = {"device": args.device, "dtype": args.dtype, **args.settings}
    more = {"settings": args.settings} if args.settings else {}
    device = device_name() if args.device == "cuda" else args.device
    for shape in args.shape:
        with tempfile.TemporaryDirectory(prefix="nanocupy-bench-") as folder:
            path = Path(folder) / f"{shape}.nano"
            with byte_progress("writing random weights", quiet_s=1.0) as report:
                write_random_model(shape, args.dtype, path, report)
            found = startup(path, shape, args.dtype, config, args.repeats)
        result = Result(found.result, found.details() | more)
        print(record(args.what, result, None, device, args.dtype), flush=True)


def run(args: argparse.Namespace, ceilings: Ceilings | None) -> None:
    """Measure and record everything, a line each on stdout."""
    for shape in args.shape:
        engine = engine_for(args, shape)
        for result in results(args, engine, shape):
            label = type_label(args)
            print(record(args.what, result, ceilings, engine.runner.device, label), flush=True)
        del engine
        gc.collect()  # its memory is the next one's


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `workload` and `settings` are made of it. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--batch", type=_numbers, default=[1], help="of decodes; as in 1,8,32")
    parser.add_argument("--draft-shape", choices=list(SHAPES), help="speculative; else free ones")
    parser.add_argument("--acceptance", type=_shares, default=[0.6, 0.7, 0.8], help="as in 0,0.8")
    parser.add_argument("--adaptive", action="store_true", help="as many guesses as pay")
    parser.add_argument("--tokens", type=_numbers, default=[2048], help="prefill; as in 2048,8192")
    parser.add_argument("--requests", type=int, default=256, help="throughput")
    parser.add_argument("--min-len", type=int, default=100)
    parser.add_argument("--max-len", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    args.shape = args.shape or ["qwen3-0.6b"]
    args.workload = Workload(args.requests, args.min_len, args.max_len)
    given = dict(text.partition("=")[::2] for text in args.set)
    require_known(given)
    args.settings = {name: SETTINGS[name].parse(value) for name, value in given.items()}
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise ConfigError(f"--acceptance is {text!r}; it must be numbers from 0 to 1, as in 0,0.8")
    return shares


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse(argv)
    except ConfigError as exc:
        sys.exit(f"benchmarks.engine: {exc}")
    if args.what == "startup":
        run_startup(args)
        return
    ceilings = None
    if args.device == "cuda":
        ceilings = measure_ceilings(args.dtype)
        say(
            f"reads {ceilings.bytes_per_s / 1e9:,.0f} GB/s, products "
            f"{ceilings.flops_per_s / 1e12:,.0f} TFLOP/s"
        )
    run(args, ceilings)


if __name__ == "__main__":
    main()
