"""A run of the load generator: its processes, and the parent that starts, stops and merges them.

The parent has no hub and no connection: it forks, says when to go and when to stop, and merges
what the processes send it over their pipes. They ignore SIGINT and obey the parent, so that a
Ctrl-C in a terminal is one signal; when the parent is gone their pipe ends, and so do they.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as PipeEnd
from multiprocessing.connection import Pipe, wait
from typing import Any, Final

from load import LoadProcess, Share, SocketAddress
from result import Result, merged
from settings import ClientSettings

PROGRESS_S: Final = 0.5


def resolve(host: str, port: int) -> tuple[SocketAddress, ...]:
    """The addresses of a host, in the order to try them; OSError if it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple((family, address) for family, _, _, _, address in found)


def run_load(
    settings: ClientSettings, cpus: float, progress: Callable[[float, Result], None]
) -> Result:
    """Runs the load against the server of `settings` and gives back what it did.

    Calls `progress` with the seconds since the start and the measured part so far, about twice a
    second. OSError if the first connection cannot be made. SIGINT or SIGTERM ends the run early:
    the result says `interrupted`; a second one raises KeyboardInterrupt.
    """
    addresses = resolve(settings.server_address.host, settings.server_address.port)
    shares = split(settings, cpus, addresses)
    with _signals_as_interrupt():
        run = _Run(shares)
        try:
            return run.supervise(progress)
        finally:
            run.kill()


def split(
    settings: ClientSettings, cpus: float, addresses: tuple[SocketAddress, ...]
) -> list[Share]:
    """Each process's share of the run; every process has at least one connection and request."""
    connections = settings.connections or math.ceil(cpus * settings.multiplier)
    wanted = settings.processes or max(1, int(cpus))
    processes = min(wanted, connections, settings.requests or wanted)
    duration_s = settings.duration_s
    if duration_s is None and settings.requests is None:
        duration_s = 60.0

    def part(whole: int, index: int) -> int:
        return whole // processes + (index < whole % processes)

    return [
        Share(
            settings,
            addresses,
            part(connections, index),
            None if settings.requests is None else part(settings.requests, index),
            duration_s,
            processes,
        )
        for index in range(processes)
    ]


class _Run:
    """The parent's side: the processes of a run, and what they sent so far."""

    def __init__(self, shares: list[Share]) -> None:
        self.shares = shares
        self.pids: dict[PipeEnd, int] = {}
        self.results: dict[PipeEnd, Result] = {}
        self.so_far: dict[PipeEnd, Result] = {}

    def supervise(self, progress: Callable[[float, Result], None]) -> Result:
        first = self.fork(self.shares[0])
        total_before = self.expect(first, "before")
        for share in self.shares[1:]:
            self.fork(share)
        for pipe in self.pids:
            self.expect(pipe, "ready")
        started_at = time.monotonic()
        self.tell("go")
        interrupted = False
        while len(self.results) < len(self.pids):
            try:
                self.collect()
                progress(time.monotonic() - started_at, merged(self.so_far.values()))
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                self.tell("stop")
        first.send("finish")
        result = merged(self.results.values())
        result.total_before = total_before
        try:
            result.total_after, sent, answered = self.expect(first, "after")
            result.sent += sent
            result.answered += answered
        except ChildProcessError:
            result.count_error("load process died")
        result.interrupted = interrupted
        result.processes = len(self.shares)
        return result

    def fork(self, share: Share) -> PipeEnd:
        ours, theirs = Pipe()
        with _signals_blocked():
            pid = os.fork()
            if not pid:
                for pipe in (ours, *self.pids):
                    pipe.close()
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                _run_process(share, theirs, index=len(self.pids))
        theirs.close()
        self.pids[ours] = pid
        return ours

    def tell(self, word: str) -> None:
        for pipe in self.pids:
            if pipe not in self.results:
                # Of a process that died, collect() finds the end of the pipe and counts it.
                with contextlib.suppress(BrokenPipeError):
                    pipe.send(word)

    def expect(self, pipe: PipeEnd, kind: str) -> Any:
        """The next message of a process, which has to be of this kind."""
        try:
            got, value = pipe.recv()
        except EOFError:
            raise ChildProcessError("a load process died; see the log above") from None
        if got == "failed":
            raise value
        assert got == kind, f"{got} where {kind} was due"
        return value

    def collect(self) -> None:
        """Takes what the processes send until the next progress is due."""
        unfinished = [pipe for pipe in self.pids if pipe not in self.results]
        until = time.monotonic() + PROGRESS_S
        while unfinished and (left_s := until - time.monotonic()) > 0:
            for pipe in wait(unfinished, left_s):
                assert isinstance(pipe, PipeEnd)
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    kind, value = "result", self.so_far.get(pipe, Result())
                    value.count_error("load process died")
                self.so_far[pipe] = value
                if kind == "result":
                    self.results[pipe] = value
                    unfinished.remove(pipe)

    def kill(self) -> None:
        """Ends and reaps every process; those of a finished run have ended by themselves."""
        for pipe, pid in self.pids.items():
            if pipe not in self.results:
                os.kill(pid, signal.SIGKILL)
            pipe.close()
            os.waitpid(pid, 0)


def _run_process(share: Share, pipe: PipeEnd, index: int) -> None:
    """The life of a load process; does not return."""
    code = 1
    try:
        process = LoadProcess(share)
        orders = _Orders(process, pipe)
        try:
            process.connections[0].open()
            if index == 0:
                pipe.send(("before", process.read_total()))
        except OSError as error:
            if index == 0:
                pipe.send(("failed", error))
                return
            process.connections[0].lose(error)
        process.open_all(first=1)
        pipe.send(("ready", None))
        orders.go.wait()
        orders.report_progress()
        process.run()
        orders.stop_reporting()
        pipe.send(("result", process.result))
        if index == 0:
            orders.finish.wait()
            sent, answered = process.result.sent, process.result.answered
            total = process.read_total()
            result = process.result
            pipe.send(("after", (total, result.sent - sent, result.answered - answered)))
        process.close()
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
        else:
            (self.go if word == "go" else self.finish).set()

    def report_progress(self) -> None:
        self._reporting.start(lambda: self.pipe.send(("progress", self.process.result)))

    def stop_reporting(self) -> None:
        self._reporting.close()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """No signal is handled inside, so that a child never runs its parent's handlers."""
    numbers = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@contextlib.contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside, as SIGINT does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
