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
from counter.processes.child import ChildError, ask_child
from counter.processes.signals import STOP_SIGNALS, Stopped, raise_stopped
from counter.processes.slots import Slots
from counter.system.signals import handled
from counter.totals.counter import Counter
from counter.totals.memory import MemoryCounter, make_shared_counter
from counter.totals.store import Found, Store, StoreAway, StoreError

# So long may the last reading of the total take, at the end of the server.
LAST_READING_S: Final = 5.0

_log = logging.getLogger("server")


class Keeper(ABC):
    """The total, before the processes of a server are forked and after they have ended."""

    found: Found

    @abstractmethod
    def open(self) -> Counter:
        """The counter for the process that calls, which is a serving one."""

    @abstractmethod
    def last_total(self, slots: Slots) -> int:
        """The total after the last of the processes has ended."""


class MemoryKeeper(Keeper):
    """The total in memory, shared by the processes forked from this one if there are any."""

    def __init__(self, start: int, processes: int) -> None:
        self._counter = make_shared_counter(start) if processes else MemoryCounter(start)
        way = getattr(self._counter, "way", "")
        survives = f"the death of a serving process, shared by {way}" if processes else "nothing"
        self.found = Found(start, True, survives)

    def open(self) -> Counter:
        return self._counter

    def last_total(self, slots: Slots) -> int:
        return self._counter.total()


class StoreKeeper(Keeper):
    """The total in a store; StoreError if it cannot be used."""

    def __init__(self, settings: ServerSettings, processes: int) -> None:
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
        return MemoryKeeper(settings.set_total or 0, processes)
    return StoreKeeper(settings, processes)
