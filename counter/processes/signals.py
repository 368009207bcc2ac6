"""What signals mean to the processes of a server, and to one that does not serve yet or any more.

SIGTERM and SIGINT stop, SIGHUP and SIGUSR1 ask for something and end nothing, CUT_SIGNAL is the
master's word to its own processes.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Final

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
ASKING_SIGNALS: Final = (signal.SIGHUP, signal.SIGUSR1)

# What the master sends after its second SIGTERM or SIGINT. Another SIGTERM would not do: two that
# are sent before the first is handled are one.
CUT_SIGNAL: Final = signal.SIGUSR2

# What the master handles.
HANDLED: Final = (*STOP_SIGNALS, signal.SIGCHLD, *ASKING_SIGNALS)


class Stopped(BaseException):
    """A signal asks the program to end, at a time when nothing is served."""

    def __str__(self) -> str:
        return "a signal ended the wait"


def stop_on_signals() -> None:
    """Has SIGTERM and SIGINT raise Stopped, and SIGHUP and SIGUSR1 do nothing: for the times before
    and after the program serves. As the first process of a container it would otherwise not end."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        raise Stopped

    for number in STOP_SIGNALS:
        signal.signal(number, on_signal)
    for number in ASKING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
