"""The master: forks the serving processes, replaces those that die, stops them in order.

It knows nothing of counting, and has no hub, no thread and no store: nothing in it can hang, and
what it forks inherits nothing that is in use. Signal handlers and children only write a byte into
its pipe; the loop decides.

The invariants: a process that dies is replaced at once, unless it died before it was ready, which
is delayed and in the end given up; when the master dies, however it dies, its processes die with
it; one stop ladder with one deadline ends them all.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

from counter.system.limits import split_evenly as split_evenly

EXIT_CANNOT_BOOT: Final = 3

# Between attempts to replace processes that die before they are ready: doubled each time.
FIRST_DELAY_S: Final = 0.1
LAST_DELAY_S: Final = 5.0
# So many in a row, and none serving: they will not come.
ATTEMPTS: Final = 5

# What a process may take beyond its own drain deadline before it is killed.
KILL_GRACE_S: Final = 2.0

# What the master sends after its second SIGTERM or SIGINT. Another SIGTERM would not do: two that
# are sent before the first is handled are one.
CUT_SIGNAL: Final = signal.SIGUSR2

_PR_SET_PDEATHSIG: Final = 1
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_HANDLED: Final = (*_STOP_SIGNALS, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR1)

_log = logging.getLogger("server")


class CannotBoot(Exception):
    """No process can serve, and trying again would not help."""


class Stopped(BaseException):
    """A signal asks the program to end, at a time when nothing is served."""

    def __str__(self) -> str:
        return "a signal ended the wait"


def stop_on_signals() -> None:
    """Has SIGTERM and SIGINT raise Stopped, and SIGHUP and SIGUSR1 do nothing: for the times before
    and after the program serves. As the first process of a container it would otherwise not end."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        raise Stopped

    for number in _STOP_SIGNALS:
        signal.signal(number, on_signal)
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class ChildError(Exception):
    """A helping process gave no answer."""


