"""A run of the load generator: its processes, and the parent that starts, stops and merges them.

The parent has no hub and no connection: it forks, says when to go and when to stop, and merges
what the processes send it over their pipes. They ignore SIGINT and obey the parent, so that a
Ctrl-C in a terminal is one signal; when the parent is gone their pipe ends, and so do they.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection as PipeEnd
from multiprocessing.connection import Pipe, wait
from tempfile import gettempdir
from types import FrameType
from typing import Any, Final

from counter.load.engines import choose
from counter.load.orders import PROGRESS_S, live
from counter.load.recording import Recording, history
from counter.load.share import Share, resolve, split
from counter.options.client import ClientSettings
from counter.proof.history import UNDECIDED, Verdict
from counter.proof.verify import verify
from counter.results.result import PROCESS_DIED, Result, merged
from counter.system.limits import spare_threads
from counter.system.signals import WakePipe, blocked, handled
from counter.turn.library import EngineMissing

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LoadProcessDied(Exception):
    """A process of the run ended before its load began; what it printed says why."""


class CannotBegin(Exception):
    """This machine does not give what the run was asked to take; the text names the remedy."""


def run_load(
    settings: ClientSettings,
    cpus: float,
    progress: Callable[[float, Result], None],
    on_interrupt: Callable[[], None],
) -> Result:
    """Runs the load against the server of `settings` and gives back what it did.

    Calls `progress` with the seconds since the start and the measured part so far, when the load
    begins and about twice a second. OSError if the first connection cannot be made, EOFError if it
    ends without an answer, CannotBegin and LoadProcessDied as they say.

    SIGINT, SIGTERM or SIGHUP ends the run early: `on_interrupt` is called, the replies in flight
    are waited for, and the result says `interrupted`. A second one ends that wait: the result says
    `cut` too, and the total afterwards is not read. A third raises KeyboardInterrupt, or ends the
    proof if it has begun.
    """
    spare_threads()
    engine = choose_engine(settings)
    addresses = resolve(settings.server_address.host, settings.server_address.port)
    shares = split(settings, cpus, addresses, engine)
    recordings = make_recordings(settings, len(shares))
    with _Interrupts() as interrupts:
        run = _Run(shares, interrupts, recordings, on_interrupt)
        try:
            result = run.supervise(progress)
        finally:
            run.kill()
    if recordings:
        # Only now, because NumPy may start threads, and a process with threads does not fork.
        result.proof = prove(result, recordings, settings.verify == "shared")
    return result


def choose_engine(settings: ClientSettings) -> str:
    """The name of the engine that serves this run; CannotBegin where it is not there."""
    try:
        return choose(settings)
    except EngineMissing as error:
        raise CannotBegin(f"--engine {settings.engine}: {error}") from None


def make_recordings(settings: ClientSettings, count: int) -> list[Recording]:
    """One for each process, none where nothing is to be proved; CannotBegin."""
    if settings.verify == "off":
        return []
    amounts = settings.amount
    amount = amounts.low if amounts.low == amounts.high else None
    try:
        return [Recording(amount) for _ in range(count)]
    except OSError as error:
        remedy = "set TMPDIR to a folder that can be written"
        if error.errno == errno.EMFILE:
            remedy = "raise the limit (ulimit -n) or lower --processes"
        raise CannotBegin(f"--verify cannot record: {error.strerror}; {remedy}") from None


def prove(result: Result, recordings: Sequence[Recording], shared: bool) -> Verdict:
    """The verdict on what was recorded of a run; closes the recordings."""
    try:
        whole = history(recordings, result.total_before, result.total_after)
        reads = (result.total_before is not None) + (result.total_after is not None)
        unrecorded = result.answered - reads - len(whole.total)
        missing = ""
        if PROCESS_DIED in result.errors:
            missing = f"{PROCESS_DIED}, and what it had not written is missing"
        elif unrecorded:
            missing = f"{unrecorded:,} answered additions could not be written to {gettempdir()}"
        return verify(whole, shared, missing)
    except KeyboardInterrupt:
        return Verdict(UNDECIDED, "interrupted before the end of the proof")
    except MemoryError:
        return Verdict(UNDECIDED, f"not enough memory for {result.answered:,} additions")
    finally:
        for recording in recordings:
            recording.close()


class _Run:
    """The parent's side: the processes of a run, and what they sent so far."""

    def __init__(
        self,
        shares: list[Share],
        interrupts: _Interrupts,
        recordings: Sequence[Recording],
        on_interrupt: Callable[[], None],
    ) -> None:
        self.shares = shares
        self.recordings = recordings
        self.interrupts = interrupts
        self.on_interrupt = on_interrupt
        self.pids: dict[PipeEnd, int] = {}
        self.results: dict[PipeEnd, Result] = {}  # of every process: so far, in the end whole
        self.stopped = False
        self.cut = False

    def supervise(self, progress: Callable[[float, Result], None]) -> Result:
        first = self.fork(self.shares[0])
        total_before = self.expect(first, "before")
        for share in self.shares[1:]:
            self.fork(share)
        for pipe in self.pids:
            self.expect(pipe, "ready")
        started_at = time.monotonic()
        self.interrupts.start_counting()
        self.tell("go")
        progress(0.0, Result(connections=sum(share.connections for share in self.shares)))
        loading = set(self.pids)
        while loading:
            self.collect(loading, "loaded", time.monotonic() + PROGRESS_S)
            progress(time.monotonic() - started_at, merged(self.results.values()))
        self.tell("finish")
        finishing = set(self.pids)
        while finishing and not self.cut:
            self.collect(finishing, "result", time.monotonic() + PROGRESS_S)
        result = merged(self.results.values())
        result.total_before = total_before
        result.total_after = self.results[first].total_after
        result.interrupted, result.cut = self.stopped, self.cut
        result.asked_rate = self.shares[0].settings.rate
        result.processes = len(self.shares)
        result.engine = self.shares[0].engine
        return result

    def fork(self, share: Share) -> PipeEnd:
        ours, theirs = Pipe()
        with blocked(_ENDING):
            try:
                pid = os.fork()
            except OSError as error:
                remedy = "raise the limit (ulimit -u) or lower --processes"
                raise CannotBegin(f"cannot fork: {error.strerror}; {remedy}") from None
            if not pid:
                signal.set_wakeup_fd(-1)
                for pipe in (ours, *self.pids):
                    pipe.close()
                for number in _ENDING:
                    signal.signal(number, signal.SIG_IGN)
                index = len(self.pids)
                recording = self.recordings[index] if self.recordings else None
                live(share, theirs, index == 0, recording)
        theirs.close()
        self.pids[ours] = pid
        return ours

    def tell(self, word: str) -> None:
        for pipe in self.pids:
            # The pipe of a process that died is at its end: whoever reads it next finds out.
            with contextlib.suppress(BrokenPipeError):
                pipe.send(word)

    def expect(self, pipe: PipeEnd, kind: str) -> Any:
        """The next message of a process, which has to be of this kind."""
        try:
            got, value = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise LoadProcessDied("a load process died before the load began") from None
        if got == "failed":
            raise value
        assert got == kind, f"{got} where {kind} was due"
        return value

    def collect(self, pipes: set[PipeEnd], last: str, until: float) -> None:
        """Takes what processes send until then; drops each pipe whose message is the `last`."""
        while pipes and (left_s := until - time.monotonic()) > 0:
            ready = wait([*pipes, self.interrupts.wake.fileno()], left_s)
            self.obey_interrupts()
            for pipe in ready:
                if not isinstance(pipe, PipeEnd):
                    continue
                try:
                    kind, self.results[pipe] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    kind = last
                    died = self.results.setdefault(pipe, Result())
                    died.errors[PROCESS_DIED] = 1
                if kind == last:
                    pipes.remove(pipe)

    def obey_interrupts(self) -> None:
        """Stops the run at the first signal, and its waiting at the second; the third raises."""
        taken = self.interrupts.taken()
        if taken > 2:
            raise KeyboardInterrupt
        if taken and not self.stopped:
            self.stopped = True
            self.tell("stop")
            self.on_interrupt()
        if taken > 1 and not self.cut:
            self.cut = True
            self.tell("cut")

    def kill(self) -> None:
        """Ends and reaps every process; one that ended by itself is a zombie until now."""
        for pipe, pid in self.pids.items():
            os.kill(pid, signal.SIGKILL)
            pipe.close()
            os.waitpid(pid, 0)


class _Interrupts:
    """What ends a run: a KeyboardInterrupt at first, and a count once the load runs.

    While it counts, `wake` becomes readable with each signal, so that a wait for results ends and
    no message is lost half-way to an exception.
    """

    def __init__(self) -> None:
        self.wake = WakePipe()
        self._is_counting = False
        self._count = 0
        self._context = contextlib.ExitStack()

    def start_counting(self) -> None:
        """From here on a signal raises nothing."""
        self._is_counting = True

    def taken(self) -> int:
        """How many signals came since counting began."""
        self.wake.clear()
        return self._count

    def __enter__(self) -> _Interrupts:
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in _ENDING if not (is_nohup and number == signal.SIGHUP)]
        self._context.enter_context(handled(numbers, self._on_signal))
        self._context.enter_context(self.wake)
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self._is_counting:
            raise KeyboardInterrupt
        self._count += 1
