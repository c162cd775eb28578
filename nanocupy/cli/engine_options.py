"""The engine's settings on the command line: `--config FILE` and a flag for each, which wins.

The flags follow the declaration in `nanocupy.engine.config`; nothing about a setting stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import click

from nanocupy.engine.config import SETTINGS, EngineConfig, Setting, read_settings
from nanocupy.errors import ConfigError

# Shown by `--help` of commands with much else to say; the other flags work there all the same.
COMMON = ("device", "dtype", "max_context")
_METAVARS = {int: "N", float: "X", str: "NAME"}


def engine_options(
    *, shown: Collection[str] = COMMON
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the options `--config` and one for each setting. `shown` names the settings that
    the command's help lists."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, setting in reversed(SETTINGS.items()):
            command = _option(setting, hidden=name not in shown)(command)
        more = "" if len(shown) == len(SETTINGS) else " Every setting is a flag too:"
        return click.option(
            "--config",
            "config_file",
            type=click.Path(),
            metavar="FILE",
            help=f"Engine settings, YAML or JSON; flags win.{more}"
            + (" `nanocupy config --show` lists them." if more else ""),
        )(command)

    return decorate


def _option(setting: Setting, *, hidden: bool) -> Callable[..., Any]:
    """Its flag. Values stay text until `engine_config` reads them: "none" is one, and is not the
    same as no flag."""
    default = setting.default
    shown_default = "on" if default is True else "off" if default is False else default
    text = setting.meaning[0].upper() + setting.meaning[1:] + "."
    if default is not None:
        text += f" [default: {shown_default}]"
    if setting.kind is bool:
        return click.option(
            f"{setting.flag}/--no-{setting.flag[2:]}",
            setting.name,
            default=None,
            help=text,
            hidden=hidden,
        )
    return click.option(
        setting.flag,
        setting.name,
        type=click.Choice(setting.choices) if setting.choices else str,
        metavar=None if setting.choices else _METAVARS[setting.kind],
        help=text,
        hidden=hidden,
    )


def layered_settings(
    options: Mapping[str, Any], **command_defaults: Any
) -> tuple[EngineConfig, dict[str, str]]:
    """The configuration that `options` (of `engine_options`) ask for, and where each setting of it
    comes from: "flag", else "file", else "default".

    command_defaults: what this command takes where neither flag nor file says. Raises ConfigError.
    """
    values = dict(command_defaults)
    sources = dict.fromkeys(SETTINGS, "default")
    file = options["config_file"]
    if file is not None:
        from_file = read_settings(file)
        values |= from_file
        sources |= dict.fromkeys(from_file, "file")
    for name, setting in SETTINGS.items():
        given = options[name]
        if given is None:
            continue
        try:
            values[name] = setting.parse(given) if isinstance(given, str) else given
        except ConfigError as exc:
            raise ConfigError(f"{setting.flag}: {exc}") from None
        sources[name] = "flag"
    try:
        return EngineConfig(**values), sources
    except ConfigError as exc:  # one value against another
        raise ConfigError(f"{file} and flags: {exc}" if file else str(exc)) from None


def engine_config(options: Mapping[str, Any], **command_defaults: Any) -> EngineConfig:
    """`layered_settings` less the sources."""
    return layered_settings(options, **command_defaults)[0]
