"""What the start-up bench runs in a process of its own: a model opened, and one token.

    python -m nanocupy.bench.first_token '{"model": …, "started_ns": …, "config": {…}}'

It takes the way that a program takes which uses `LLM`, and prints the seconds of each part as JSON.
Nothing but the standard library is imported before the clock is read.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PROMPT = "The capital of France is"
PARTS = ("start", "import", "open", "device", "load", "compile", "first token")


class Stopwatch:
    """Seconds by part; a part within another is taken out of it.

    "device/arena" is a share of the part "device", and "/arena" one of whatever part it is done in.
    beside: what other threads do meanwhile, by the same names; no part takes it out.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self.beside: dict[str, float] = {}
        self._clock = clock
        self._open: list[tuple[str, float]] = []  # part, and when it was entered or came back
        self._thread = threading.get_ident()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done within belongs to this part."""
        if threading.get_ident() != self._thread:
            with self._part_beside(name.rpartition("/")[2]):
                yield
            return
        now = self._clock()
        if self._open:
            self._add(now)
            if name.startswith("/"):
                name = self._open[-1][0].partition("/")[0] + name
        self._open.append((name, now))
        try:
            yield
        finally:
            now = self._clock()
            self._add(now)
            self._open.pop()
            if self._open:
                self._open[-1] = (self._open[-1][0], now)

    @contextmanager
    def _part_beside(self, name: str) -> Iterator[None]:
        since = self._clock()
        try:
            yield
        finally:
            self.beside[name] = self.beside.get(name, 0.0) + self._clock() - since

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """From now on, calls of owner's `attribute` belong to the part `name`."""
        function = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def parts(self) -> dict[str, float]:
        """Seconds of the parts, all shares in them."""
        found = dict.fromkeys(PARTS, 0.0)
        for name, seconds in self.seconds.items():
            found[name.partition("/")[0]] += seconds
        return found

    def shares(self) -> dict[str, float]:
        """Those parts of parts that have a name, in the order of the parts."""
        named = [name for name in self.seconds if "/" in name]
        named.sort(key=lambda name: PARTS.index(name.partition("/")[0]))
        return {name: self.seconds[name] for name in named}

    def _add(self, now: float) -> None:
        name, since = self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - since


def first_token(model: str, config: dict[str, Any], watch: Stopwatch) -> tuple[int, int]:
    """Open `model`, and sample one token of a short text: its id, and when it was there, by
    `time.monotonic_ns`. Raises a NanocupyError."""
    with watch.part("import"):
        from nanocupy import LLM, SamplingParams
        from nanocupy.cuda import probe
        from nanocupy.engine import backend
        from nanocupy.model import load

    watch.wrap(probe, "probe_driver", "device/driver")
    watch.wrap(probe, "probe_cupy", "import/cupy")
    watch.wrap(probe, "_nvrtc_version", "import/nvrtc")
    watch.wrap(probe, "_cublas_loads", "import/cublas")
    watch.wrap(load, "load_numpy_weights", "load")
    watch.wrap(backend, "make_runner", "device")
    watch.wrap(backend, "LLMEngine", "open/engine")
    watch.wrap(LLM, "_encoded", "/encode")
    if config.get("device") != "cpu":
        from nanocupy.cuda.driver_start import DriverStart

        watch.wrap(DriverStart, "_starts", "/driver")
        watch.wrap(DriverStart, "_makes_context", "/context")
        cuda_runner = backend._cuda_runner

        def on_a_gpu(*args: Any) -> Any:
            with watch.part("import"):  # where a start imports it, and not before
                _watch_device(watch)
            return cuda_runner(*args)

        backend._cuda_runner = on_a_gpu
    with watch.part("open"):
        llm = LLM(model, **config)
    with watch.part("first token"):
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        chunk = next(iter(llm.stream(PROMPT, params)))
    ended_ns = time.monotonic_ns()  # the model is let go on the way out, which takes its time too
    assert chunk.token_id is not None
    return chunk.token_id, ended_ns


def _watch_device(watch: Stopwatch) -> None:
    """Time what a GPU's runner does."""
    from nanocupy.cuda.compiler import Compiler
    from nanocupy.cuda.cublas import Cublas
    from nanocupy.cuda.device import CudaDevice
    from nanocupy.cuda.graphs import GraphCache
    from nanocupy.cuda.kernels import KernelLoader
    from nanocupy.cuda.upload import DeviceTransfer
    from nanocupy.engine import device_plan
    from nanocupy.engine.device_runner import DeviceRunner

    for owner, attribute, name in (
        (KernelLoader, "get", "compile/kernels"),
        (KernelLoader, "load", "compile/modules"),
        (Compiler, "compile_all", "compile/cubins"),
        (CudaDevice, "__init__", "device/context"),
        (device_plan, "plan_limits", "device/plan"),
        (DeviceRunner, "__init__", "device/state"),
        (CudaDevice, "allocate", "/arena"),
        (CudaDevice, "pinned", "/pinned memory"),
        (CudaDevice, "fill", "/filling"),
        (CudaDevice, "synchronize", "/waiting"),
        (CudaDevice, "wait", "/waiting"),
        (DeviceRunner, "swap_costs", "device/swap costs"),
        (DeviceRunner, "upload_weights", "load"),
        (DeviceTransfer, "__init__", "load/pinned memory"),
        (Cublas, "__init__", "/cublas"),
        (CudaDevice, "matmul", "/products"),
        (GraphCache, "capture", "/capture"),
    ):
        watch.wrap(owner, attribute, name)


def main() -> None:
    task = json.loads(sys.argv[1])
    watch = Stopwatch()
    # The clock is the system's, so that the starting process could read it too.
    watch.seconds["start"] = (time.monotonic_ns() - task["started_ns"]) / 1e9
    from nanocupy.errors import NanocupyError

    try:
        token_id, ended_ns = first_token(task["model"], task["config"], watch)
    except NanocupyError as exc:
        print(f"nanocupy: error: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
    seconds = (ended_ns - task["started_ns"]) / 1e9
    found = {"seconds": seconds, "parts": watch.parts(), "shares": watch.shares()}
    print(json.dumps({**found, "beside": watch.beside, "token_id": token_id}))


if __name__ == "__main__":
    main()
