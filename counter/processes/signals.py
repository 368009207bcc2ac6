"""What signals mean to a server, and to one that does not serve yet or any more.

None that can be handled ends it without its last lines: docs/operations.md has the table.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from counter.system.signals import ignore, undo_inherited

# SIGPWR: the power fails. SIGXCPU: the time that the process may compute is up.
STOP_SIGNALS: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGPWR,
    signal.SIGXCPU,
)
ASKING_SIGNALS: Final = (signal.SIGHUP, signal.SIGUSR1)

# Those that mean something to other servers, or to nobody, and would end this one.
UNUSED_SIGNALS: Final = (
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
    signal.SIGSTKFLT,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)

# What the master handles.
HANDLED: Final = (*STOP_SIGNALS, signal.SIGCHLD, *ASKING_SIGNALS, *UNUSED_SIGNALS)


class Stopped(BaseException):
    """A signal asks the program to end, at a time when nothing is served."""

    def __str__(self) -> str:
        return "a signal ended the wait"


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside, a signal that stops raises Stopped, and the others do nothing: for the time before
    the program serves. As the first process of a container it would otherwise not end. Behind, the
    program ends, and none does anything.
    """
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, raise_stopped)
        for number in (*ASKING_SIGNALS, *UNUSED_SIGNALS):
            signal.signal(number, signal.SIG_IGN)
        undo_inherited()
        yield
    finally:
        ignore_stop_signals()


def raise_stopped(_number: int, _frame: FrameType | None) -> None:
    """Handles the first of the signals that stop; what ends for it is not disturbed by another."""
    if ignore(STOP_SIGNALS):
        raise Stopped


def ignore_stop_signals() -> None:
    """For a program that is about to end. One that comes while the interpreter ends would find no
    handler of Python's any more, and would be what ended it.
    """
    ignore(STOP_SIGNALS)


def ignore_signals() -> None:
    """In a forked process: signals are its parent's, which tells it what they mean."""
    signal.set_wakeup_fd(-1)
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)


def name_of(number: int) -> str:
    """How a signal is called: SIGTERM, or SIGRTMIN+1."""
    if signal.SIGRTMIN < number < signal.SIGRTMAX:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"
    return signal.Signals(number).name
