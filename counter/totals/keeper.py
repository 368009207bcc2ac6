"""Who keeps the total of one server: found before it serves, opened by each of its processes, read
at the end.

The master never opens a store. What it has to know of one is found out by a short-lived process, so
that neither a connection nor a lock nor a library of the store's is left in what it forks.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from contextlib import closing
from typing import Final

from counter.options.server import ServerSettings
from counter.options.values import Seconds, StoreAddress
from counter.processes.bells import Bells
from counter.processes.child import ChildError, ask_child
from counter.processes.signals import STOP_SIGNALS, Stopped, raise_stopped
from counter.processes.slots import Slots
from counter.system.signals import handled
from counter.totals.counter import Counter
from counter.totals.ledger import Ledger, OwnLedger, SharedLedger, unavailable
from counter.totals.memory import AtomicCounter, MemoryCounter, make_shared_counter
from counter.totals.sessions import SessionTable
from counter.totals.store import Found, Store, StoreAway, StoreError

# So long may the last reading of the total take, at the end of the server.
LAST_READING_S: Final = 5.0

_log = logging.getLogger("server")


class Keeper(ABC):
    """The total, before the processes of a server are forked and after they have ended."""

    found: Found
    ledger: Ledger | None = None  # of sessions, where there may be any
    bells: Bells | None = None  # of the processes that have them
    why_no_sessions: str = ""

    def bury(self, place: int) -> None:  # noqa: B027  # most leave nothing behind
        """Finishes or undoes what the serving process at `place` was at, which is dead."""

    @abstractmethod
    def open(self) -> Counter:
        """The counter for the process that calls, which is a serving one."""

    @abstractmethod
    def last_total(self, slots: Slots) -> int:
        """The total after the last of the processes has ended."""


class MemoryKeeper(Keeper):
    """The total in memory, shared by the processes forked from this one if there are any."""

    def __init__(self, start: int, processes: int, sessions: int = 0) -> None:
        self._counter = make_shared_counter(start) if processes else MemoryCounter(start)
        self._make_ledger(sessions, processes)
        way = getattr(self._counter, "way", "")
        survives = f"the death of a serving process, shared by {way}" if processes else "nothing"
        self.found = Found(start, True, survives)

    def _make_ledger(self, sessions: int, processes: int) -> None:
        """Makes room for so many sessions, or says why there are none."""
        if not sessions:
            self.why_no_sessions = "--sessions is 0"
            return
        if processes:
            self.why_no_sessions = unavailable(self._counter, processes)
            if self.why_no_sessions:
                return
        try:
            table = SessionTable(sessions, max(1, processes))
        except OSError as error:
            self.why_no_sessions = f"no memory for {sessions} ({error.strerror}); lower --sessions"
            return
        self.bells = Bells(max(1, processes))
        if isinstance(self._counter, AtomicCounter):
            self.ledger = SharedLedger(self._counter, table, processes)
        else:
            self.ledger = OwnLedger(self._counter, table)

    def bury(self, place: int) -> None:
        if self.ledger is not None and self.bells is not None:
            self.ledger.bury(place)
            self.bells.ring_all()

    def open(self) -> Counter:
        return self._counter

    def last_total(self, slots: Slots) -> int:
        return self._counter.total()


class StoreKeeper(Keeper):
    """The total in a store; StoreError if it cannot be used."""

    def __init__(self, settings: ServerSettings, processes: int) -> None:
        if settings.store.kind != "sqlite":
            self.why_no_sessions = "this store keeps none"
        elif not settings.sessions:
            self.why_no_sessions = "--sessions is 0"
        self._address = settings.store
        self._forks = processes > 0

        def check() -> Found:
            return open_store(settings.store).check(settings.set_total, settings.force)

        try:
            self.found = ask_child(check, settings.store_timeout_s, raises=(StoreError,))
        except ChildError as error:
            timeout = f"{error}; --storeTimeout is {Seconds(settings.store_timeout_s)}"
            raise StoreError(f"cannot use {self._address}: {timeout}") from None

    def open(self) -> Store:
        return open_store(self._address)

    def last_total(self, slots: Slots) -> int:
        """What the store holds now; where it is away, the last total that it told this server."""
        try:
            with handled(STOP_SIGNALS, raise_stopped):
                # Aside, so that a store that hangs is given up in time.
                if self._forks:
                    return ask_child(self._read, LAST_READING_S, raises=(StoreAway,))
                return self._read()
        except (ChildError, OSError, StoreAway, Stopped) as error:
            told = slots.last_total()
            _log.warning(
                "store %s cannot be read at the end (%s): what follows is the last total it told",
                self._address,
                error,
            )
            return self.found.total if told is None else told

    def _read(self) -> int:
        with closing(self.open()) as store:
            return store.read()


def open_store(address: StoreAddress) -> Store:
    """The store at an address other than `memory`, not yet used."""
    if address.kind == "sqlite":
        from counter.totals.sqlite import SqliteStore

        return SqliteStore(address.path)
    from counter.totals.redis import RedisStore

    return RedisStore(address.url, address.key)


def make_keeper(settings: ServerSettings, processes: int) -> Keeper:
    """The keeper that the settings name; StoreError if its store cannot be used."""
    if settings.store.kind == "memory":
        return MemoryKeeper(settings.set_total or 0, processes, settings.sessions)
    return StoreKeeper(settings, processes)
