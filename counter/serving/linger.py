"""Sockets after their FIN: what their peers still send is thrown away until they are quiet.

Closing a socket that has unread bytes sends RST, which can destroy replies that were sent already.
A lingering socket holds no worker, and for a bounded time and number of bytes.
"""

from __future__ import annotations

import _socket
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from gevent.event import Event

from counter.system.libev import READ

# How long, and for how many bytes, a peer may go on sending after it was told that it will not be
# answered and still see FIN rather than RST.
LINGER_S: Final = 1.0
LINGER_BYTES: Final = 1 << 20

_READ_BYTES: Final = 65536


class Lingering:
    """The lingering sockets of one serving process."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._sockets: set[_Linger] = set()
        self._quiet = Event()
        self._quiet.set()

    def add(self, sock: _socket.socket) -> None:
        """Sends FIN and lets the socket linger, from now on without its former owner."""
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            sock.close()
            return
        self._quiet.clear()
        self._sockets.add(_Linger(self._loop, sock, self._discard))

    def sweep(self, now: float) -> None:
        """Closes those whose time is over, at a moment of time.monotonic()."""
        for linger in [linger for linger in self._sockets if now >= linger.until]:
            linger.take()  # what came in time, or a reset would take replies with it
            linger.close()

    def join(self) -> None:
        """Waits until no socket lingers."""
        self._quiet.wait()

    def close(self) -> None:
        """Closes all of them."""
        for linger in list(self._sockets):
            linger.close()

    def _discard(self, linger: _Linger) -> None:
        self._sockets.discard(linger)
        if not self._sockets:
            self._quiet.set()


class _Linger:
    """One of them. It ends at the peer's EOF, after LINGER_S, or after LINGER_BYTES."""

    __slots__ = ("_bytes_left", "_on_end", "_sock", "_watcher", "until")

    def __init__(self, loop: Any, sock: _socket.socket, on_end: Callable[[_Linger], None]) -> None:
        self._sock = sock
        self._on_end = on_end
        self.until = time.monotonic() + LINGER_S
        self._bytes_left = LINGER_BYTES
        self._watcher: Any = loop.io(sock.fileno(), READ)
        self._watcher.start(self.take)

    def take(self) -> None:
        """Throws away what has come."""
        try:
            size = len(self._sock.recv(_READ_BYTES))
        except BlockingIOError:
            return
        except OSError:
            size = 0
        self._bytes_left -= size
        if not size or self._bytes_left <= 0:
            self.close()

    def close(self) -> None:
        """Closes the socket; without effect if it is closed."""
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
            self._sock.close()
            self._on_end(self)
