"""How long the generator waits for a peer, counted in looks at it and not by the clock alone.

A process that stood still (SIGSTOP, Ctrl-Z, docker pause, a suspended machine) finds every deadline
over when it goes on, though what it waits for lies in its sockets or was held up as it was. So what
passes between two looks counts as one look, however long it was, and nothing is given up before its
socket was looked at once more. A loop that is always late still gives up, later.
"""

from __future__ import annotations

import math
import select
from collections import deque
from contextlib import suppress
from time import monotonic
from typing import Final

from gevent.socket import wait_read, wait_write

from counter.system.libev import READ

LONGEST_LOOK_S: Final = 0.25  # how late is noticed that something is overdue, at most
SHORTEST_LOOK_S: Final = 0.01


def look_s(timeout_s: float) -> float:
    """The seconds between two looks at what may take so long."""
    return max(SHORTEST_LOOK_S, min(LONGEST_LOOK_S, timeout_s / 4))


def is_ready(fd: int, events: int) -> bool:
    """Whether a descriptor can be read, or written, or is at its end."""
    poll = select.poll()
    poll.register(fd, select.POLLIN if events == READ else select.POLLOUT)
    return bool(poll.poll(0))


class Patience:
    """What is left of a time that a greenlet waits for one peer, `left_s` of it."""

    def __init__(self, seconds: float) -> None:
        self.left_s = seconds
        self._look_s = look_s(seconds)

    def wait(self, fd: int, events: int) -> None:
        """Waits until a descriptor is ready; TimeoutError when nothing is left."""
        wait = wait_read if events == READ else wait_write
        while not is_ready(fd, events):
            if self.left_s <= 0:
                raise TimeoutError("timed out")
            look_s, began_at = min(self.left_s, self._look_s), monotonic()
            with suppress(TimeoutError):
                wait(fd, look_s, TimeoutError())
            self.left_s -= min(look_s, monotonic() - began_at)


class Sweeps:
    """The looks at all connections of a process, from which it knows which request is overdue."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_ns = int(timeout_s * 1e9)
        self.interval_s = look_s(timeout_s)
        self._last: deque[int] = deque(maxlen=math.ceil(timeout_s / self.interval_s))

    def note(self, now: int) -> int:
        """Notes a sweep; what was sent before the moment that it gives back is overdue."""
        first = self._last[0] if len(self._last) == self._last.maxlen else 0
        self._last.append(now)
        return min(first, now - self._timeout_ns)
