"""The GPU's driver, started in a thread while the interpreter opens a model and imports CuPy.

To start the driver and make a context takes tenths of a second and no interpreter: ctypes lets that
go on meanwhile. The context is the primary one of the GPU, which the CUDA runtime
finds, and with it CuPy, when it is first used there, in whatever thread.

Errors are not told here: who uses the GPU meets them again, and has the words for them (`probe`).
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from threading import Thread
from typing import Any

from nanocupy.cuda import probe


class DriverStart:
    """In a `with`: GPU `index` gets its context in a thread.

    The end waits for the thread and lets the context go. Whoever uses it by then holds it himself,
    and where nobody does, as the model could not be opened, its memory is free again.
    """

    def __init__(self, index: int = 0) -> None:
        self._index = index
        self._driver: Any = None  # where the context is held
        self._device = ctypes.c_int(0)
        self._thread = Thread(target=self._run, name="nanocupy-driver-start")

    def __enter__(self) -> DriverStart:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.join()
        if self._driver is not None:
            self._driver.cuDevicePrimaryCtxRelease_v2(self._device)
            self._driver = None

    def _run(self) -> None:
        with suppress(OSError, AttributeError):  # no driver, or none that is known here
            driver = probe.load_libcuda()
            if self._starts(driver) and self._makes_context(driver):
                self._driver = driver

    def _starts(self, driver: Any) -> bool:
        return driver.cuInit(0) == 0

    def _makes_context(self, driver: Any) -> bool:
        if driver.cuDeviceGet(ctypes.byref(self._device), self._index) != 0:
            return False
        context = ctypes.c_void_p()
        return driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device) == 0
