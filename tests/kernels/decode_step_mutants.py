"""Runs the decode step of one launch with bugs planted in it, each of which must be found."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from tests.kernels.decode_step_runs import LARGE_CASES, ShimStep, card_of, check, make
from tests.kernels.test_decode_step import CASES
from tests.kernels.test_decode_step_codes import CASES as CODE_CASES
from tests.kernels.test_decode_step_codes import TILED
from tests.shim.build import KERNELS

Storage = tuple[str, int | None] | None


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the sources, where it is `times` times; found by the case of that name
    with weights of this storage, (kind, inputs of a group), None for 16 bits. The case is one of
    decode_step_runs, of the test of that storage, or "tiles"."""

    name: str
    old: str
    new: str
    case: str = "two, norms of q and k"
    storage: Storage = None
    times: int = 1

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def sources(old: str = "", new: str = "", times: int = 1) -> str:
    """The kernel's text with its own headers in place, changed."""
    seen = set()

    def include(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return text_of(name).replace("#pragma once", "")

    def text_of(name: str) -> str:
        return re.sub(r'#include "(decode_step_\w+\.cuh)"', include, (KERNELS / name).read_text())

    text = text_of("decode_step.cu")
    if old:
        assert text.count(old) == times, f"{old!r} is {text.count(old)} times in the sources"
    return text.replace(old, new) if old else text


def _launch(name: str, storage: Storage, order: int, source: str) -> None:
    """Raises where the step is not that of the ops."""
    case = ((CODE_CASES if storage else CASES) | LARGE_CASES | {"tiles": TILED})[name]
    model, tuning = make(case, "bfloat16", storage=storage)
    check(model, model.launch(ShimStep(order, source), tuning, **card_of(case, model)))


@functools.cache
def _launch_as_it_is(name: str, storage: Storage, order: int) -> None:
    _launch(name, storage, order, sources())


def assert_is_found(mutant: Mutant) -> None:
    """By one order of threads, without which the step is right in the same order."""
    from tests.shim.driver import KernelFault

    planted = sources(mutant.old, mutant.new, mutant.times)
    for order in (0, 1):
        _launch_as_it_is(mutant.case, mutant.storage, order)
        try:
            _launch(mutant.case, mutant.storage, order, planted)
        except (KernelFault, AssertionError):
            return
    raise AssertionError("no step noticed it")
