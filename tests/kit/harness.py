"""Real servers, real clients and plain sockets for the tests, with verbs for what they check.

Every process started here is ended here; every wait has a deadline and a condition.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import resource
import select
import selectors
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Self

from protocol import REPLY_SIZE, decode_totals, encode_frame, parse_address

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 20.0  # far above what anything here takes, so that only a hang runs into it


def wait_until(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Waits for a condition; fails with `what` was waited for if it does not come."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience_s:g} s in vain until {what}"
        time.sleep(0.005)


def _limit(one_cpu: bool, descriptors: int | None) -> None:
    if one_cpu:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))


class Command:
    """A command of the project as a real process, its output collected line by line.

    `inside` is a command that runs it, such as one that enters another network.
    """

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        one_cpu: bool = False,
        descriptors: int | None = None,
        inside: Sequence[str] = (),
    ) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("COUNTER_")}
        self.process = subprocess.Popen(
            [*inside, sys.executable, *arguments],
            cwd=ROOT,
            env=env | (environment or {}),
            stdin=stdin,
            # Only where it is needed: Python warns of it where threads run.
            preexec_fn=partial(_limit, one_cpu, descriptors) if one_cpu or descriptors else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._out = _Lines(self.process.stdout)
        self._err = _Lines(self.process.stderr)

    def line(self) -> str:
        """The next line of standard output."""
        return self._out.next()

    def error_line(self) -> str:
        """The next line of standard error."""
        return self._err.next()

    def error_line_with(self, text: str) -> str:
        """The next line of standard error that contains a text."""
        while text not in (line := self.error_line()):
            pass
        return line

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self, patience_s: float = PATIENCE_S) -> int:
        """Waits for the end; gives back the exit code."""
        return self.process.wait(patience_s)

    def output(self) -> str:
        """What is left of standard output, up to its end."""
        return self._out.rest()

    def errors(self) -> str:
        """What is left of standard error, up to its end."""
        return self._err.rest()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if error is not None:
            sys.stderr.write(self._err.rest())
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


class _Lines:
    """Lines of a pipe, each waited for with a deadline."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        assert stream is not None
        self._fd = stream.fileno()
        self._buffer = b""

    def next(self) -> str:
        while b"\n" not in self._buffer:
            if not self._more():
                raise AssertionError(f"the stream ended in {self._buffer!r} where a line was due")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def rest(self) -> str:
        while self._more():
            pass
        text, self._buffer = self._buffer.decode(), b""
        return text

    def _more(self) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._fd, selectors.EVENT_READ)
            assert selector.select(PATIENCE_S), "waited in vain for output"
        data = os.read(self._fd, 65536)
        self._buffer += data
        return bool(data)


class ServerCommand(Command):
    """python server.py on a free port of the loopback, ready to serve."""

    def __init__(
        self,
        *arguments: str,
        port: str = "0",
        workers: int | None = None,
        descriptors: int | None = None,
        inside: Sequence[str] = (),
    ) -> None:
        if workers:
            arguments = ("--multiplier", str(workers), *arguments)
        super().__init__(
            "server.py",
            "--port",
            port,
            *arguments,
            one_cpu=workers is not None,
            descriptors=descriptors,
            inside=inside,
        )
        try:
            self.first_line = self.told()
            match = re.fullmatch(r"Listening on (\S+) with (\d+) workers .*", self.first_line)
            assert match, self.first_line
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        self.address = match[1]
        self.workers = int(match[2])

    def __enter__(self) -> ServerCommand:
        return self

    def told(self) -> str:
        """The next line of standard output, as text also where it is JSON."""
        line = self.line()
        return str(json.loads(line)["message"]) if line.startswith("{") else line

    def connect(self) -> Peer:
        return Peer(self.address)

    def leave_descriptors(self, count: int) -> None:
        """Lets each of its processes open so many descriptors more, and no others."""
        for pid in children(self.process.pid):
            limit = len(os.listdir(f"/proc/{pid}/fd")) + count
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limit))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, int]:
        """Stops the server; gives back the total and the requests that it printed."""
        self.signal(number)
        return self.farewell()

    def farewell(self) -> tuple[int, int]:
        """Waits for the end of a server that was told to stop; total and requests it printed."""
        total = re.fullmatch(r"Counter value: ([\d,]+)", self.told())
        requests = re.fullmatch(
            r"Server stopped after processing total requests: ([\d,]+)", self.told()
        )
        assert total
        assert requests
        assert self.finish() == 0
        return int(total[1].replace(",", "")), int(requests[1].replace(",", ""))


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Reads so many bytes; fails if the stream ends before."""
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        assert more, f"the stream ended after {len(data)} of {size} bytes"
        data += more
    return data


class ScriptedServer:
    """A server that does what a test says: `script` runs in a thread for each connection.

    At the end it hangs up on all that are left, and every script has to end by that.
    """

    def __init__(self, script: Callable[[socket.socket], object]) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._open: list[socket.socket] = []

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(sock)
            thread = threading.Thread(target=self._play, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _play(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, AssertionError):
            self._script(sock)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(PATIENCE_S)  # then no other thread begins
        self._listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a script goes on though its connection has ended"


class Peer:
    """A stock TCP client: a blocking socket without any of the project's client code."""

    def __init__(self, address: str) -> None:
        self.sock = socket.create_connection(parse_address(address), PATIENCE_S)

    def send(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    def totals(self, count: int) -> list[int]:
        """Reads exactly so many replies."""
        return list(decode_totals(receive_exactly(self.sock, count * REPLY_SIZE))[0])

    def add(self, amount: int) -> int:
        self.send(encode_frame(amount))
        return self.totals(1)[0]

    def everything(self) -> bytes:
        """What comes until EOF; a reset is an error."""
        data = b""
        while more := self.sock.recv(65536):
            data += more
        return data

    def expect_silence(self, seconds: float) -> None:
        """Checks that for so long nothing comes: no reply, no EOF."""
        ready, _, _ = select.select([self.sock], [], [], seconds)
        assert not ready

    def expect_eof(self) -> None:
        """Checks that FIN comes, with no byte before it and without RST."""
        assert self.everything() == b""

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def peers(address: str, count: int) -> Iterator[Sequence[Peer]]:
    """So many connected peers, all closed at the end."""
    opened: list[Peer] = []
    try:
        for _ in range(count):
            opened.append(Peer(address))
        yield opened
    finally:
        for peer in opened:
            peer.close()


def children(pid: int) -> list[int]:
    """The processes that a process forked and that have not ended."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [child for child in map(int, listed.split()) if is_alive(child)]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not reaped does not."""
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cpu_seconds(pid: int) -> float:
    """What a process and those it forked have computed so far."""
    ticks = 0
    for one in (pid, *children(pid)):
        fields = _stat(one)
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@contextmanager
def run_in_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command of the project with a terminal of its own, ended at the end; and the terminal's
    other end."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
    )
    os.close(inside)
    try:
        yield process, terminal
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def read_terminal_until(terminal: int, text: str) -> str:
    """What a terminal shows up to a text, and what it shows at once with it."""
    shown = ""
    while text not in shown:
        shown += os.read(terminal, 4096).decode()
    return shown
