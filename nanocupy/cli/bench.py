"""`nanocupy bench`: how fast this machine runs a shape of model; random weights, no download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from nanocupy.cli.engine_options import COMMON, engine_config, engine_options
from nanocupy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nanocupy.checkpoint import Checkpoint
    from nanocupy.engine.config import EngineConfig
    from nanocupy.engine.engine import LLMEngine

SHAPE_NAMES = (
    "smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "tinyllama-1.1b", "qwen2.5-7b",
    "qwen3-8b", "llama-3.1-8b",
)  # fmt: skip

# On a CPU, where the workload for GPUs would take an hour: requests, shortest, longest.
_CPU_WORKLOAD = (8, 16, 64)

_SHAPE = click.option(
    "--shape",
    type=click.Choice(SHAPE_NAMES),
    default="smollm2-135m",
    show_default=True,
    help="The public model whose dimensions are run.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object a result.")


def _repeats(default: int) -> Callable[..., Any]:
    return click.option(
        "--repeats",
        type=click.IntRange(1),
        default=default,
        show_default=True,
        help="Counted runs.",
    )


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise click.BadParameter(f"{value!r} must be whole numbers from 1, as in 1,8,32")
    return numbers


def _shares(ctx: click.Context, param: click.Parameter, value: str) -> list[float]:
    try:
        shares = [float(part) for part in value.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise click.BadParameter(f"{value!r} must be numbers from 0 to 1, as in 0.6,0.8")
    return shares


@click.group(short_help="Measure decode, prefill, throughput, start-up, guessing.")
def bench() -> None:
    """Measure how fast this machine runs a model of a given shape.

    Weights are random, prompts too: nothing is downloaded, and no text makes sense. Each result
    stands beside its floor's work: bytes that must be read, operations that must be done.
    """


@bench.command(short_help="Milliseconds a step, context 128 to 384.")
@_SHAPE
@click.option(
    "--batch", "batches", default="1", show_default=True, callback=_numbers, help="As in 1,8,32."
)
@click.option(
    "--idle",
    is_flag=True,
    help="Show the host's time by part too, and how long the GPU is idle between steps.",
)
@_repeats(3)
@_JSON
@engine_options()
def decode(
    shape: str, batches: list[int], idle: bool, repeats: int, as_json: bool, **options: Any
) -> None:
    """Milliseconds of a decode step, from context 128 to 384."""
    from nanocupy.bench import measure
    from nanocupy.cli.bench_report import report_times

    context = measure.DECODE_PROMPT + measure.DECODE_OUTPUT
    config = _config(options, context, max(batches))
    engine, dtype = _engine(shape, config, context, max(batches))
    results = [measure.decode(engine, shape, dtype, batch, repeats) for batch in batches]
    host = None
    if idle:
        from nanocupy.bench.idle import decode_idle

        host = [decode_idle(engine, shape, dtype, batch) for batch in batches]
    report_times(results, engine.runner.device, as_json, batches, host)


@bench.command(short_help="Milliseconds to the first token of a prompt.")
@_SHAPE
@click.option(
    "--tokens",
    "lengths",
    default="512",
    show_default=True,
    callback=_numbers,
    help="As in 512,2048.",
)
@_repeats(3)
@_JSON
@engine_options()
def prefill(shape: str, lengths: list[int], repeats: int, as_json: bool, **options: Any) -> None:
    """Milliseconds from a prompt to its first token."""
    from nanocupy.bench import measure
    from nanocupy.cli.bench_report import report_times

    context = max(lengths) + 1
    engine, dtype = _engine(shape, _config(options, context, 1), context, 1)
    results = [measure.prefill(engine, shape, dtype, tokens, repeats) for tokens in lengths]
    report_times(results, engine.runner.device, as_json, lengths)


@bench.command(short_help="Output tokens a second of many requests at once.")
@_SHAPE
@click.option("--requests", type=click.IntRange(1), help="How many. [default: 256; on the CPU 8]")
@click.option(
    "--min-len", type=click.IntRange(1),
    help="Tokens of the shortest prompt, and the shortest output. [default: 100; on the CPU 16]",
)  # fmt: skip
@click.option(
    "--max-len", type=click.IntRange(1),
    help="Tokens of the longest prompt, and the longest output. [default: 1024; on the CPU 64]",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draw.")
@_repeats(1)
@_JSON
@engine_options(shown=(*COMMON, "max_num_seqs", "chunk_size"))
def throughput(
    shape: str,
    requests: int | None,
    min_len: int | None,
    max_len: int | None,
    seed: int,
    repeats: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Output tokens a second: all requests at once, lengths of prompts and outputs uniform.

    The defaults on a GPU are nano-vllm's workload: 256 requests of 100 to 1024 tokens in and out,
    at temperature 0.6, ends of text ignored. Two runs come first that are not counted.
    """
    from nanocupy.bench import throughput as bench_throughput
    from nanocupy.cli.bench_report import report_throughput
    from nanocupy.engine.backend import chosen_device
    from nanocupy.progress import count_progress

    on_gpu = chosen_device(engine_config(options).device) == "cuda"
    usual = bench_throughput.Workload()
    defaults = (usual.num_requests, usual.min_len, usual.max_len) if on_gpu else _CPU_WORKLOAD
    given = (requests, min_len, max_len)
    workload = bench_throughput.Workload(
        *(b if a is None else a for a, b in zip(given, defaults, strict=True)), seed
    )
    num_seqs = min(workload.num_requests, 256)
    config = _config(options, workload.max_context, num_seqs)
    engine, dtype = _engine(shape, config, workload.max_context, 1)
    with count_progress("output tokens") as report:
        found = bench_throughput.throughput(engine, shape, dtype, workload, repeats, report)
    report_throughput(found, engine.runner.device, as_json)


