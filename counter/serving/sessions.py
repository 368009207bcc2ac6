"""Sessions: what a connection that began with a hello may ask, and how a memory's are kept.

A session outlives its connections: what was added of it, and the totals after it, is kept beside
the total and changes with it in one indivisible act. So a client that resumes it learns which of
its frames are in the total, and sends the others again. Every frame of a session has one number,
its place in the order of all that were ever sent in it.

The invariant: nobody is welcomed to a session as long as another connection can still add to it.
Where another one of this process has it, it is cut first; where one of another process has it, that
process is asked to, and waited for.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import MutableSequence
from typing import Any, Final, Protocol

from counter.processes.bells import Bells
from counter.processes.slots import (
    SESSIONS_EVICTED,
    SESSIONS_OPENED,
    SESSIONS_REFUSED,
    SESSIONS_RESUMED,
)
from counter.system.libev import READ
from counter.totals.ledger import Ledger
from counter.totals.sessions import Claimed, Held
from counter.turn.engine import Turn
from protocol import Answer, Hello, Refused, encode_total

# So long is a process waited for that is to give a session up. One that serves does so between two
# turns; one that died gave it up when the master buried it.
TAKEOVER_S: Final = 1.0


class Member(Protocol):
    """A connection, as its session sees it."""

    tag: int  # of its session; 0 before it was welcomed, and once that is over

    def welcome(self, tag: int, answer: Answer) -> None:
        """Its hello is answered: it belongs to a session, whose frames bear `tag`."""

    def turn_away(self, answer: bytes) -> None:
        """Its hello is answered, or its end, and there is no session for it, or not any more."""

    def give_way(self) -> None:
        """Its session goes on with another connection: it leaves, and what was not read of it is
        not added."""

    def withdraw(self) -> None:
        """What it waits for took too long: it leaves without an answer."""


class Sessions(ABC):
    """The sessions of one process; to be used in the loop."""

    __slots__ = ()

    @abstractmethod
    def greet(self, member: Member, hello: Hello) -> None:
        """Has a hello answered, now or later."""

    @abstractmethod
    def end(self, member: Member) -> None:
        """The client has all its replies and wants no more of the session: it is over, and the
        member is told how many frames were applied, now or later."""

    @abstractmethod
    def abandon(self, member: Member) -> None:
        """The session of a client that is broken is over."""

    @abstractmethod
    def leave(self, member: Member) -> None:
        """The connection is gone, or does not wait any more; its session is kept."""

    @abstractmethod
    def sweep(self, now: float) -> None:
        """Keeps its deadlines, at a moment of time.monotonic()."""

    @abstractmethod
    def close(self) -> None:
        """Answers nobody any more."""


class MemorySessions(Sessions):
    """The sessions of a total in memory, in the process at `place`; a member's tag is its session's
    slot, and 1."""

    def __init__(
        self,
        ledger: Ledger,
        place: int,
        bells: Bells,
        limit: int,
        slot: MutableSequence[int],
        loop: Any,
    ) -> None:
        self._ledger = ledger
        self._table = ledger.table
        self._place = place
        self._bells = bells
        self._limit = limit
        self._slot = slot
        self._members: dict[int, Member] = {}  # by tag
        self._waiting: dict[Member, tuple[Hello, float]] = {}  # what for, and until when
        self._rung = loop.io(bells.fileno(place), READ)
        self._rung.start(self._on_bell)

    def add(self, turn: Turn) -> int:
        """Adds a turn in which members ask for something; gives back the total before."""
        entries = [(tag - 1, frames, offset) for tag, frames, offset in turn.shares()]
        return self._ledger.add(self._place, turn.amount, entries)

    def greet(self, member: Member, hello: Hello) -> None:
        if not self._answer(member, hello):
            self._waiting[member] = hello, time.monotonic() + TAKEOVER_S

    def end(self, member: Member) -> None:
        member.turn_away(encode_total(self._finish(member)))

    def abandon(self, member: Member) -> None:
        self._finish(member)

    def leave(self, member: Member) -> None:
        self._waiting.pop(member, None)
        if member.tag and self._members.pop(member.tag, None) is not None:
            with self._table.lock:
                slot = member.tag - 1
                wanted_by = self._table.wanted_by(slot)
                self._table.release(slot)
            if wanted_by is not None:
                self._bells.ring(wanted_by)

    def sweep(self, now: float) -> None:
        overdue = [member for member, (_, until) in self._waiting.items() if until <= now]
        for member in overdue:
            hello, _ = self._waiting.pop(member)
            # One that died meanwhile may have given it up.
            if not self._answer(member, hello):
                self._refuse(member, Refused.HELD)

    def close(self) -> None:
        self._waiting.clear()
        self._rung.close()

    def _finish(self, member: Member) -> int:
        """Ends a member's session; gives back how many frames were applied."""
        tag, member.tag = member.tag, 0
        del self._members[tag]
        with self._table.lock:
            return self._table.end(tag - 1)

    def _answer(self, member: Member, hello: Hello) -> bool:
        """Answers a hello, unless another connection has to give its session up first."""
        claim = self._claim(hello)
        if isinstance(claim, Held) and claim.place == self._place:
            self._members[claim.slot + 1].give_way()
            claim = self._claim(hello)
        if isinstance(claim, Held):
            self._bells.ring(claim.place)
            return False
        if isinstance(claim, Refused):
            self._refuse(member, claim)
        elif claim.slot is None:
            self._slot[SESSIONS_REFUSED] += 1
            member.turn_away(claim.answer.encode())
        else:
            self._slot[SESSIONS_RESUMED if claim.answer.applied else SESSIONS_OPENED] += 1
            self._members[claim.slot + 1] = member
            member.welcome(claim.slot + 1, claim.answer)
        return True

    def _claim(self, hello: Hello) -> Claimed | Held | Refused:
        table = self._table
        with table.lock:
            claim = table.claim(self._place, hello, self._limit)
            if isinstance(claim, Held) and claim.place != self._place:
                table.want(claim.slot, self._place)
            evicted, table.evicted = table.evicted, 0
        self._slot[SESSIONS_EVICTED] += evicted
        return claim

    def _refuse(self, member: Member, why: Refused) -> None:
        self._slot[SESSIONS_REFUSED] += 1
        member.turn_away(encode_total(why.value))

    def _on_bell(self) -> None:
        """Gives up what other processes want, and looks whether what is waited for is there."""
        self._bells.quiet(self._place)
        wanted = [
            member
            for tag, member in self._members.items()
            if self._table.wanted_by(tag - 1) is not None
        ]
        for member in wanted:
            member.give_way()
        for member, (hello, _) in list(self._waiting.items()):
            if member in self._waiting and self._answer(member, hello):
                self._waiting.pop(member, None)
