"""How `nanocupy bench` shows what was measured: tables for people, a JSON object a result."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from nanocupy.cli.console import make_table, plain_console

if TYPE_CHECKING:
    from nanocupy.bench.idle import HostTime
    from nanocupy.bench.measure import Measurement
    from nanocupy.bench.speculative import SpeculativeResult
    from nanocupy.bench.startup import Startup
    from nanocupy.bench.throughput import Throughput

SHOWN_SHARE_S = 0.001  # of a part of a start; what takes less is left out for people


def report_times(
    results: list[Measurement],
    device: str,
    as_json: bool,
    tokens: list[int],
    idle: list[HostTime] | None = None,
) -> None:
    """Milliseconds of steps or prompts; `tokens`: how many each of them brings or takes."""
    if as_json:
        for i, (result, count) in enumerate(zip(results, tokens, strict=True)):
            rate = {"tokens_per_second": round(1e3 * count / result.median, 2)}
            more = idle[i].as_dict() if idle else {}
            _print_json(result, device, rate | more)
        return
    columns = ("", "ms", "±", "tokens/s", "GB/s", "GFLOP/s")
    table = make_table(f"on {device}", *columns, right=(1, 2, 3, 4, 5))
    for result, count in zip(results, tokens, strict=True):
        seconds = result.median / 1e3
        table.add_row(
            result.name,
            f"{result.median:.3f}",
            _spread(result),
            f"{count / seconds:,.1f}",
            f"{result.num_bytes / seconds / 1e9:,.1f}",
            f"{result.num_flops / seconds / 1e9:,.1f}",
        )
    console = plain_console()
    console.print(table)
    if idle:
        _print_idle(console, idle)


def report_throughput(found: Throughput, device: str, as_json: bool) -> None:
    """Output tokens a second, and what the run was made of."""
    result = found.result
    if as_json:
        _print_json(result, device, found.details())
        return
    table = make_table(f"on {device}", "", result.name, right=(1,))
    table.add_row("output tokens/s", f"{result.median:,.1f}")
    if len(result.values) > 1:
        table.add_row("±", _spread(result))
    table.add_row("seconds", f"{found.num_output_tokens / result.median:,.2f}")
    table.add_row("steps", f"{found.num_steps:,}")
    table.add_row("preemptions", f"{found.num_preemptions:,}")
    table.add_row("prompt tokens", f"{found.num_prompt_tokens:,}")
    table.add_row("output tokens", f"{found.num_output_tokens:,}")
    plain_console().print(table)


def report_speculative(results: list[SpeculativeResult], device: str, as_json: bool) -> None:
    """Tokens a second, each beside the same batch without guesses, which comes before it."""
    columns = ["", "tokens/s", "±", "x off", "ms/step", "ms/guess", "per forward"]
    has_clock = any(found.device_ms is not None for found in results)
    if has_clock:  # of a step, and before one
        columns += ["GPU ms", "idle"]
    name = results[0].result.name.rpartition("/b")[0]
    table = make_table(f"{name} on {device}", *columns, right=tuple(range(1, len(columns))))
    for found in results:
        result = found.result
        if as_json:
            _print_json(result, device, found.details())
            continue
        table.add_row(
            result.name.removeprefix(f"{name}/"),
            f"{result.median:,.1f}",
            _spread(result),
            f"{found.x_off:.2f}",
            f"{found.step_ms:.3f}",
            f"{found.draft_ms:.3f}",
            f"{found.tokens_per_forward:.2f}",
            *(
                "-" if ms is None else f"{ms:.3f}"
                for ms in (found.device_ms, found.idle_ms)
                if has_clock
            ),
        )
    if not as_json:
        plain_console().print(table)


def report_startup(found: Startup, device: str, as_json: bool) -> None:
    """Seconds to the first token, with kernels in the cache and without."""
    result = found.result
    if as_json:
        _print_json(result, device, found.details())
        return
    table = make_table(f"{result.name} on {device}", "seconds", "usual", "first", right=(1, 2))
    for part, seconds in found.parts.items():
        table.add_row(part, f"{seconds:.3f}", f"{found.cold_parts[part]:.3f}")
        for name, share in found.shares.items():
            if name.startswith(f"{part}/") and share >= SHOWN_SHARE_S:
                table.add_row(f"  {name.partition('/')[2]}", f"{share:.3f}", "")
    table.add_row("to the first token", f"{result.median:.3f}", f"{found.cold_s:.3f}")
    for name, seconds in found.beside.items():
        table.add_row(f"beside it: {name}", f"{seconds:.3f}", "")
    plain_console().print(table)


def _print_json(result: Measurement, device: str, more: dict[str, Any]) -> None:
    click.echo(
        json.dumps(
            {
                "name": result.name,
                "value": round(result.median, 4),
                "unit": result.unit,
                "spread": [round(min(result.values), 4), round(max(result.values), 4)],
                "device": device,
                "bytes": result.num_bytes,
                "flops": result.num_flops,
                **more,
            }
        )
    )


def _spread(result: Measurement) -> str:
    return f"{50 * (max(result.values) - min(result.values)) / result.median:.0f} %"


def _print_idle(console: Any, idle: list[HostTime]) -> None:
    from nanocupy.profiling.step_parts import PARTS

    names = [host.name.rpartition("/")[2] for host in idle]
    table = make_table("microseconds of a step", "", *names, right=tuple(range(1, 1 + len(names))))
    for part in PARTS:
        table.add_row(f"host: {part}", *(f"{host.parts_us[part]:,.1f}" for host in idle))
    table.add_row("host: in all", *(f"{host.step_us:,.1f}" for host in idle))
    measured = [host.idle for host in idle if host.idle is not None]
    if len(measured) == len(idle):
        table.add_row("GPU: step", *(f"{gpu.step_ns / 1e3:,.1f}" for gpu in measured))
        table.add_row("GPU: to the next step", *(f"{gpu.gap_ns / 1e3:,.1f}" for gpu in measured))
        table.add_row("GPU: idle, of all time", *(f"{100 * gpu.share:.1f} %" for gpu in measured))
    console.print(table)
    if len(measured) < len(idle):
        console.print("GPU: not measured, this device has no clock that tells its steps")
