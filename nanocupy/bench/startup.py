"""Seconds from the start of a process to its first token, and where they go."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanocupy.bench.measure import Measurement
from nanocupy.errors import NanocupyError

_TIMEOUT_S = 1800
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Startup:
    """Starts of one model. `result` has seconds with a warm kernel cache, its bytes are the model
    file's.

    parts        medians of: start (of Python), import, open (file and tokenizer), device (driver,
                 context and memory), load (weights into place), compile (kernels, or finding them
                 in the cache), first token
    shares       medians of what parts are made of, as far as it is told: "device/arena"
    beside       medians of what other threads did meanwhile
    cold_s       the first start, with an empty kernel cache; the same as others on a CPU
    cold_parts   its parts
    """

    result: Measurement
    parts: dict[str, float]
    shares: dict[str, float]
    beside: dict[str, float]
    cold_s: float
    cold_parts: dict[str, float]

    def details(self) -> dict[str, Any]:
        """All but the result, for JSON."""

        def rounded(parts: dict[str, float]) -> dict[str, float]:
            return {name: round(seconds, 4) for name, seconds in parts.items()}

        return {
            "parts": rounded(self.parts),
            "shares": rounded(self.shares),
            "beside": rounded(self.beside),
            "cold_s": round(self.cold_s, 4),
            "cold_parts": rounded(self.cold_parts),
        }


def startup(
    model: Path,
    name: str,
    dtype: str,
    config: dict[str, Any],
    repeats: int = 3,
    report: Report = lambda done, total: None,
) -> Startup:
    """Start a process for `model` once with no kernels in the cache, then `repeats` times with.

    config: settings of EngineConfig that are not its defaults. The file is in the system's cache
    where memory allows, as it is read each time. report: starts done, and in all. Raises
    NanocupyError with the process's own line where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="nanocupy-bench-") as cache:
        runs = []
        for number in range(1 + repeats):
            runs.append(_run(model, config, cache))
            report(number + 1, 1 + repeats)
    cold, *warm = runs
    return Startup(
        Measurement(
            f"startup/{name}/{dtype}",
            "s",
            tuple(run["seconds"] for run in warm),
            num_bytes=model.stat().st_size if model.is_file() else 0,
            num_flops=0,
        ),
        _medians([run["parts"] for run in warm]),
        _medians([run["shares"] for run in warm]),
        _medians([run["beside"] for run in warm]),
        cold["seconds"],
        cold["parts"],
    )


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """By name; what a run did not do took it no time."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}


def _run(model: Path, config: dict[str, Any], cache: str) -> dict[str, Any]:
    """One start: what `first_token` prints."""
    task = {"model": str(model), "config": config, "started_ns": time.monotonic_ns()}
    command = [sys.executable, "-m", "nanocupy.bench.first_token", json.dumps(task)]
    done = subprocess.run(
        command,
        env={**os.environ, "NANOCUPY_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise NanocupyError(f"{model}: the start failed: {lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
