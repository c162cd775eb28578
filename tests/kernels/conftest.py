"""The fixtures of the kernel tests: where kernels run, and in which storage type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.backends import WORST_ERRORS, GpuBackend, ShimBackend
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


@pytest.fixture(autouse=True)
def _errors_go_to_the_record(request: pytest.FixtureRequest, record_error: Any) -> Any:
    """What a test on a GPU measured, to the record of the run."""
    WORST_ERRORS.clear()
    # What a test launches without the backend goes by the test's own name.
    GpuBackend.last_entry = request.node.path.stem.removeprefix("test_").removesuffix("_gpu")
    yield
    if request.node.get_closest_marker("gpu") is not None:
        for (entry, dtype), error in WORST_ERRORS.items():
            record_error(entry, dtype, error)
