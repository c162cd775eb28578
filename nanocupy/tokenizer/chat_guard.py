"""Keeps users from spelling control tokens: marks them in messages before a template renders.

Owns the marking. Inside every untrusted string, whatever could become (part of) a whole-string
token gets a character that occurs nowhere in the input; after rendering, a token is only where it
is spelled without the mark, that is, where the template wrote it. The marks are then taken out of
the ordinary text. Knows no template engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from nanocupy.errors import TokenizerError

# Private-use planes 15 and 16: never white space, no case, untouched by JSON and normalisation.
_CANDIDATES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_PLAIN_KEY = re.compile(r"\w+\Z")
MAX_DEPTH = 64


class Guard:
    """specials  texts of control tokens; added  texts of the other whole-string tokens, which
    assistants may write (templates cut their messages at "</think>")."""

    def __init__(self, specials: Iterable[str], added: Iterable[str]) -> None:
        specials = list(specials)
        self._strict = _Marker([*specials, *added])
        self._assistant = _Marker(specials)

    def protect(self, messages: list[Any], variables: Mapping[str, Any]) -> tuple[Any, Any, str]:
        """(messages, variables, mark): copies with marks in every string but the roles."""
        mark = _unused_character([messages, dict(variables)])
        marked = []
        for message in messages:
            marker = self._strict
            if isinstance(message, Mapping) and message.get("role") == "assistant":
                marker = self._assistant
            if isinstance(message, Mapping):
                body = {key: value for key, value in message.items() if key != "role"}
                body = _map_strings(body, lambda text, m=marker: m.mark(text, mark))
                # The key order of the caller's dict is what `tojson` would show.
                message = {key: message[key] if key == "role" else None for key in message} | body
            marked.append(message)
        guarded = _map_strings(dict(variables), lambda text: self._strict.mark(text, mark))
        return marked, guarded, mark


class _Marker:
    def __init__(self, tokens: list[str]) -> None:
        self._whole = None
        if tokens:
            alternatives = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
            # A look-ahead finds overlapping spellings; case does not matter, as a template may
            # change it.
            self._whole = re.compile(f"(?=({alternatives}))", re.IGNORECASE)
        # Parts of tokens that the next or previous string, or the template, could complete.
        self._heads = {token[:n].lower() for token in tokens for n in range(1, len(token))}
        self._tails = {token[n:].lower() for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def mark(self, text: str, mark: str) -> str:
        if self._whole is None or not text:
            return text
        places = {match.start() + 1 for match in self._whole.finditer(text)}
        # Templates trim white space, so what counts as an end is where the visible text ends.
        start = len(text) - len(text.lstrip())
        end = len(text.rstrip())
        lowered = text.lower() if len(text.lower()) == len(text) else text
        for size in range(1, min(self._longest, end - start + 1)):
            if lowered[end - size : end] in self._heads:
                places.add(end - size + 1)
            if lowered[start : start + size] in self._tails:
                places.add(start + size - 1)
        if not places:
            return text
        cuts = [0, *sorted(places), len(text)]
        return mark.join(text[a:b] for a, b in pairwise(cuts))


def _map_strings(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """`value` rebuilt from plain JSON types, strings changed; other objects are refused."""
    if depth > MAX_DEPTH:
        raise TokenizerError(f"chat: messages are nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        return change(str.__str__(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {
            # Plain names are what templates look up; only others could spell a token.
            change(key) if isinstance(key, str) and not _PLAIN_KEY.match(key) else key: (
                _map_strings(item, change, depth + 1)
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_strings(item, change, depth + 1) for item in value]
    raise TokenizerError(
        f"chat: a {type(value).__name__} cannot be given to a template, only JSON values"
    )


def plain(value: Any) -> Any:
    """`value` rebuilt from plain JSON types; TokenizerError for other objects."""
    return _map_strings(value, lambda text: text)


def _unused_character(value: Any) -> str:
    used: set[str] = set()

    def collect(item: Any, depth: int = 0) -> None:
        if depth > MAX_DEPTH + 2:
            raise TokenizerError(f"chat: messages are nested more than {MAX_DEPTH} levels deep")
        if isinstance(item, str):
            if not item.isascii():
                used.update(item)
        elif isinstance(item, Mapping):
            for key, inner in item.items():
                collect(key, depth + 1)
                collect(inner, depth + 1)
        elif isinstance(item, list | tuple):
            for inner in item:
                collect(inner, depth + 1)

    collect(value)
    for plane in _CANDIDATES:
        for code in plane:
            if chr(code) not in used:
                return chr(code)
    raise TokenizerError("chat: the messages use every private-use character there is")
