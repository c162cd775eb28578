"""`nanocupy warmup`: kernels compiled beforehand, on a machine with a GPU or for one without."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from nanocupy.cli.bench import SHAPE_NAMES
from nanocupy.cli.engine_options import engine_config, engine_options
from nanocupy.errors import ConfigError

if TYPE_CHECKING:
    from nanocupy.checkpoint.base import Checkpoint
    from nanocupy.engine.config import EngineConfig
    from nanocupy.ops.cuda_sizes import DeviceTraits


@click.command(short_help="Compile a model's GPU kernels into the cache.")
@click.option("--model", "-m", metavar="MODEL", help="The model that will run.")
@click.option("--shape", type=click.Choice(SHAPE_NAMES), help="Or one of a public model's shape.")
@click.option(
    "--arch",
    "archs",
    multiple=True,
    metavar="ARCH",
    help="Compile for cards of this architecture, such as sm_90a; no GPU need be there. May be "
    "given often. [default: this machine's GPU]",
)
@engine_options(shown=("dtype", "max_context", "max_num_seqs", "draft_model"))
def warmup(model: str | None, shape: str | None, archs: tuple[str, ...], **options: Any) -> None:
    """Compile the GPU kernels that a model needs, so that its first start finds them.

    They lie in the cache folder, which NANOCUPY_CACHE_DIR moves: in the build of a container, say
    where it is to lie and give --arch. Settings of the engine that the later runs will have belong
    here too, a draft model among them.
    """
    if (model is None) == (shape is None):
        raise ConfigError("give either --model or --shape")
    config = engine_config(options)
    if config.device == "cpu":
        raise ConfigError("device is cpu; there are no kernels to compile for it")
    from nanocupy.cuda.cards import capability_of, common_cards
    from nanocupy.cuda.compiler import arch_for

    capabilities = [capability_of(arch) for arch in archs]  # all, before anything takes long
    targets = {arch_for(capability): common_cards(capability) for capability in capabilities}
    if not targets:
        from nanocupy.cuda.device import CudaDevice
        from nanocupy.cuda.probe import find_cuda

        status = find_cuda()
        if not status.usable:
            raise ConfigError(
                f"there is no GPU to compile for: {status.reason}; give --arch, as in --arch sm_90a"
            )
        device = CudaDevice()
        targets = {device.kernels.arch: [device.traits]}
    checkpoint = _checkpoint(model, shape)
    draft = _checkpoint(config.draft_model, None) if config.proposer == "draft" else None
    for arch, cards in targets.items():
        _compile(arch, cards, checkpoint, draft, config)


def _checkpoint(model: str | None, shape: str | None) -> Checkpoint:
    if shape is not None:
        from nanocupy.bench.shapes import random_checkpoint

        return random_checkpoint(shape)
    from nanocupy.checkpoint.open import open_checkpoint
    from nanocupy.hub import resolve_model

    return open_checkpoint(resolve_model(model))


def _compile(
    arch: str,
    cards: list[DeviceTraits],
    checkpoint: Checkpoint,
    draft: Checkpoint | None,
    config: EngineConfig,
) -> None:
    """Compile for each of `cards`, all of `arch`, and say what was done. draft: a draft model that
    will run beside it."""
    from nanocupy.cuda.compiler import Compiler
    from nanocupy.engine.backend import device_model, model_context
    from nanocupy.engine.device_kernels import kernel_variants
    from nanocupy.engine.device_plan import draft_limits
    from nanocupy.engine.runner import RunnerLimits
    from nanocupy.progress import count_progress

    start_s = time.monotonic()
    checkpoint, settings, _ = device_model(checkpoint, config, cards[0])
    model = checkpoint.config
    cards = [replace(card, whole_steps=config.whole_steps) for card in cards]
    limits = RunnerLimits(
        num_blocks=2,  # no kernel depends on it
        block_size=config.block_size,
        max_context=model_context(model, config),
        max_step_tokens=config.max_step_tokens,
        max_num_seqs=config.max_num_seqs,
        max_drafts=config.max_drafts,
        max_draft_rows=config.max_draft_rows,
    )
    runners = [(model, settings, limits)]
    if draft is not None:
        draft, settings, _ = device_model(draft, config, cards[0])
        runners.append((draft.config, settings, draft_limits(limits, draft.config)))
    variants = {
        (file, tuple(sorted(macros.items()))): (file, macros)
        for card in cards
        for runner in runners
        for file, macros in kernel_variants(*runner, card, every_size=True)
    }
    compiler = Compiler()
    with count_progress(f"compiling kernels for {arch}") as report:
        cubins = compiler.compile_all(variants.values(), arch=arch, progress=report)
    if any(cubin.path is None for cubin in cubins):
        raise ConfigError(
            f"kernels for {arch} were compiled but cannot be kept: {compiler.cache or 'no folder'} "
            "cannot be written; set NANOCUPY_CACHE_DIR"
        )
    num_found = sum(cubin.from_cache for cubin in cubins)
    click.echo(
        f"{arch}: {len(cubins) - num_found} kernel modules compiled, {num_found} were there, "
        f"{time.monotonic() - start_s:.1f} s; in {compiler.cache}"
    )
