"""The sessions of one process whose total is in a store.

What is wished of a session waits for the next commit (group_commit.py), and what became of it is
acted upon between two commits. So a hello is answered when its session is in the store, and whoever
had it in this process leaves before anything else is committed: what that one asked for is in the
answer, or is void.

The invariant: a tag means one session for the life of the process. What was asked with it may wait
longer than its connection lasts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, MutableSequence
from time import monotonic
from typing import Final

from counter.processes.slots import (
    SESSIONS_EVICTED,
    SESSIONS_OPENED,
    SESSIONS_REFUSED,
    SESSIONS_RESUMED,
)
from counter.serving.sessions import Member, Sessions
from counter.serving.store_calls import raw_lock
from counter.totals.session_store import Claim, End, Granted, Park, Wish
from protocol import Answer, Hello, encode_total

_MOST_TAGS: Final = 2**32 - 1


class _Asked:
    """A wish, if any: who waits for it, since when, and the tag that means nothing after it."""

    __slots__ = ("is_taken", "member", "since", "tag", "wish")

    def __init__(self, wish: Wish | None, member: Member | None = None, tag: int = 0) -> None:
        self.wish = wish
        self.member = member
        self.since = monotonic()
        self.tag = tag
        self.is_taken = False  # into a commit


class StoredSessions(Sessions):
    """The sessions of a process; `limit` is the largest amount, and who waits for `timeout_s` is
    withdrawn. len() is how many wishes wait.

    take() is for the caller of the store, perhaps in a thread of its own; all else is for the loop.
    """

    def __init__(self, limit: int, slot: MutableSequence[int], timeout_s: float) -> None:
        self._limit = limit
        self._slot = slot
        self._timeout_s = timeout_s
        self._members: dict[int, Member] = {}  # by the ids of their sessions
        self.ids: dict[int, int] = {}  # of sessions, by tag; to be read also by who takes
        self._last_tag = 0
        # Never replaced: it is taken from at its head while the loop appends.
        self._waiting: list[_Asked] = []
        self._under_way: list[_Asked] = []
        self._asking: dict[Member, _Asked] = {}
        self._claims: Counter[int] = Counter()  # how many wait for a session, or are under way
        # Nobody has them any more, and somebody claims them: they are not parked meanwhile.
        self._orphans: set[int] = set()
        self._taking = raw_lock()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_active(self) -> bool:
        """Whether the next commit may have to do with sessions."""
        return bool(self._waiting or self.ids)

    def greet(self, member: Member, hello: Hello) -> None:
        self._claims[hello.session_id] += 1
        self._ask(_Asked(Claim(hello), member), member)

    def end(self, member: Member) -> None:
        session_id = self.ids[member.tag]
        if self._claims[session_id]:
            # It comes too late, the session goes on with another connection.
            member.give_way()
        else:
            self._ask(_Asked(End(session_id), member, member.tag), member)

    def abandon(self, member: Member) -> None:
        tag, member.tag = member.tag, 0
        session_id = self.ids[tag]
        if self._members.get(session_id) is member:
            del self._members[session_id]
            self._let_go(session_id, tag, End(session_id))

    def leave(self, member: Member) -> None:
        self._forget_asked(member)
        session_id = self.ids.get(member.tag)
        if session_id is not None and self._members.get(session_id) is member:
            del self._members[session_id]
            self._let_go(session_id, member.tag, Park(session_id))

    def sweep(self, now: float) -> None:
        for member, asked in list(self._asking.items()):
            if asked.since <= now - self._timeout_s:
                member.withdraw()

    def close(self) -> None:
        for asked in self._asking.values():
            asked.member = None
        self._asking.clear()

    def take(self) -> list[Wish]:
        """Moves all wishes that wait into the commit; they are to be taken before its frames."""
        with self._taking:
            count = len(self._waiting)
            self._under_way = self._waiting[:count]
            del self._waiting[:count]
            for asked in self._under_way:
                asked.is_taken = True
            return [asked.wish for asked in self._under_way if asked.wish is not None]

    def finish(self) -> None:
        """The commit is made: acts upon what became of the wishes in it."""
        under_way, self._under_way = self._under_way, []
        for asked in under_way:
            wish, member = asked.wish, asked.member
            if member is not None:
                del self._asking[member]
            if isinstance(wish, Claim):
                self._end_claim(wish, member)
            elif isinstance(wish, End) and member is not None:
                self._end_session(wish, member)
            self.ids.pop(asked.tag, None)

    def put_back(self) -> None:
        """The commit was not made: what it held waits again, in front of what came since."""
        self._wait_first(self._under_way)
        self._under_way = []

    def fail(self) -> None:
        """Nobody knows whether the commit was made: who waits for it is withdrawn, and what was
        claimed is let go of."""
        under_way, self._under_way = self._under_way, []
        self._wait_first([asked for asked in under_way if not isinstance(asked.wish, Claim)])
        for asked in under_way:
            member = asked.member
            if isinstance(asked.wish, Claim):
                self._end_wait(asked.wish.session_id, True)
            if member is not None:
                self._asking.pop(member, None)
                asked.member = None
                member.withdraw()

    def lose(self, lost: Iterable[int]) -> None:
        """These sessions went on elsewhere: their connections leave, before anything is committed.

        What the store may still have of them here is parked before any wish that waits is done.
        """
        parks = []
        for session_id in lost:
            member = self._members.pop(session_id, None)
            parks.append(_Asked(Park(session_id), None, 0 if member is None else member.tag))
            if member is not None:
                member.give_way()
        self._wait_first(parks)

    def _ask(self, asked: _Asked, member: Member) -> None:
        self._asking[member] = asked
        self._waiting.append(asked)

    def _wait_first(self, asked: list[_Asked]) -> None:
        """Has wishes wait in front of what waits."""
        with self._taking:
            for one in asked:
                one.is_taken = False
            self._waiting[:0] = asked

    def _end_claim(self, claim: Claim, member: Member | None) -> None:
        """Answers a hello, whose claim is in the store or is refused."""
        outcome, session_id = claim.outcome, claim.session_id
        self._slot[SESSIONS_EVICTED] += claim.evicted
        if isinstance(outcome, Granted) and (member is not None or outcome.is_over):
            self._replace(session_id)
        if isinstance(outcome, Granted) and not outcome.is_over and member is not None:
            self._welcome(member, session_id, outcome)
            return
        self._end_wait(session_id, isinstance(outcome, Granted))
        if member is None:
            return
        self._slot[SESSIONS_REFUSED] += 1
        if isinstance(outcome, Granted):
            member.turn_away(Answer(outcome.applied, self._limit).encode())
        else:
            assert outcome is not None
            member.turn_away(encode_total(outcome.value))

    def _welcome(self, member: Member, session_id: int, granted: Granted) -> None:
        self._slot[SESSIONS_RESUMED if granted.applied else SESSIONS_OPENED] += 1
        tag = self._new_tag()
        self.ids[tag] = session_id
        self._members[session_id] = member
        self._end_wait(session_id, False)
        member.welcome(tag, Answer(granted.applied, self._limit, granted.runs))

    def _replace(self, session_id: int) -> None:
        """Has the connection leave that had a session; nothing that it asks is committed then."""
        old = self._members.pop(session_id, None)
        if old is not None:
            self.ids.pop(old.tag, None)
            old.give_way()

    def _end_session(self, end: End, member: Member) -> None:
        """Tells a member that its session is over, and how much was applied."""
        assert end.applied is not None
        member.tag = 0
        self._members.pop(end.session_id, None)
        member.turn_away(encode_total(end.applied))

    def _let_go(self, session_id: int, tag: int, wish: Wish) -> None:
        """Nobody has a session any more; who claims it meanwhile gets it as it is."""
        if self._claims[session_id]:
            self._orphans.add(session_id)
            self._waiting.append(_Asked(None, None, tag))
        else:
            self._waiting.append(_Asked(wish, None, tag))

    def _end_wait(self, session_id: int, is_orphan: bool) -> None:
        """A claim has ended. Where it was the last one, and leaves a session that may be in the
        page without a connection, that is parked."""
        self._claims[session_id] -= 1
        if is_orphan:
            self._orphans.add(session_id)
        if self._claims[session_id] > 0:
            return
        del self._claims[session_id]
        if session_id in self._orphans:
            self._orphans.discard(session_id)
            if session_id not in self._members:
                self._waiting.append(_Asked(Park(session_id)))

    def _forget_asked(self, member: Member) -> None:
        """Nobody is there to be told what becomes of what he asked."""
        asked = self._asking.pop(member, None)
        if asked is None:
            return
        asked.member = None
        with self._taking:
            wish = asked.wish
            if not isinstance(wish, Claim) or asked.is_taken:
                return
            asked.wish = None
        self._end_wait(wish.session_id, False)

    def _new_tag(self) -> int:
        while True:
            self._last_tag = self._last_tag % _MOST_TAGS + 1
            if self._last_tag not in self.ids:
                return self._last_tag
