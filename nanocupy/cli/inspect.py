"""`nanocupy inspect`: what a model file holds, whether it is whole, and what memory it needs.

It reads a checkpoint through the checkpoint package's contract alone; no tensor is read unless
`--verify` asks for it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from nanocupy.cli.console import (
    binary_bytes,
    counted,
    make_table,
    plain_console,
    plain_text,
    printable,
)
from nanocupy.cli.legacy_options import legacy_options

if TYPE_CHECKING:
    from nanocupy.checkpoint.base import Checkpoint

_MAX_VALUE_CHARS = 200
_MAX_TEMPLATE_CHARS = 20_000
_MAX_SHOWN_DAMAGE = 20


@click.command(short_help="Show what a model file holds and what it needs.")
@click.argument("model")
@click.option("--verify", is_flag=True, help="Read every tensor and check it; exit 2 on damage.")
@click.option("--tensors", "show_tensors", is_flag=True, help="List every tensor.")
@click.option("--template", "show_template", is_flag=True, help="Print the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@legacy_options
def inspect(
    model: str,
    verify: bool,
    show_tensors: bool,
    show_template: bool,
    as_json: bool,
    **of_legacy: Any,
) -> None:
    """Show what MODEL holds: architecture, tensors, tokenizer, and what memory it needs."""
    from nanocupy.checkpoint.open import open_checkpoint
    from nanocupy.hub import resolve_model

    with open_checkpoint(
        resolve_model(model, progress=not as_json),
        **of_legacy,
    ) as checkpoint:
        report = describe(checkpoint, with_tensors=show_tensors)
        damage = _verify(checkpoint, progress=not as_json) if verify else None
        if damage is not None:
            report["verify"] = {"tensors": len(checkpoint.tensors), "damaged": damage}
        if as_json:
            # ASCII only: nothing a file says can reach the terminal as it is
            click.echo(json.dumps(report, indent=2, ensure_ascii=True, default=str))
        else:
            _print(checkpoint, report, show_tensors, show_template)
        if damage:
            _fail(checkpoint, damage)


def describe(checkpoint: Checkpoint, *, with_tensors: bool = False) -> dict[str, Any]:
    """Everything `inspect` knows, JSON-able."""
    from nanocupy.cli.fit import describe_memory

    config = checkpoint.config
    by_dtype: dict[str, dict[str, int]] = defaultdict(
        lambda: {"tensors": 0, "elements": 0, "nbytes": 0}
    )
    for info in checkpoint.tensors.values():
        row = by_dtype[info.dtype]
        row["tensors"] += 1
        row["nbytes"] += info.nbytes
        elements = 1
        for dimension in info.shape:
            elements *= dimension
        row["elements"] += elements
    report: dict[str, Any] = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "parameters": config.num_parameters,
        "config": config.to_dict(),
        "dtypes": dict(by_dtype),
        "tokenizer": _describe_tokenizer(checkpoint),
        "chat_template": _describe_template(checkpoint.chat_template),
        "generation_defaults": asdict(checkpoint.generation_defaults),
        "memory": describe_memory(config),
        "metadata": dict(checkpoint.metadata),
    }
    if with_tensors:
        report["tensors"] = [asdict(info) for info in checkpoint.tensors.values()]
    return report


def _describe_tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        return None
    return {
        "kind": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": dict(tokenizer.special_tokens),
        "added_tokens": dict(tokenizer.added_tokens),
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "add_bos": tokenizer.add_bos,
        "fingerprint": hashlib.sha256(tokenizer.to_bytes()).hexdigest()[:16],
    }


def _describe_template(template: str | None) -> dict[str, Any] | None:
    if template is None:
        return None
    digest = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
    return {"chars": len(template), "sha256": digest}


def _verify(checkpoint: Checkpoint, *, progress: bool) -> dict[str, str]:
    """Name -> what is wrong, of every damaged tensor."""
    from nanocupy.progress import byte_progress

    damage: dict[str, str] = {}
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    done = 0
    with byte_progress("verifying", progress) as report:
        report(0, total)
        for name, problem in checkpoint.verify():
            if problem is not None:
                damage[name] = problem
            info = checkpoint.tensors.get(name)
            done += info.nbytes if info else 0
            report(done, total)
    return damage


def _fail(checkpoint: Checkpoint, damage: dict[str, str]) -> None:
    from nanocupy.errors import CheckpointError

    first, problem = next(iter(damage.items()))
    raise CheckpointError(
        f"{checkpoint.path}: {len(damage)} of {len(checkpoint.tensors)} tensors damaged, "
        f"first {first}: {problem}; fetch or export the model again"
    )


def _print(
    checkpoint: Checkpoint, report: dict[str, Any], show_tensors: bool, show_template: bool
) -> None:
    from nanocupy.cli.fit import memory_tables

    console = plain_console()
    console.print(_facts_table(report))
    sizes = make_table("Stored", "dtype", "tensors", "elements", "size", right=(1, 2, 3))
    for dtype, row in sorted(report["dtypes"].items()):
        sizes.add_row(
            plain_text(dtype),
            f"{row['tensors']:,}",
            f"{row['elements']:,}",
            binary_bytes(row["nbytes"]),
        )
    console.print(sizes)
    for table in memory_tables(report["memory"]):
        console.print(table)
    console.print(plain_text(report["memory"]["note"], "dim"))
    if show_tensors:
        tensors = make_table("Tensors", "name", "shape", "dtype", "size", right=(3,))
        for info in checkpoint.tensors.values():
            shape = "×".join(str(dimension) for dimension in info.shape)
            tensors.add_row(
                plain_text(info.name), shape, plain_text(info.dtype), binary_bytes(info.nbytes)
            )
        console.print(tensors)
    if show_template and checkpoint.chat_template is not None:
        console.print("Chat template")
        for line in checkpoint.chat_template[:_MAX_TEMPLATE_CHARS].splitlines():
            console.print(plain_text("  " + line))
    if "verify" in report:
        _print_damage(console, report["verify"])


def _print_damage(console: Any, verify: dict[str, Any]) -> None:
    damaged = verify["damaged"]
    if not damaged:
        console.print(f"Verified: all {counted(verify['tensors'], 'tensor')} whole.")
        return
    table = make_table("Damaged", "tensor", "what is wrong")
    for name, problem in list(damaged.items())[:_MAX_SHOWN_DAMAGE]:
        table.add_row(plain_text(name), plain_text(problem))
    if len(damaged) > _MAX_SHOWN_DAMAGE:
        table.add_row(f"and {len(damaged) - _MAX_SHOWN_DAMAGE} more", "")
    console.print(table)


def _facts_table(report: dict[str, Any]) -> Any:
    config = report["config"]
    table = make_table(report["config"]["name"] or report["path"], "", "")
    table.show_header = False
    heads = f"{config['num_heads']} query, {config['num_kv_heads']} key/value"
    rows = [
        ("file", report["path"]),
        ("format", report["format"]),
        ("architecture", config["architecture"]),
        ("parameters", f"{report['parameters']:,}"),
        ("layers", config["num_layers"]),
        ("hidden / feed-forward", f"{config['hidden_size']:,} / {config['intermediate_size']:,}"),
        ("heads", f"{heads}, of {config['head_size']}"),
        ("vocabulary", f"{config['vocab_size']:,}"),
        ("context", f"{config['max_context']:,} tokens"),
        ("rotary", _rotary(config)),
        ("options", _options(config)),
        ("ends at ids", ", ".join(map(str, config["eos_ids"])) or "none"),
        *_tokenizer_rows(report["tokenizer"]),
        ("chat template", _template_row(report["chat_template"])),
        ("recommended sampling", _defaults_row(report["generation_defaults"])),
        *((f"  {key}", value) for key, value in report["metadata"].items()),
    ]
    for name, value in rows:
        table.add_row(printable(name, 60), plain_text(printable(value, _MAX_VALUE_CHARS)))
    return table


def _rotary(config: dict[str, Any]) -> str:
    scaling = config["rope_scaling"]
    base = f"base {config['rope_theta']:,.10g}"
    if scaling["kind"] == "none":
        return base
    original = scaling["original_context"]
    trained = f", from {original:,} tokens" if original else ""
    return f"{base}, {scaling['kind']} scaling by {scaling['factor']:g}{trained}"


def _options(config: dict[str, Any]) -> str:
    names = {
        "tied_lm_head": "LM head is the embedding",
        "has_qkv_bias": "q/k/v bias",
        "has_o_bias": "output bias",
        "has_mlp_bias": "feed-forward bias",
        "has_qk_norm": "q/k norm",
    }
    return ", ".join(label for key, label in names.items() if config[key]) or "none"


def _tokenizer_rows(tokenizer: dict[str, Any] | None) -> list[tuple[str, str]]:
    if tokenizer is None:
        return [("tokenizer", "none in the file; a prompt needs --tokenizer")]
    specials = sorted(tokenizer["special_tokens"].items(), key=lambda item: item[1])
    shown = ", ".join(f"{text} {token_id}" for text, token_id in specials[:8])
    more = f" and {len(specials) - 8} more" if len(specials) > 8 else ""
    return [
        (
            "tokenizer",
            f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} ids, "
            f"fingerprint {tokenizer['fingerprint']}",
        ),
        ("special tokens", (shown or "none") + more),
    ]


def _template_row(template: dict[str, Any] | None) -> str:
    if template is None:
        return "none; prompts are continued as they are"
    return f"{counted(template['chars'], 'character')} (--template shows it)"


def _defaults_row(defaults: dict[str, Any]) -> str:
    said = [f"{key} {value}" for key, value in defaults.items() if value is not None]
    return ", ".join(said) or "none given"
