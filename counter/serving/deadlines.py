"""Since when something is waited for: deadlines of many connections, kept by one sweep.

What is waited for is the rest of a frame, a handshake, or a peer that reads its replies; only
connections of which something is waited for are here. A timer for each frame would cost more than
the frame.
"""

from __future__ import annotations

import time
from typing import Generic, TypeVar

C = TypeVar("C")


class Deadlines(Generic[C]):
    """Of which connections something is waited for, since when, and for how long at most."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._began: dict[C, float] = {}
        self._paused: dict[C, float] = {}  # how long it was waited for already

    def begin(self, connection: C, began_at: float | None = None) -> None:
        """Notes that something is waited for, from now on or since a moment of time.monotonic()."""
        self._began[connection] = time.monotonic() if began_at is None else began_at

    def begin_unless_begun(self, connection: C) -> None:
        """The same now, unless something of this connection is waited for already, or its deadline
        stands still."""
        if connection not in self._paused:
            self._began.setdefault(connection, time.monotonic())

    def end(self, connection: C) -> float | None:
        """Notes that nothing is waited for; gives back since when something was, None if not."""
        self._paused.pop(connection, None)
        return self._began.pop(connection, None)

    def pause(self, connection: C) -> None:
        """Has the deadline stand still, if there is one."""
        began_at = self._began.pop(connection, None)
        if began_at is not None:
            self._paused[connection] = time.monotonic() - began_at

    def resume(self, connection: C) -> None:
        """Has a deadline that stood still go on."""
        waited_s = self._paused.pop(connection, None)
        if waited_s is not None:
            self._began[connection] = time.monotonic() - waited_s

    def overdue(self, now: float) -> list[C]:
        """The connections that were waited for too long."""
        late_at = now - self.timeout_s
        return [connection for connection, at in self._began.items() if at <= late_at]
