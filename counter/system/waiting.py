"""Waiting for one descriptor, in a process without a loop."""

from __future__ import annotations

import math
import select
from typing import Final

_LONGEST_MS: Final = 2**31 - 1  # what poll(2) takes, 24 days


def wait_readable(fd: int, timeout_s: float | None = None) -> bool:
    """Whether a descriptor becomes readable, or is at its end, in so many seconds; None: for ever.

    By poll(2): select(2) knows no descriptor above 1,023.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if timeout_s is None:
        return bool(poll.poll())
    return bool(poll.poll(min(_LONGEST_MS, max(0, math.ceil(timeout_s * 1000)))))
