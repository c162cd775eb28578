"""`nanocupy plan`: what an engine would hold in a GPU's memory, by owner; no GPU need be there."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from nanocupy.cli.bench import SHAPE_NAMES
from nanocupy.cli.console import binary_bytes, make_table, plain_console, printable
from nanocupy.cli.engine_options import engine_config, engine_options
from nanocupy.errors import ConfigError

if TYPE_CHECKING:
    from nanocupy.checkpoint.base import Checkpoint
    from nanocupy.engine.config import EngineConfig
    from nanocupy.ops.cuda_sizes import DeviceTraits

_SHOWN = (
    "dtype", "residual_dtype", "embed_dtype", "lm_head_dtype", "weight_format", "kv_cache_dtype",
    "max_context", "max_num_seqs", "chunk_size", "block_size", "gpu_memory_utilization",
    "whole_steps", "two_streams",
)  # fmt: skip


@click.command(short_help="Show what an engine takes of a GPU's memory.")
@click.option("--model", "-m", metavar="MODEL", help="The model that will run.")
@click.option("--shape", type=click.Choice(SHAPE_NAMES), help="Or one of a public model's shape.")
@click.option(
    "--arch", metavar="ARCH",
    help="Architecture of the card, such as sm_90a. [default: this machine's GPU]",
)  # fmt: skip
@click.option(
    "--memory", "memory_gb", type=click.FloatRange(0.1, 4096), metavar="GB",
    help="Free memory of the card, in GB of 10^9 bytes. [default: this machine's GPU]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@engine_options(shown=_SHOWN)
def plan(
    model: str | None,
    shape: str | None,
    arch: str | None,
    memory_gb: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what an engine with these settings would take of a GPU's memory, by owner, and how many
    tokens its cache would hold. Nothing is loaded, and no GPU need be there.

    It is the plan that a start makes. The driver's context, cuBLAS' workspace and captured graphs
    are not in it; gpu_memory_utilization leaves them room.
    """
    if (model is None) == (shape is None):
        raise ConfigError("give either --model or --shape")
    config = engine_config(options)
    if config.device == "cpu":
        raise ConfigError("device is cpu; a plan is of a GPU's memory")
    card = _card(arch, memory_gb)
    card = replace(card, traits=replace(card.traits, whole_steps=config.whole_steps))
    from nanocupy.progress import say

    report = describe_plan(_checkpoint(model, shape), config, card)
    for note in report["notes"]:
        say(note, not as_json)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)


@dataclass(frozen=True)
class Card:
    """What a plan must know of a GPU."""

    name: str
    traits: DeviceTraits
    num_free_bytes: int

    def free_bytes(self) -> int:
        return self.num_free_bytes


def describe_plan(checkpoint: Checkpoint, config: EngineConfig, card: Card) -> dict[str, Any]:
    """The plan, JSON-able, with notes for the user. Raises CapacityError where the model does not
    fit, ConfigError for what the card does not take."""
    from nanocupy.config import EMBEDDING, LM_HEAD
    from nanocupy.cuda.arena import ArenaPlan
    from nanocupy.engine.backend import device_model, model_context
    from nanocupy.engine.device_plan import buffer_specs, plan_limits

    context = model_context(checkpoint.config, config)
    checkpoint, settings, notes = device_model(checkpoint, config, card.traits)
    limits = plan_limits(
        checkpoint.config, card, settings, max_context=context, max_num_seqs=config.max_num_seqs,
        max_step_tokens=config.max_step_tokens, block_size=config.block_size,
    )  # fmt: skip
    arena = ArenaPlan(buffer_specs(checkpoint.config, card, settings, limits))
    kinds = {name: stored.kind for name, stored in settings.quantized.items()}
    return {
        "card": card.name,
        "free_bytes": card.num_free_bytes,
        "dtype": settings.dtype,
        "residual_dtype": settings.residual_dtype,
        "cache_dtype": settings.cache_dtype,
        **{
            f"{name.split('.')[0]}_dtype": kinds.get(name) or settings.weight_dtype(name)
            for name in (EMBEDDING, LM_HEAD)
        },
        "quantized_weights": len(settings.quantized),
        "bytes_by_owner": arena.bytes_by_owner(),
        "total_bytes": arena.total_bytes,
        "cache_blocks": limits.num_blocks - 1,  # one is the null block
        "cache_tokens": (limits.num_blocks - 1) * limits.block_size,
        "max_context": context,
        "max_num_seqs": config.max_num_seqs,
        "notes": notes,
    }


def _card(arch: str | None, memory_gb: float | None) -> Card:
    if arch is None or memory_gb is None:
        from nanocupy.cuda.probe import find_cuda

        status = find_cuda()
        if not status.usable:
            raise ConfigError(
                f"there is no GPU to plan for: {status.reason}; give --arch and --memory, as in "
                "--arch sm_90a --memory 80"
            )
        from nanocupy.cuda.device import CudaDevice

        device = CudaDevice()
        name, traits, free_bytes = device.name, device.traits, device.free_bytes()
    if arch is not None:
        from nanocupy.cuda.cards import capability_of, common_cards

        # Of the largest card of the architecture, which needs most room.
        name, traits = arch, common_cards(capability_of(arch))[-1]
    if memory_gb is not None:
        free_bytes = int(memory_gb * 1e9)
    return Card(name, traits, free_bytes)


def _checkpoint(model: str | None, shape: str | None) -> Checkpoint:
    if shape is not None:
        from nanocupy.bench.shapes import random_checkpoint

        return random_checkpoint(shape)
    from nanocupy.checkpoint.open import open_checkpoint
    from nanocupy.hub import resolve_model

    return open_checkpoint(resolve_model(model))


def _print(report: dict[str, Any]) -> None:
    title = f"{printable(report['card'])}, {binary_bytes(report['free_bytes'])} free"
    table = make_table(title, "for", "bytes", right=(1,))
    for owner, num_bytes in report["bytes_by_owner"].items():
        table.add_row(owner, binary_bytes(num_bytes))
    table.add_row("in all", binary_bytes(report["total_bytes"]))
    console = plain_console()
    console.print(table)
    console.print(
        f"the cache holds {report['cache_tokens']:,} tokens in {report['cache_dtype']}, for "
        f"{report['max_num_seqs']:,} sequences of up to {report['max_context']:,}"
    )
