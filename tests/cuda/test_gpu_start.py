"""The start of a process on a GPU: a context made below CuPy, a handle made in another thread."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

# In a process of its own, where nobody has made a context yet.
_CODE = """
from concurrent.futures import ThreadPoolExecutor

from nanocupy.cuda.driver_start import DriverStart

with DriverStart() as start:
    start._thread.join()
    assert start._driver is not None
    import numpy as np
    from nanocupy.cuda.arena import BufferSpec
    from nanocupy.cuda.device import CudaDevice

    device = CudaDevice()
    shapes = {"x": (7, 96), "w": (40, 96), "out": (7, 40)}
    specs = [BufferSpec(name, shape, "float32", "test") for name, shape in shapes.items()]
    view = device.allocate(device.plan(specs)).view
    rng = np.random.default_rng(0)
    host = {name: device.pinned(view(name).nbytes).view(np.float32) for name in shapes}
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(device.prepare_products)
        for name in ("x", "w"):
            host[name][:] = rng.standard_normal(host[name].size)
            device.to_device(view(name), host[name].reshape(shapes[name]))
        made.result()
handle = device._cublas

def product():
    device.matmul(view("x"), view("w"), view("out"))

for _ in range(3):  # eager, captured, replayed
    device.fill(view("out"), 0xFF)
    device.run("product", product)
    device.to_host(host["out"].reshape(shapes["out"]), view("out"))
    device.synchronize("a product")
    x, w, out = (host[name].reshape(shape) for name, shape in shapes.items())
    np.testing.assert_allclose(out, x.astype(float) @ w.T.astype(float), rtol=1e-4, atol=1e-4)
assert device._cublas is handle
assert device.graphs.counters.captured == 1, device.graphs.counters.summary()
"""


def test_a_context_and_a_handle_of_other_threads_are_used() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
