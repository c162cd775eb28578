"""What runs a kernel in the tests: the host shim, or a GPU. Both take NumPy arrays.

A test is written once, with the fixture `backend`; run on the shim it is part of the plain suite,
on a GPU it is marked `gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from tests.ops.cases import guarded, guards_intact, inner

# Type codes of the kernels' macros; uint8 arrays of a cache hold the bits of float8 e4m3.
CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "uint8": 4}
NO_ROWS: Mapping[int, int] = MappingProxyType({})
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
# (entry, dtype) -> the worst error that `assert_close` saw since this was emptied, as a share of
# |wanted| + rms: what the record of a GPU run tells.
WORST_ERRORS: dict[tuple[str, str], float] = {}


def cache_macro(call: Any) -> dict[str, int]:
    """The macro of a call's cache, where it is quantised."""
    a = call.arguments
    return {} if a["key_scales"] is None else {"CACHE": CODES[a["key_cache"].dtype.name]}


@dataclass(frozen=True)
class Mapped:
    """An argument that a kernel takes as a tensor map of `array`, a matrix of 16-bit values."""

    array: np.ndarray
    box: tuple[int, int]


class Shape(Protocol):
    """As `nanocupy.ops.launch_shapes.LaunchShape`; `cluster` may be missing."""

    grid: tuple[int, ...]
    block: int
    shared_bytes: int


class ShimBackend:
    """Kernels on the CPU. `orders`: each launch is done once in each order of the threads, from the
    same start, and must give the same bits. `changed`: other texts for kernel files, by name."""

    name = "shim"
    has_wgmma = True  # twins of what compute capability 9.0a alone has

    def __init__(
        self, orders: tuple[int, ...] = (0, 1), changed: Mapping[str, str] | None = None
    ) -> None:
        self.orders = orders
        self.changed = changed or {}

    def run(
        self,
        file: str,
        entry: str,
        shape: Shape,
        args: Sequence[Any],
        written: Sequence[int],
        open_rows: Mapping[int, int] = NO_ROWS,
        **macros: int,
    ) -> None:
        """Launch; `written` are the positions of arrays that are updated in place. An empty grid
        is not launched. Writes around an array are found by its guards.

        open_rows: argument -> how many of its first rows may come out one way or another (threads
        that may write to one place); they are given back as zeros."""
        from tests.shim.driver import HostTensorMap, host_kernel

        kernel = host_kernel(file, entry, source=self.changed.get(file), **macros)
        if 0 in shape.grid:
            return
        results = []
        for order in self.orders:
            copies = [
                HostTensorMap(arg.array, arg.box) if isinstance(arg, Mapped) else arg
                for arg in args
            ]
            for i in written:
                copies[i] = None if args[i] is None else args[i].copy()
            kernel(
                shape.grid, shape.block, *copies, shared_bytes=shape.shared_bytes, order=order,
                cluster=getattr(shape, "cluster", 1),
            )  # fmt: skip
            for i, count in open_rows.items():
                copies[i][:count] = 0
            results.append([copies[i] for i in written if args[i] is not None])
        for other in results[1:]:
            for first, again in zip(results[0], other, strict=True):
                assert first.tobytes() == again.tobytes(), "two runs differ: a missing barrier?"
        outputs = [args[i] for i in written if args[i] is not None]
        for target, value in zip(outputs, results[0], strict=True):
            target[...] = value


def device_loader() -> Any:
    """Loads kernels on device 0; macros of $NANOCUPY_TEST_MACROS, "NAME=1 OTHER=2", are defined in
    every build besides."""
    from nanocupy.cuda.kernels import KernelLoader

    loader = KernelLoader(0)
    given = (macro.partition("=") for macro in os.environ.get("NANOCUPY_TEST_MACROS", "").split())
    loader.get = partial(loader.get, **{name: int(value) for name, _, value in given})
    return loader


class GpuBackend:
    """Kernels on device 0, each array in an allocation of its own between guard rows."""

    name = "gpu"
    last_entry = ""  # what `assert_close` is about

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._loader = device_loader()

    @property
    def has_wgmma(self) -> bool:
        return self._loader.arch == "sm_90a"

    def run(
        self,
        file: str,
        entry: str,
        shape: Shape,
        args: Sequence[Any],
        written: Sequence[int],
        open_rows: Mapping[int, int] = NO_ROWS,
        **macros: int,
    ) -> None:
        """As ShimBackend.run; two launches from the same start must give the same bits."""
        if 0 in shape.grid:
            return
        kernel = self._loader.get(file, entry, **macros)
        GpuBackend.last_entry = entry
        boxes = {i: arg.box for i, arg in enumerate(args) if isinstance(arg, Mapped)}
        args = [arg.array if isinstance(arg, Mapped) else arg for arg in args]
        results = []
        for _ in range(1 if entry == "stamp_step" else 2):  # a clock is never the same
            wholes = [
                self._cupy.asarray(guarded(arg)) if isinstance(arg, np.ndarray) else None
                for arg in args
            ]
            device_args = [
                arg if whole is None else inner(whole)
                for arg, whole in zip(args, wholes, strict=True)
            ]
            for i, box in boxes.items():
                device_args[i] = self._loader.driver.tensor_map(device_args[i], box)
            kernel.launch(
                shape.grid, (shape.block,), device_args, shape.shared_bytes,
                cluster=getattr(shape, "cluster", 1),
            )  # fmt: skip
            back = [None if whole is None else self._cupy.asnumpy(whole) for whole in wholes]
            for i, whole in enumerate(back):
                if whole is None:
                    continue
                assert guards_intact(whole), f"{entry}: argument {i} written outside its rows"
                if i not in written:
                    assert inner(whole).tobytes() == args[i].tobytes(), f"argument {i} was changed"
            for i, count in open_rows.items():
                inner(back[i])[:count] = 0
            results.append([inner(back[i]) for i in written if args[i] is not None])
        for other in results[1:]:
            for first, again in zip(results[0], other, strict=True):
                assert first.tobytes() == again.tobytes(), "two runs differ"
        outputs = [args[i] for i in written if args[i] is not None]
        for target, value in zip(outputs, results[0], strict=True):
            target[...] = value


def assert_close(
    got: np.ndarray,
    wanted: np.ndarray,
    what: str = "",
    ignored: np.ndarray | None = None,
    tolerance: float | None = None,
) -> float:
    """|error| <= tolerance * (|wanted| + rms of the row), everywhere but where `ignored`; the
    tolerance is that of got's dtype. Returns the worst error as a share of the bound."""
    assert got.shape == wanted.shape, f"{what}: {got.shape} for {wanted.shape}"
    tolerance = TOLERANCES[got.dtype.name] if tolerance is None else tolerance
    smallest = 2.0**-24 if got.dtype == np.float16 else 1e-37  # the spacing of subnormal numbers
    values, wanted = got.astype(np.float64), wanted.astype(np.float64)
    if ignored is not None:
        wanted = np.where(ignored, 0, wanted)
    rms = np.sqrt(np.mean(wanted**2, axis=-1, keepdims=True)) if wanted.size else np.float64(0)
    bound = tolerance * (abs(wanted) + rms) + smallest
    share = abs(values - wanted) / bound
    if ignored is not None:
        share = share[~ignored]
    assert not np.isnan(share).any(), f"{what}: NaN, or never written"
    worst = float(share.max(initial=0.0))
    assert worst <= 1, f"{what}: the worst error is {worst:.3g} of the bound"
    key = GpuBackend.last_entry, got.dtype.name
    WORST_ERRORS[key] = max(WORST_ERRORS.get(key, 0.0), worst * tolerance)
    return worst
