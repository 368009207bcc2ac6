"""How a process has another one look at memory that they share: a bell each, rung by anybody.

A bell is an eventfd, made before the fork: readable once it was rung, however often.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress


class Bells:
    """The bells of `count` processes; shared with every process forked afterwards."""

    def __init__(self, count: int) -> None:
        self._fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
        for fd in self._fds:
            weakref.finalize(self, os.close, fd)

    def fileno(self, index: int) -> int:
        """What the loop of a process watches: readable after its bell was rung."""
        return self._fds[index]

    def ring(self, index: int) -> None:
        """Has a process look; it is no matter whether it lives."""
        with suppress(BlockingIOError):  # rung 2^64 times, and not heard
            os.eventfd_write(self._fds[index], 1)

    def ring_all(self) -> None:
        """Has every process look."""
        for index in range(len(self._fds)):
            self.ring(index)

    def quiet(self, index: int) -> None:
        """Takes note of having been rung."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._fds[index])
