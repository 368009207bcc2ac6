"""The turn of a serving process: what all that are ready ask is read, added and answered as one.

An engine has the connections of a process in an epoll of its own, which the loop watches as one
descriptor. receive() reads all that are ready, verifies their frames and gives back one Turn: what
they ask for together, which is one addition. answer() sends each its replies. Whatever is to be
decided (an end, a refusal, replies that the kernel did not take) is an Event, and nothing here
decides: no deadline, no worker, no store, no log.

Two engines do the same, compiled.py in C and plain.py in Python; tests/turn/test_engines.py is what
both pass. Why: a watcher of the loop for each connection costs 1 us a request, and a call for each
system call as much again.
"""

from __future__ import annotations

import _socket
import mmap
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableSequence
from enum import Enum, IntEnum
from typing import Any, Final, Protocol

from gevent import monkey

# So many connections at most are read before they are answered: with thousands, the first would
# have left the processor's cache by then.
TURN_PARTS: Final = 64

# Of a connection that begins with what is no frame so many bytes are told: a hello has 48, and
# nothing stands behind it.
HELLO_ROOM: Final = 64

# While something was ready the epoll is asked again, so many times and so long at most: a turn of
# the loop costs 3 us, and the loop's other work must not wait for longer than that.
ROUNDS: Final = 16
LONGEST_S: Final = 0.001

_EPOLLIN: Final = 0x001
_EPOLLOUT: Final = 0x004
_EPOLLONESHOT: Final = 1 << 30


class Kind(IntEnum):
    """What is to be decided of a connection. UNSENT comes with the replies, CHECKSUM and LIMIT with
    the frame that is refused, HELLO with all that was read, FAILED with the traceback."""

    READY = 1  # one that is served elsewhere can be read, or written
    BEGUN = 2  # a frame has begun that is not whole
    COMPLETED = 3  # the frame that had begun is whole, and none has begun behind it
    CHECKSUM = 4
    LIMIT = 5
    END = 6  # the peer sends no more
    RESET = 7  # the connection is gone
    DRAINED = 8  # what was to be read at most has been read
    UNSENT = 9  # replies that the kernel did not take
    FULL = 10  # very many frames wait for a store
    ANSWERED = 11  # nothing waits for a store any more; follows FULL, or tell_answered()
    FAILED = 12  # an error of this program's own
    HELLO = 13  # its first frame is none: it may belong to a session


Event = tuple[int, int, bytes]
"""A Kind, a descriptor, and the bytes that come with it."""

Share = tuple[int, int, int]
"""A tag, how many frames of one read bear it, and the sum of the turn up to the last of them."""

# What ends a connection that may have asked for something just before.
_ENDS: Final = frozenset((Kind.CHECKSUM, Kind.LIMIT, Kind.HELLO, Kind.END, Kind.DRAINED))


class Interest(Enum):
    """What a connection is watched for: the mask of epoll, and whether the engine serves it."""

    FRAMES = (_EPOLLIN, True)
    BYTES = (_EPOLLIN, False)  # READY as long as there is anything to read
    ARRIVAL = (_EPOLLIN | _EPOLLONESHOT, False)  # READY once there is something to read
    ROOM = (_EPOLLOUT | _EPOLLONESHOT, False)  # READY once something can be written
    NOTHING = (_EPOLLONESHOT, False)

    def __init__(self, mask: int, is_served: bool) -> None:
        self.mask = mask
        self.is_served = is_served


class Adder(Protocol):
    """What is asked of the total."""

    def add(self, amount: int) -> int:
        """Adds, modulo 2^64; gives back the total before."""


class Turn(ABC):
    """What several connections ask, one addition: answered or kept before anything else is read."""

    __slots__ = ()

    amount: int  # what to add, to be taken modulo 2^64
    frames: int
    reads: int  # from how many connections
    tagged: int  # how many of those bear a tag

    @abstractmethod
    def shares(self) -> list[Share]:
        """What those that bear a tag ask, in the order in which it is added."""

    @abstractmethod
    def answer(self, before: int) -> None:
        """Sends each connection its replies, `before` being the total before the addition; one that
        was forgotten since gets none."""

    @abstractmethod
    def keep(self) -> KeptTurn:
        """The same, to be answered later: its frames are owed from now on."""


