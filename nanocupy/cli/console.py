"""Text for the terminal: what comes from files made harmless, and numbers made readable."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def printable(text: object, max_chars: int | None = None) -> str:
    """`text` on one line, with every character that could steer a terminal as a Python escape.

    Files name their tensors and write their templates as they like; escape sequences, line breaks,
    bidirectional overrides and lone surrogates are shown, never sent.
    """
    raw = str(text)
    clipped = raw if max_chars is None or len(raw) <= max_chars else raw[:max_chars] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in clipped)


def binary_bytes(num_bytes: float) -> str:
    """ "1.25 GiB": binary units, as memory is sized."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"


def counted(number: int, noun: str) -> str:
    """ "1 tensor", "272 tensors"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def plain_console() -> Console:
    """A console on stdout that takes no markup and guesses no highlights."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def make_table(title: str, *columns: str, right: tuple[int, ...] = ()) -> Table:
    """A table whose cells are plain text; columns named in `right` are right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(title=plain_text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(
            column,
            justify="right" if i in right else "left",
            overflow="fold",
            no_wrap=i in right,  # a broken number reads as two
        )
    return table


def plain_text(text: object, style: str = "") -> Text:
    """A rich Text of `printable(text)`: brackets in it are no markup."""
    from rich.text import Text

    return Text(printable(text), style=style)
