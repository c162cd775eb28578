"""`nanocupy export-qwen`, `export-llama` and `export-gguf`: any checkpoint to a NanoInfer file.

Owns the options, the progress bar and the last line. What can be written, and how, is the
exporters' business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from nanocupy.cli.legacy_options import legacy_options
from nanocupy.errors import ConfigError

_OPTIONS: list[Callable[..., Any]] = [
    click.argument("src"),
    click.argument("out", type=click.Path(path_type=Path)),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        help="Type of the matrices. [default: the source's; float16 for GGUF's quantised types]",
    ),
    click.option("--legacy", is_flag=True, help="Write a legacy NanoInfer file, where one fits."),
    click.option(
        "--legacy-layout",
        type=click.Choice(["A", "B", "C", "D1", "D2"]),
        help="Which legacy layout: A, C and D1 are float32, B and D2 int8. "
        "[default: C for Qwen3, A for LLaMA]",
    ),
]


def _export_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = legacy_options(command)
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command(short_help="Convert Qwen2, Qwen2.5 or Qwen3 to a NanoInfer file.")
@_export_options
def export_qwen(**options: Any) -> None:
    """Convert the Qwen2, Qwen2.5 or Qwen3 model SRC to the NanoInfer file OUT.

    SRC is a Hugging Face folder, a GGUF or NanoInfer file, or a model's name.
    """
    from nanocupy.exporters import qwen

    _export(qwen, **options)


@click.command(short_help="Convert a LLaMA-type model to a NanoInfer file.")
@_export_options
def export_llama(**options: Any) -> None:
    """Convert the model SRC of LLaMA's architecture to the NanoInfer file OUT.

    SRC is a Hugging Face folder, a GGUF or NanoInfer file, or a model's name.
    """
    from nanocupy.exporters import llama

    _export(llama, **options)


@click.command(short_help="Convert a GGUF file to a NanoInfer file.")
@_export_options
def export_gguf(**options: Any) -> None:
    """Convert the GGUF file SRC to the NanoInfer file OUT."""
    from nanocupy.exporters import gguf

    _export(gguf, **options)


def _export(
    family: ModuleType,
    *,
    src: str,
    out: Path,
    dtype: str | None,
    legacy: bool,
    legacy_layout: str | None,
    **of_legacy: Any,
) -> None:
    from nanocupy.checkpoint import open_checkpoint
    from nanocupy.hub import resolve_model
    from nanocupy.progress import byte_progress, human_bytes, say

    start_s = time.perf_counter()
    legacy = legacy or legacy_layout is not None
    if legacy and dtype not in (None, "float32"):
        raise ConfigError(
            f"--dtype is {dtype} but legacy layouts are float32 (A, C, D1) or int8 (B, D2); "
            "leave --dtype or --legacy out"
        )
    with open_checkpoint(resolve_model(src), **of_legacy) as checkpoint:
        family.check_source(checkpoint)
        notes: list[str] = []
        with byte_progress(f"writing {out.name}", quiet_s=0.5) as report:
            if legacy:
                from nanocupy.exporters.legacy import write_legacy

                layout = family.legacy_layout(checkpoint, legacy_layout)
                notes = write_legacy(checkpoint, out, layout=layout, progress=report)
            else:
                from nanocupy.exporters.nanoinfer2 import write_nanoinfer2

                write_nanoinfer2(checkpoint, out, dtype=dtype, progress=report)
                if checkpoint.tokenizer is None:
                    notes.append("the source has no tokenizer, so the file has none")
    for note in notes:
        say(f"note: {note}")
    size, seconds = human_bytes(out.stat().st_size), time.perf_counter() - start_s
    click.echo(f"{out}: {size} in {seconds:.1f} s")
