"""The schedule of an open loop, and the timer that keeps it.

A request is due at its moment whoever is late; an open loop measures latency from there, so a late
timer is a wrong latency. libev's own timers are up to a millisecond late, the kernel's are not.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections import deque
from collections.abc import Callable
from time import monotonic_ns as clock
from typing import Any, Final, Protocol

from counter.system.libev import READ
from protocol import Batch

# Due requests go out at most so late. Setting the kernel's timer costs 15 us on a virtual machine:
# done for each request of a high rate, it would be most of the client's time.
TICK_NS: Final = 100_000

_ABSOLUTE: Final = 1  # TFD_TIMER_ABSTIME


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Alarm:
    """Calls `on_alarm` from the loop at a moment of the monotonic clock, once for each set()."""

    def __init__(self, loop: Any, on_alarm: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        self._fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, flags)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "cannot make a timer")
        self._on_alarm = on_alarm
        self._at_ns = 0  # 0: not set
        self._watcher = loop.io(self._fd, READ)
        self._watcher.start(self._on_expired)

    def set(self, at_ns: int) -> None:
        """Sets the alarm to a moment of time.monotonic_ns(), in place of one set before."""
        if at_ns == self._at_ns:
            return
        self._at_ns = at_ns
        at = _Itimerspec(value=_Timespec(at_ns // 10**9, at_ns % 10**9))
        self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(at), None)

    def close(self) -> None:
        """Lets go of the timer; it does not call any more."""
        self._watcher.close()
        os.close(self._fd)

    def _on_expired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        self._at_ns = 0
        self._on_alarm()


class Slot(Protocol):
    """What the schedule and its sender may ask of a connection that can take a request."""

    @property
    def epoch(self) -> int:
        """Changes when the connection is lost: what was offered before is void."""

    def send(self, batch: Batch, due_ns: int) -> None:
        """Sends frames of these amounts, which were due then."""


class Sender(Protocol):
    """What the schedule may ask of the generator."""

    @property
    def sending(self) -> bool:
        """Whether anything is to be sent at all."""

    def send_due(self, connection: Slot, due_ns: int) -> bool:
        """Sends one request that was due then, false if no further one may be sent."""


class Pace:
    """The schedule of an open loop: request k is due k intervals after the start, whoever is late.

    A request that is due while every connection is busy waits, and its latency counts from when it
    was due: a slow server does not slow down the question (coordinated omission).
    """

    def __init__(self, loop: Any, sender: Sender, rate: float) -> None:
        self._sender = sender
        self._interval_ns = 1e9 / rate
        self._free: deque[tuple[Slot, int]] = deque()  # with the epoch in which it was offered
        self._start_ns = 0
        self._measure_from_ns = 0
        self._next = 0
        self._alarm = Alarm(loop, self._send_due)

    def start(self, now: int, measure_from_ns: int) -> None:
        """Begins the schedule, whose measured part begins at `measure_from_ns`."""
        self._start_ns = now - now % -TICK_NS
        self._measure_from_ns = measure_from_ns

    def offer(self, connection: Slot, count: int) -> None:
        """A connection can take `count` further requests."""
        self._free.extend([(connection, connection.epoch)] * count)
        self._send_due()

    def behind(self, now: int, left: int | None) -> int:
        """How many requests were due by then and have not been sent; `left` may be, at most."""
        due = int((now - self._start_ns) / self._interval_ns) + 1 - self._next
        return max(0, due if left is None else min(due, left))

    def close(self) -> None:
        """Ends the schedule."""
        self._alarm.close()

    def _due_ns(self) -> int:
        return self._start_ns + int(self._next * self._interval_ns)

    def _send_due(self) -> None:
        while self._free and self._sender.sending:
            due_ns = self._due_ns()
            if due_ns < self._measure_from_ns <= clock():
                # What the warm-up left behind is not carried into the measured part.
                ahead_ns = self._measure_from_ns - self._start_ns
                self._next = math.ceil(ahead_ns / self._interval_ns)
                due_ns = self._due_ns()
            if due_ns > clock():
                self._alarm.set(due_ns - due_ns % -TICK_NS)
                return
            connection, epoch = self._free.popleft()
            if connection.epoch == epoch and self._sender.send_due(connection, due_ns):
                self._next += 1
