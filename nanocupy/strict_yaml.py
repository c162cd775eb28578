"""YAML settings from files nobody vouches for: one flat mapping of names to plain values.

Owns the grammar that is accepted, a small part of YAML read event by event: comments, `name: value`
lines (or the same between braces), quoted and block text. Lists, nested mappings, anchors, aliases
and tags are refused as they come, so that nothing can multiply. Knows no setting.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NoReturn

from nanocupy.errors import ConfigError
from nanocupy.strict_json import shown

if TYPE_CHECKING:
    import yaml

MAX_YAML_BYTES = 64 << 10

# Plain values as YAML 1.2's core schema reads them. YAML 1.1, PyYAML's own, takes "1e3" for text,
# "on" for true, "010" for eight and "1:30" for ninety.
_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_WHOLE = re.compile(r"[-+]?[0-9]{1,18}")  # a longer one stays text, which no number's check takes
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def parse_flat_mapping(data: bytes, where: str) -> dict[str, Any]:
    """name -> None, bool, int, float or str, from UTF-8 YAML; `where` names the file in errors.

    An empty document is an empty mapping. Raises ConfigError: too large, not UTF-8, not YAML, not
    one mapping, a name twice, anything but a plain value under a name.
    """
    import yaml

    if len(data) > MAX_YAML_BYTES:
        raise ConfigError(f"{where}: {len(data)} bytes; settings have at most {MAX_YAML_BYTES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{where}: byte {exc.start} is not UTF-8 text") from None
    try:
        return _read(text, where)
    except yaml.MarkedYAMLError as exc:
        line = f"line {exc.problem_mark.line + 1}: " if exc.problem_mark else ""
        raise ConfigError(f"{where}: {line}not valid YAML: {exc.problem or exc.context}") from None
    except yaml.YAMLError:  # the reader's own: it has no mark
        raise ConfigError(f"{where}: not valid YAML: a control character") from None
    except (ValueError, OverflowError):  # PyYAML gives an escape beyond Unicode to chr()
        raise ConfigError(f"{where}: not valid YAML: an escape beyond Unicode") from None


def _read(text: str, where: str) -> dict[str, Any]:
    import yaml

    def fail(event: yaml.Event, reason: str) -> NoReturn:
        raise ConfigError(f"{where}: line {event.start_mark.line + 1}: {reason}")

    found: dict[str, Any] = {}
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    is_open, is_over, name = False, False, None
    for event in events:
        if isinstance(event, (yaml.StreamStartEvent, yaml.StreamEndEvent)):
            continue
        if isinstance(event, yaml.DocumentEndEvent):
            is_over = True
        elif isinstance(event, yaml.DocumentStartEvent):
            if is_over:
                fail(event, "a second YAML document; settings are one")
        elif getattr(event, "anchor", None) is not None:
            fail(event, "an anchor or alias (& or *); write each value out, or put it in quotes")
        elif getattr(event, "tag", None) is not None:
            fail(event, f"a tag ({shown(event.tag)}); leave it out")
        elif not is_open:
            if isinstance(event, yaml.MappingStartEvent):
                is_open = True
            elif _is_nothing(event):
                pass  # comments alone
            else:
                fail(event, "settings must be lines of the form name: value")
        elif isinstance(event, yaml.MappingEndEvent):
            is_open = False
        elif not isinstance(event, yaml.ScalarEvent):
            kind = "list" if isinstance(event, yaml.SequenceStartEvent) else "mapping"
            subject = "a name" if name is None else name if name.isidentifier() else shown(name)
            fail(event, f"{subject} is a {kind}; each setting is one plain value")
        elif name is None:
            name = event.value
            if name in found:
                fail(event, f"{shown(name)} is set twice")
        else:
            value = _joined_surrogates(event.value)
            found[name] = _plain_value(value) if event.implicit[0] else value
            name = None
    return found


def _is_nothing(event: yaml.Event) -> bool:
    implicit = getattr(event, "implicit", None)
    return isinstance(implicit, tuple) and implicit[0] and event.value == ""


def _joined_surrogates(text: str) -> str:
    """The text, where JSON's escapes for one character beyond U+FFFF were read as two; a lone half
    stays, for who checks the value."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _plain_value(text: str) -> Any:
    """What an unquoted value stands for."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and not text.lstrip("+-").isdigit():
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text
