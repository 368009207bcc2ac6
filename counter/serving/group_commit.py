"""Group commit: additions to a store, many at a time, without the loop ever waiting for it.

What connections ask for while a commit is under way waits together and is the next commit: one
addition of the sum, from which each gets its own total. The loop starts a commit and is called back
when it has ended; the store's own work is done elsewhere, by a thread where it blocks, otherwise by
a greenlet. One callback answers all that a commit held.

The invariant: an addition waits, is part of the one commit under way, or is answered or withdrawn.
What is part of a commit whose outcome is in doubt stays so until the store has said what became of
it; nothing else is committed before. Only what waits can be withdrawn.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, MutableSequence
from itertools import accumulate, compress
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent import monkey

from counter.processes.slots import (
    COMMIT_BOUNDS_S,
    COMMIT_US,
    COMMITS,
    READS,
    REASONS,
    REFUSED,
    REQUESTS,
    TOTAL,
    TOTAL_AT_MS,
)
from counter.totals.store import InDoubt, Store, StoreAway
from protocol import MAX_UNREAD_FRAMES, TOTAL_MASK, Batch, encode_total

if TYPE_CHECKING:
    from counter.serving.connection import Connection

Asked = tuple["Connection", int, "Batch | None"]
Marks = list[tuple[float, int]]  # of a list of what is asked: when so many of it waited already

# A store that has not answered for so long is away, though it has not said so.
SILENT_S: Final = 1.0

# A store that nobody asks is asked for its total so often: an outage shows before it costs anyone.
HEARTBEAT_S: Final = 5.0

# Between attempts at a store that is away: doubled each time.
FIRST_DELAY_S: Final = 0.05
LAST_DELAY_S: Final = 1.0

# Those who were just answered mostly ask again at once, and a commit costs the same for one as for
# many. So the next one waits for half of all who were answered or wait, which leaves the other half
# to ask while it is under way; but no longer than the last one took, nor than this.
LONGEST_GATHER_S: Final = 0.005

_log = logging.getLogger("server")


class GroupCommit:
    """What the connections of one process ask of a store; stands where Turn does for a memory.

    To be used in the loop. `on_away(reason)` is called when the store is found to be away,
    `on_back()` when it adds again, `on_loss()` when it is found to have lost what it had answered.
    """

    def __init__(
        self,
        store: Store,
        slot: MutableSequence[int],
        timeout_s: float,
        on_away: Callable[[str], None],
        on_back: Callable[[], None],
        on_loss: Callable[[], None],
    ) -> None:
        self._store = store
        self._slot = slot
        self._timeout_s = timeout_s
        self._on_away = on_away
        self._on_back = on_back
        self._on_loss = on_loss
        self._losses = 0
        self._loop: Any = gevent.get_hub().loop
        self._worker = _Thread(self) if store.blocks else _Greenlet(self)
        # Never replaced: the worker takes from its head while the loop appends.
        self._asked: list[Asked] = []
        self._taking = _raw_lock()
        self._marks: Marks = []  # of `_asked`
        self._under_way: list[Asked] = []
        self._marks_under_way: Marks = []
        self._busy = False  # a call to the store is under way
        self._started_at = 0.0
        self._ended_at = 0.0  # of the last call that succeeded
        self._in_doubt = False
        self._outcome: int | None = None
        self._error: Exception | None = None
        self._expected = 0  # so many are waited for before the next commit
        self._gathering: Any = None
        self._failures = 0  # in a row
        self._retry: Any = None
        self._away = False
        self._closed = False

    def ask(self, connection: Connection, amount: int, batch: Batch | None) -> None:
        """Has an addition wait for the next commit; a connection with very many is not read."""
        connection.owed += 1 if batch is None else len(batch)
        self._asked.append((connection, amount, batch))
        if connection.owed >= MAX_UNREAD_FRAMES:
            connection.wake()

    def commit(self) -> None:
        """Starts a commit of what waits, unless one is under way or it is too early.

        Called by the loop before it waits, and by whoever acts on a connection in between.
        """
        idle = not (self._busy or self._retry or self._closed)
        if idle and self._asked and len(self._asked) >= self._expected:
            self._start()

    def sweep(self, now: float) -> None:
        """Withdraws what has waited too long, and notices a store that is silent."""
        late_at = now - self._timeout_s
        with self._taking:
            overdue = self._under_way[: _late(self._marks_under_way, late_at)]
            overdue += self._asked[: _late(self._marks, late_at)]
            if overdue:
                self._withdraw(overdue)
                # Whatever else those connections asked for stands behind what is withdrawn.
                self._asked[:], self._marks = _still_owed(self._asked, self._marks)
            if self._asked and (not self._marks or self._marks[-1][1] < len(self._asked)):
                self._marks.append((now, len(self._asked)))
        if self._busy:
            if now - self._started_at >= SILENT_S:
                self._be_away(f"no answer for {SILENT_S:g} s")
        elif now - self._ended_at >= HEARTBEAT_S and not (self._retry or self._closed):
            self._start()

    def close(self) -> None:
        """Ends the worker when it has ended what it does; nothing more is committed."""
        self._closed = True
        for timer in (self._gathering, self._retry):
            if timer:
                timer.close()
        self._retry = None
        self._worker.close()

    def operate(self) -> None:
        """One call to the store, by the worker."""
        self._error = None
        try:
            if self._in_doubt:
                self._outcome = self._store.settle()
            elif self._asked:
                self._outcome = self._store.commit(self._take)
            else:
                self._outcome = self._store.probe()
        except Exception as error:
            self._error = error

    def close_store(self) -> None:
        """The worker's last act."""
        self._store.close()

    def _take(self) -> int:
        """Moves all that waits into the commit; gives back its sum. Called by the worker.

        A connection that was withdrawn since it asked is owed nothing, and nothing of it is added.
        """
        with self._taking:
            count = len(self._asked)
            marks, self._marks = self._marks, []
            if not marks or marks[-1][1] < count:
                marks.append((time.monotonic(), count))
            self._under_way, self._marks_under_way = _still_owed(self._asked[:count], marks)
            del self._asked[:count]
        return sum([amount for _, amount, _ in self._under_way])

    def _start(self) -> None:
        if self._gathering:
            self._gathering.close()
            self._gathering = None
        self._retry = None
        self._busy = True
        self._started_at = time.monotonic()
        self._worker.run()

    def ended(self) -> None:
        """A call to the store has ended; runs in the loop."""
        self._busy = False
        error = self._error
        if error is None:
            took_s = self._measure()
            self._failures = 0
            # One that always takes so long is not away and back with every commit.
            if self._away and took_s < SILENT_S:
                self._away = False
                self._on_back()
            if self._store.losses > self._losses:
                self._losses = self._store.losses
                self._on_loss()
            self._succeed(self._outcome)
        elif isinstance(error, StoreAway):
            if isinstance(error, InDoubt):
                self._in_doubt = True
            elif not self._in_doubt and self._under_way:
                self._put_back()
            self._try_again(str(error))
        else:
            _log.error("the store failed", exc_info=error)
            self._in_doubt = False
            self._withdraw(self._under_way)
            self._under_way = []
            self._store.close()
            self._try_again(str(error))

    def _measure(self) -> float:
        """Seconds that the call took, which are counted if it was a commit."""
        now = self._ended_at = time.monotonic()
        took_s = now - self._started_at
        if self._under_way:
            self._slot[COMMITS + bisect_left(COMMIT_BOUNDS_S, took_s)] += 1
            self._slot[COMMIT_US] += int(took_s * 1e6)
        return took_s

    def _succeed(self, before: int | None) -> None:
        under_way, self._under_way = self._under_way, []
        self._in_doubt = False
        if before is None:
            self._withdraw(under_way)
        else:
            self._note_total(self._answer(under_way, before))
        if self._closed:
            return
        self._expected = (len(under_way) + len(self._asked)) // 2
        if len(self._asked) < self._expected:
            took_s = time.monotonic() - self._started_at
            self._gathering = self._loop.timer(min(took_s, LONGEST_GATHER_S))
            self._gathering.start(self._gathered)

    def _gathered(self) -> None:
        self._expected = 0
        self.commit()

    def _note_total(self, total: int) -> None:
        self._slot[TOTAL] = total
        self._slot[TOTAL_AT_MS] = int(time.monotonic() * 1000)

    def _answer(self, under_way: list[Asked], before: int) -> int:
        """Replies to all that a commit held; gives back the total after it."""
        answered = 0
        for connection, amount, batch in under_way:
            frames = 1 if batch is None else len(batch)
            after = (before + amount) & TOTAL_MASK
            if connection.owed:
                answered += frames
                try:
                    connection.send(encode_total(after) if batch is None else batch.replies(before))
                    connection.answered(frames)
                except Exception:
                    connection.fail()
            before = after
        self._slot[REQUESTS] += answered
        self._slot[READS] += len(under_way)
        return before

    def _put_back(self) -> None:
        """What a commit held that was not made waits again, in front of what came since."""
        with self._taking:
            again, marks = _still_owed(self._under_way, self._marks_under_way)
            self._marks = [*marks, *((at, len(again) + count) for at, count in self._marks)]
            self._asked[:0] = again
            self._under_way = []

    def _try_again(self, reason: str) -> None:
        """After a failure: at once the first time, as a broken connection is soon a new one."""
        self._failures += 1
        delay_s = 0.0
        if self._failures > 1:
            self._be_away(reason)
            delay_s = min(LAST_DELAY_S, FIRST_DELAY_S * 2 ** min(self._failures - 2, 10))
        if not self._closed:
            self._retry = self._loop.timer(delay_s)
            self._retry.start(self._start)

    def _be_away(self, reason: str) -> None:
        if not self._away:
            self._away = True
            self._on_away(reason)

    def _withdraw(self, asked: list[Asked]) -> None:
        for connection, _, _ in asked:
            if connection.owed:
                self._slot[REFUSED + REASONS.index("store")] += 1
                connection.withdraw("store")


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


