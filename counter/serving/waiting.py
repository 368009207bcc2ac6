"""What waits for a commit to a store, and what is part of the one that is under way.

The invariant: a turn waits, is part of the one commit under way, or is neither any more. The loop
appends and the caller of the store takes from the head, perhaps in a thread of its own, so the
taking is locked. What connections asked that are gone is taken out of what waits, in the loop, and
stays in what is under way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import chain

from counter.serving.store_calls import raw_lock
from counter.totals.session_store import SessionShare
from counter.turn.engine import KeptTurn
from protocol import TOTAL_MASK

Asked = tuple[float, KeptTurn]  # since when, by time.monotonic()


class Waiting:
    """The turns of one process on their way into a store; len() is how many reads wait."""

    def __init__(self) -> None:
        # Never replaced: it is taken from at its head while the loop appends.
        self._asked: list[Asked] = []
        self._under_way: list[Asked] = []
        self._has_void = False
        self._taking = raw_lock()

    def __len__(self) -> int:
        return sum([turn.reads for _, turn in self._asked])

    @property
    def is_under_way(self) -> bool:
        """Whether a commit holds anything."""
        return bool(self._under_way)

    def append(self, turn: KeptTurn) -> None:
        """Has a turn wait."""
        self._asked.append((time.monotonic(), turn))

    def note_void(self) -> None:
        """Notes that something may wait of a connection that is gone."""
        self._has_void = True

    def take(self) -> int:
        """Moves all that waits into the commit; gives back its sum. For the caller of the store."""
        with self._taking:
            count = len(self._asked)
            self._under_way = self._asked[:count]
            del self._asked[:count]
        return sum([turn.amount for _, turn in self._under_way])

    def shares(self, ids: Mapping[int, int]) -> list[SessionShare]:
        """What sessions ask in the commit, with its sums; `ids` has theirs by tag.

        For the caller of the store.
        """
        shares: list[SessionShare] = []
        before = 0
        for _, turn in self._under_way:
            if turn.tagged:
                shares += [
                    (ids[tag], frames, (before + offset) & TOTAL_MASK)
                    for tag, frames, offset in turn.shares()
                ]
            before += turn.amount
        return shares

    def finish(self) -> list[KeptTurn]:
        """What the commit held, which is over."""
        under_way = self._under_way
        self._under_way = []
        return [turn for _, turn in under_way]

    def put_back(self) -> None:
        """What a commit held that was not made waits again, in front of what came since."""
        with self._taking:
            self._asked[:0] = self._under_way
            self._under_way = []
        self._has_void = True
        self.purge()

    def purge(self) -> None:
        """Takes out of what waits whatever is void."""
        if not self._has_void:
            return
        self._has_void = False
        with self._taking:
            for _, turn in self._asked:
                turn.purge()
            self._asked[:] = [(since, turn) for since, turn in self._asked if turn.reads]

    def asked_before(self, moment: float) -> list[int]:
        """The descriptors of those who wait, or are part of the commit, since then or longer."""
        with self._taking:
            overdue = [
                turn for since, turn in chain(self._under_way, self._asked) if since <= moment
            ]
        return list(dict.fromkeys(chain.from_iterable(turn.askers() for turn in overdue)))
