"""The fixtures of the kernel tests: where kernels run, and in which storage type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.backends import GpuBackend, ShimBackend
from tests.ops.cases import DTYPES
from tests.shim import build


@pytest.fixture(scope="session", params=["shim", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Any:
    """A ShimBackend (skipped without g++) or, with -m gpu, a GpuBackend."""
    if request.param == "gpu":
        return GpuBackend()
    if build.compiler() is None:
        pytest.skip(build.MISSING)
    return ShimBackend()


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def storage(request: pytest.FixtureRequest) -> np.dtype:
    """The type of weights, activations and cache."""
    return DTYPES[request.param]
