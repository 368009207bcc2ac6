"""A process forked from the master: a place that it keeps filled, or the answer to one question.

A child never outlives its parent, and nothing leads from it back into the code of the parent.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Final, NoReturn, TypeVar

from counter.processes.orders import Orders
from counter.processes.signals import STOP_SIGNALS, ignore_signals
from counter.system.signals import blocked
from counter.system.waiting import wait_readable

_PR_SET_PDEATHSIG: Final = 1

_log = logging.getLogger("server")

T = TypeVar("T")


class Child(ABC):
    """What runs in one of the master's processes, and what the master knows of it.

    `name` is what the log calls its process. That one which is not `vital` is ready says nothing
    of whether the server can serve.
    """

    name: ClassVar[str]
    is_vital: ClassVar[bool] = True

    @abstractmethod
    def live(self, orders: Orders, ready: Callable[[], None]) -> int:
        """Runs in a process of its own; gives back that process's exit code.

        Calls `ready` once it serves, and does as it is ordered. EXIT_CANNOT_BOOT says that it
        cannot start and has said why.
        """

    def on_death(self) -> None:  # noqa: B027  # most have nothing to do
        """Called in the master when its process has died, before it is replaced."""


class CannotServe(Exception):
    """This process lacks what it needs to serve: what it is, and what to do about it."""


class ChildError(Exception):
    """A helping process gave no answer."""


def ask_child(
    work: Callable[[], T], timeout_s: float, raises: tuple[type[Exception], ...] = ()
) -> T:
    """What `work` gives or, of the errors in `raises`, what it raises, in a process of its own.

    What it opens and imports ends with it. ChildError if nothing comes within `timeout_s`, or at
    all; then the log says why. OSError if it cannot be forked.
    """
    parent = os.getpid()
    read_end, write_end = os.pipe()
    # Blocked, a signal waits until the child ignores it, instead of running the parent's handler.
    with blocked(STOP_SIGNALS):
        try:
            pid = os.fork()
        except OSError:
            os.close(read_end)
            os.close(write_end)
            raise
        if not pid:
            _answer(parent, work, raises, write_end)
    os.close(write_end)
    try:
        answer: T | Exception = pickle.loads(_read_all(read_end, timeout_s))
    finally:
        os.close(read_end)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(
    parent: int,
    work: Callable[[], object],
    raises: tuple[type[Exception], ...],
    write_end: int,
) -> NoReturn:
    """The life of a helping process."""
    code = 1
    try:
        ignore_signals()  # the parent ends it
        die_with_parent(parent)
        answer: object
        try:
            answer = work()
        except raises as error:
            answer = error
        data = pickle.dumps(answer)
        # Only now: the end of the pipe is the end of this process, and a failure is said first.
        with open(write_end, "wb") as pipe:
            pipe.write(data)
        code = 0
    except Exception:
        _log.exception("a helping process failed")
    finally:
        os._exit(code)


def _read_all(fd: int, timeout_s: float) -> bytes:
    """What a pipe holds up to its end, which must come in time and not at once."""
    deadline = time.monotonic() + timeout_s
    data = b""
    while wait_readable(fd, deadline - time.monotonic()):
        more = os.read(fd, 65536)
        if more:
            data += more
        elif data:
            return data
        else:
            raise ChildError("it failed; the log says why")
    raise ChildError(f"no answer within {timeout_s:g} s")


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, also when it is dead already.

    `parent` is the pid from before the fork: a parent that died before the request was made is
    found by comparing it. Use on the main thread of a parent whose forking thread does not end.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot ask to be killed with the parent")
    if os.getppid() != parent:
        os._exit(1)
