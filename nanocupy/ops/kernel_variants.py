"""Which kernel modules a piece of work needs, found by going through it without launching.

So that they can be compiled all at once and beforehand, instead of one by one as they are met.
"""

from __future__ import annotations

from typing import Any

Variant = tuple[str, dict[str, int | str]]  # file, macros


class VariantCollector:
    """In place of a `KernelLoader`: notes what is asked for; its kernels launch nothing."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, tuple[tuple[str, int | str], ...]], Variant] = {}

    def get(self, file: str, entry: str, **macros: int | str) -> VariantCollector:
        self._found[file, tuple(sorted(macros.items()))] = (file, macros)
        return self

    def launch(self, *args: Any, **options: Any) -> None:
        """Nothing."""

    @property
    def driver(self) -> VariantCollector:
        return self

    def tensor_map(self, *args: Any, **options: Any) -> None:
        """Nothing."""

    @property
    def variants(self) -> list[Variant]:
        """The modules that were asked for."""
        return list(self._found.values())
