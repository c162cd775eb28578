"""`nanocupy bench`: how fast this machine runs a shape of model; random weights, no download."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from nanocupy.cli.engine_options import engine_config, engine_options
from nanocupy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nanocupy.bench.measure import Measurement
    from nanocupy.engine.engine import LLMEngine

SHAPE_NAMES = (
    "smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "tinyllama-1.1b", "qwen2.5-7b",
    "qwen3-8b", "llama-3.1-8b",
)  # fmt: skip

_OPTIONS = [
    click.option(
        "--shape",
        type=click.Choice(SHAPE_NAMES),
        default="smollm2-135m",
        show_default=True,
        help="The public model whose dimensions are run.",
    ),
    click.option(
        "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Counted runs."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object a result."),
]


def _bench_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = engine_options()(command)
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise click.BadParameter(f"{value!r} must be whole numbers from 1, as in 1,8,32")
    return numbers


@click.group(short_help="Measure decode and prefill on this machine.")
def bench() -> None:
    """Measure how fast this machine runs a model of a given shape.

    Weights are random, prompts too: nothing is downloaded, and no text makes sense. Each result
    stands beside its floor's work: bytes that must be read, operations that must be done.
    """


@bench.command(short_help="Milliseconds a step, context 128 to 384.")
@click.option(
    "--batch", "batches", default="1", show_default=True, callback=_numbers, help="As in 1,8,32."
)
@_bench_options
def decode(shape: str, repeats: int, as_json: bool, batches: list[int], **options: Any) -> None:
    """Milliseconds of a decode step, from context 128 to 384."""
    from nanocupy.bench import measure

    context = measure.DECODE_PROMPT + measure.DECODE_OUTPUT
    engine, dtype = _engine(shape, options, context, max(batches))
    results = [measure.decode(engine, shape, dtype, batch, repeats) for batch in batches]
    _report(results, engine.runner.device, as_json, per_second=batches)


@bench.command(short_help="Milliseconds to the first token of a prompt.")
@click.option(
    "--tokens",
    "lengths",
    default="512",
    show_default=True,
    callback=_numbers,
    help="As in 512,2048.",
)
@_bench_options
def prefill(shape: str, repeats: int, as_json: bool, lengths: list[int], **options: Any) -> None:
    """Milliseconds from a prompt to its first token."""
    from nanocupy.bench import measure

    engine, dtype = _engine(shape, options, max(lengths) + 1, 1)
    results = [measure.prefill(engine, shape, dtype, tokens, repeats) for tokens in lengths]
    _report(results, engine.runner.device, as_json, per_second=lengths)


def _engine(
    shape: str, options: dict[str, Any], max_context: int, max_num_seqs: int
) -> tuple[LLMEngine, str]:
    """An engine that holds the bench's work, and its dtype."""
    from nanocupy.bench.shapes import SHAPES, random_checkpoint
    from nanocupy.engine.backend import make_engine

    if max_context > SHAPES[shape].max_context:
        raise ConfigError(f"{shape} takes {SHAPES[shape].max_context} tokens, not {max_context}")
    config = engine_config(
        options, max_context=max_context, max_num_seqs=max_num_seqs, prefix_cache=False
    )
    for name, value, needed in (
        ("max_context", config.max_context, max_context),
        ("max_num_seqs", config.max_num_seqs, max_num_seqs),
        ("batch_size", config.num_running, max_num_seqs),
    ):
        if value is not None and value < needed:
            raise ConfigError(f"{name} is {value}; this bench needs {needed} or more")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if config.device == "cuda" else "float32"
    checkpoint = random_checkpoint(shape, dtype)
    return make_engine(checkpoint, config.with_(dtype=dtype), progress=True), dtype


def _report(results: list[Measurement], device: str, as_json: bool, per_second: list[int]) -> None:
    if as_json:
        for result, tokens in zip(results, per_second, strict=True):
            click.echo(
                json.dumps(
                    {
                        "name": result.name,
                        "value": round(result.median, 4),
                        "unit": result.unit,
                        "spread": [round(min(result.values), 4), round(max(result.values), 4)],
                        "tokens_per_second": round(1e3 * tokens / result.median, 2),
                        "device": device,
                        "bytes": result.num_bytes,
                        "flops": result.num_flops,
                    }
                )
            )
        return
    from nanocupy.cli.console import make_table, plain_console

    columns = ("", "ms", "±", "tokens/s", "GB/s", "GFLOP/s")
    table = make_table(f"on {device}", *columns, right=(1, 2, 3, 4, 5))
    for result, tokens in zip(results, per_second, strict=True):
        seconds = result.median / 1e3
        table.add_row(
            result.name,
            f"{result.median:.3f}",
            f"{50 * (max(result.values) - min(result.values)) / result.median:.0f} %",
            f"{tokens / seconds:,.1f}",
            f"{result.num_bytes / seconds / 1e9:,.1f}",
            f"{result.num_flops / seconds / 1e9:,.1f}",
        )
    plain_console().print(table)
