"""Who keeps the total of one server: found before it serves, opened by each of its processes, read
at the end.

The master never opens a store. What it has to know of one is found out by a short-lived process, so
that neither a connection nor a lock nor a library of the store's is left in what it forks.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from contextlib import closing
from dataclasses import asdict
from typing import Final

from counter.options.server import ServerSettings
from counter.options.values import Seconds
from counter.processes.master import ChildError, Stopped, ask_child
from counter.processes.slots import Slots
from counter.totals.counter import Counter, MemoryCounter, make_shared_counter
from counter.totals.store import Found, Store, StoreAway, StoreError, open_store

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

        def check() -> str:
            try:
                found = open_store(settings.store).check(settings.set_total, settings.force)
            except StoreError as error:
                return json.dumps({"error": str(error)})
            return json.dumps(asdict(found))

        try:
            answer = json.loads(ask_child(check, settings.store_timeout_s))
        except ChildError as error:
            timeout = f"{error}; --storeTimeout is {Seconds(settings.store_timeout_s)}"
            raise StoreError(f"cannot use {self._address}: {timeout}") from None
        if "error" in answer:
            raise StoreError(answer["error"])
        self.found = Found(**answer)

    def open(self) -> Store:
        return open_store(self._address)

    def last_total(self, slots: Slots) -> int:
        """What the store holds now; where it is away, the last total that it told this server."""
        try:
            if self._forks:
                return self._read_aside()
            return self._read()
        except (ChildError, StoreAway, Stopped) as error:
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

    def _read_aside(self) -> int:
        """The same by a helping process, so that a store that hangs is given up in time."""

        def read() -> str:
            try:
                return str(self._read())
            except StoreAway as error:
                return f"away {error}"

        answer = ask_child(read, LAST_READING_S)
        if not answer.isdigit():
            raise StoreAway(answer.removeprefix("away "))
        return int(answer)


def make_keeper(settings: ServerSettings, processes: int) -> Keeper:
    """The keeper that the settings name; StoreError if its store cannot be used."""
    if settings.store.kind == "memory":
        return MemoryKeeper(settings.set_total or 0, processes)
    return StoreKeeper(settings, processes)
