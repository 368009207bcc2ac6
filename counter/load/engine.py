"""How a load process hears from its connections: all of them in an epoll of their own, which the
loop watches as one descriptor, and one turn() for all that are ready.

Two engines do the same, and tests/load/test_load_engines.py is what both pass. plain.py has each
connection read and send for itself. compiled.py borrows those that wait for nothing but plain
replies: one call of C reads, checks, measures and records what has come to all of them, and sends
to them again. Whatever needs a decision is the connection's own, in both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Final, Protocol

from gevent import monkey

from counter.load.meter import Meter
from counter.system.libev import READ

EPOLLIN: Final = 0x001
EPOLLOUT: Final = 0x004

Account = tuple[int, list[tuple[int, int]]]
"""What a connection has in flight: its last total, and the bursts, oldest first: when each was sent
(ns), and how many frames it is."""


class Served(Protocol):
    """What an engine may ask of a connection."""

    @property
    def number(self) -> int:
        """Its name in the recording, 0 without one."""

    def on_readable(self) -> None:
        """Reads what has come, or that it has ended."""

    def on_writable(self) -> None:
        """Sends what the kernel did not take before."""

    def hand_over(self, most: int) -> Account | None:
        """Gives away what is in flight, in so many bursts at most; None where it is more, or where
        anything but its replies is waited for, or no total is there to hold them against."""

    def take_back(self, account: Account) -> None:
        """Has this in flight again."""

    def received(self, data: bytes, now: int) -> None:
        """Takes what was read at `now`; nothing: the end."""

    def left_unsent(self, size: int) -> None:
        """Has the last `size` bytes of what is in flight sent as soon as the kernel takes them."""

    def lose(self, error: OSError | None) -> None:
        """Ends, for this reason."""


class Sender(Protocol):
    """What an engine may ask of the process that it serves."""

    @property
    def sending(self) -> bool:
        """Whether anything is to be sent at all."""

    @property
    def meter(self) -> Meter:
        """What is done, counted."""

    def end_turn(self) -> None:
        """Sends to those that have read a lone reply."""

    def allowance(self) -> int:
        """How many requests may be sent before somebody has to decide."""

    def spend(self, requests: int) -> None:
        """So many requests of the measured part were sent."""


class Engine(ABC):
    """The connections of one process, by their descriptors."""

    name: str

    def __init__(self, loop: Any, sender: Sender) -> None:
        self._sender = sender
        self._connections: dict[int, Served] = {}
        self._epoll: Any = monkey.get_original("select", "epoll")()
        self._watcher = loop.io(self._epoll.fileno(), READ)
        self._watcher.start(self.turn)

    def watch(self, fd: int, connection: Served) -> None:
        """Has a connection told of what comes; OSError where the kernel has no room for it."""
        self._epoll.register(fd, EPOLLIN)
        self._connections[fd] = connection

    def watch_room(self, fd: int, is_wanted: bool) -> None:
        """Whether a connection is told too when the kernel takes more."""
        self._epoll.modify(fd, EPOLLIN | EPOLLOUT if is_wanted else EPOLLIN)

    def forget(self, fd: int) -> None:
        """Lets go of a connection, whose socket is closed next."""
        self._epoll.unregister(fd)
        del self._connections[fd]

    def close(self) -> None:
        """Watches nothing any more."""
        self._watcher.close()
        self._epoll.close()

    @abstractmethod
    def turn(self) -> None:
        """Serves those that are ready; never waits."""

    @abstractmethod
    def recall(self, sent_before_ns: int) -> None:
        """Gives each connection back what is in flight, if the oldest was sent before then."""

    def serve(self, fd: int, mask: int) -> None:
        """Has a connection do what it can by epoll's mask."""
        connection = self._connections[fd]
        if mask & EPOLLOUT:
            connection.on_writable()
        if mask & ~EPOLLOUT and fd in self._connections:
            connection.on_readable()
