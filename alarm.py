"""A timer of the loop as exact as the kernel's: libev's own are up to a millisecond late.

An open loop measures latency from when a request was due, so a late timer is a wrong latency.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any, Final

_READ: Final = 1  # libev's event mask
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
        self._watcher = loop.io(self._fd, _READ)
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
