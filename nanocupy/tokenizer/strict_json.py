"""JSON from untrusted files: bounded, no duplicate keys, every failure one TokenizerError."""

from __future__ import annotations

import json
from typing import Any

from nanocupy.errors import TokenizerError


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise TokenizerError(f"the key {twice[:60]!r} is given twice")
    return fields


def _no_constant(name: str) -> float:
    raise TokenizerError(f"the number {name} is not JSON")


def load_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `data` (UTF-8) holds; TokenizerError, naming `where`, for others."""
    try:
        value = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except TokenizerError as exc:
        raise TokenizerError(f"{where}: {exc}") from None
    except RecursionError:
        raise TokenizerError(f"{where}: nested too deeply") from None
    except UnicodeDecodeError as exc:
        raise TokenizerError(f"{where}: byte {exc.start} is not UTF-8") from None
    except ValueError as exc:
        raise TokenizerError(f"{where}: not JSON: {exc}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{where}: holds a {type(value).__name__}, not an object")
    return value
