"""What adding means: the interface of every counter and store.

One rule for all: add() is one indivisible addition modulo 2^64 that gives back the total right
before it. From that one number each frame of a batch gets its own total, so a batch is one addition
however many frames it has, and two counters that add at once can never give the same total twice.
No frame, no socket and no clock here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod


class Counter(ABC):
    """One exact uint64 total; tests/kit/counter_contract.py is what every implementation passes."""

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