class Master:
    """Keeps `count` processes running, each of which runs `serve(index, ready)`.

    `serve` calls `ready()` once it serves, ends at SIGTERM within `drain_timeout_s`, at CUT_SIGNAL
    at once, and gives back the exit code of its process; EXIT_CANNOT_BOOT says that it
    cannot start and has said why. `on_death(index)` is called in the master after each death,
    `on_reload()` after SIGHUP; if it is true, every process gets SIGHUP. `on_dump()` after SIGUSR1,
    which every process gets then. The last `aside` places serve something else: that they are
    ready says nothing of whether the server can serve.
    """

    def __init__(
        self,
        count: int,
        serve: Callable[[int, Callable[[], None]], int],
        drain_timeout_s: float,
        on_death: Callable[[int], None],
        on_reload: Callable[[], bool] = lambda: False,
        on_dump: Callable[[], None] = lambda: None,
        aside: int = 0,
    ) -> None:
        self._count = count
        self._serving = count - aside
        self._has_announced = False
        self._serve = serve
        self._drain_timeout_s = drain_timeout_s
        self._on_death = on_death
        self._on_reload = on_reload
        self._on_dump = on_dump
        self._must_reload = False
        self._must_dump = False
        self._pid = os.getpid()
        self._indexes: dict[int, int] = {}  # of each living process, by pid
        self._ready = mmap.mmap(-1, count)  # one byte a process, set by itself
        self._were_ready: set[int] = set()
        self._has_served = False
        self._failures: dict[int, int] = {}  # of each place: deaths in a row before ready
        self._retry_at: dict[int, float] = {}
        self._stop_signals = 0
        self._wake_end, self._waker = os.pipe()
        for end in (self._wake_end, self._waker):
            os.set_blocking(end, False)

    def run(self, on_ready: Callable[[], None], on_stop: Callable[[], None]) -> None:
        """Forks, supervises and stops; gives back when the last process has ended.

        `on_ready` is called when all processes are ready for the first time, `on_stop` when the
        stopping begins. CannotBoot if the processes cannot start.
        """
        previous = {number: signal.signal(number, self._on_signal) for number in _HANDLED}
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        try:
            self._fork_missing()
            self._until_ready()
            if not self._stop_signals:
                on_ready()
                self._has_announced = True
                self._obey()
            while not self._stop_signals:
                self._wait(self._seconds_to_retry())
                self._fork_missing()
        finally:
            on_stop()
            self._stop()
            signal.set_wakeup_fd(-1)
            for number, handler in previous.items():
                signal.signal(number, handler)
            for end in (self._wake_end, self._waker):
                os.close(end)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Records; that the loop wakes is the wake-up descriptor's work."""
        if number in _STOP_SIGNALS:
            self._stop_signals += 1
        elif number == signal.SIGHUP:
            self._must_reload = True
        elif number == signal.SIGUSR1:
            self._must_dump = True

    def _until_ready(self) -> None:
        while not self._stop_signals and not all(self._ready[i] for i in range(self._count)):
            self._wait(self._seconds_to_retry())
            self._fork_missing()

    def _wait(self, seconds: float | None) -> None:
        """Until a signal or a process that is ready wakes it; then reaps."""
        select.select([self._wake_end], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_end, 4096)
        self._reap()
        self._obey()
        ready = {index for index in range(self._count) if self._ready[index]}
        for index in ready - self._were_ready:
            self._has_served = self._has_served or index < self._serving
            self._failures.pop(index, None)
        self._were_ready = ready

    def _obey(self) -> None:
        """Does what SIGHUP and SIGUSR1 ask for."""
        if self._must_dump:
            self._must_dump = False
            self._on_dump()
            self._tell(signal.SIGUSR1)
        # Before all are ready nobody is told that they are, which a reload does at its end.
        if self._must_reload and self._has_announced and not self._stop_signals:
            self._must_reload = False
            if self._on_reload():
                self._tell(signal.SIGHUP)

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
                was_ready = bool(self._ready[index])
                self._ready[index] = 0
                self._on_death(index)
                if not self._stop_signals:
                    self._note_death(index, pid, os.waitstatus_to_exitcode(status), was_ready)

    def _note_death(self, index: int, pid: int, code: int, was_ready: bool) -> None:
        name = "serving process" if index < self._serving else "admin process"
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if was_ready:
            self._has_served = self._has_served or index < self._serving
            _log.warning("%s %d %s and is replaced", name, pid, how)
            return
        failures = self._failures[index] = self._failures.get(index, 0) + 1
        # Once any process has served, the total is worth more than giving up: it is tried for ever.
        if not self._has_served and (code == EXIT_CANNOT_BOOT or failures >= ATTEMPTS):
            raise CannotBoot(f"{name} {pid} {how} before it was ready")
        delay_s = min(LAST_DELAY_S, FIRST_DELAY_S * 2 ** min(failures - 1, 10))
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
        for index in sorted(set(range(self._count)) - set(self._indexes.values())):
            if self._retry_at.get(index, 0.0) > time.monotonic():
                continue
            self._retry_at.pop(index, None)
            try:
                self._fork(index)
            except OSError as error:
                reason = f"cannot fork serving process {index + 1} of {self._count}"
                remedy = "raise the limit (ulimit -u) or lower --processes"
                if not self._has_served:
                    raise CannotBoot(f"{reason}: {error.strerror}; {remedy}") from None
                _log.warning("%s: %s; %s", reason, error.strerror, remedy)
                self._retry_at[index] = time.monotonic() + LAST_DELAY_S

    def _fork(self, index: int) -> None:
        # Blocked, a signal waits for the child's own handlers instead of running the master's.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            pid = os.fork()
            if not pid:
                self._live(index)
            self._indexes[pid] = index
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

    def _live(self, index: int) -> None:
        """The life of a child; does not return."""
        code = EXIT_CANNOT_BOOT
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # Until it listens to these; it takes the certificates that were published last anyway.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            # A Ctrl-C in a terminal reaches every process of it; the master's word counts.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
            die_with_parent(self._pid)
            code = self._serve(index, lambda: self._say_ready(index))
        except Exception:
            _log.exception("a serving process failed")
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
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes the master as well
            os.write(self._waker, b"\0")

    def _stop(self) -> None:
        """The stop ladder: SIGTERM, the drain deadline, SIGKILL; a second signal shortens it."""
        self._stop_signals = max(1, self._stop_signals)
        self._tell(signal.SIGTERM)
        deadline = time.monotonic() + self._drain_timeout_s + KILL_GRACE_S
        cut = False
        while self._indexes and time.monotonic() < deadline:
            if self._stop_signals > 1 and not cut:
                cut = True
                self._tell(CUT_SIGNAL)
                deadline = min(deadline, time.monotonic() + KILL_GRACE_S)
            self._wait(max(0.0, deadline - time.monotonic()))
        if self._indexes:
            _log.warning("%d serving processes did not end and are killed", len(self._indexes))
            self._tell(signal.SIGKILL)
        while self._indexes:
            self._wait(None)

    def _tell(self, number: signal.Signals) -> None:
        for pid in self._indexes:
            os.kill(pid, number)


def ask_child(work: Callable[[], str], timeout_s: float) -> str:
    """What `work` gives, in a process of its own: what it opens and imports ends with it.

    ChildError if it does not come within `timeout_s`, or not at all (then its log says why).
    """
    parent = os.getpid()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _HANDLED:
                signal.signal(number, signal.SIG_DFL)
            die_with_parent(parent)
            text = work()
            # Only now: the end of the pipe is the end of this process, and a failure is said first.
            with open(write_end, "w", encoding="utf-8") as answer:
                answer.write(text)
            code = 0
        except Exception:
            _log.exception("a helping process failed")
        finally:
            os._exit(code)
    os.close(write_end)
    try:
        return _read_all(read_end, timeout_s)
    finally:
        os.close(read_end)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _read_all(fd: int, timeout_s: float) -> str:
    """What a pipe holds up to its end, which must come in time and not at once."""
    deadline = time.monotonic() + timeout_s
    data = b""
    while select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        more = os.read(fd, 65536)
        if more:
            data += more
        elif data:
            return data.decode()
        else:
            raise ChildError("it failed; the log says why")
    raise ChildError(f"no answer within {timeout_s:g} s")


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, also when it is dead already.

    `parent` is the pid from before the fork: a parent that died before the request was made is
    found by comparing it. Use on the main thread of a parent whose forking thread does not end.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot ask to be killed with the parent")
    if os.getppid() != parent:
        os._exit(1)
