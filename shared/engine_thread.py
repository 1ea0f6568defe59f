"""The one thread that an engine runs on: calls in the order in which they were started, results on the event loop.

`run_in_executor` takes 120 microseconds of processor a call on a slow core, most of them for two futures with locks
that are chained to each other. A queue to the thread and one call back into the loop take 60, and half of the time.
"""

import asyncio
import atexit
import contextlib
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

_Result = TypeVar("_Result")


class EngineThread:
    """Runs until `close`, or to the end of its last call where the interpreter exits."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: Thread | None = None  # until the first call
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<EngineThread {self._name}>"

    def start(self, work: Callable[[], _Result]) -> "asyncio.Future[_Result]":
        """Run `work` once the thread is free; the future is the running loop's, and cancelling it stops nothing.

        Raises `RuntimeError` after `close`.
        """
        if self._is_closed:
            raise RuntimeError(f"the thread {self._name!r} is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Result] = loop.create_future()

        def call() -> None:
            try:
                told = partial(_succeed, future, work())
            except BaseException as error:  # noqa: BLE001  # else the thread ended, and its caller waited for ever
                told = partial(_fail, future, error)
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(told)

        if self._thread is None:
            self._thread = Thread(target=self._run, name=self._name, daemon=True)  # or exit would never come to `close`
            self._thread.start()
            atexit.register(self.close)
        self._calls.put(call)
        return future

    def close(self) -> None:
        """Wait until all that was started is done, then end the thread."""
        self._is_closed = True
        if self._thread is not None:
            atexit.unregister(self.close)
            self._calls.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # with all that it refers to, while the next one is waited for


def _succeed(future: "asyncio.Future[_Result]", result: _Result) -> None:
    if not future.done():  # or it was cancelled
        future.set_result(result)


def _fail(future: "asyncio.Future[_Result]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
