"""What waits for a commit to a store, and what is part of the one that is under way.

The invariant: an addition waits, is part of the one commit under way, or is neither any more. The
loop appends and the caller of the store takes from the head, perhaps in a thread of its own, so the
taking is locked; a connection that was withdrawn since it asked is owed nothing, and nothing of it
is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate, compress

from counter.serving.additions import Asker
from counter.serving.store_calls import raw_lock
from protocol import Batch

Asked = tuple[Asker, int, Batch | None]
Marks = list[tuple[float, int]]  # of a list of what is asked: when so many of it waited already


class Waiting:
    """The additions of one process on their way into a store; len() is how many wait."""

    def __init__(self) -> None:
        # Never replaced: it is taken from at its head while the loop appends.
        self._asked: list[Asked] = []
        self._marks: Marks = []  # of `_asked`
        self._under_way: list[Asked] = []
        self._marks_under_way: Marks = []
        self._taking = raw_lock()

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def is_under_way(self) -> bool:
        """Whether a commit holds anything."""
        return bool(self._under_way)

    def append(self, connection: Asker, amount: int, batch: Batch | None) -> None:
        """Has an addition wait."""
        self._asked.append((connection, amount, batch))

    def take(self) -> int:
        """Moves all that waits into the commit; gives back its sum. For the caller of the store."""
        with self._taking:
            count = len(self._asked)
            marks, self._marks = self._marks, []
            if not marks or marks[-1][1] < count:
                marks.append((time.monotonic(), count))
            self._under_way, self._marks_under_way = _still_owed(self._asked[:count], marks)
            del self._asked[:count]
        return sum([amount for _, amount, _ in self._under_way])

    def finish(self) -> list[Asked]:
        """What the commit held, which is over."""
        under_way = self._under_way
        self._under_way, self._marks_under_way = [], []
        return under_way

    def put_back(self) -> None:
        """What a commit held that was not made waits again, in front of what came since."""
        with self._taking:
            again, marks = _still_owed(self._under_way, self._marks_under_way)
            self._marks = [*marks, *((at, len(again) + count) for at, count in self._marks)]
            self._asked[:0] = again
            self._under_way, self._marks_under_way = [], []

    def withdraw_older(
        self, late_at: float, now: float, withdraw: Callable[[list[Asked]], None]
    ) -> None:
        """Has what was there at `late_at` withdrawn, waiting or under way; notes what is there now.

        What is under way stays part of its commit.
        """
        with self._taking:
            overdue = self._under_way[: _late(self._marks_under_way, late_at)]
            overdue += self._asked[: _late(self._marks, late_at)]
            if overdue:
                withdraw(overdue)
                # Whatever else those connections asked for stands behind what is withdrawn.
                self._asked[:], self._marks = _still_owed(self._asked, self._marks)
            if self._asked and (not self._marks or self._marks[-1][1] < len(self._asked)):
                self._marks.append((now, len(self._asked)))


def _late(marks: Marks, late_at: float) -> int:
    """How many waited already at a moment."""
    return max((count for at, count in marks if at <= late_at), default=0)


def _still_owed(asked: list[Asked], marks: Marks) -> tuple[list[Asked], Marks]:
    """What is asked by connections that were not withdrawn since, and the marks of that."""
    kept = [bool(connection.owed) for connection, _, _ in asked]
    if all(kept):
        return asked, marks
    left = list(accumulate(kept, initial=0))
    return list(compress(asked, kept)), [(at, left[count]) for at, count in marks if left[count]]
