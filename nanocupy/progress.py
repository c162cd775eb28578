"""Progress of long work on stderr: a bar on a terminal, a line now and then elsewhere.

It knows bytes or counts and labels, never where they come from.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

Report = Callable[[int, int], None]  # (done, total); a total of 0 is "not known yet"

_PLAIN_INTERVAL_S = 5.0


def say(message: str, enabled: bool = True) -> None:
    """One line to stderr, where anybody is to see it."""
    if enabled:
        print(f"nanocupy: {message}", file=sys.stderr, flush=True)


def human_bytes(num_bytes: float) -> str:
    """ "92.9 MB": decimal units, as downloads and disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


@contextmanager
def byte_progress(label: str, enabled: bool = True, *, quiet_s: float = 0.0) -> Iterator[Report]:
    """Give a function to call with (done_bytes, total_bytes) as often as one likes.

    Nothing is shown before `quiet_s` seconds: what is over sooner needs no bar.
    """
    if not enabled:
        yield lambda done_bytes, total_bytes: None
    elif quiet_s > 0:
        start_s = time.monotonic()
        with ExitStack() as stack:
            shown: list[Report] = []

            def report(done_bytes: int, total_bytes: int) -> None:
                if not shown and time.monotonic() - start_s >= quiet_s:
                    shown.append(stack.enter_context(byte_progress(label)))
                if shown:
                    shown[0](done_bytes, total_bytes)

            yield report
    elif sys.stderr.isatty():
        from rich.progress import DownloadColumn, TransferSpeedColumn

        with _bar(label, DownloadColumn(), TransferSpeedColumn()) as report:
            yield report
    else:
        with _lines(label, human_bytes) as report:
            yield report


@contextmanager
def count_progress(label: str, enabled: bool = True) -> Iterator[Report]:
    """Give a function to call with (done, total) as often as one likes: of things that are counted.

    The bar is drawn twice a second, so that what is measured beside it is not disturbed.
    """
    if not enabled:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from rich.progress import MofNCompleteColumn

        with _bar(label, MofNCompleteColumn(), draws_per_second=2) as report:
            yield report
    else:
        with _lines(label, "{:,}".format) as report:
            yield report


@contextmanager
def _bar(label: str, *columns: Any, draws_per_second: float = 10) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=draws_per_second,
    )
    with bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


@contextmanager
def _lines(label: str, shown: Callable[[int], str]) -> Iterator[Report]:
    last_time_s = time.monotonic()
    num_done = 0
    say(f"{label} …")

    def report(done: int, total: int) -> None:
        nonlocal last_time_s, num_done
        num_done = done
        now_s = time.monotonic()
        if now_s - last_time_s >= _PLAIN_INTERVAL_S:
            last_time_s = now_s
            of = f" of {shown(total)}" if total else ""
            say(f"{label}: {shown(done)}{of}")

    yield report
    say(f"{label}: {shown(num_done)}, done")
