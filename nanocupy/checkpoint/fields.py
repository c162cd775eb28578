"""Typed access to the settings a checkpoint carries, each checked before anything uses it.

Owns the error lines of a wrong setting, and two readings that the Hugging Face and GGUF formats
share: the recommended sampling, and the context that a rotary scaling leaves usable. Knows no
files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from nanocupy.checkpoint.base import GenerationDefaults
from nanocupy.config import MAX_DIMENSION, RopeScaling
from nanocupy.errors import CheckpointError
from nanocupy.strict_json import shown


class Fields:
    """A mapping from a file, read key by key. A key that is absent or null gives the default.

    where    what errors call the mapping: the file, and the part of it
    """

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values

    def fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {reason}") from None

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_DIMENSION
    ) -> int:
        """A whole number in [low, high]; without a default the key must be there."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.fail(f"{key} is missing")
            return default
        # Counts are sometimes written as 8192.0.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            self.fail(f"{key} is {shown(value)}; it must be a whole number from {low} to {high}")
        return value

    def number(
        self, key: str, default: float | None = None, *, low: float = 0.0, high: float = math.inf
    ) -> float:
        """A finite number in [low, high]; without a default the key must be there."""
        value = self.optional_number(key, low=low, high=high)
        if value is None:
            if default is None:
                self.fail(f"{key} is missing")
            return default
        return value

    def optional_number(
        self, key: str, *, low: float = 0.0, high: float = math.inf
    ) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is int and abs(value) < 1 << 63:
            value = float(value)
        if type(value) is not float or not math.isfinite(value) or not low <= value <= high:
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            self.fail(f"{key} is {shown(value)}; it must be a finite number, {bounds}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            self.fail(f"{key} is {shown(value)}; it must be true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(f"{key} is {shown(value)}; it must be text")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of ids, each with a row in the embedding; () where there is none."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                self.fail(
                    f"{key} is {shown(value)}; a token id must be a whole number from 0 to "
                    f"{vocab_size - 1}, the last row of the embedding"
                )
        return tuple(dict.fromkeys(ids))


def generation_defaults(fields: Fields, names: Mapping[str, str]) -> GenerationDefaults:
    """The author's sampling settings; `names` maps GenerationDefaults' fields to file keys."""
    top_k = None
    if fields.has(names["top_k"]):
        top_k = fields.integer(names["top_k"], low=-1)
    return GenerationDefaults(
        temperature=fields.optional_number(names["temperature"]),
        top_k=-1 if top_k == 0 else top_k,  # both formats write 0 for "no limit"
        top_p=fields.optional_number(names["top_p"], high=1.0),
        min_p=fields.optional_number(names["min_p"], high=1.0),
        repetition_penalty=fields.optional_number(names["repetition_penalty"], low=1e-6),
        do_sample=(
            fields.flag(names["do_sample"])
            if "do_sample" in names and fields.has(names["do_sample"])
            else None
        ),
    )


def usable_context(stated: int, scaling: RopeScaling) -> int:
    """Tokens a model can attend to, given the context its file states.

    Linear, dynamic and YaRN scaling are mostly switched on without touching the stated context, so
    the stretched one counts where it is longer; llama3 files state the stretched one already.
    """
    if scaling.kind not in ("linear", "dynamic", "yarn"):
        return stated
    stretched = min((scaling.original_context or stated) * scaling.factor, float(MAX_DIMENSION))
    return max(stated, int(stretched))
