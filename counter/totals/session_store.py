"""What a store that keeps sessions promises, beside what every store does.

A commit changes the total and the sessions whose frames are in it together, or nothing. What is
wished of sessions rides along: to hold one (a hello), to let go of one, to end one. So one that was
answered is in the store, and many of them are one commit. The frames of a commit come first, then
its wishes, in their order.

Each store that is open for additions is a writer with a page of its own, which holds the sessions
that have a connection there. Another writer may take one out of it, and raises the page's fence as
it does. A writer commits only if its page is as it left it. Otherwise it is Fenced: nothing was
added, and it has to let go of the sessions that it lost before it commits again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from counter.totals.store import Store, StoreAway
from protocol import Hello, Refused, Run


class Fenced(StoreAway):
    """Nothing was added, as the sessions of these ids are the writer's no longer."""

    def __init__(self, lost: frozenset[int]) -> None:
        super().__init__(f"{len(lost)} sessions went on elsewhere")
        self.lost = lost


@dataclass(frozen=True)
class Granted:
    """A session is held by who asked for it, unless it is over, because its client has more of its
    replies than were applied; `runs` are those that its client may not have."""

    applied: int
    runs: tuple[Run, ...]
    is_over: bool = False


@dataclass(eq=False)
class Claim:
    """Asks for the session that a hello names. What becomes of it is in `outcome` after the commit,
    and in `evicted` how many sessions gave way to it."""

    hello: Hello
    outcome: Granted | Refused | None = None
    evicted: int = 0

    @property
    def session_id(self) -> int:
        """Which session."""
        return self.hello.session_id


@dataclass(eq=False)
class Park:
    """Lets go of a session, which is kept; nothing is done where it is not the writer's."""

    session_id: int


@dataclass(eq=False)
class End:
    """Ends a session; `applied` is what was applied of it, None where it was not the writer's."""

    session_id: int
    applied: int | None = None


Wish = Claim | Park | End

SessionShare = tuple[int, int, int]
"""The id of a session, how many frames of it, and the sum of the commit up to the last of them."""


@dataclass
class Work:
    """What is in one commit."""

    amount: int
    shares: list[SessionShare] = field(default_factory=list)
    wishes: list[Wish] = field(default_factory=list)


class SessionStore(Store):
    """A store that keeps sessions too."""

    @abstractmethod
    def keep_sessions(self, most: int) -> None:
        """Has it keep so many sessions at most, of all writers together; before it is used."""

    @abstractmethod
    def commit_work(self, take: Callable[[], Work]) -> int:
        """As commit(), of what `take` gives, which is called as `amount` is there.

        The outcomes are in the wishes when this, or settle() after it, has ended without an error.
        Fenced, from here and from settle(), says that nothing was added, nor is in doubt.
        """
