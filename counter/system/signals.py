"""Signals, as a program meets them that waits for several things: something to wait for, or to
keep out for a moment.

A handler only notes; what it noted is looked at where the program waits. Which signals there are
and what they mean is said by whoever uses this. Everything here is for the main thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

_system_signal = ctypes.CDLL(None).signal
_system_signal.argtypes, _system_signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p


class WakePipe:
    """Becomes readable with every signal that has a handler, so that a wait for it ends.

    It has a fileno(), as select and its like take it. A context: inside, it is the one that the
    interpreter writes to (signal.set_wakeup_fd); behind, it is closed.
    """

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)

    def fileno(self) -> int:
        """The end to wait for."""
        return self._read_end

    def wake(self) -> None:
        """Makes it readable, from this process or from one that it forked."""
        with contextlib.suppress(BlockingIOError):  # a full pipe is readable
            os.write(self._write_end, b"\0")

    def clear(self) -> None:
        """Makes it unreadable until the next signal."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read_end, 4096)

    def __enter__(self) -> WakePipe:
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for end in (self._read_end, self._write_end):
            os.close(end)


def undo_inherited() -> None:
    """Puts right what a parent left ignored or blocked; what waited blocked comes with this call.

    cron, shells and some supervisors ignore SIGCHLD, and a process that inherits that is never told
    how its children ended.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@contextlib.contextmanager
def handled(
    numbers: Iterable[int],
    handler: Callable[[int, FrameType | None], Any],
    ignored_behind: bool = False,
) -> Iterator[None]:
    """Inside, these signals call the handler; behind, what handled them before does so again, or
    they are ignored."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        if ignored_behind:
            ignore(before)
        else:
            for number, earlier in before.items():
                signal.signal(number, earlier)


def ignore(numbers: Iterable[int]) -> bool:
    """Ignores signals from here on; false if the system ignored the first of them already.

    By the system first, for all threads and at once: a handler that calls this is entered again by
    whatever comes meanwhile. The interpreter complains of one that has come and finds its handler
    gone; so it is told when none can come any more. It must be, as it would have the system act on
    them at its end.
    """
    ignored = tuple(numbers)
    before = [_system_signal(number, int(signal.SIG_IGN)) for number in ignored]
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    return bool(before[0] != int(signal.SIG_IGN))


@contextlib.contextmanager
def blocked(numbers: Iterable[int]) -> Iterator[None]:
    """None of these signals is handled inside; they wait.

    For a fork: so a child never runs its parent's handlers, if it sets its own before it unblocks.
    """
    masked = tuple(numbers)
    signal.pthread_sigmask(signal.SIG_BLOCK, masked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, masked)
