"""Jinja2 as Hugging Face sets it up for chat templates, with bounds on work and memory.

Owns the environment. A template is somebody's program: besides Jinja's own sandbox (no attributes
of Python's internals, nothing mutable) every loop, call and growing string is counted against a
budget, so that a template cannot hang or exhaust the machine. Knows no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 2_000_000  # loop turns and calls in one rendering
MAX_TEXT_CHARS = 1 << 26  # of any one string, and of all characters that operations produce
_GROWING_METHODS = frozenset(
    (
        *("replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "format"),
        *("format_map", "translate"),
    )
)
_steps: ContextVar[list[int]] = ContextVar("steps")


def _spend(steps: int = 0, chars: int = 0) -> None:
    budget = _steps.get(None)
    if budget is None:
        budget = [0, 0]
        _steps.set(budget)
    budget[0] += steps
    budget[1] += chars
    if budget[0] > MAX_STEPS:
        raise SecurityError(f"it takes more than {MAX_STEPS} steps")
    if budget[1] > MAX_TEXT_CHARS:
        raise SecurityError(f"it handles more than {MAX_TEXT_CHARS} characters")


def start_budget() -> None:
    """A fresh budget for the rendering that follows in this context."""
    _steps.set([0, 0])


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 32


def _counted(iterable: Iterable[Any]) -> Iterable[Any]:
    """`iterable`, each turn of which costs a step; sized where it is (loop.length)."""
    if isinstance(iterable, str | list | tuple | dict | range):
        _spend(len(iterable))
        return iterable

    def turns() -> Iterator[Any]:
        for item in iterable:
            _spend(1)
            yield item

    return turns()


def _concat(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _spend(1, sum(map(len, texts)))
    return "".join(texts)


def _bounded_range(*args: Any) -> range:
    values = range(*args)
    if len(values) > MAX_STEPS:
        raise SecurityError(f"range({', '.join(map(str, args))}) is too long")
    return values


class _Generation(Extension):
    """Tolerates `{% generation %} … {% endgeneration %}`, which marks what an assistant wrote."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment; templates of it raise TemplateError when they spend too much."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.globals.pop("lipsum", None)
        self.globals.update(
            range=_bounded_range, raise_exception=_raise_exception, strftime_now=_strftime_now
        )
        self.filters.update(tojson=_tojson, _counted=_counted, _concat=_concat)
        for name in ("replace", "join", "center", "indent", "format", "wordwrap", "batch", "slice"):
            self.filters[name] = _checked_filter(name, self.filters[name])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered("_counted", loop.iter)
        _replace_concats(tree)
        return tree.set_environment(self)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        _spend(1)
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str) and name in _GROWING_METHODS:
            _check_growth(name, owner, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if isinstance(left, str | list | tuple):
                _spend(1, _size(left) + _size(right))
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    _spend(1, len(one) * max(other, 0))
            if isinstance(left, int) and isinstance(right, int):
                _spend(1, (left.bit_length() + right.bit_length()) // 8)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and right > 0:
                _spend(1, left.bit_length() * right // 8)
        elif isinstance(left, str):
            _check_format(left, right)
        return super().call_binop(context, operator, left, right)


def _filtered(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _replace_concats(tree: nodes.Node) -> None:
    """`a ~ b` becomes a filter that counts what it joins: Jinja has no hook for this operator."""
    for field, value in tree.iter_fields():
        if isinstance(value, nodes.Node):
            _replace_concats(value)
            if isinstance(value, nodes.Concat):
                parts = nodes.List(value.nodes, lineno=value.lineno)
                setattr(tree, field, _filtered("_concat", parts))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _replace_concats(item)
                    if isinstance(item, nodes.Concat):
                        parts = nodes.List(item.nodes, lineno=item.lineno)
                        value[index] = _filtered("_concat", parts)


def _check_growth(name: str, text: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Charge for what a string method could make at most."""
    if name == "replace" and len(args) >= 2 and all(isinstance(arg, str) for arg in args[:2]):
        count = text.count(args[0])
        _spend(1, len(text) + count * max(0, len(args[1]) - len(args[0])))
    elif name == "join" and args:
        items = args[0]
        if not isinstance(items, str | list | tuple | dict):
            raise SecurityError("join takes a list")
        total = sum(map(_size, items)) + len(items) * len(text)
        _spend(len(items), total)
    elif name in ("center", "ljust", "rjust", "zfill"):
        _spend(1, len(text) + sum(max(0, arg) for arg in args if isinstance(arg, int)))
    elif name == "expandtabs":
        width = args[0] if args and isinstance(args[0], int) else kwargs.get("tabsize", 8)
        _spend(1, len(text) + text.count("\t") * max(0, width))
    elif name in ("format", "format_map"):
        _check_format(text, (args, kwargs))
    else:
        raise SecurityError(f"str.{name} is not available to templates")


def _check_format(text: str, values: Any) -> None:
    """Refuse widths that a format string can blow up with."""
    if re.search(r"[0-9]{5}", text) or "*" in text or re.search(r"\{[^{}]*\{", text):
        raise SecurityError(f"the format {text[:40]!r} has a variable or very large width")
    _spend(1, len(text) + len(str(values)) * (1 + text.count("{") + text.count("%")))


def _checked_filter(name: str, original: Any) -> Any:
    """`original` with its worst case charged first; keeps Jinja's marks on the function."""
    import functools

    passes = getattr(original, "jinja_pass_arg", None) is not None

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        values = args[1:] if passes else args
        subject, rest = values[0] if values else "", [*values[1:], *kwargs.values()]
        if name == "replace" and len(rest) >= 2:
            subject = str(subject)
            grown = subject.count(str(rest[0])) * len(str(rest[1]))
            _spend(1, len(subject) + grown)
        elif name == "join":
            subject = list(_counted(subject))
            args = (args[0], subject, *args[2:]) if passes else (subject, *args[1:])
            glue = max([len(part) for part in rest if isinstance(part, str)], default=0)
            _spend(1, sum(map(_size, subject)) + glue * len(subject))
        elif name == "format":
            _check_format(str(subject), rest)
        else:
            lines = str(subject).count("\n") + 1 if isinstance(subject, str) else 1
            widths = [part if isinstance(part, int) else _size(part) for part in rest]
            _spend(1, _size(subject) + lines * max([0, *widths]))
        return original(*args, **kwargs)

    return checked


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    if (indent is not None and not isinstance(indent, int)) or (indent or 0) > 64:
        raise SecurityError(f"tojson: indent {str(indent)[:20]!r} is too much")
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    _spend(1, len(text))
    return text
