"""`nanocupy quantize`: any checkpoint to a NanoInfer 2 file with linear layers in fewer bits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanocupy.cli.console import make_table, plain_console
from nanocupy.cli.legacy_options import legacy_options

if TYPE_CHECKING:
    from rich.table import Table

    from nanocupy.exporters.quantizing import QuantizedView


@click.command(short_help="Write a model in int4, int8 or fp8 to a NanoInfer file.")
@click.argument("model")
@click.option(
    "--to",
    "kind",
    required=True,
    type=click.Choice(["int4", "int8", "fp8"]),
    help="What the weights of linear layers become.",
)
@click.option(
    "--group-size",
    type=int,
    metavar="N",
    help="Inputs with one scale; -1 = all of a row. [default: that of most layers which are in "
    "this kind already; else -1 for fp8; else 128, or what of 64, 32, 16 and 8 divides every row]",
)
@click.option(
    "--no-search", is_flag=True, help="Take int4's scales from the largest values, unsearched."
)
@click.option("--lm-head", is_flag=True, help="The LM head, too, where it is not the embedding.")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The NanoInfer file to write.",
)
@legacy_options
def quantize(
    model: str,
    kind: str,
    group_size: int | None,
    no_search: bool,
    lm_head: bool,
    out: Path,
    **of_legacy: Any,
) -> None:
    """Write MODEL with its linear layers in int4, int8 or fp8 to a NanoInfer file.

    MODEL is a file, a folder or a model's name. Embedding, LM head, norms and biases are in 16 bits
    or more. int4 looks for the scale of least squared error in every group; the table says what
    that saved. Layers that MODEL has in this kind and group size already keep their bits, as does
    an LM head in this kind: a GGUF file's Q4_0, Q4_1 and Q4_K are int4 in groups of 32, its Q8_0
    and Q5_0 int8.
    """
    from nanocupy.checkpoint.open import open_checkpoint
    from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
    from nanocupy.exporters.quantizing import QuantizedView
    from nanocupy.hub import resolve_model
    from nanocupy.progress import byte_progress, human_bytes, say

    start_s = time.perf_counter()
    with open_checkpoint(resolve_model(model), **of_legacy) as checkpoint:
        view = QuantizedView(
            checkpoint, kind, group_size=group_size, search=not no_search, lm_head=lm_head
        )
        with byte_progress(f"writing {out.name}", quiet_s=0.5) as report:
            write_nanoinfer2(view, out, progress=report)
        if view.rounded_twice:
            say(
                f"note: {model} has {', '.join(view.rounded_twice)}, which was rounded a second "
                "time; start from the model's 16-bit weights where you can"
            )
        if view.tokenizer is None:
            say("note: the source has no tokenizer, so the file has none")
        plain_console().print(_error_table(view))
    size, seconds = human_bytes(out.stat().st_size), time.perf_counter() - start_s
    click.echo(f"{out}: {size} in {seconds:.1f} s")


def _error_table(view: QuantizedView) -> Table:
    """Mean squared errors by the kind of layer, and of all."""
    from nanocupy.exporters.quantizing import RoundingError

    columns = ["layers", "weights", "nearest", "searched", "of their squares"]
    if not view.search:
        columns.remove("searched")
        columns[columns.index("nearest")] = "squared error"
    right = tuple(range(1, len(columns)))
    table = make_table(f"Weights in {view.metadata['quantized']}", *columns, right=right)
    nothing = RoundingError(0.0, 0.0, 0.0, 0)
    by_part: dict[str, RoundingError] = {}
    for name, error in view.errors.items():
        part = name.split(".")[-2]
        by_part[part] = by_part.get(part, nothing) + error
    for part, error in [*by_part.items(), ("all", sum(by_part.values(), nothing))]:
        count = max(error.count, 1)
        cells = [f"{error.nearest / count:.4g}"]
        if view.search:
            cells.append(f"{error.written / count:.4g}")
        share = error.written / error.weights if error.weights else 0.0
        table.add_row(part, f"{error.count:,}", *cells, f"{share:.3%}")
    return table
