"""A device made of the shim: what `CudaOps` needs of a GPU, on NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nanocupy.ops.cuda_ops import CudaOps, DeviceTraits, OpSizes, workspace_plan
from tests.ops.cases import DTYPES
from tests.shim.driver import HostKernel, host_kernel

# A small card of each kind: few multiprocessors, so that work is cut as it is on a large one.
MODERN = DeviceTraits((9, 0), 6, 227 << 10)
OLD = DeviceTraits((7, 5), 4, 64 << 10, force_plain=True)


class ShimKernels:
    """Like cuda.kernels.KernelLoader; `launched` collects the entries' names."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def get(self, file: str, entry: str, **macros: int) -> _ShimKernel:
        return _ShimKernel(self, entry, host_kernel(file, entry, **macros))


class _ShimKernel:
    def __init__(self, owner: ShimKernels, entry: str, kernel: HostKernel) -> None:
        self._owner, self._entry, self._kernel = owner, entry, kernel

    def launch(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        for arg in args:
            if not (arg is None or isinstance(arg, np.ndarray | np.generic)):
                raise TypeError(f"{self._entry}: {arg!r} is no array and no scalar of NumPy")
            if isinstance(arg, np.ndarray) and not arg.flags.c_contiguous:
                raise TypeError(f"{self._entry}: an array has gaps, strides {arg.strides}")
        self._owner.launched.append(self._entry)
        self._kernel(grid, block, *args, shared_bytes=shared_bytes)


def matmul(x: np.ndarray, w: np.ndarray, out: np.ndarray, beta: float = 0.0) -> None:
    """What cuBLAS does: out = x @ w.T + beta * out, summed in float32, rounded once."""
    product = x.astype(np.float32) @ w.astype(np.float32).T
    out[...] = product + beta * out.astype(np.float32) if beta else product


def shim_ops(sizes: OpSizes, traits: DeviceTraits) -> CudaOps:
    """CudaOps on the shim, every workspace in poison."""
    workspaces = {}
    for name, (shape, dtype) in workspace_plan(sizes, traits).items():
        poison = np.full(int(np.prod(shape)) * 8, 0xFF, np.uint8)
        array = poison.view(DTYPES.get(dtype, np.dtype(dtype)))[: int(np.prod(shape))]
        workspaces[name] = np.zeros_like(array) if name == "counters" else array.copy()
    return CudaOps(ShimKernels(), matmul, workspaces, sizes, traits)
