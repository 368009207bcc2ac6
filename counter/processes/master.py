"""The master: forks the serving processes, replaces those that die, stops them in order.

It knows nothing of counting, and has no hub, no thread and no store: nothing in it can hang, and
what it forks inherits nothing that is in use. Signal handlers and children only write a byte into
its pipe; the loop decides.

The invariants: a process that dies is replaced at once, unless it died before it was ready, which
is delayed and in the end given up; when the master dies, however it dies, its processes die with
it; one stop ladder with one deadline ends them all.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Final, NoReturn, Protocol

from counter.processes.child import CannotServe, Child, die_with_parent
from counter.processes.orders import Order, Ordering
from counter.processes.signals import (
    HANDLED,
    STOP_SIGNALS,
    UNUSED_SIGNALS,
    ignore_signals,
    name_of,
)
from counter.system.backoff import backoff_s
from counter.system.exits import EXIT_CANNOT_BOOT
from counter.system.signals import WakePipe, blocked, handled
from counter.system.waiting import wait_readable

# Between attempts to replace processes that die before they are ready: doubled each time.
FIRST_DELAY_S: Final = 0.1
LAST_DELAY_S: Final = 5.0
# So many in a row, and none serving: they will not come.
ATTEMPTS: Final = 5

# What a process may take beyond its own drain deadline before it is killed.
KILL_GRACE_S: Final = 2.0

# A wait that ends so much later than it should says that this process was stopped.
LATE_S: Final = 0.5

_log = logging.getLogger("server")


class CannotBoot(Exception):
    """No process can serve, and trying again would not help."""


class Program(Protocol):
    """What the master asks of the program whose processes it keeps; all of it in the master."""

    def on_ready(self) -> None:
        """All processes are ready for the first time."""

    def on_stop(self) -> None:
        """The stopping begins."""

    def on_reload(self) -> bool:
        """SIGHUP came; true if every process shall get it too."""

    def on_dump(self) -> None:
        """SIGUSR1 came, which every process gets then."""


class Master:
    """Keeps one process for each of `children` running, and ends them within `drain_timeout_s`."""

    def __init__(self, children: Sequence[Child], drain_timeout_s: float, program: Program) -> None:
        self._children = children
        self._drain_timeout_s = drain_timeout_s
        self._program = program
        self._has_announced = False
        self._must_reload = False
        self._must_dump = False
        self._pid = os.getpid()
        self._indexes: dict[int, int] = {}  # of each living process, by pid
        self._orderings: dict[int, Ordering] = {}  # likewise
        self._ready = mmap.mmap(-1, len(children))  # one byte a process, set by itself
        self._were_ready: set[int] = set()
        self._has_served = False
        self._failures: dict[int, int] = {}  # of each place: deaths in a row before ready
        self._retry_at: dict[int, float] = {}
        self._stop_signals = 0
        self._stopped_by = ""
        self._unused_signals: list[int] = []
        self._wake = WakePipe()

    def run(self) -> None:
        """Forks, supervises and stops; gives back when the last process has ended.

        CannotBoot if the processes cannot start.
        """
        others = set(HANDLED) - set(STOP_SIGNALS)
        with (
            # Who stops it once more, when all have ended, is told how it ended like everybody.
            handled(STOP_SIGNALS, self._on_signal, ignored_behind=True),
            handled(others, self._on_signal),
            self._wake,
        ):
            try:
                self._fork_missing()
                self._until_ready()
                if not self._stop_signals:
                    self._program.on_ready()
                    self._has_announced = True
                    self._obey()
                while not self._stop_signals:
                    self._wait(self._seconds_to_retry())
                    self._fork_missing()
            finally:
                self._program.on_stop()
                self._stop()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Records; that the loop wakes is the wake-up descriptor's work."""
        if number in STOP_SIGNALS:
            self._stop_signals += 1
            self._stopped_by = name_of(number)
        elif number in UNUSED_SIGNALS:
            self._unused_signals.append(number)
        elif number == signal.SIGHUP:
            self._must_reload = True
        elif number == signal.SIGUSR1:
            self._must_dump = True

    def _until_ready(self) -> None:
        while not self._stop_signals and len(self._were_ready) < len(self._children):
            self._wait(self._seconds_to_retry())
            self._fork_missing()

    def _wait(self, seconds: float | None) -> None:
        """Until a signal or a process that is ready wakes it; then reaps."""
        wait_readable(self._wake.fileno(), seconds)
        self._wake.clear()
        self._reap()
        self._obey()
        ready = {index for index in range(len(self._children)) if self._ready[index]}
        for index in ready - self._were_ready:
            self._has_served = self._has_served or self._children[index].is_vital
            self._failures.pop(index, None)
        self._were_ready = ready

    def _obey(self) -> None:
        """Does what SIGHUP and SIGUSR1 ask for, and says which signals ask for nothing."""
        while self._unused_signals:
            _log.warning(
                "%s means nothing to this server and is ignored; SIGTERM stops it",
                name_of(self._unused_signals.pop()),
            )
        if self._must_dump:
            self._must_dump = False
            self._program.on_dump()
            self._tell(Order.DUMP)
        # Before all are ready nobody is told that they are, which a reload does at its end.
        if self._must_reload and self._has_announced and not self._stop_signals:
            self._must_reload = False
            if self._program.on_reload():
                self._tell(Order.RELOAD)

    def _seconds_to_retry(self) -> float | None:
        if not self._retry_at:
            return None
        return max(0.0, min(self._retry_at.values()) - time.monotonic())

    def _reap(self) -> None:
        """Takes note of every process that ended.

        waitpid(-1), because the first process of a container inherits orphans of others; those are
        reaped and are none of ours.
        """
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            index = self._indexes.pop(pid, None)
            if index is not None:
                self._orderings.pop(pid).close()
                was_ready = bool(self._ready[index])
                self._ready[index] = 0
                self._children[index].on_death()
                if not self._stop_signals:
                    self._note_death(index, pid, os.waitstatus_to_exitcode(status), was_ready)

    def _note_death(self, index: int, pid: int, code: int, was_ready: bool) -> None:
        name = self._children[index].name
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if was_ready:
            self._has_served = self._has_served or self._children[index].is_vital
            _log.warning("%s %d %s and is replaced", name, pid, how)
            return
        failures = self._failures[index] = self._failures.get(index, 0) + 1
        # Once any process has served, the total is worth more than giving up: it is tried for ever.
        if not self._has_served and (code == EXIT_CANNOT_BOOT or failures >= ATTEMPTS):
            raise CannotBoot(f"{name} {pid} {how} before it was ready")
        delay_s = backoff_s(failures, FIRST_DELAY_S, LAST_DELAY_S)
        _log.warning(
            "%s %d %s before it was ready; another is tried in %.1f s",
            name,
            pid,
            how,
            delay_s,
        )
        self._retry_at[index] = time.monotonic() + delay_s

    def _fork_missing(self) -> None:
        """Forks a process for each place that has none, unless it is too early to try again."""
        if self._stop_signals:
            return
        for index in sorted(set(range(len(self._children))) - set(self._indexes.values())):
            if self._retry_at.get(index, 0.0) > time.monotonic():
                continue
            self._retry_at.pop(index, None)
            try:
                self._fork(index)
            except OSError as error:
                place = f"{index + 1} of {len(self._children)}"
                reason = f"cannot fork {self._children[index].name} {place}"
                remedy = "raise the limit (ulimit -u) or lower --processes"
                if not self._has_served:
                    raise CannotBoot(f"{reason}: {error.strerror}; {remedy}") from None
                _log.warning("%s: %s; %s", reason, error.strerror, remedy)
                self._retry_at[index] = time.monotonic() + LAST_DELAY_S

    def _fork(self, index: int) -> None:
        # Blocked, a signal waits for the child's own handlers instead of running the master's.
        with blocked(HANDLED):
            ordering = Ordering()
            try:
                pid = os.fork()
            except OSError:
                ordering.become_parent()
                ordering.close()
                raise
            if not pid:
                self._live(index, ordering)
            ordering.become_parent()
            self._indexes[pid] = index
            self._orderings[pid] = ordering

    def _live(self, index: int, ordering: Ordering) -> NoReturn:
        """The life of a child."""
        code = EXIT_CANNOT_BOOT
        try:
            ignore_signals()
            die_with_parent(self._pid)
            for other in self._orderings.values():
                other.close()
            orders = ordering.become_child()
            code = self._children[index].live(orders, lambda: self._say_ready(index))
        except CannotServe as error:
            _log.error("%s cannot serve: %s", self._children[index].name, error)
        except Exception:
            _log.exception("%s failed", self._children[index].name)
            code = 1 if self._ready[index] else EXIT_CANNOT_BOOT
        finally:
            try:
                for stream in (sys.stdout, sys.stderr):
                    if stream is not None:  # closed before the program began
                        stream.flush()
            finally:  # nothing may lead from here back into the master's own code
                os._exit(code)

    def _say_ready(self, index: int) -> None:
        self._ready[index] = 1
        self._wake.wake()

    def _stop(self) -> None:
        """The stop ladder: drain, its deadline, SIGKILL; a second signal shortens it."""
        if self._stop_signals:
            limit = f"{self._drain_timeout_s:g} s"
            _log.info("%s: draining; what is not done in %s is cut", self._stopped_by, limit)
        self._stop_signals = max(1, self._stop_signals)
        self._tell(Order.DRAIN)
        deadline = time.monotonic() + self._drain_timeout_s + KILL_GRACE_S
        cut = False
        while self._indexes and time.monotonic() < deadline:
            if self._stop_signals > 1 and not cut:
                cut = True
                _log.info("%s again: what is left is cut", self._stopped_by)
                self._tell(Order.CUT)
                deadline = min(deadline, time.monotonic() + KILL_GRACE_S)
            left_s = max(0.0, deadline - time.monotonic())
            self._wait(left_s)
            # Who was stopped meanwhile (docker pause, a suspended machine) has seen nothing.
            if time.monotonic() - deadline > LATE_S:
                deadline = time.monotonic() + left_s
        if self._indexes:
            _log.warning("%d processes did not end and are killed", len(self._indexes))
            for pid in self._indexes:
                os.kill(pid, signal.SIGKILL)
        while self._indexes:
            self._wait(None)

    def _tell(self, order: Order) -> None:
        for ordering in self._orderings.values():
            ordering.give(order)
