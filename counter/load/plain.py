"""The engine in Python: each connection that is ready reads for itself."""

from __future__ import annotations

from typing import Final

from counter.load.engine import EPOLLIN, Engine

# So many connections at most are read before they are sent to again.
READY: Final = 64


class PlainEngine(Engine):
    """The engine that is always there."""

    name = "plain"

    def turn(self) -> None:
        connections = self._connections
        for fd, mask in self._epoll.poll(0, READY):
            if mask == EPOLLIN:
                connections[fd].on_readable()
            else:
                self.serve(fd, mask)
        self._sender.end_turn()

    def recall(self, sent_before_ns: int) -> None:
        """Every connection has what is its own."""