class KeptTurn(Turn):
    """A turn that waits for its addition, while some of its connections may end."""

    __slots__ = ()

    @abstractmethod
    def purge(self) -> None:
        """Takes out what connections asked that are gone, or what is void: it will not be added."""

    @abstractmethod
    def live_frames(self) -> int:
        """How many frames answer() would answer now."""

    @abstractmethod
    def askers(self) -> list[int]:
        """The descriptors of those that it has something of and that were not forgotten."""


class Engine(ABC):
    """Reads and answers the connections of one process, which are named by their descriptors.

    `events` is what there is to decide, in the order in which it was found; see told().
    """

    name: str

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._epoll: Any = monkey.get_original("select", "epoll")()

    def told(self) -> list[Event]:
        """Takes what there is to decide out of `events`, in the order in which it is to be decided.

        Ends come last: what was read with one is answered after it was found, and replies that the
        kernel did not take would be lost with a connection that has ended.
        """
        told = sorted(self.events, key=_is_end)
        self.events.clear()
        return told

    def fileno(self) -> int:
        """What the loop is to watch: readable while a connection is ready."""
        return int(self._epoll.fileno())

    def close(self) -> None:
        """Watches nothing any more."""
        self._epoll.close()

    @abstractmethod
    def open(self, sock: _socket.socket, interest: Interest) -> None:
        """Takes a connection; OSError where the kernel or memory lacks for it."""

    @abstractmethod
    def watch(self, fd: int, interest: Interest) -> None:
        """Watches a connection for something else from now on."""

    @abstractmethod
    def forget(self, fd: int) -> None:
        """Lets go of a connection, whose socket is closed next or was handed on: see unwatch()."""

    def unwatch(self, fd: int) -> None:
        """Has the epoll forget a descriptor that stays open."""
        self._epoll.unregister(fd)

    @abstractmethod
    def void(self, fd: int) -> None:
        """What the connection has asked for and was not answered is owed no longer."""

    @abstractmethod
    def limit(self, fd: int, count: int) -> None:
        """Reads so many bytes more at most, from 1; DRAINED tells when."""

    @abstractmethod
    def hold(self, fd: int, holds: bool) -> None:
        """Whether replies wait behind others that the kernel has not taken: they come as UNSENT."""

    @abstractmethod
    def tell_answered(self, fd: int) -> None:
        """Has ANSWERED tell when nothing is owed any more."""

    @abstractmethod
    def join(self, fd: int, tag: int) -> None:
        """Has all that the connection asks from now on bear a tag, of 1 to 2^32 - 1."""

    @abstractmethod
    def owed(self, fd: int) -> int:
        """How many frames wait for a store."""

    @abstractmethod
    def held(self, fd: int) -> int:
        """How many bytes there are of a frame that has begun."""

    @abstractmethod
    def read_at(self, fd: int) -> float:
        """When something was read last, by time.monotonic(); 0 where nothing was."""

    @abstractmethod
    def receive(self, fd: int = -1) -> Turn | None:
        """Reads what is ready, or one connection whether it is ready or not; what is asked so, or
        None. The turn is to be answered or kept before the next call."""

    @abstractmethod
    def is_quiet(self) -> bool:
        """Whether the last receive() found nothing ready."""

    def each_turn(self, take: Callable[[Turn], None]) -> None:
        """Has `take` answer or keep each turn: until nothing is ready, something is to be decided,
        or the loop's other work is due."""
        until = time.monotonic() + LONGEST_S
        for _ in range(ROUNDS):
            turn = self.receive()
            if turn is not None:
                take(turn)
            if self.events or self.is_quiet() or time.monotonic() > until:
                break

    def in_one_call(
        self, counter: Adder, slot: MutableSequence[int], take: Callable[[Turn], None]
    ) -> Callable[[], None] | None:
        """What receives, adds to a total in memory and answers as each_turn() would, without a call
        of Python's in between; turns in which anything bears a tag are left to `take`. None where
        this engine or this total has no such way."""
        return None

    def tagged_add(
        self, address: int, memory: mmap.mmap, before_at: int, notes_at: int, places: int
    ) -> Callable[[int, int], None] | None:
        """What adds an amount, with a tag, to the total at an address that has its tag beside it,
        writes the total before into the word `before_at` of `memory`, and notes whose tag was
        replaced in those from `notes_at`; None where this engine has no such way."""
        return None


def _is_end(event: Event) -> bool:
    return event[0] in _ENDS
