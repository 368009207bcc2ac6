"""What connections ask to be added: the interface, and what adds to a total in memory.

Whatever stands behind it, an addition that was asked for is added once and answered with its total,
in the order of its connection, or its connection ends unanswered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, MutableSequence

from counter.processes.slots import READS, REQUESTS
from counter.totals.counter import Counter
from counter.turn.engine import Engine, Turn


class Additions(ABC):
    """What the connections of one process have added; to be used in the loop."""

    __slots__ = ()

    @abstractmethod
    def exchange(self) -> None:
        """Takes what the engine's connections ask, as far as they are ready."""

    @abstractmethod
    def ask(self, turn: Turn) -> None:
        """Has a turn added and answered, now or later."""

    @abstractmethod
    def commit(self) -> None:
        """Begins to add what was asked for, if it is time to.

        Called after each turn of the loop, and by whoever acts on a connection in between.
        """

    @abstractmethod
    def note_void(self) -> None:
        """Notes that a connection has ended that was owed something: it is not added any more,
        unless that is under way."""

    @abstractmethod
    def sweep(self, now: float) -> None:
        """Keeps its deadlines, at a moment of time.monotonic()."""

    @abstractmethod
    def close(self) -> None:
        """Adds nothing more."""


class InMemory(Additions):
    """Adds to a total in memory, at once.

    What is asked in one turn is one addition: it is paid once for all connections that were ready
    together, and reading them all before answering any keeps the processor in one piece of code.
    """

    __slots__ = ("_add", "_add_tagged", "_exchange", "_slot")

    def __init__(
        self,
        counter: Counter,
        slot: MutableSequence[int],
        engine: Engine,
        add_tagged: Callable[[Turn], int] | None = None,
    ) -> None:
        """`add_tagged` adds a turn in which sessions ask for something, and gives back the total
        before."""
        self._add = counter.add
        self._add_tagged = add_tagged
        self._slot = slot
        in_one_call = engine.in_one_call(counter, slot, self.ask)
        self._exchange = in_one_call or (lambda: engine.each_turn(self.ask))

    def exchange(self) -> None:
        self._exchange()

    def ask(self, turn: Turn) -> None:
        if turn.tagged and self._add_tagged is not None:
            before = self._add_tagged(turn)
        else:
            before = self._add(turn.amount)
        slot = self._slot
        slot[REQUESTS] += turn.frames
        slot[READS] += turn.reads
        turn.answer(before)

    def commit(self) -> None:
        """Nothing waits."""

    def note_void(self) -> None:
        """Nothing is owed."""

    def sweep(self, now: float) -> None:
        """Nothing waits from one turn to the next."""

    def close(self) -> None:
        """Nothing is held."""
