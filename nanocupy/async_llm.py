"""An LLM for servers: many answers at once, asked for and dropped from any task or thread.

One thread runs the engine, step after step, while anybody waits. Everything that touches the engine
happens on that thread: a call from elsewhere is put in its queue and answered through a future.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from nanocupy.engine.request import RequestPriority
from nanocupy.errors import RequestError
from nanocupy.llm import LLM, Answer, Completion, Message, Prompt, TextChunk
from nanocupy.sampling_params import SamplingParams

T = TypeVar("T")
# What a listener is told: a chunk, the error that ended everything, or None at the end.
Event = TextChunk | BaseException | None
Listener = Callable[[Event], None]


class AsyncLLMEngine:
    """Runs `llm` on a thread of its own. Close it (or leave its `async with`) to end the thread;
    `llm` must not be used by anyone else meanwhile."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._listeners: dict[int, tuple[Answer, Listener]] = {}
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nanocupy-engine", daemon=True)
        self._thread.start()

    # ----------------------------------------------------------------- asking

    async def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        priority: RequestPriority | None = None,
    ) -> AsyncIterator[TextChunk]:
        """The answer piece by piece, those of its samples as they come. Leaving the iteration early
        ends the request.

        prompt, params: as `LLM.stream`. Raises RequestError for this request alone, and whatever
        ended the engine for every request that waits.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        answer = await self._submitted(prompt, params, priority, tell)
        try:
            while (event := await queue.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.abort(answer)

    async def generate(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        priority: RequestPriority | None = None,
    ) -> Completion:
        """The whole answer."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        loop = ended.get_loop()

        def settle(event: Event) -> None:
            if ended.done():
                return
            if isinstance(event, BaseException):
                ended.set_exception(event)
            elif event is None:
                ended.set_result(None)

        def tell(event: Event) -> None:
            if not isinstance(event, TextChunk):
                loop.call_soon_threadsafe(settle, event)

        answer = await self._submitted(prompt, params, priority, tell)
        try:
            await ended
        finally:
            self.abort(answer)
        return answer.completion()

    async def _submitted(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None,
        priority: RequestPriority | None,
        listener: Listener,
    ) -> Answer:
        """`submit`, for a task that may be cancelled while it waits for that."""

        def drop(future: Future[Answer]) -> None:
            if not future.cancelled() and future.exception() is None:
                self.abort(future.result())

        future = self.submit(prompt, params, priority, listener)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(drop)  # the engine's thread may be adding it right now
            raise

    def submit(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None,
        priority: RequestPriority | None,
        listener: Listener,
    ) -> Future[Answer]:
        """Queue a request, from any thread. `listener` is called on the engine's thread with every
        chunk, then with None or the error that ended it; it must not wait for anything, and if it
        raises, its request ends."""

        def add() -> Answer:
            answer = self.llm.stream(prompt, params, priority or RequestPriority())
            self._listeners[id(answer)] = answer, listener
            return answer

        return self.call(add)

    def abort(self, answer: Answer) -> None:
        """End a request, from any thread; one that has ended is left alone."""

        def end() -> None:
            answer.close()
            self._listeners.pop(id(answer), None)

        self._enqueue(end)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Do something with `llm` on the engine's thread, between two steps (`llm.configure`)."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as exc:
                future.set_exception(exc)

        if not self._enqueue(run):
            closed = RequestError("the engine is closed; make another")
            future.set_exception(self._failure or closed)
        return future

    # ----------------------------------------------------------------- ending

    def close(self) -> None:
        """End all requests and the thread. Whoever still waits gets a RequestError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    async def __aenter__(self) -> AsyncLLMEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)

    # ----------------------------------------------------------------- the engine's thread

    def _enqueue(self, function: Callable[[], None]) -> bool:
        """Have the engine's thread do it; False where that has ended."""
        with self._wake:
            if not self._closed:
                self._calls.append(function)
                self._wake.notify()
            return not self._closed

    def _run(self) -> None:
        try:
            while not self._closed:
                with self._wake:
                    while not (self._calls or self._listeners or self._closed):
                        self._wake.wait()
                    calls, self._calls = self._calls, deque()
                for function in calls:
                    function()
                if self._listeners and not self._closed:
                    self.llm._step()
                    self._deliver()
            self._end_all(RequestError("the engine was closed before the answer ended"))
        except BaseException as exc:
            # Not one request's mistake (those are told where they are made): nothing can go on.
            with self._wake:
                self._failure, self._closed = exc, True
            self._end_all(exc)
            if not isinstance(exc, Exception):
                raise

    def _deliver(self) -> None:
        for key, (answer, listener) in list(self._listeners.items()):
            try:
                for chunk in answer.take_chunks():
                    listener(chunk)
                if answer.finish_reason is None:
                    continue
                listener(answer.error)  # None where it ended well
            except Exception:  # a listener that fails ends its own request and no other
                answer.close()
            del self._listeners[key]

    def _end_all(self, reason: BaseException) -> None:
        with self._wake:
            calls, self._calls = self._calls, deque()
        for answer, listener in list(self._listeners.values()):
            try:
                answer.close()
                listener(reason)
            except Exception:  # a loop that is gone: nobody is there to be told
                continue
        self._listeners.clear()
        for function in calls:  # futures must not wait for ever
            function()
