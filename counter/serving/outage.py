"""An outage of the store, as all processes of one server see it: one line when it begins, one when
it ends.

Each process finds out for itself. Of several, the first to notice says that the store is away, and
the last to get on with it says that it is back; they know of each other by their slots, which are
looked at by one at a time: processes that one lock wakes notice in the same microseconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from counter.processes.slots import AWAY_SINCE_MS, Slots, to_ms


class Outage:
    """Whether the store is away for the process whose slot is `index`."""

    def __init__(
        self,
        slots: Slots,
        index: int,
        logger: logging.Logger,
        store: str,
        patience: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self._index = index
        self._log = logger
        self._store = store
        self._patience = patience
        self._clock = clock
        self._began_ms = 0  # 0: it is not away

    def begin(self, reason: str) -> None:
        """Notes, and says if this process is the first, that the store is away.

        Nothing more while it is.
        """
        if self._began_ms:
            return
        now_ms = to_ms(self._clock())
        with self._slots.alone():
            self._slots[self._index][AWAY_SINCE_MS] = now_ms
            others_ms = self._of_others()
            self._began_ms = min([now_ms, *others_ms])
            if not others_ms:
                self._log.warning(
                    "store %s is away (%s); additions wait up to %s for it, then their connections "
                    "close unanswered",
                    self._store,
                    reason,
                    self._patience,
                )

    def end(self) -> None:
        """Notes, and says if this process is the last, that the store is back, if it was away."""
        if not self._began_ms:
            return
        with self._slots.alone():
            self._slots[self._index][AWAY_SINCE_MS] = 0
            if not self._of_others():
                away_s = (to_ms(self._clock()) - self._began_ms) / 1000
                self._log.warning("store %s is back after %.1f s", self._store, away_s)
        self._began_ms = 0

    def _of_others(self) -> list[int]:
        cells = (self._slots[i][AWAY_SINCE_MS] for i in range(len(self._slots)) if i != self._index)
        return [since_ms for since_ms in cells if since_ms]