class _Greenlet:
    """Runs the calls of a store that waits as a greenlet does."""

    def __init__(self, group: GroupCommit) -> None:
        self._group = group
        self._running: Any = None

    def run(self) -> None:
        self._running = gevent.spawn(self._operate)

    def _operate(self) -> None:
        self._group.operate()
        self._group.ended()

    def close(self) -> None:
        if self._running is not None:
            self._running.kill()
        self._group.close_store()


class _Thread:
    """Runs the calls of a store that blocks, in a thread of the system.

    The loop hands over by releasing a lock and is woken by an async watcher. Nothing else of gevent
    is touched by the thread, nor what its patches have replaced, logging among it.
    """

    def __init__(self, group: GroupCommit) -> None:
        self._group = group
        self._closing = False
        self._gate = _raw_lock()
        self._gate.acquire()
        self._ended = gevent.get_hub().loop.async_()
        self._ended.start(group.ended)
        monkey.get_original("_thread", "start_new_thread")(self._live, ())

    def run(self) -> None:
        self._gate.release()

    def _live(self) -> None:
        while True:
            self._gate.acquire()
            if self._closing:
                self._group.close_store()
                return
            self._group.operate()
            self._ended.send()

    def close(self) -> None:
        self._closing = True
        if self._gate.locked():
            self._gate.release()


def _raw_lock() -> threading.Lock:
    """A lock of the system's threads, also where gevent has replaced those of Python."""
    lock: threading.Lock = monkey.get_original("_thread", "allocate_lock")()
    return lock
