"""`nanocupy profile`: time by op and by layer, memory by owner, a trace for a viewer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanocupy.cli.bench import SHAPE_NAMES
from nanocupy.cli.console import counted
from nanocupy.errors import CapacityError, ConfigError, NanocupyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nanocupy.profiling.roofline import Roof
    from nanocupy.profiling.timeline import Span


@click.command(short_help="Show where time and memory of a model go.")
@click.option("--model", "-m", metavar="MODEL", help="A model; without it, --shape is run.")
@click.option(
    "--shape",
    type=click.Choice(SHAPE_NAMES),
    help="Random weights in a public model's shape. [default: smollm2-135m]",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
@click.option(
    "--batch", type=click.IntRange(1, 4096), default=1, show_default=True, help="Sequences."
)
@click.option(
    "--prompt", "prompt_tokens", type=click.IntRange(1), default=128, show_default=True,
    help="Tokens of each prompt.",
)  # fmt: skip
@click.option(
    "--output", "output_tokens", type=click.IntRange(2), default=16, show_default=True,
    help="Tokens of each answer.",
)  # fmt: skip
@click.option(
    "--speculate", type=click.Choice(["auto", "off", "draft", "ngram"]), default="auto",
    show_default=True,
    help="What guesses tokens ahead, always as many as it may; auto: draft with a --draft-model.",
)  # fmt: skip
@click.option("--draft-model", metavar="MODEL", help="The model that guesses.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a trace that chrome://tracing or ui.perfetto.dev opens.",
)
@click.option(
    "--html", "page",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page with timeline, roofline, memory and tables, for any browser.",
)  # fmt: skip
@click.option(
    "--nvtx",
    is_flag=True,
    help="Mark requests, steps, layers and ops as ranges for nsys or ncu, under which it runs.",
)
@click.option("--by-layer", is_flag=True, help="A table by layer too.")
@click.option("--json", "as_json", is_flag=True, help="Print the tables as JSON.")
def profile(
    model: str | None,
    shape: str | None,
    device: str,
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
    speculate: str,
    draft_model: str | None,
    trace: Path | None,
    page: Path | None,
    nvtx: bool,
    by_layer: bool,
    as_json: bool,
) -> None:
    """Run random prompts through a model and time every op call.

    Each op is timed on its own, so nothing overlaps, no graph is replayed, and a decode step of few
    sequences is not the one launch that it is in use: shares are right, whole steps are slower
    than `nanocupy bench` shows. GB/s and GFLOP/s are of the bytes and
    operations that an op cannot do without. To see steps as they are in use, with ranges of
    requests and steps alone, run any command under a profiler with NANOCUPY_NVTX=1.
    """
    if model is not None and shape is not None:
        raise ConfigError("give --model or --shape, not both")
    from nanocupy.engine.backend import make_runner
    from nanocupy.engine.config import EngineConfig
    from nanocupy.engine.draft_backend import make_speculator
    from nanocupy.profiling.profile import profile as run_profile
    from nanocupy.profiling.timeline import totals, trace_events, write_trace
    from nanocupy.speculation.policy import DraftPolicy

    ranges = None
    if nvtx:
        from nanocupy.cuda.nvtx import CupyNvtx

        ranges = CupyNvtx()
    checkpoint, itemsize = _checkpoint(model, shape or "smollm2-135m", device)
    context = prompt_tokens + output_tokens
    if context > checkpoint.config.max_context:
        raise ConfigError(
            f"{prompt_tokens} + {output_tokens} tokens; the model's context holds "
            f"{checkpoint.config.max_context}"
        )
    config = EngineConfig(
        device=device, max_context=context, max_num_seqs=batch, speculate=speculate,
        draft_model=draft_model,
    )  # fmt: skip
    draft = None
    if config.proposer == "draft":
        draft, _ = _checkpoint(draft_model, "", device)
    runner = make_runner(checkpoint, config, draft=draft, progress=True)
    speculator = make_speculator(config, runner, draft, progress=True)
    if speculator is not None:
        speculator.policy = DraftPolicy(config.draft_tokens)
    result = run_profile(
        runner, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch,
        itemsize=itemsize, nvtx=ranges, speculator=speculator,
    )  # fmt: skip
    parts = {"prefill": result.prefill, "decode": result.decode}
    memory = result.memory[-1][1]
    tables = {}
    for name, spans in parts.items():
        ops = [span for span in spans if span.track == "ops"]
        tables[name] = {"by_op": totals(ops, lambda s: s.name)}
        if by_layer:
            tables[name]["by_layer"] = totals(ops, _layer, by_time=False)
    if trace is not None:
        events = trace_events([*result.prefill, *result.decode], result.memory)
        _written(trace, lambda: write_trace(trace, events))
    if page is not None:
        from nanocupy.profiling.page import write_page

        name = checkpoint.config.name or checkpoint.config.architecture
        subtitle = (
            f"on {runner.device}: {counted(batch, 'prompt')} of {counted(prompt_tokens, 'token')}, "
            f"{counted(output_tokens, 'token')} of output"
        )
        roof = _roof(runner)
        _written(page, lambda: write_page(page, result, f"Profile of {name}", subtitle, roof))
    if as_json:
        shown = _as_json(tables, parts, memory, runner.device)
        if result.speculation is not None:
            shown["speculation"] = result.speculation.as_dict()
        click.echo(json.dumps(shown))
    else:
        _print(tables, parts, memory, runner.device)
        if result.speculation is not None:
            click.echo(f"guesses: {result.speculation.summary()}")
        if trace is not None:
            click.echo(f"trace written to {trace}; open it in chrome://tracing or ui.perfetto.dev")
        if page is not None:
            click.echo(f"page written to {page}; open it in a browser")


def _written(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as exc:
        raise NanocupyError(f"{path}: cannot be written: {exc.strerror}") from None


def _roof(runner: Any) -> Roof | None:
    """What the device can do; None where it has no memory left to try."""
    from nanocupy.profiling.roofline import measure_roof

    dtype = runner.settings.dtype if hasattr(runner, "settings") else "float32"
    try:
        return measure_roof(getattr(runner, "clock", None), dtype)
    except CapacityError:
        return None


def _checkpoint(model: str | None, shape: str, device: str) -> tuple[Any, int]:
    """What to run, and the bytes of one of its values as the device stores it."""
    from nanocupy.engine.backend import chosen_device

    itemsize = 2 if chosen_device(device) == "cuda" else 4
    if model is None:
        from nanocupy.bench.shapes import random_checkpoint

        return random_checkpoint(shape, "bfloat16" if itemsize == 2 else "float32"), itemsize
    from nanocupy.checkpoint.open import open_checkpoint
    from nanocupy.hub import resolve_model

    return open_checkpoint(resolve_model(model)), itemsize


def _layer(span: Span) -> str:
    return "outside the layers" if span.layer is None else f"layer {span.layer}"


def _steps(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.track == "steps"]


def _as_json(tables: Any, parts: Any, memory: dict[str, int], device: str) -> dict[str, Any]:
    return {
        "device": device,
        "memory_bytes": memory,
        **{
            name: {
                "steps": len(_steps(parts[name])),
                "seconds": sum(span.duration_s for span in _steps(parts[name])),
                **{
                    kind: [
                        {
                            "name": total.key,
                            "calls": total.count,
                            "seconds": total.seconds,
                            "share": total.share,
                            "bytes": total.cost.num_bytes,
                            "flops": total.cost.num_flops,
                        }
                        for total in rows
                    ]
                    for kind, rows in kinds.items()
                },
            }
            for name, kinds in tables.items()
        },
    }


def _print(tables: Any, parts: Any, memory: dict[str, int], device: str) -> None:
    from nanocupy.cli.console import binary_bytes, make_table, plain_console

    console = plain_console()
    for name, kinds in tables.items():
        steps = _steps(parts[name])
        if not steps:
            continue
        milliseconds = 1e3 * sum(span.duration_s for span in steps) / len(steps)
        title = f"{name} on {device}: {counted(len(steps), 'step')} of {milliseconds:.2f} ms"
        for rows in kinds.values():
            columns = ("", "calls", "ms a step", "share", "GB/s", "GFLOP/s")
            table = make_table(title, *columns, right=(1, 2, 3, 4, 5))
            for total in rows:
                table.add_row(
                    total.key,
                    str(total.count),
                    f"{1e3 * total.seconds / len(steps):.3f}",
                    f"{100 * total.share:.1f} %",
                    f"{total.gigabytes_per_second:,.1f}",
                    f"{total.gigaflops_per_second:,.1f}",
                )
            console.print(table)
    table = make_table("memory", "for", "bytes", right=(1,))
    for owner, num_bytes in sorted(memory.items(), key=lambda item: -item[1]):
        table.add_row(owner, binary_bytes(num_bytes))
    console.print(table)
