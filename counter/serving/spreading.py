"""Accepting, in one of the processes that share a listening socket: plain sockets, spread evenly.

The kernel wakes whichever process waits, mostly the same one. One that has more connections than
another therefore leaves a new one to the others for a moment, once, and takes it after all if they
do not. That a connection is accepted does not hang on a free worker: what is full is said by
is_crowded(), not by gevent's Pool.
"""

from __future__ import annotations

import _socket
import socket
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Final

from gevent.pool import Pool
from gevent.server import StreamServer

from counter.processes.slots import CONNECTIONS, Slots
from counter.system.accepting import PausingServer

# What a process that is ahead of others in connections leaves a new one to them for: long enough
# for an idle process to wake, short beside what a connection costs its peer anyway.
LEAVE_TO_OTHERS_S: Final = 0.001


class SpreadingServer(PausingServer, StreamServer):
    """Accepts connections of `listener` in the process at `index` of those that have `slots`."""

    # gevent's stubs leave out what a server on plain sockets needs of it.
    full: Any
    pool: Any
    socket: Any

    def __init__(self, listener: Any, pool: Pool, slots: Slots, index: int) -> None:
        self.slots = slots
        self.index = index
        self._has_others = len(slots) > 1
        self._has_left_it = False  # what waits to be accepted was left to them once
        if self._has_others:
            self.max_accept = 1  # a burst is spread over the processes, not taken by the first
        super().__init__(listener, spawn=pool)
        self.full = self.is_crowded

    @abstractmethod
    def is_crowded(self) -> bool:
        """Whether as many connections are open as may be."""

    @abstractmethod
    def warn_of_lack(self, error: OSError) -> None:
        """Says that the machine lacks for a connection."""

    def do_read(self) -> tuple[_socket.socket, Any] | None:  # type: ignore[override]
        """Accepts one connection as a plain non-blocking socket, or gives back None."""
        return self.accept_or_pause(self._accept, self.warn_of_lack)

    def _accept(self) -> tuple[_socket.socket, Any] | None:
        while True:
            try:
                fd, address = self.socket._accept()
            except BlockingIOError:
                return None
            except ConnectionAbortedError:
                continue
            sock = _socket.socket(self.family, socket.SOCK_STREAM, 0, fd)
            sock.setblocking(False)
            return sock, address

    def _do_read(self) -> None:
        """Accepts what waits; leaves it to the other processes first if this one is ahead of them.

        One that has as many as it may accepts again when one of them has ended.
        """
        if self.is_crowded():
            self.stop_accepting()
        elif self._has_others and not self._has_left_it and self._is_ahead():
            self._has_left_it = True
            self.pause_accepting(LEAVE_TO_OTHERS_S)
        else:
            self._has_left_it = False
            super()._do_read()  # type: ignore[misc]  # gevent's stubs leave it out

    def _is_ahead(self) -> bool:
        """Whether another process is to take what waits: clearly so while there are free workers
        here, as leaving it costs a moment, and exactly once there are none."""
        fewest = self.slots.fewest_connections(but=self.index)
        if fewest is None:
            return False
        allowed = 0 if self.pool.full() else max(4, fewest // 4)
        return self.slots[self.index][CONNECTIONS] > fewest + allowed

    def do_handle(self, *accepted: Any) -> None:
        """Hands an accepted connection to handle(), without starting a greenlet for it."""
        self.handle(*accepted)

    def accept_all(self) -> Iterator[_socket.socket]:
        """Accepts every connection that waits, whatever others have; OSError ends it."""
        while accepted := self.do_read():
            yield accepted[0]
