"""Since when frames are waited for: the deadline of every incomplete frame, kept by one sweep.

Only connections with an incomplete frame, or in a TLS handshake, are here; further bytes do not
move a deadline.
"""

from __future__ import annotations

import time
from typing import Generic, TypeVar

C = TypeVar("C")


class FrameDeadlines(Generic[C]):
    """Which connections have begun a frame and not completed it, and when they did."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._began: dict[C, float] = {}

    def begin(self, connection: C, began_at: float | None = None) -> None:
        """Notes that a frame has begun, now or at a moment of time.monotonic()."""
        self._began[connection] = time.monotonic() if began_at is None else began_at

    def begin_unless_begun(self, connection: C) -> None:
        """The same now, unless a frame of this connection is waited for already."""
        self._began.setdefault(connection, time.monotonic())

    def end(self, connection: C) -> float | None:
        """Notes that nothing is waited for; gives back since when something was, None if not."""
        return self._began.pop(connection, None)

    def overdue(self, now: float) -> list[C]:
        """The connections whose frame has not come in time."""
        late_at = now - self.timeout_s
        return [connection for connection, at in self._began.items() if at <= late_at]
