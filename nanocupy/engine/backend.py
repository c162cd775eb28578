"""Chooses the device and builds the runner on it, sized for the machine."""

from __future__ import annotations

from nanocupy.checkpoint import Checkpoint
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.errors import ConfigError, DeviceError
from nanocupy.progress import byte_progress, say

BLOCK_SIZE = 16  # tokens
# The share of the machine's memory that the key/value cache may grow to on the CPU.
CPU_CACHE_SHARE = 0.5


def make_runner(
    checkpoint: Checkpoint,
    *,
    device: str,
    max_context: int | None,
    max_num_seqs: int,
    chunk_size: int,
    progress: bool = False,
) -> Runner:
    """A runner for `checkpoint` on `device` ("auto", "cuda" or "cpu").

    Raises DeviceError where the GPU was asked for and cannot be used, ConfigError for settings out
    of bounds, CapacityError where the weights do not fit.
    """
    config = checkpoint.config
    for name, value in (("max_num_seqs", max_num_seqs), ("chunk_size", chunk_size)):
        if not isinstance(value, int) or not 1 <= value <= 65536:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1 to 65536")
    if max_context is not None and not 2 <= max_context <= config.max_context:
        raise ConfigError(
            f"max_context is {max_context}; this model takes 2 to {config.max_context} tokens"
        )
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"device is {device!r}; it must be auto, cuda or cpu")
    if device == "cuda":
        from nanocupy.cuda.probe import find_cuda

        find_cuda().require()
        raise DeviceError(
            "a usable GPU is here, but this version of nanocupy computes on the CPU only; "
            "use --device cpu"
        )
    if device == "auto" and progress:
        say(f"computing on the CPU: {_why_not_cuda()}")
    return _cpu_runner(checkpoint, max_context, max_num_seqs, chunk_size, progress)


def _cpu_runner(
    checkpoint: Checkpoint,
    max_context: int | None,
    max_num_seqs: int,
    chunk_size: int,
    progress: bool,
) -> Runner:
    from nanocupy.engine.numpy_runner import NumpyRunner
    from nanocupy.model.load import load_numpy_weights

    config = checkpoint.config
    context = max_context or config.max_context
    block_bytes = 2 * config.num_layers * config.kv_size * 4 * BLOCK_SIZE
    # Pages of the cache are committed as they are written, so a large one costs nothing unused.
    affordable = int(_machine_memory() * CPU_CACHE_SHARE) // block_bytes
    wanted = max_num_seqs * -(-context // BLOCK_SIZE)
    limits = RunnerLimits(
        num_blocks=1 + max(1, min(wanted, affordable)),
        block_size=BLOCK_SIZE,
        max_context=context,
        max_step_tokens=max(chunk_size, max_num_seqs),
        max_num_seqs=max_num_seqs,
    )
    with byte_progress("loading", progress, quiet_s=1.0) as report:
        weights = load_numpy_weights(checkpoint, progress=report)
    return NumpyRunner(config, weights, limits)


def _why_not_cuda() -> str:
    from nanocupy.cuda.probe import probe_driver

    problem = probe_driver().problem  # asks the driver alone: no CuPy, no context
    if problem is not None:
        return problem.reason
    return "this version of nanocupy has no CUDA backend yet"


def _machine_memory() -> int:
    """Bytes of memory of this machine; a cautious guess where the system does not say."""
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30
