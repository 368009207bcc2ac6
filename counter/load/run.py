"""A run of the load generator: its processes, and the parent that starts, stops and merges them.

The parent has no hub and no connection: it forks, says when to go and when to stop, and merges
what the processes send it over their pipes. They ignore SIGINT and obey the parent, so that a
Ctrl-C in a terminal is one signal; when the parent is gone their pipe ends, and so do they.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection as PipeEnd
from multiprocessing.connection import Pipe, wait
from tempfile import gettempdir
from types import FrameType
from typing import Any, Final

from counter.load.process import LoadProcess, Share, SocketAddress
from counter.load.recording import Record, history
from counter.options.client import ClientSettings
from counter.proof.verify import UNDECIDED, Proof, verify
from counter.results.result import PROCESS_DIED, Result, merged
from counter.system.limits import whole_share

PROGRESS_S: Final = 0.5
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def resolve(host: str, port: int) -> tuple[SocketAddress, ...]:
    """The addresses of a host, in the order to try them; OSError if it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple((family, address) for family, _, _, _, address in found)


def run_load(
    settings: ClientSettings,
    cpus: float,
    progress: Callable[[float, Result], None],
    on_interrupt: Callable[[], None],
) -> Result:
    """Runs the load against the server of `settings` and gives back what it did.

    Calls `progress` with the seconds since the start and the measured part so far, about twice a
    second. OSError if the first connection cannot be made, EOFError if it ends without an answer.

    SIGINT, SIGTERM or SIGHUP ends the run early: `on_interrupt` is called, the replies in flight
    are waited for, and the result says `interrupted`. A second one ends that wait: the result says
    `cut` too, and the total afterwards is not read. A third raises KeyboardInterrupt, or ends the
    proof if it has begun.
    """
    addresses = resolve(settings.server_address.host, settings.server_address.port)
    shares = split(settings, cpus, addresses)
    records = []
    if settings.verify != "off":
        amounts = settings.amount
        amount = amounts.low if amounts.low == amounts.high else None
        try:
            records = [Record(amount) for _ in shares]
        except OSError as error:
            remedy = "set TMPDIR to a folder that can be written"
            raise CannotRecord(f"--verify cannot record: {error.strerror}; {remedy}") from None
    with _Interrupts() as interrupts:
        run = _Run(shares, interrupts, records, on_interrupt)
        try:
            result = run.supervise(progress)
        finally:
            run.kill()
    if records:
        # Only now, because NumPy starts threads, and a process with threads does not fork.
        result.proof = prove(result, records, settings.verify == "shared")
    return result


def prove(result: Result, records: Sequence[Record], shared: bool) -> Proof:
    """The verdict on what was recorded of a run; closes the records."""
    try:
        whole = history(records, result.total_before, result.total_after)
        reads = (result.total_before is not None) + (result.total_after is not None)
        unrecorded = result.answered - reads - len(whole.total)
        missing = ""
        if PROCESS_DIED in result.errors:
            missing = f"{PROCESS_DIED}, and what it had not written is missing"
        elif unrecorded:
            missing = f"{unrecorded:,} answered additions could not be written to {gettempdir()}"
        return verify(whole, shared, missing)
    except KeyboardInterrupt:
        return Proof(UNDECIDED, "interrupted before the end of the proof")
    except MemoryError:
        return Proof(UNDECIDED, f"not enough memory for {result.answered:,} additions")
    finally:
        for record in records:
            record.close()


def split(
    settings: ClientSettings, cpus: float, addresses: tuple[SocketAddress, ...]
) -> list[Share]:
    """Each process's share of the run; every process has at least one connection and request."""
    connections = settings.connections or whole_share(cpus, settings.multiplier)
    wanted = settings.processes or max(1, int(cpus))
    processes = min(wanted, connections, settings.requests or wanted)

    def part(whole: int, index: int) -> int:
        return whole // processes + (index < whole % processes)

    return [
        Share(
            settings,
            addresses,
            part(connections, index),
            None if settings.requests is None else part(settings.requests, index),
            settings.rate / processes,
            settings.planned_duration_s,
            processes,
        )
        for index in range(processes)
    ]