@bench.command(short_help="What guessing tokens ahead costs and brings.")
@_SHAPE
@click.option(
    "--draft-shape", type=click.Choice(SHAPE_NAMES),
    help="The draft model's dimensions. [default: none, guesses cost nothing]",
)  # fmt: skip
@click.option(
    "--batch", "batches", default="1", show_default=True, callback=_numbers, help="As in 1,8,32."
)
@click.option(
    "--acceptance", "acceptances", default="0.6,0.7,0.8", show_default=True, callback=_shares,
    help="How often a guess counts, as in 0,0.8.",
)  # fmt: skip
@click.option(
    "--adaptive", is_flag=True, help="As many guesses as pay, as in use, not always --draft-tokens."
)
@_repeats(3)
@_JSON
@engine_options(shown=(*COMMON, "draft_tokens"))
def speculative(
    shape: str,
    draft_shape: str | None,
    batches: list[int],
    acceptances: list[float],
    adaptive: bool,
    repeats: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Output tokens a second with guesses and without, from context 128 to 384.

    Random weights never guess right, so a coin decides how many guesses count; all else is as in
    use. Shown beside: a step, what finding a guess takes, tokens that a forward gives; on a GPU a
    step by its own clock, and how long it waits for the host before one.
    """
    from nanocupy.bench import measure
    from nanocupy.bench.shapes import SHAPES, random_checkpoint
    from nanocupy.bench.speculative import speculative as bench_speculative
    from nanocupy.cli.bench_report import report_speculative

    context = measure.DECODE_PROMPT + measure.DECODE_OUTPUT
    config = _config(options, context, max(batches))
    if config.draft_model is not None or config.speculate != "auto":
        name = "speculate" if config.speculate != "auto" else "draft_model"
        raise ConfigError(
            f"{name} is {getattr(config, name)}; leave it out here: --draft-shape says what guesses"
        )
    draft = None
    if draft_shape is None:
        config = config.with_(speculate="ngram")
    else:
        config = config.with_(draft_model=draft_shape)
        # One vocabulary, as a draft model must have.
        own = SHAPES[draft_shape].with_(
            vocab_size=SHAPES[shape].vocab_size, eos_ids=SHAPES[shape].eos_ids
        )
        draft = random_checkpoint(draft_shape, _dtype(config), seed=1, config=own)
    engine, dtype = _engine(shape, config, context, max(batches), draft)
    found = [
        result
        for batch in batches
        for result in bench_speculative(
            engine, shape, dtype, batch, acceptances, adaptive=adaptive, repeats=repeats
        )
    ]
    report_speculative(found, engine.runner.device, as_json)


@bench.command(short_help="Seconds from process start to the first token.")
@click.option(
    "--shape",
    type=click.Choice(SHAPE_NAMES),
    help="Random weights in a public model's shape, in a temporary file. [default: smollm2-135m]",
)
@click.option("--model", "-m", metavar="MODEL", help="A model of your own instead.")
@_repeats(3)
@_JSON
@engine_options()
def startup(
    shape: str | None, model: str | None, repeats: int, as_json: bool, **options: Any
) -> None:
    """Seconds from the start of a process to its first token, and where they go.

    Every run is a process of its own. The first has no compiled kernels yet and is shown apart.
    """
    if model is not None and shape is not None:
        raise ConfigError("give --model or --shape, not both")
    import tempfile
    from pathlib import Path

    from nanocupy.bench.model_file import write_random_model
    from nanocupy.bench.startup import startup as bench_startup
    from nanocupy.cli.bench_report import report_startup
    from nanocupy.engine.config import EngineConfig
    from nanocupy.hub import resolve_model
    from nanocupy.progress import byte_progress, count_progress

    config = engine_config(options)
    usual = EngineConfig().to_dict()
    changed = {name: v for name, v in config.to_dict().items() if v != usual[name]}
    dtype = _dtype(config)
    with tempfile.TemporaryDirectory(prefix="nanocupy-bench-") as folder:
        if model is None:
            name = shape or "smollm2-135m"
            path = Path(folder) / f"{name}.nano"
            with byte_progress("writing random weights", quiet_s=1.0) as report:
                write_random_model(name, dtype, path, report)
        else:
            path = Path(resolve_model(model, progress=True))
            name = path.stem
        with count_progress("starts") as report:
            found = bench_startup(path, name, dtype, changed, repeats, report)
    report_startup(found, config.device, as_json)


def _config(
    options: dict[str, Any], max_context: int, max_num_seqs: int, **defaults: Any
) -> EngineConfig:
    """What flags and file say, else what a bench takes."""
    return engine_config(
        options,
        max_context=max_context,
        max_num_seqs=max_num_seqs,
        prefix_cache=False,
        **defaults,
    )


def _engine(
    shape: str,
    config: EngineConfig,
    max_context: int,
    num_seqs: int,
    draft: Checkpoint | None = None,
) -> tuple[LLMEngine, str]:
    """An engine with random weights, and what they are stored in. Raises ConfigError where it would
    not hold num_seqs sequences of max_context tokens."""
    from nanocupy.bench.shapes import SHAPES, random_checkpoint
    from nanocupy.engine.backend import make_engine

    if max_context > SHAPES[shape].max_context:
        raise ConfigError(f"{shape} takes {SHAPES[shape].max_context} tokens, not {max_context}")
    for name, value, needed in (
        ("max_context", config.max_context, max_context),
        ("max_num_seqs", config.max_num_seqs, num_seqs),
        ("batch_size", config.num_running, num_seqs),
    ):
        if value is not None and value < needed:
            raise ConfigError(f"{name} is {value}; this bench needs {needed} or more")
    dtype = _dtype(config)
    checkpoint = random_checkpoint(shape, dtype)
    engine = make_engine(checkpoint, config.with_(dtype=dtype), draft=draft, progress=True)
    quantised = config.weight_format not in ("auto", "float")
    return engine, f"{dtype}-{config.weight_format}" if quantised else dtype


def _dtype(config: EngineConfig) -> str:
    """What weights are stored in."""
    from nanocupy.engine.backend import chosen_device

    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if chosen_device(config.device) == "cuda" else "float32"
