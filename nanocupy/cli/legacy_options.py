"""The options that say what a legacy NanoInfer file leaves unsaid, shared by every command that
opens a model. Their names are the keywords of `open_checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

NAMES = ("legacy_format", "legacy_kind", "rope_scaling", "tokenizer_path")

_OPTIONS: list[Callable[..., Any]] = [
    click.option(
        "--format",
        "legacy_format",
        type=click.Choice(["A", "B", "C", "D"]),
        help="Layout of a legacy NanoInfer file, where its size fits two.",
    ),
    click.option(
        "--kind",
        "legacy_kind",
        type=click.Choice(["llama2", "llama3", "qwen3"]),
        help="Model family of a legacy NanoInfer file.",
    ),
    click.option(
        "--rope-scaling",
        metavar="SCALING",
        help="Of a legacy NanoInfer file, instead of its family's: none, linear:FACTOR or "
        "llama3:FACTOR.",
    ),
    click.option(
        "--tokenizer",
        "tokenizer_path",
        type=click.Path(),
        help="Tokenizer file of a legacy NanoInfer file.",
    ),
]


def legacy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options above, in their order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