class LoadProcessDied(Exception):
    """A process of the run ended before its load began; what it printed says why."""


class CannotRecord(LoadProcessDied):
    """There is no place for the record that a proof needs, so no process began."""


class _Run:
    """The parent's side: the processes of a run, and what they sent so far."""

    def __init__(
        self,
        shares: list[Share],
        interrupts: _Interrupts,
        records: Sequence[Record],
        on_interrupt: Callable[[], None],
    ) -> None:
        self.shares = shares
        self.records = records
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
        self.interrupts.counting = True
        self.tell("go")
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
        return result

    def fork(self, share: Share) -> PipeEnd:
        ours, theirs = Pipe()
        with _signals_blocked():
            try:
                pid = os.fork()
            except OSError as error:
                remedy = "raise the limit (ulimit -u) or lower --processes"
                raise LoadProcessDied(f"cannot fork: {error.strerror}; {remedy}") from None
            if not pid:
                signal.set_wakeup_fd(-1)
                for pipe in (ours, *self.pids):
                    pipe.close()
                for number in _ENDING:
                    signal.signal(number, signal.SIG_IGN)
                index = len(self.pids)
                record = self.records[index] if self.records else None
                _run_process(share, theirs, index, record)
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
            ready = wait([*pipes, self.interrupts.wake_end], left_s)
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


def _run_process(share: Share, pipe: PipeEnd, index: int, record: Record | None) -> None:
    """The life of a load process; does not return."""
    code = 1
    try:
        process = LoadProcess(share, record.connection) if record else LoadProcess(share)
        orders = _Orders(process, pipe)
        if index == 0:
            try:
                total_before = process.read_total()
            except (OSError, EOFError) as error:
                pipe.send(("failed", error))
                return
            pipe.send(("before", total_before))
        process.open_all()
        pipe.send(("ready", None))
        orders.go.wait()
        orders.report_progress()
        process.run()
        orders.stop_reporting()
        process.close()
        if record:
            record.write()
        pipe.send(("loaded", process.result))
        orders.finish.wait()
        if index == 0:
            # With the run's own connections closed there is a worker for this one.
            with contextlib.suppress(OSError, EOFError):
                process.result.total_after = process.read_total()
        pipe.send(("result", process.result))
        code = 0
    except BrokenPipeError:
        pass  # the parent is gone, and nobody waits for a result
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class _Orders:
    """The parent's words, as events; its death ends the process."""

    def __init__(self, process: LoadProcess, pipe: PipeEnd) -> None:
        from gevent.event import Event

        self.process = process
        self.pipe = pipe
        self.go, self.finish = Event(), Event()
        self._listening = process.loop.io(pipe.fileno(), 1)  # 1: readable
        self._listening.start(self._on_word)
        self._reporting = process.loop.timer(PROGRESS_S, PROGRESS_S)

    def _on_word(self) -> None:
        try:
            word = self.pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        if word == "stop":
            self.process.stop()
        elif word == "cut":
            self.process.cut = True
        else:
            (self.go if word == "go" else self.finish).set()

    def report_progress(self) -> None:
        self._reporting.start(lambda: self.pipe.send(("progress", self.process.so_far())))

    def stop_reporting(self) -> None:
        self._reporting.close()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """No signal is handled inside, so that a child never runs its parent's handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


class _Interrupts:
    """What ends a run: a KeyboardInterrupt at first, and a count once the load runs.

    While it counts, `wake_end` becomes readable with each signal, so that a wait for results ends
    and no message is lost half-way to an exception.
    """

    def __init__(self) -> None:
        self.counting = False
        self._count = 0
        self.wake_end, self._waker = os.pipe()
        for end in (self.wake_end, self._waker):
            os.set_blocking(end, False)
        self._before: list[tuple[signal.Signals, Any]] = []

    def taken(self) -> int:
        """How many signals came since counting began."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_end, 100)
        return self._count

    def __enter__(self) -> _Interrupts:
        for number in _ENDING:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._before.append((number, signal.signal(number, self._on_signal)))
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before:
            signal.signal(number, handler)
        for end in (self.wake_end, self._waker):
            os.close(end)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self.counting:
            raise KeyboardInterrupt
        self._count += 1
