"""JSON from files nobody vouches for: bounded, strict, and one clear line where it is wrong.

Owns the bounds (size, nesting) and what is refused beyond the JSON grammar: repeated keys, NaN and
infinities, text that cannot be UTF-8. Knows no format; the caller says which error is raised.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from nanocupy.errors import CheckpointError, NanocupyError

# A parsed document takes up to some twenty times its text. Configs, indexes and headers are far
# smaller than this even for hundreds of layers; only lists of added tokens grow beyond it.
MAX_JSON_BYTES = 4 << 20
MAX_TOKENIZER_JSON_BYTES = 16 << 20
MAX_DEPTH = 32
# In UTF-8 a lone surrogate can only be written as an escape.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")

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
    data: bytes | memoryview,
    where: str,
    max_bytes: int = MAX_JSON_BYTES,
    *,
    error: type[NanocupyError] = CheckpointError,
) -> dict[str, Any]:
    """The JSON object in `data`, with or without a byte order mark; `where` names the file (and
    part) in errors.

    Raises `error`: too large, too deep, not UTF-8, not JSON, not an object, a key twice, a number
    that is not finite.
    """

    def fail(reason: str) -> NoReturn:
        raise error(f"{where}: {reason}") from None

    if len(data) > max_bytes:
        fail(f"{len(data)} bytes of JSON; nanocupy reads at most {max_bytes}")

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
            str(data, "utf-8-sig"),
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
    _check_depth(document, fail)
    if _SURROGATE_ESCAPE.search(data):
        _check_text(document, fail)
    return document


def _check_depth(document: dict[str, Any], fail: Callable[[str], NoReturn]) -> None:
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for value in level
            for part in (value.values() if isinstance(value, dict) else value)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return
    fail(f"JSON nested deeper than {MAX_DEPTH} levels")


def _check_text(value: Any, fail: Callable[[str], NoReturn]) -> None:
    """Refuse lone surrogates, which no later step could write out again."""
    if isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            fail(f"the text {shown(value)} is not Unicode")
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_text(key, fail)
            _check_text(part, fail)
    elif isinstance(value, list):
        for part in value:
            _check_text(part, fail)


def read_small_file(
    path: Path, max_bytes: int = MAX_JSON_BYTES, *, error: type[NanocupyError] = CheckpointError
) -> bytes | None:
    """The bytes of a file beside the weights; None where there is no such file. Raises `error`."""
    try:
        if not path.exists():
            if path.is_symlink():
                raise error(f"{path}: a link to a file that is missing; download it again")
            return None
        if not path.is_file():  # a pipe would block, a device never end
            raise error(f"{path}: not a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as exc:
        raise error(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    if len(data) > max_bytes:
        raise error(f"{path}: larger than {max_bytes} bytes, the most nanocupy reads")
    return data


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file. Raises CheckpointError."""
    data = read_small_file(path, max_bytes)
    return None if data is None else parse_object(data, str(path), max_bytes)
