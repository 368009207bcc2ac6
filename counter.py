"""What adding means: the Counter interface, and the total in memory.

One rule for every counter and store: add() is one indivisible addition modulo 2^64 that gives back
the total right before it. From that one number each frame of a batch gets its own total, so a batch
is one addition however many frames it has, and two counters that add at once can never give the
same total twice. No protocol, no socket and no clock here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from protocol import TOTAL_MASK


class Counter(ABC):
    """One exact uint64 total. Every implementation passes tests/counter_contract.py unchanged."""

    @abstractmethod
    def add(self, amount: int) -> int:
        """Adds `amount` (any integer from 0, taken modulo 2^64); gives back the total before.

        Must be indivisible: whoever else adds at the same time, in this process or another that
        shares the total, adds either wholly before or wholly after.
        """

    def total(self) -> int:
        """The total now, 0..2^64-1: an addition of nothing."""
        return self.add(0)

    @abstractmethod
    def close(self) -> None:
        """Lets go of what the counter holds; the total itself is left as it is."""


class MemoryCounter(Counter):
    """The total of a single process, starting from `start`; it ends with the process.

    Indivisible between greenlets and loop callbacks, because nothing in add() switches; not
    between threads.
    """

    def __init__(self, start: int = 0) -> None:
        self._total = start

    def add(self, amount: int) -> int:
        before = self._total
        self._total = (before + amount) & TOTAL_MASK
        return before

    def close(self) -> None:
        """Nothing is held."""
