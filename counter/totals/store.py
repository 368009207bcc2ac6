"""What a durable or shared total promises: the Store interface, its errors, which store is which.

A store is a Counter whose addition can fail, and then says what became of it. StoreAway: nothing
was added. InDoubt: perhaps it was; settle() asks for that addition again, until it is known, and it
is applied once. A store never adds twice, and never gives a total it is not sure of.

A store opens what it needs when it is first used, so that a process can serve while its store is
away. Only check() creates anything, before the server serves; it overwrites nothing unless told to.
SQLite is in sqlite.py, Redis in redis.py; serving/group_commit.py runs them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from counter.totals.counter import Counter


class StoreError(Exception):
    """A store cannot be used as it is, and trying again would not help: what is wrong, what to do.

    Nothing was overwritten.
    """


class StoreAway(Exception):
    """The store cannot add now and may be able to later; nothing was added. The text says why."""


class InDoubt(StoreAway):
    """The store cannot say whether the addition was made. settle() has to be called for it."""


@dataclass(frozen=True)
class Found:
    """What check() found."""

    total: int
    is_new: bool  # it held no total before
    survives: str  # what an answered addition survives, as far as the store can be asked
    warnings: tuple[str, ...] = ()


class Store(Counter):
    """A Counter that outlives the server. Not for two threads or greenlets at once."""

    # Whether a call blocks the thread it is made in, or waits as a greenlet does.
    blocks: ClassVar[bool]

    # How often the total was found to have gone back, because the store lost what it had answered.
    losses: int = 0

    @abstractmethod
    def check(self, set_total: int | None = None, force: bool = False) -> Found:
        """Makes the total if there is none, and finds out whether it can be added to.

        `set_total` is what a new total begins with; one that is there already is replaced only
        with `force`. StoreError if this store cannot be used.
        """

    @abstractmethod
    def commit(self, amount: Callable[[], int]) -> int:
        """Adds what `amount` gives, durably; gives back the total before.

        `amount` is called once, when nothing else has to be waited for, so that what comes until
        then is in it. StoreAway and InDoubt as they say. Not to be called while an addition is in
        doubt.
        """

    @abstractmethod
    def settle(self) -> int | None:
        """Asks again for the addition that is in doubt, which is applied once.

        Gives back the total before it; None if that can never be known, and then it is not asked
        for any more. StoreAway while it cannot be asked: it stays in doubt.
        """

    @abstractmethod
    def read(self) -> int:
        """The total as it is now, which nothing is written or queued for; StoreAway."""

    @abstractmethod
    def probe(self) -> int:
        """The total, if an addition could be made now; StoreAway otherwise."""

    def add(self, amount: int) -> int:
        """As Counter.add; StoreAway or InDoubt where the store fails."""
        return self.commit(lambda: amount)


def counts_already(total: int, set_total: int) -> str:
    """What a store says that holds a total and is told to begin with another."""
    return (
        f"the total is {total:,} and --setTotal would make it {set_total:,}; "
        "leave --setTotal out to go on from there, or add --force to overwrite it"
    )
