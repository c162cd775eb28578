"""One line of JSON for each result, in benchmarks/records/: what every speed claim rests on."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "records"


def write_record(
    file: str,
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    device: str,
    dtype: str,
    **more: Any,
) -> dict[str, Any]:
    """Append a result to benchmarks/records/<file>.jsonl, and give it back.

    values: the runs; the record holds their median and, as `spread`, their range. `more`: bytes and
    flops of one unit of work, ceiling (same unit), share of it, peer and peer_value.
    """
    record = {
        "name": name,
        "value": round(statistics.median(values), 4),
        "unit": unit,
        "spread": [round(min(values), 4), round(max(values), 4)],
        "device": device,
        "dtype": dtype,
        "commit": _commit(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        **more,
    }
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{file}.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
    return record


def _module() -> str:
    """What was run, by its name and not by where it lies."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def _commit() -> str:
    """The commit measured, with "+" where the sources differ from it. NANOCUPY_COMMIT says it for a
    copy of the sources without their history."""
    given = os.environ.get("NANOCUPY_COMMIT")
    if given:
        return given
    sources = ("../nanocupy", "../kernels_cu")
    git = ["git", "-C", str(FOLDER.parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", *sources], text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed.strip() else "")
