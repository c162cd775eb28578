"""What the start-up bench runs in a process of its own: a model opened, and one token.

    python -m nanocupy.bench.first_token '{"model": …, "started_ns": …, "config": {…}}'

It takes the way that a program takes which uses `LLM`, and prints the seconds of each part as JSON.
Nothing but the standard library is imported before the clock is read.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PROMPT = "The capital of France is"
PARTS = ("start", "import", "open", "device", "load", "compile", "first token")


class Stopwatch:
    """Seconds by part; a part within another is taken out of it."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._open: list[tuple[str, float]] = []  # part, and when it was entered or came back

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done within belongs to this part."""
        now = self._clock()
        if self._open:
            self._add(now)
        self._open.append((name, now))
        try:
            yield
        finally:
            now = self._clock()
            self._add(now)
            self._open.pop()
            if self._open:
                self._open[-1] = (self._open[-1][0], now)

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """From now on, calls of owner's `attribute` belong to the part `name`."""
        function = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def _add(self, now: float) -> None:
        name, since = self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - since


def first_token(model: str, config: dict[str, Any], watch: Stopwatch) -> int:
    """Open `model`, and sample one token of a short text. Raises a NanocupyError."""
    with watch.part("import"):
        from nanocupy import LLM, SamplingParams
        from nanocupy.engine import backend
        from nanocupy.model import load

        if backend.chosen_device(config.get("device", "auto")) == "cuda":
            import nanocupy.cuda.device  # noqa: F401  (each would be imported within a later part)
            from nanocupy.cuda.kernels import KernelLoader
            from nanocupy.cuda.libraries import nvrtc_version
            from nanocupy.engine.device_runner import DeviceRunner

            nvrtc_version()  # imports CuPy
            watch.wrap(KernelLoader, "get", "compile")
            watch.wrap(KernelLoader, "prefetch", "compile")
            watch.wrap(DeviceRunner, "upload_weights", "load")
        watch.wrap(load, "load_numpy_weights", "load")
        watch.wrap(backend, "make_runner", "device")
    with watch.part("open"):
        llm = LLM(model, **config)
    with watch.part("first token"):
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        chunk = next(iter(llm.stream(PROMPT, params)))
    assert chunk.token_id is not None
    return chunk.token_id


def main() -> None:
    task = json.loads(sys.argv[1])
    watch = Stopwatch()
    # The clock is the system's, so that the starting process could read it too.
    watch.seconds["start"] = (time.monotonic_ns() - task["started_ns"]) / 1e9
    from nanocupy.errors import NanocupyError

    try:
        token_id = first_token(task["model"], task["config"], watch)
    except NanocupyError as exc:
        print(f"nanocupy: error: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
    seconds = (time.monotonic_ns() - task["started_ns"]) / 1e9
    parts = {name: watch.seconds.get(name, 0.0) for name in PARTS}
    print(json.dumps({"seconds": seconds, "parts": parts, "token_id": token_id}))


if __name__ == "__main__":
    main()
