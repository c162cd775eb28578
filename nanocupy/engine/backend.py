"""Chooses the device and builds the runner on it, sized for the machine."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from nanocupy.checkpoint.base import Checkpoint
from nanocupy.checkpoint.untied import untied
from nanocupy.config import EMBEDDING, HEAD_NORM, LM_HEAD, ModelConfig
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.engine import LLMEngine, scheduler_settings
from nanocupy.engine.runner import Runner, RunnerLimits
from nanocupy.errors import ConfigError
from nanocupy.kv_types import QUANTIZED
from nanocupy.progress import byte_progress, say
from nanocupy.strict_json import shown

if TYPE_CHECKING:
    from nanocupy.cuda.device import CudaDevice
    from nanocupy.engine.device_plan import DeviceSettings
    from nanocupy.ops.cuda_sizes import DeviceTraits

BFLOAT16_CAPABILITY = (8, 0)  # older cards have no bfloat16 arithmetic
FP8_CAPABILITY = (8, 9)  # older cards have no conversions of float8


def chosen_device(name: str) -> str:
    """ "cuda" or "cpu": where an engine with `device` = name computes."""
    if name != "auto":
        return name
    from nanocupy.cuda.probe import find_cuda

    return "cuda" if find_cuda().usable else "cpu"


def starting_driver(config: EngineConfig) -> AbstractContextManager[Any]:
    """Within it a GPU that `config` may take gets ready in a thread: for all that comes before
    `make_runner` returns. What is wrong with the GPU, `make_runner` says."""
    if config.device == "cpu" or not ("cupy" in sys.modules or find_spec("cupy")):
        return nullcontext()
    from nanocupy.cuda.driver_start import DriverStart

    return DriverStart()


def make_runner(
    checkpoint: Checkpoint,
    config: EngineConfig,
    *,
    draft: Checkpoint | None = None,
    progress: bool = False,
) -> Runner:
    """A runner for `checkpoint` as `config` says. draft: what `draft_backend.make_draft_runner`
    will need memory for beside it. progress: a bar and notes on stderr.

    Raises DeviceError where the GPU was asked for and cannot be used, ConfigError for settings this
    model or device does not take, CapacityError where the weights do not fit.
    """
    context = model_context(checkpoint.config, config)
    if config.device != "cpu":
        from nanocupy.cuda.probe import find_cuda

        status = find_cuda()
        if config.device == "cuda":
            status.require()
        if status.usable:
            return _cuda_runner(checkpoint, config, context, draft, progress)
        if progress:
            mend = "" if status.driver.problem is not None else f"; {status.mend}"
            say(f"computing on the CPU: {status.reason}{mend}")
    if draft is not None:
        from nanocupy.engine.draft_backend import cpu_shares

        config = cpu_shares(config, checkpoint.config, draft.config, _machine_memory())[0]
    return cpu_runner(checkpoint, config, context, progress)


def model_context(model: ModelConfig, config: EngineConfig) -> int:
    """The longest sequence in tokens. Raises ConfigError for more than the model takes."""
    context = config.max_context or model.max_context
    if context > model.max_context:
        raise ConfigError(
            f"max_context is {context}; this model takes 2 to {model.max_context} tokens"
        )
    return context


def device_settings(config: EngineConfig, compute_capability: tuple[int, int]) -> DeviceSettings:
    """What `config` asks for on a card. Raises ConfigError for dtypes that do not go together."""
    from nanocupy.engine.device_plan import DeviceSettings

    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if compute_capability >= BFLOAT16_CAPABILITY else "float16"
    residual_dtype = dtype if config.residual_dtype == "auto" else config.residual_dtype
    if residual_dtype not in (dtype, "float32"):
        raise ConfigError(
            f"residual_dtype is {residual_dtype} and dtype {dtype}; the residual stream has the "
            "same type, or float32"
        )
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    if kv_dtype != dtype and kv_dtype not in QUANTIZED:
        raise ConfigError(
            f"kv_cache_dtype is {kv_dtype} and dtype {dtype}; they must be the same, or the cache "
            f"{' or '.join(QUANTIZED)}"
        )
    if kv_dtype == "fp8" and compute_capability < FP8_CAPABILITY:
        raise ConfigError(
            "kv_cache_dtype is fp8, which cards from compute capability 8.9 on have; this one is "
            f"{compute_capability[0]}.{compute_capability[1]}: take int8"
        )
    cache_dtype = QUANTIZED.get(kv_dtype, kv_dtype)
    return DeviceSettings(
        dtype, residual_dtype, cache_dtype, config.gpu_memory_utilization,
        two_streams=config.two_streams,
        embed_dtype=None if config.embed_dtype == "auto" else config.embed_dtype,
        lm_head_dtype=None if config.lm_head_dtype == "auto" else config.lm_head_dtype,
    )  # fmt: skip


def device_model(
    checkpoint: Checkpoint, config: EngineConfig, traits: DeviceTraits
) -> tuple[Checkpoint, DeviceSettings, list[str]]:
    """What runs on a card of these traits as `config` says: the model, with an LM head of its own
    where that has another type than the embedding; the types; notes for the user. Raises
    ConfigError, CheckpointError."""
    settings = device_settings(config, traits.compute_capability)
    if settings.weight_dtype(EMBEDDING) != settings.weight_dtype(LM_HEAD):
        checkpoint = untied(checkpoint)
    return checkpoint, *with_weight_formats(settings, checkpoint, config, traits)


def with_weight_formats(
    settings: DeviceSettings, checkpoint: Checkpoint, config: EngineConfig, traits: DeviceTraits
) -> tuple[DeviceSettings, list[str]]:
    """`settings` with the weights that stay quantised on a card of these traits, and notes for the
    user. Raises CheckpointError."""
    from nanocupy.engine.weight_formats import plan_weight_formats
    from nanocupy.ops.cuda_sizes import ITEMSIZES
    from nanocupy.ops.launch_quantized import uses_codes

    multiplies_codes = uses_codes(
        1, ITEMSIZES[settings.dtype], traits.compute_capability, force_plain=traits.force_plain
    )
    formats, notes = plan_weight_formats(
        checkpoint, config.weight_format, multiplies_codes=multiplies_codes
    )
    if settings.lm_head_dtype is not None:  # asked for in floating point
        formats = {name: stored for name, stored in formats.items() if name != LM_HEAD}
    return replace(settings, quantized=formats), notes


def make_engine(
    checkpoint: Checkpoint,
    config: EngineConfig,
    *,
    draft: Checkpoint | None = None,
    progress: bool = False,
) -> LLMEngine:
    """An engine on the runner that `make_runner` gives, with all of `config`. Raises the same.

    draft: what config.draft_model names, where guesses come from it. With NANOCUPY_NVTX=1 in the
    environment, profilers see its requests and steps as ranges.
    """
    from nanocupy.engine.draft_backend import make_speculator

    if config.proposer == "draft" and draft is None:
        raise ConfigError(
            f"draft_model is {shown(config.draft_model)}, but this command opens no draft model; "
            "leave it out, or use bench speculative --draft-shape"
        )
    runner = make_runner(checkpoint, config, draft=draft, progress=progress)
    engine = LLMEngine(
        checkpoint.config,
        runner,
        scheduler_settings(config, runner.limits),
        prefix_cache=config.prefix_cache,
        run_ahead=config.run_ahead and runner.can_run_ahead,
        speculator=make_speculator(config, runner, draft, progress=progress),
    )
    if os.environ.get("NANOCUPY_NVTX", "0") not in ("", "0"):
        from nanocupy.cuda.nvtx import CupyNvtx
        from nanocupy.profiling.ranges import RangeWatch

        engine.watch = RangeWatch(CupyNvtx())
    return engine


def cpu_runner(
    checkpoint: Checkpoint, config: EngineConfig, context: int, progress: bool
) -> Runner:
    """A runner on the CPU, whatever config.device says."""
    from nanocupy.engine.numpy_runner import NumpyRunner
    from nanocupy.engine.weight_formats import quantized_reader
    from nanocupy.model.load import load_numpy_weights

    for name in ("dtype", "residual_dtype"):
        if getattr(config, name) not in ("auto", "float32"):
            raise ConfigError(
                f"{name} is {getattr(config, name)}; the CPU computes in float32 alone"
            )
    if config.kv_cache_dtype not in ("auto", "float32", *QUANTIZED):
        raise ConfigError(
            f"kv_cache_dtype is {config.kv_cache_dtype}; on the CPU it is float32, "
            f"{' or '.join(QUANTIZED)}"
        )
    dtypes = {EMBEDDING: config.embed_dtype, LM_HEAD: config.lm_head_dtype}
    dtypes = {name: "float32" if d == "auto" else d for name, d in dtypes.items()}
    if dtypes[EMBEDDING] != dtypes[LM_HEAD]:
        checkpoint = untied(checkpoint)
    dtypes[HEAD_NORM] = dtypes[LM_HEAD]
    quantized = QUANTIZED.get(config.kv_cache_dtype)
    token_bytes = checkpoint.config.kv_bytes_per_token(quantized or "float32")
    # Pages of the cache are committed as they are written, so a large one costs nothing unused.
    affordable = int(_machine_memory() * config.cpu_cache_share)
    affordable //= token_bytes * config.block_size
    wanted = config.max_num_seqs * -(-context // config.block_size)
    limits = RunnerLimits(
        num_blocks=1 + max(1, min(wanted, affordable)),
        block_size=config.block_size,
        max_context=context,
        max_step_tokens=config.max_step_tokens,
        max_num_seqs=config.max_num_seqs,
        num_host_blocks=_num_host_blocks(config, wanted, token_bytes),
        max_drafts=config.max_drafts,
        max_draft_rows=config.max_draft_rows,
    )
    read_codes, notes = quantized_reader(checkpoint, config.weight_format)
    for note in notes:
        say(note, progress)
    with byte_progress("loading", progress, quiet_s=1.0) as report:
        weights = load_numpy_weights(
            checkpoint, progress=report, quantized=read_codes, dtypes=dtypes
        )
    return NumpyRunner(checkpoint.config, weights, limits, cache_dtype=quantized)


def _cuda_runner(
    checkpoint: Checkpoint,
    config: EngineConfig,
    context: int,
    draft: Checkpoint | None,
    progress: bool,
) -> Runner:
    from nanocupy.cuda.device import CudaDevice
    from nanocupy.engine.device_plan import plan_limits

    device = CudaDevice(use_graphs=config.use_graphs, whole_steps=config.whole_steps)
    checkpoint, settings, notes = device_model(checkpoint, config, device.traits)
    for note in notes:
        say(note, progress)
    beside = None
    if draft is not None:
        draft, own, _ = device_model(draft, config, device.traits)
        beside = draft.config, own
    limits = plan_limits(
        checkpoint.config,
        device,
        settings,
        max_context=context,
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=config.max_step_tokens,
        block_size=config.block_size,
        max_drafts=config.max_drafts,
        max_draft_rows=config.max_draft_rows,
        draft=beside,
    )
    wanted = config.max_num_seqs * -(-context // config.block_size)
    token_bytes = checkpoint.config.kv_bytes_per_token(settings.cache_dtype)
    limits = replace(limits, num_host_blocks=_num_host_blocks(config, wanted, token_bytes))
    return filled_runner(checkpoint, device, limits, settings, progress)


def filled_runner(
    checkpoint: Checkpoint,
    device: CudaDevice,
    limits: RunnerLimits,
    settings: DeviceSettings,
    progress: bool,
) -> Runner:
    """A runner on `device` with its weights there and its kernels ready."""
    from nanocupy.engine.device_runner import DeviceRunner

    runner = DeviceRunner(checkpoint.config, device, limits, settings)
    variants = runner.kernel_variants()
    compiler, arch = device.kernels.compiler, device.kernels.arch
    with ThreadPoolExecutor(2) as pool:  # all take their time, and none needs another
        compiled = pool.submit(compiler.compile_all, variants, arch=arch)
        products = pool.submit(device.prepare_products)
        with byte_progress("loading", progress, quiet_s=1.0) as report:
            runner.upload_weights(checkpoint, report)
        if not compiled.done():
            say("compiling kernels for this GPU, once; later starts find them", progress)
        device.kernels.load(compiled.result())
        products.result()
    return runner


def _num_host_blocks(config: EngineConfig, num_blocks: int, token_bytes: int) -> int:
    """Blocks of host memory for preempted requests: what host_cache_gb holds, and no more than all
    requests can have. A single sequence is never preempted. The memory is taken as it is needed,
    when it is late to find that there is not so much: half the machine's is the most."""
    if config.max_num_seqs == 1 or config.preemption == "recompute":
        return 0
    block_bytes = token_bytes * config.block_size
    num_bytes = min(config.host_cache_bytes, _machine_memory() // 2)
    return min(num_bytes // block_bytes, num_blocks)


def _machine_memory() -> int:
    """Bytes of memory of this machine; a cautious guess where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30
