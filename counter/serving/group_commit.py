"""Group commit: additions to a store, many at a time, without the loop ever waiting for it.

What connections ask for while a commit is under way waits together and is the next commit: one
addition of the sum, from which each gets its own total. The loop starts a commit and is called back
when it has ended; the store's own work is done elsewhere (store_calls.py). One callback answers all
that a commit held.

Sessions ride along (stored_sessions.py): what is wished of them, and which frames are whose.

The invariant: what is part of a commit whose outcome is in doubt stays so until the store has said
what became of it; nothing else is committed before. Only what waits can be withdrawn.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, MutableSequence
from enum import Enum
from typing import Any, Final, Protocol

import gevent

from counter.processes.slots import (
    COMMIT_BOUNDS_S,
    COMMIT_US,
    COMMITS,
    READS,
    REQUESTS,
    TOTAL,
    TOTAL_AT_MS,
    now_ms,
)
from counter.serving.additions import Additions
from counter.serving.store_calls import make_caller
from counter.serving.stored_sessions import StoredSessions
from counter.serving.waiting import Waiting
from counter.system.backoff import backoff_s
from counter.totals.session_store import Fenced, SessionStore, Work
from counter.totals.store import InDoubt, Store, StoreAway
from counter.turn.engine import Engine, KeptTurn, Turn
from protocol import TOTAL_MASK

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


class Outage(Protocol):
    """Who is told how the store fares, as often as it is found."""

    def begin(self, reason: str) -> None:
        """The store is away."""

    def end(self) -> None:
        """The store has done what it was asked."""


class Crowd(Protocol):
    """What a commit may ask of those whose additions it makes."""

    def withdraw(self, fd: int) -> None:
        """Ends a connection without an answer to what waits for the store, which is void then."""

    def decide_events(self) -> None:
        """Acts on what the engine has to tell, after something was answered."""


class State(Enum):
    """What the store is at."""

    IDLE = "nothing"
    GATHERING = "waiting for more to commit"
    COMMITTING = "a commit, or a probe where nobody asked"
    RETRYING = "waiting for the next attempt"
    DOUBTING = "waiting for the next attempt to settle a commit"
    SETTLING = "settling a commit"
    CLOSED = "no more"


_MAY_FOLLOW: Final = {
    State.IDLE: {State.COMMITTING, State.CLOSED},
    State.GATHERING: {State.IDLE, State.COMMITTING, State.CLOSED},
    State.COMMITTING: {
        State.IDLE,
        State.GATHERING,
        State.RETRYING,
        State.DOUBTING,
        State.CLOSED,
    },
    State.RETRYING: {State.COMMITTING, State.CLOSED},
    State.DOUBTING: {State.SETTLING, State.CLOSED},
    State.SETTLING: {
        State.IDLE,
        State.GATHERING,
        State.RETRYING,
        State.DOUBTING,
        State.CLOSED,
    },
}


class GroupCommit(Additions):
    """What the connections of one process ask of a store; stands where InMemory does for a memory.

    `outage` is told whether the store is there; `on_loss()` is called when it is found to have lost
    what it had answered.
    """

    def __init__(
        self,
        store: Store,
        slot: MutableSequence[int],
        engine: Engine,
        crowd: Crowd,
        timeout_s: float,
        outage: Outage,
        on_loss: Callable[[], None],
        sessions: StoredSessions | None = None,
    ) -> None:
        """`sessions` are those of a SessionStore."""
        self._store = store
        self._sessions = sessions
        self._slot = slot
        self._engine = engine
        self._crowd = crowd
        self._timeout_s = timeout_s
        self._outage = outage
        self._on_loss = on_loss
        self._losses = 0
        self._loop: Any = gevent.get_hub().loop
        self._caller = make_caller(store.blocks, self._ended, store.close)
        self._waiting = Waiting()
        self._state = State.IDLE
        self._timer: Any = None  # ends GATHERING, RETRYING or DOUBTING
        self._expected = 0  # so many are waited for while GATHERING
        self._failures = 0  # in a row
        self._started_at = 0.0
        self._ended_at = 0.0  # of the last call that succeeded

    def exchange(self) -> None:
        self._engine.each_turn(self.ask)

    def ask(self, turn: Turn) -> None:
        """Has what is asked wait for the next commit."""
        self._waiting.append(turn.keep())

    def note_void(self) -> None:
        self._waiting.note_void()

    def commit(self) -> None:
        """Starts a commit of what waits, unless one is under way or it is too early."""
        if not self.is_idle:
            return
        self._waiting.purge()
        state, count = self._state, self._count()
        if (state is State.IDLE and count) or (
            state is State.GATHERING and count >= self._expected
        ):
            self._start()

    def sweep(self, now: float) -> None:
        """Withdraws what has waited too long, and notices a store that is silent."""
        self._withdraw(self._waiting.asked_before(now - self._timeout_s))
        if self.is_busy:
            if now - self._started_at >= SILENT_S:
                self._outage.begin(f"no answer for {SILENT_S:g} s")
        elif self.is_idle and now - self._ended_at >= HEARTBEAT_S:
            self._start()
        else:
            self.commit()  # what was wished of sessions since the last turn

    def close(self) -> None:
        """Ends when the store has ended what it is at; nothing more is committed."""
        self._enter(State.CLOSED)
        self._caller.close()

    @property
    def is_idle(self) -> bool:
        """Whether the store has nothing to do, now or when some time has passed."""
        return self._state in (State.IDLE, State.GATHERING)

    @property
    def is_busy(self) -> bool:
        """Whether a call to the store is under way."""
        return self._state in (State.COMMITTING, State.SETTLING)

    def _count(self) -> int:
        """How many reads wait, and wishes."""
        return len(self._waiting) + (0 if self._sessions is None else len(self._sessions))

    def _enter(self, state: State, after_s: float | None = None) -> None:
        """Changes the state; one that is to end by itself does so `after_s`."""
        if self._state is State.CLOSED:
            return
        assert state in _MAY_FOLLOW[self._state], f"{state} after {self._state}"
        self._state = state
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        if after_s is not None:
            self._timer = self._loop.timer(after_s)
            self._timer.start(self._on_timer)

    def _on_timer(self) -> None:
        if self._state is not State.GATHERING:
            self._start()
            return
        self._enter(State.IDLE)
        self.commit()

    def _start(self) -> None:
        """Begins a call to the store."""
        self._waiting.purge()
        settles = self._state is State.DOUBTING
        self._enter(State.SETTLING if settles else State.COMMITTING)
        self._started_at = time.monotonic()
        if settles:
            self._caller.run(self._store.settle)
        elif self._sessions is not None and self._sessions.is_active:
            self._caller.run(self._commit_work_or_probe)
        else:
            # Nobody is welcomed before this has ended, so nothing of a session is asked meanwhile.
            self._caller.run(self._commit_or_probe)

    def _commit_or_probe(self) -> int:
        """The caller's call: what waits when it begins is committed; without any, a probe."""
        if self._waiting:
            return self._store.commit(self._waiting.take)
        return self._store.probe()

    def _commit_work_or_probe(self) -> int:
        """The same where sessions may have to do with it."""
        assert isinstance(self._store, SessionStore)
        if self._count():
            return self._store.commit_work(self._take_work)
        return self._store.probe()

    def _take_work(self) -> Work:
        assert self._sessions is not None
        # Wishes first: what was asked before one of them is committed with it, or was before.
        wishes = self._sessions.take()
        amount = self._waiting.take()
        return Work(amount, self._waiting.shares(self._sessions.ids), wishes)

    def _ended(self, before: int | None, error: Exception | None) -> None:
        """A call to the store has ended; runs in the loop."""
        if error is None:
            self._succeed(before, self._measure())
        elif isinstance(error, Fenced):
            self._put_back()
            self._lose(error.lost)
        elif isinstance(error, StoreAway):
            if isinstance(error, InDoubt) or self._state is State.SETTLING:
                self._try_again(str(error), State.DOUBTING)
            else:
                self._put_back()
                self._try_again(str(error), State.RETRYING)
        else:
            _log.error("the store failed", exc_info=error)
            self._fail(self._waiting.finish())
            self._store.close()
            self._try_again(str(error), State.RETRYING)

    def _measure(self) -> float:
        """Seconds that the call took, which are counted if it was a commit."""
        now = self._ended_at = time.monotonic()
        took_s = now - self._started_at
        if self._waiting.is_under_way:
            self._slot[COMMITS + bisect_left(COMMIT_BOUNDS_S, took_s)] += 1
            self._slot[COMMIT_US] += int(took_s * 1e6)
        return took_s

    def _succeed(self, before: int | None, took_s: float) -> None:
        """Answers what the call held; `before` is None where its outcome can never be known."""
        self._failures = 0
        # One that always takes so long is not away and back with every commit.
        if took_s < SILENT_S:
            self._outage.end()
        if self._store.losses > self._losses:
            self._losses = self._store.losses
            self._on_loss()
        under_way = self._waiting.finish()
        if before is None:
            self._fail(under_way)
        else:
            self._note_total(self._answer(under_way, before))
            if self._sessions is not None:
                self._sessions.finish()
        count = self._count()
        self._expected = (sum([turn.reads for turn in under_way]) + count) // 2
        if count < self._expected:
            took_s = time.monotonic() - self._started_at
            self._enter(State.GATHERING, after_s=min(took_s, LONGEST_GATHER_S))
        else:
            self._enter(State.IDLE)
            self.commit()

    def _note_total(self, total: int) -> None:
        self._slot[TOTAL] = total
        self._slot[TOTAL_AT_MS] = now_ms()

    def _answer(self, under_way: list[KeptTurn], before: int) -> int:
        """Replies to all that a commit held; gives back the total after it."""
        # Counted before they are sent: who is killed in between has answered no more than that.
        self._slot[REQUESTS] += sum([turn.live_frames() for turn in under_way])
        self._slot[READS] += sum([turn.reads for turn in under_way])
        for turn in under_way:
            turn.answer(before)
            before = (before + turn.amount) & TOTAL_MASK
        self._crowd.decide_events()
        return before

    def _try_again(self, reason: str, state: State) -> None:
        """After a failure: at once the first time, as a broken connection is soon a new one."""
        self._failures += 1
        delay_s = 0.0
        if self._failures > 1:
            self._outage.begin(reason)
            delay_s = backoff_s(self._failures - 1, FIRST_DELAY_S, LAST_DELAY_S)
        self._enter(state, after_s=delay_s)

    def _put_back(self) -> None:
        """The commit was not made: what it held waits again."""
        if self._sessions is not None:
            self._sessions.put_back()
        self._waiting.put_back()

    def _lose(self, lost: frozenset[int]) -> None:
        """Commits again, at once, without what the connections of these sessions asked."""
        assert self._sessions is not None
        self._failures = 0
        self._sessions.lose(lost)
        self._crowd.decide_events()
        self._enter(State.IDLE)
        self.commit()

    def _fail(self, turns: list[KeptTurn]) -> None:
        """Nobody knows what became of a commit: who waits for it is withdrawn."""
        if self._sessions is not None:
            self._sessions.fail()
        self._withdraw(list(dict.fromkeys(fd for turn in turns for fd in turn.askers())))

    def _withdraw(self, askers: list[int]) -> None:
        for fd in askers:
            self._crowd.withdraw(fd)
        self._waiting.purge()
