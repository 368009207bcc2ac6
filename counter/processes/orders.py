"""What the master tells its processes, each by a pipe of its own.

No signal means anything to them: one that is sent to all processes of a server at once, as service
managers and terminals do, reaches the master too, and what it does about it is told here. So it
does not matter who got a signal first.
"""

from __future__ import annotations

import os
from contextlib import suppress
from enum import Enum
from typing import Final

from counter.system.waiting import wait_readable


class Order(Enum):
    """One word of the master's."""

    DRAIN = b"d"  # count and answer what has arrived, within the drain deadline, and end
    CUT = b"c"  # end at once
    RELOAD = b"r"  # take the certificates that were published last
    DUMP = b"s"  # write the stacks to standard error


_MOST: Final = 64  # taken at once


class Orders:
    """A process's end of its pipe; its master's death is an order to end at once."""

    def __init__(self, read_end: int) -> None:
        self._read_end = read_end
        os.set_blocking(read_end, False)

    def fileno(self) -> int:
        """What becomes readable with each order."""
        return self._read_end

    def take(self) -> list[Order]:
        """The orders that have come since the last call."""
        try:
            words = os.read(self._read_end, _MOST)
        except BlockingIOError:
            return []
        return [Order(bytes([word])) for word in words] or [Order.CUT]

    def wait(self) -> Order:
        """The next order; for a process that does nothing meanwhile."""
        while True:
            wait_readable(self._read_end)
            with suppress(BlockingIOError):
                return Order(os.read(self._read_end, 1) or Order.CUT.value)


class Ordering:
    """The master's end of the pipe to one process."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)

    def give(self, order: Order) -> None:
        """Tells it; one that has just died hears nothing."""
        with suppress(BrokenPipeError, BlockingIOError):
            os.write(self._write_end, order.value)

    def become_child(self) -> Orders:
        """In the process that was forked: its own end."""
        os.close(self._write_end)
        return Orders(self._read_end)

    def become_parent(self) -> None:
        """In the master, after the fork."""
        os.close(self._read_end)

    def close(self) -> None:
        """When the process has ended, and in processes that it is not for."""
        os.close(self._write_end)
