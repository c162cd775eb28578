"""`nanocupy config`: what the settings are, where each comes from, and a file to start from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from nanocupy.cli.engine_options import engine_options, layered_settings
from nanocupy.engine.config import SETTINGS, EngineConfig, Setting
from nanocupy.errors import ConfigError

_WIDTH = 96
# Text that YAML takes for itself, without quotes; YAML 1.1 has more truth values than 1.2.
_PLAIN_NAME = re.compile(r"(?!(?:null|true|false|on|off|yes|no|y|n)$)[a-z][a-z0-9_]*")


@click.command(short_help="Show the engine's settings, or write a file.")
@click.option("--show", is_flag=True, help="Print every setting (what happens without options).")
@click.option(
    "--init",
    "new_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the settings to a new YAML file, with comments.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options(shown=SETTINGS)
def config(show: bool, new_file: Path | None, as_json: bool, **options: Any) -> None:
    """Show the settings of the engine: their values, where each comes from (default, file or flag),
    their bounds and meaning.

    The same file and flags do the same for generate, chat and bench.
    """
    if new_file is not None and (show or as_json):
        raise ConfigError("--init writes a file and prints nothing; leave --show and --json out")
    settings, sources = layered_settings(options)
    if new_file is not None:
        _write_new(new_file, commented_yaml(settings))
        click.echo(f"wrote {new_file}", err=True)
        return
    if as_json:
        click.echo(json.dumps(_as_objects(settings, sources), indent=2, ensure_ascii=False))
    else:
        click.echo(_listing(settings, sources))


def _as_objects(config: EngineConfig, sources: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "value": getattr(config, name),
            "source": sources[name],
            "default": s.default,
            "unit": s.unit,
            "bounds": s.bounds,
            "changes_while_running": s.live,
            "meaning": s.meaning,
        }
        for name, s in SETTINGS.items()
    }


def _listing(config: EngineConfig, sources: dict[str, str]) -> str:
    """Two lines a setting, which fit a terminal of 80 columns."""
    lines = ["* may change while the engine runs"]
    for name, s in SETTINGS.items():
        unit = f"{s.unit}, " if s.unit else ""
        star = "*" if s.live else " "
        value = as_yaml(getattr(config, name))
        lines.append(f"{star} {name:<22} {value:<9} {sources[name]:<8} {unit}{s.bounds}")
        lines.append(f"      {s.meaning}")
    return "\n".join(lines)


def as_yaml(value: Any) -> str:
    """A setting's value as files write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not _PLAIN_NAME.fullmatch(value):
        return json.dumps(value, ensure_ascii=False)
    text = str(value)  # names need no quotes; Python's floats read back equal
    # Most YAML readers take a number with an exponent for text unless it has a point.
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def commented_yaml(config: EngineConfig) -> str:
    """A settings file that says what each setting means."""
    lines = ["# Settings of the nanocupy engine. What is left out has its default."]
    for name, s in SETTINGS.items():
        details = [s.unit, s.bounds, f"default {as_yaml(s.default)}"]
        if s.live:
            details.append("may change while running")
        lines += [
            "",
            *_comment(s.meaning[0].upper() + s.meaning[1:] + "."),
            *_comment("; ".join(d for d in details if d)),
            f"{name}: {as_yaml(getattr(config, name))}",
        ]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: exists already; give a new name, or move it away") from None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be written: {exc.strerror or exc}") from None


def markdown_table() -> str:
    """The table of docs/configuration.md, which a test compares with it."""
    lines = [
        "| setting | default | unit | bounds | while running | meaning |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_markdown_row(name, s) for name, s in SETTINGS.items()]
    return "\n".join(lines) + "\n"


def _markdown_row(name: str, s: Setting) -> str:
    live = "yes" if s.live else ""
    cells = (f"`{name}`", f"`{as_yaml(s.default)}`", s.unit, s.bounds, live, s.meaning)
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")
