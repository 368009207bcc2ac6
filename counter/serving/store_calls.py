"""Who calls a store while the loop goes on: a thread where its calls block, else a greenlet.

One call at a time; what becomes of it is told in the loop.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import gevent
from gevent import monkey

from counter.processes.child import CannotServe

Call = Callable[[], int | None]
OnEnd = Callable[[int | None, Exception | None], None]


class StoreCaller(ABC):
    """Makes calls to a store. `on_end` is told in the loop what each gave, or the error that it
    raised; `last` is the last call of all, whose end nobody is told.
    """

    @abstractmethod
    def run(self, call: Call) -> None:
        """Begins a call; not while another is under way."""

    @abstractmethod
    def close(self) -> None:
        """Makes the last call, when the one that is under way has ended or was given up."""


def make_caller(blocks: bool, on_end: OnEnd, last: Callable[[], None]) -> StoreCaller:
    """The one that suits a store whose calls block their thread, or wait as a greenlet does."""
    return ThreadCaller(on_end, last) if blocks else GreenletCaller(on_end, last)


class GreenletCaller(StoreCaller):
    """Makes the calls of a store that waits as a greenlet does."""

    def __init__(self, on_end: OnEnd, last: Callable[[], None]) -> None:
        self._on_end = on_end
        self._last = last
        self._running: Any = None

    def run(self, call: Call) -> None:
        self._running = gevent.spawn(lambda: self._on_end(*attempt(call)))

    def close(self) -> None:
        if self._running is not None:
            self._running.kill()
        self._last()


class ThreadCaller(StoreCaller):
    """Makes the calls of a store that blocks, in a thread of the system.

    The loop hands over by releasing a lock and is woken by an async watcher. Nothing else of gevent
    is touched by the thread, nor what its patches have replaced, logging among it.
    """

    def __init__(self, on_end: OnEnd, last: Callable[[], None]) -> None:
        self._on_end = on_end
        self._last = last
        self._call: Call | None = None  # None: the thread is to end
        self._outcome: tuple[int | None, Exception | None] = None, None
        self._gate = raw_lock()
        self._gate.acquire()
        self._ended = gevent.get_hub().loop.async_()
        self._ended.start(lambda: self._on_end(*self._outcome))
        try:
            monkey.get_original("_thread", "start_new_thread")(self._live, ())
        except RuntimeError as error:
            remedy = "raise the limit of threads (ulimit -u, or the container's of pids)"
            raise CannotServe(f"no thread for the store: {error}; {remedy}") from None

    def run(self, call: Call) -> None:
        self._call = call
        self._gate.release()

    def _live(self) -> None:
        while True:
            self._gate.acquire()
            call = self._call
            if call is None:
                self._last()
                return
            self._outcome = attempt(call)
            self._ended.send()

    def close(self) -> None:
        self._call = None
        if self._gate.locked():
            self._gate.release()


def attempt(call: Call) -> tuple[int | None, Exception | None]:
    """What a call gives, or the error that it raises."""
    try:
        return call(), None
    except Exception as error:
        return None, error


def raw_lock() -> threading.Lock:
    """A lock of the system's threads, also where gevent has replaced those of Python."""
    lock: threading.Lock = monkey.get_original("_thread", "allocate_lock")()
    return lock
