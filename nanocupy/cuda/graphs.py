"""Capture and replay: work that repeats with the same addresses becomes one launch.

A captured graph holds addresses, no arrays. So it keeps the function it was captured from, and with
it everything that function refers to, and refuses a capture that allocates: memory CuPy's pool
hands out within a capture is handed out again after it. It must not know what is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from nanocupy.cuda.checks import ContextLostError, LaunchLog, cuda_error
from nanocupy.cuda.streams import synchronize
from nanocupy.errors import CudaError

# cudaStreamCaptureModeThreadLocal: calls that must not happen in a capture fail, in this thread.
_THREAD_LOCAL = 1


@dataclass
class GraphCounters:
    """How the work of a run was started."""

    captured: int = 0
    replayed: int = 0
    eager: Counter[str] = field(default_factory=Counter)  # why -> how often

    def summary(self) -> str:
        """ "captured 3, replayed 120, eager 4 (first of its shape 3, too large 1)"."""
        reasons = ", ".join(f"{why} {count}" for why, count in self.eager.most_common())
        tail = f" ({reasons})" if reasons else ""
        return (
            f"captured {self.captured}, replayed {self.replayed}, "
            f"eager {sum(self.eager.values())}{tail}"
        )


@dataclass(frozen=True)
class CapturedGraph:
    """A graph ready to run; `keep` is all that must live as long as it does."""

    name: str
    graph: Any
    keep: tuple[Any, ...]


def capture(
    name: str, stream: Any, body: Callable[[], None], keep: tuple[Any, ...] = ()
) -> CapturedGraph:
    """Record what `body` starts on `stream`, without running it.

    `body` runs with `stream` as CuPy's current one, on which it starts everything, or on streams
    that follow it and that it follows again. What it uses must be loaded: run it once eagerly
    before. Raises CudaError with `name` where something cannot be captured, or allocates.
    """
    import cupy

    def refuse(num_bytes: int) -> Any:
        raise CudaError(
            f"capturing {name}: {num_bytes} bytes of device memory were asked for; what a graph "
            "uses must be allocated before"
        )

    failure: BaseException | None = None
    graph = None
    with stream, cupy.cuda.using_allocator(refuse):
        try:
            stream.begin_capture(_THREAD_LOCAL)
        except Exception as exc:
            raise cuda_error(f"beginning to capture {name}", exc) from exc
        try:
            body()
        except BaseException as exc:
            failure = exc
        try:
            graph = stream.end_capture()  # also after a failure: the stream is to work again
        except Exception as exc:
            failure = failure or exc
    if isinstance(failure, Exception):
        raise cuda_error(f"capturing {name}", failure) from failure
    if failure is not None:
        raise failure
    if graph is None:
        raise CudaError(f"capturing {name}: nothing was captured")
    try:
        graph.upload(stream)  # so that the first replay is as quick as the others
    except Exception as exc:
        raise cuda_error(f"uploading the graph {name}", exc) from exc
    return CapturedGraph(name, graph, (body, *keep))


class GraphCache:
    """The captured graphs of one stream by key, with counters.

    The first run of a key is eager, which loads what there is to load; the second captures, and
    what cannot be captured stays eager, which the counters tell. Beyond `max_graphs` the one that
    was not used for longest goes.
    """

    def __init__(
        self,
        stream: Any,
        *,
        enabled: bool = True,
        max_graphs: int = 256,
        log: LaunchLog | None = None,
        counters: GraphCounters | None = None,
    ) -> None:
        """enabled: whether to capture at all; without, everything runs eagerly."""
        self.stream = stream
        self.enabled = enabled
        self.max_graphs = max_graphs
        self.counters = counters or GraphCounters()
        self._log = log
        self._graphs: dict[Hashable, CapturedGraph] = {}
        self._seen: set[Hashable] = set()
        self._not_captured: set[Hashable] = set()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def run(self, key: Hashable, body: Callable[[], None], keep: tuple[Any, ...] = ()) -> None:
        """Do `body`: by replaying the graph of `key`, after capturing it if it was seen before."""
        if key in self._graphs:
            self.replay(key)
        elif not self.enabled:
            self.eager("graphs are off", body)
        elif key not in self._seen:
            self._seen.add(key)
            self.eager("first of its shape", body)
        elif key in self._not_captured:
            self.eager("cannot be captured", body)
        else:
            try:
                self.capture(key, body, keep)
            except ContextLostError:
                raise
            except CudaError:  # it ran before, and can run so again
                self._not_captured.add(key)
                self.eager("cannot be captured", body)
                return
            self.replay(key)

    def capture(self, key: Hashable, body: Callable[[], None], keep: tuple[Any, ...] = ()) -> None:
        """Capture `body` as `key`, in place of what was captured under it. Does not run it."""
        self._graphs.pop(key, None)
        if len(self._graphs) >= self.max_graphs:
            synchronize(self.stream, "dropping a graph", self._log)  # it may be running
            del self._graphs[next(iter(self._graphs))]
        self._graphs[key] = capture(str(key), self.stream, body, keep)
        self.counters.captured += 1

    def replay(self, key: Hashable) -> None:
        """Run the graph of `key` on the stream; kernels' own faults show later."""
        captured = self._graphs[key] = self._graphs.pop(key)  # the last used is last
        if self._log is not None:
            self._log.note(f"graph {captured.name}")
        try:
            captured.graph.launch(self.stream)
        except Exception as exc:
            raise cuda_error(f"replaying the graph {captured.name}", exc, self._log) from exc
        self.counters.replayed += 1

    def eager(self, why: str, body: Callable[[], None]) -> None:
        """Run `body` as it is, on the stream; `why` is counted."""
        with self.stream:
            body()
        self.counters.eager[why] += 1

    def clear(self) -> None:
        """Forget every graph. Nothing of them may be running."""
        self._graphs.clear()
        self._seen.clear()
        self._not_captured.clear()
