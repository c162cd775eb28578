"""`nanocupy doctor`: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Literal

import click

from nanocupy import __version__
from nanocupy.cli import machine
from nanocupy.cli.console import binary_bytes, make_table, plain_console, plain_text, printable
from nanocupy.cuda.probe import CupyStatus, DriverStatus, dotted, probe_cupy, probe_driver

State = Literal["ok", "missing", "warning", "broken"]

# Distribution names; what the base install needs at run time.
CORE_PACKAGES = (
    *("numpy", "ml-dtypes", "click", "safetensors", "sentencepiece", "tiktoken"),
    *("gguf", "jinja2", "pyyaml", "rich", "pip"),
)
_LOW_DISK_BYTES = 2 << 30
_LOW_MEMORY_BYTES = 2 << 30
_STYLES = {"ok": "green", "missing": "yellow", "warning": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. "missing" is something optional that is not there; only "broken"
    means that what is installed does not work."""

    name: str
    state: State
    detail: str
    mend: str = ""


@click.command(short_help="Check GPU, driver, CuPy and cache; say how to mend.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor(as_json: bool) -> int:
    """Check what nanocupy can use on this machine and say how to mend the rest.

    Exits 0 when what is there fits together (a machine without a GPU does: the CPU is used), and 1
    when something is broken.
    """
    findings = list(examine())
    broken = sum(finding.state == "broken" for finding in findings)
    summary = _summary(findings, broken)
    if as_json:
        report = {
            "nanocupy": __version__,
            "ok": not broken,
            "summary": summary,
            "findings": [asdict(finding) for finding in findings],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        _print(findings, summary)
    return 1 if broken else 0


def examine() -> Iterator[Finding]:
    """Every finding, in the order of the report."""
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield _packages()
    yield Finding("processor", "ok", f"{machine.cpu_name()}, {machine.num_cpus()} usable CPUs")
    yield _memory()
    yield _blas()
    yield from _cache()
    driver = probe_driver()
    yield _driver(driver)
    for device in driver.devices:
        detail = (
            f"{device.name}, compute capability {dotted(device.compute_capability)}, "
            f"{binary_bytes(device.memory_bytes)}, {device.num_multiprocessors} multiprocessors"
        )
        yield Finding(
            f"gpu {device.index}",
            "ok" if device.supported else "warning",
            detail,
            "" if device.supported else "compute capability 7.5 or newer is needed",
        )
    yield from _cupy(driver)


def _packages() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    found, missing = [], []
    for name in CORE_PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(
            "packages",
            "broken",
            f"not installed: {', '.join(missing)}",
            f"pip install {' '.join(missing)}",
        )
    return Finding("packages", "ok", ", ".join(found))


def _memory() -> Finding:
    memory = machine.memory_bytes()
    if memory is None:
        return Finding("memory", "ok", "unknown")
    total, available = memory
    detail = f"{binary_bytes(available)} available of {binary_bytes(total)}"
    if available < _LOW_MEMORY_BYTES:
        return Finding("memory", "warning", detail, "close other programs, or use a smaller model")
    return Finding("memory", "ok", detail)


def _blas() -> Finding:
    if find_spec("numpy") is None:
        return Finding("blas", "broken", "NumPy is not installed", "pip install numpy")
    threads, cpus = machine.blas_threads(), machine.num_cpus()
    detail = machine.blas_name() + (f", {threads} threads" if threads else "")
    if threads and threads > cpus:
        return Finding(
            "blas",
            "warning",
            f"{detail} for {cpus} CPUs, which slows the CPU backend down",
            f"export OPENBLAS_NUM_THREADS={cpus}",
        )
    return Finding("blas", "ok", detail)


def _cache() -> Iterator[Finding]:
    from nanocupy.errors import ConfigError
    from nanocupy.hub.cache import cache_dir

    mend = "set NANOCUPY_CACHE_DIR to a folder you can write to"
    try:
        folder = cache_dir()
    except ConfigError as exc:
        yield Finding("cache", "broken", str(exc), mend)
        return
    reason = machine.can_write(folder)
    if reason is not None:
        yield Finding("cache", "broken", f"{folder} cannot be written: {reason}", mend)
        return
    yield Finding("cache", "ok", str(folder))
    free = machine.free_disk_bytes(folder)
    if free is not None:
        low = free < _LOW_DISK_BYTES
        yield Finding(
            "disk",
            "warning" if low else "ok",
            f"{binary_bytes(free)} free for the cache",
            "make room, or set NANOCUPY_CACHE_DIR to a folder on another disk" if low else "",
        )


def _driver(driver: DriverStatus) -> Finding:
    module = machine.kernel_driver()
    if not driver.installed:
        if module is None:
            return Finding("driver", "missing", "no NVIDIA driver; the CPU is used")
        return Finding(
            "driver",
            "broken",
            f"the kernel module {module} is loaded, but libcuda is not found",
            "install the driver's library (libcuda1), or mount it into the container",
        )
    shown = [f"NVIDIA {module}"] if module else []
    if driver.cuda_version is not None:
        shown.append(f"runs CUDA up to {dotted(driver.cuda_version)}")
    detail = ", ".join(shown) or "version unknown"
    if driver.problem is None:
        return Finding("driver", "ok", detail)
    # A driver without a GPU to drive is a common and harmless state of containers and laptops.
    harmless = not driver.devices and "does not start" not in driver.problem.reason
    return Finding(
        "driver",
        "missing" if harmless else "broken",
        f"{detail}; {driver.problem.reason}",
        driver.problem.mend,
    )


def _cupy(driver: DriverStatus) -> Iterator[Finding]:
    cupy = probe_cupy(driver)
    installed = ", ".join(f"{name} {version}" for name, version in cupy.distributions)
    if not cupy.distributions:
        mend = cupy.problem.mend if cupy.problem and driver.devices else ""
        detail = "not installed" + ("" if mend else "; it is only needed for a GPU")
        yield Finding("cupy", "missing", detail, mend)
        return
    if cupy.problem is None or cupy.imported:
        yield Finding("cupy", "ok", installed + _versions(cupy))
    if cupy.problem is not None:
        name = "cuda libraries" if cupy.imported else "cupy"
        yield Finding(name, "broken", cupy.problem.reason, cupy.problem.mend)


def _versions(cupy: CupyStatus) -> str:
    parts = [("CUDA runtime", cupy.runtime_version), ("NVRTC", cupy.nvrtc_version)]
    shown = "".join(f", {name} {dotted(version)}" for name, version in parts if version)
    return shown + (", cuBLAS loads" if cupy.cublas_loaded else "")


def _summary(findings: list[Finding], broken: int) -> str:
    if broken:
        return f"{broken} broken: mend what is marked"
    gpu = any(f.name.startswith("gpu") and f.state == "ok" for f in findings)
    cupy = any(f.name == "cupy" and f.state == "ok" for f in findings)
    if find_spec("nanocupy.ops.cuda_ops") is None:
        if gpu:
            return "this version of nanocupy computes on the CPU; its CUDA backend is being built"
        return "the CPU backend is ready"
    if gpu and cupy:
        return "the GPU is ready"
    return "the CPU backend is ready" + ("; install CuPy to use the GPU" if gpu else "")


def _print(findings: list[Finding], summary: str) -> None:
    console = plain_console()
    table = make_table(f"nanocupy {__version__}", "", "", "")
    table.show_header = False
    for finding in findings:
        detail = printable(finding.detail)
        if finding.mend:
            detail += f"\n→ {printable(finding.mend)}"
        state = plain_text(finding.state, _STYLES[finding.state])
        table.add_row(plain_text(finding.name), state, detail)
    console.print(table)
    console.print(summary)
