"""JSON from files nobody vouches for: bounded, strict, and one clear line where it is wrong.

Owns the bounds (size, nesting) and what is refused beyond the JSON grammar: repeated keys, NaN and
infinities, text that cannot be UTF-8. Knows no checkpoint format.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any, NoReturn

from nanocupy.errors import CheckpointError

# A parsed document takes up to some twenty times its text. Configs, indexes and headers are far
# smaller than this even for hundreds of layers; only lists of added tokens grow beyond it.
MAX_JSON_BYTES = 4 << 20
MAX_TOKENIZER_JSON_BYTES = 16 << 20
MAX_DEPTH = 32

_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 80
_shortener.maxlevel = 3
_shortener.maxlist = _shortener.maxdict = _shortener.maxtuple = 6


def shown(value: object) -> str:
    """`value` as an error line shows it: repr, cut short, without control characters."""
    try:
        return _shortener.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number too long to print"


def parse_object(
    data: bytes | memoryview, where: str, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """The JSON object in `data`; `where` names the file (and part) in errors.

    Raises CheckpointError: too large, too deep, not UTF-8, not JSON, not an object, a key twice,
    a number that is not finite.
    """
    if len(data) > max_bytes:
        raise CheckpointError(
            f"{where}: {len(data)} bytes of JSON; nanocupy reads at most {max_bytes}"
        )

    def fail(reason: str) -> NoReturn:
        raise CheckpointError(f"{where}: {reason}") from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    fail(f"the key {shown(key)} occurs twice in one JSON object")
                seen.add(key)
        return found

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            fail(f"the number {shown(text)} is beyond what a float can hold")
        return value

    try:
        document = json.loads(
            str(data, "utf-8"),
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=lambda name: fail(f"{name} is not a number JSON allows"),
        )
    except UnicodeDecodeError as exc:
        fail(f"not UTF-8 text (byte {exc.start}); it is damaged or not JSON")
    except RecursionError:
        fail(f"JSON nested deeper than {MAX_DEPTH} levels")
    except json.JSONDecodeError as exc:
        fail(f"not valid JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}")
    except ValueError:
        fail("a whole number in the JSON has thousands of digits")
    if not isinstance(document, dict):
        fail(f"the JSON is a {type(document).__name__}, not an object")
    _check_contents(document, where)
    return document


def _check_contents(document: dict[str, Any], where: str) -> None:
    """Refuse deep nesting and lone surrogates, which no later step could write out again."""
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            parts = value
            if isinstance(value, dict):
                parts = [*value.keys(), *value.values()]
            for part in parts:
                if isinstance(part, str):
                    if not part.isascii() and any("\ud800" <= c <= "\udfff" for c in part):
                        raise CheckpointError(f"{where}: the text {shown(part)} is not Unicode")
                elif isinstance(part, (dict, list)):
                    below.append(part)
        if not below:
            return
        level = below
    raise CheckpointError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels")


def read_small_file(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
    """The bytes of a file beside the weights; None where there is no such file."""
    try:
        if not path.exists():
            if path.is_symlink():
                raise CheckpointError(
                    f"{path}: a link to a file that is missing; download it again"
                )
            return None
        if not path.is_file():  # a pipe would block, a device never end
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes} bytes, the most nanocupy reads")
    return data


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file."""
    data = read_small_file(path, max_bytes)
    return None if data is None else parse_object(data, str(path), max_bytes)
