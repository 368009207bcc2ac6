"""What the server's name leads to, which may be another address in the middle of a run.

A lookup waits in a thread of gevent's, and nobody waits long for it: whoever has to connect does
so to the addresses that were known, where a lookup takes its time or finds nothing.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from time import monotonic
from typing import Final

import gevent
from gevent.socket import getaddrinfo

from counter.load.share import SocketAddress

LOOKUP_S: Final = 1.0  # between lookups, however many connections are lost
PATIENCE_S: Final = 1.0  # what a connection waits for a lookup


class ServerName:
    """The addresses of the server, looked up anew when connections are made."""

    def __init__(self, host: str, port: int, addresses: tuple[SocketAddress, ...]) -> None:
        """`addresses` are those that were found at the start."""
        self._host, self._port = host, port
        self._addresses = addresses
        self._is_fixed = _is_number(host)
        self._lookup: gevent.Greenlet[[], None] | None = None
        self._next_at = monotonic() + LOOKUP_S

    def addresses(self) -> tuple[SocketAddress, ...]:
        """What to connect to, in the order to try it; waits a moment where it is looked up."""
        if not self._is_fixed and monotonic() >= self._next_at and self._is_idle():
            self._next_at = monotonic() + LOOKUP_S
            self._lookup = gevent.spawn(self._look_up)
        if self._lookup is not None:
            self._lookup.join(PATIENCE_S)
        return self._addresses

    def _is_idle(self) -> bool:
        return self._lookup is None or self._lookup.ready()

    def _look_up(self) -> None:
        # RuntimeError: no thread can be started.
        with suppress(OSError, UnicodeError, RuntimeError):
            found = getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            self._addresses = tuple((family, address) for family, _, _, _, address in found)


def _is_number(host: str) -> bool:
    """Whether it is an address and no name."""
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return False
    return True
