"""The admin port and what comes to it that is no well-behaved request.

Deadlines are those of a server in a thread of this process, where they can be short.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import gevent
import pytest
from gevent.event import Event

from counter.admin import http
from counter.admin.http import MOST_CONNECTIONS, MOST_REQUEST_BYTES, Admin
from counter.admin.status import Status
from counter.processes.slots import Slots
from counter.system.sockets import listen
from kit.admin_server import AdminServer, connect_http, everything
from kit.harness import PATIENCE_S, receive_exactly, wait_until
from protocol import format_address

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
SHORT_S = 0.3


@pytest.fixture(scope="module")
def server() -> Iterator[AdminServer]:
    with AdminServer("--processes", "1", "--logFormat", "json") as server:
        yield server


def talk(server: AdminServer, *parts: bytes) -> bytes:
    """Everything that is answered to some bytes, to the end of the connection."""
    with server.http() as sock:
        for part in parts:
            with contextlib.suppress(ConnectionError):
                sock.sendall(part)
        return everything(sock)


class AdminHere:
    """An admin port in a thread of this process, which has a loop of its own."""

    def __init__(self) -> None:
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        assert self._is_up.wait(PATIENCE_S)

    def _serve(self) -> None:
        listener = listen("127.0.0.1", 0, 128)
        self.address = format_address(*listener.getsockname()[:2])
        admin = Admin(listener, Status(Slots(1), "memory", lambda: 7, 0))
        admin.start()
        stop = Event()
        loop = gevent.get_hub().loop
        self._stop, self._block = loop.async_(), loop.async_()
        self._stop.start(stop.set)
        self._block.start(lambda: self._while_blocked())
        self._is_up.set()
        stop.wait()
        admin.stop()
        gevent.get_hub().destroy()

    def connect(self) -> socket.socket:
        return connect_http(self.address)

    def stand_still(self, meanwhile: Callable[[], object]) -> None:
        """Does something while the loop does not run, as that of a process which is stopped."""
        is_done = threading.Event()

        def run() -> None:
            meanwhile()
            is_done.set()

        self._while_blocked = run
        self._block.send()
        assert is_done.wait(PATIENCE_S)

    def stop(self) -> None:
        self._stop.send()
        self._thread.join(PATIENCE_S)


@contextmanager
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[AdminHere]:
    """An admin port with short deadlines."""
    monkeypatch.setattr(http, "REQUEST_TIMEOUT_S", SHORT_S)
    monkeypatch.setattr(http, "TICK_S", SHORT_S / 10)
    admin = AdminHere()
    try:
        yield admin
    finally:
        admin.stop()


def test_a_request_that_is_dripped_ends_at_its_one_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with impatient(monkeypatch) as admin, admin.connect() as sock:
        began = time.monotonic()
        sock.sendall(b"GET /livez HTTP/1.1\r\nX: ")
        sock.settimeout(SHORT_S / 10)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + PATIENCE_S:
                with contextlib.suppress(TimeoutError):
                    assert sock.recv(100) == b""
                    break
                sock.sendall(b"a")  # each byte is in time for a deadline that starts with the last
        assert SHORT_S * 0.9 < time.monotonic() - began < 10 * SHORT_S


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET /livez HT", id="half a line"),
        pytest.param(b"GET /livez HTTP/1.1\r\nHost", id="half a header"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\na", id="half a body"),
        pytest.param(LIVEZ, id="nothing more"),
        pytest.param(LIVEZ + b"GET /", id="half of a second one"),
    ],
)
def test_a_connection_that_waits_for_its_peer_ends_in_time_without_a_word(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with impatient(monkeypatch) as admin, admin.connect() as sock:
        sock.sendall(sent)
        everything(sock)
    assert capfd.readouterr().err == ""


def test_a_peer_that_does_not_read_is_cut_in_time_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with impatient(monkeypatch) as admin, closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = admin.address.split(":")
        sock.connect((host, int(port)))
        sock.setblocking(False)

        def is_cut() -> bool:
            try:
                sock.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
            except BlockingIOError:
                return False
            except ConnectionError:
                return True
            return False

        wait_until(is_cut, "it is cut")
    assert capfd.readouterr().err == ""


def test_what_came_while_the_process_was_stopped_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with impatient(monkeypatch) as admin, ExitStack() as stack:
        socks = [stack.enter_context(admin.connect()) for _ in range(20)]
        for sock in socks:
            sock.sendall(LIVEZ[:20])
        with admin.connect() as last:  # by its answer those before it were accepted and read
            last.sendall(LAST)
            everything(last)

        def pause() -> None:
            time.sleep(3 * SHORT_S)
            for sock in socks:
                sock.sendall(LIVEZ[20:])

        admin.stand_still(meanwhile=pause)
        for sock in socks:
            assert receive_exactly(sock, len(OK)) == OK


def test_a_hundred_peers_that_drip_do_not_keep_livez_from_anybody(server: AdminServer) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(server.http()) for _ in range(MOST_CONNECTIONS + 20)]
        for sock in slow:
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        assert talk(server, LAST).startswith(OK)
        # The newest give way last.
        slow.append(stack.enter_context(server.http()))
        slow[-1].sendall(LAST[:20])
        for _ in range(3):
            assert talk(server, LAST).startswith(OK)
        slow[-1].sendall(LAST[20:])
        assert everything(slow[-1]).startswith(OK)
        closed = select.select(slow, [], [], 0)[0]
        assert MOST_CONNECTIONS - 5 < len(slow) - len(closed) <= MOST_CONNECTIONS


def test_a_connection_that_is_asked_over_does_not_count_as_waiting(server: AdminServer) -> None:
    with ExitStack() as stack:
        busy = stack.enter_context(server.http())
        for _ in range(MOST_CONNECTIONS):
            stack.enter_context(server.http())
            busy.sendall(LIVEZ)
            assert receive_exactly(busy, len(OK)) == OK
            while not busy.recv(65536).endswith(b"ok\n"):
                pass
        busy.sendall(LAST)
        assert everything(busy).startswith(OK)


def test_a_peer_that_sends_requests_without_end_leaves_others_their_turn() -> None:
    with AdminServer("--processes", "0") as server, server.http() as greedy:
        stop = threading.Event()

        def send() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    greedy.sendall(LIVEZ * 1000)

        def read() -> None:
            with contextlib.suppress(OSError):
                while greedy.recv(1 << 20):
                    pass

        threads = [threading.Thread(target=work) for work in (send, read)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                began = time.monotonic()
                assert talk(server, LAST).startswith(OK)
                with server.connect() as peer:
                    peer.add(1)
                assert time.monotonic() - began < 2
        finally:
            stop.set()
            greedy.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(PATIENCE_S)


GARBAGE = {
    "noise": b"\x00\xff\x16\x03\x01\x02\x00\x01\x00" * 20,
    "a frame of the counter": bytes.fromhex("0000000000000001b7b41276360564d4"),
    "an empty line": b"\r\n",
    "HTTP/0.9": b"GET /livez\r\n",
    "a version without a point": b"GET /livez HTTP/1\r\n\r\n",
    "a version without numbers": b"GET /livez HTTP/x.y\r\n\r\n",
    "a version to come": b"GET /livez HTTP/7.0\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no colon": b"GET /livez HTTP/1.1\r\nHost\r\n\r\n",
    "an empty name": b"GET /livez HTTP/1.1\r\n: x\r\n\r\n",
    "a length that is none": b"GET /livez HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    "a negative length": b"GET /livez HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "an unended body": b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nab",
    "a bad chunk": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a bad address": b"GET http://[/ HTTP/1.1\r\n\r\n",
    "percents": b"GET /%s%d%ff%zz HTTP/1.1\r\n\r\n",
    "a long line": b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 2_000 + b"\r\n",
    "headers without end": b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 20_000,
}


def test_garbage_and_resets_leave_no_line_in_the_log_and_the_port_at_work() -> None:
    with AdminServer("--processes", "1", "--logFormat", "json") as server:
        for sent in GARBAGE.values():
            with server.http() as sock:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(sent)
                    sock.shutdown(socket.SHUT_WR)
                answer = everything(sock)
                assert b" 500 " not in answer, sent[:50]
                assert answer[:12] in (b"", b"HTTP/1.1 200", b"HTTP/1.1 400", b"HTTP/1.1 404",
                                       b"HTTP/1.1 405", b"HTTP/1.1 414"), sent[:50]  # fmt: skip
        for sent in (b"", LIVEZ, b"GET /livez HTTP/1.1\r\nHos", *GARBAGE.values()):
            with server.http() as sock:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(sent)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert server.get("livez") == (200, "ok\n")
        server.stop()
        (line,) = server.errors().splitlines()
        assert "draining" in json.loads(line)["message"]


def test_many_connections_are_worth_one_line_of_json() -> None:
    with AdminServer("--processes", "1", "--logFormat", "json") as server, ExitStack() as stack:
        for _ in range(2 * MOST_CONNECTIONS):
            stack.enter_context(server.http())
        assert server.get("livez") == (200, "ok\n")
        server.stop()
        lines = [json.loads(line)["message"] for line in server.errors().splitlines()]
        assert len(lines) <= 2
        assert lines[0].startswith(f"more than {MOST_CONNECTIONS} connections to the admin port")


def test_a_request_may_come_in_absolute_form(server: AdminServer) -> None:
    for target in (b"http://x:1/livez", b"HTTP://x/livez", b"http://x/livez?verbose=1"):
        request = b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert talk(server, request).startswith(OK)
    request = b"GET http://x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert b"<!DOCTYPE html>" in talk(server, request)


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"OPTIONS", b"BREW"])
def test_other_methods_are_told_which_are_allowed(server: AdminServer, method: bytes) -> None:
    answer = talk(server, method + b" /total HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n")
    assert b"\r\nAllow: GET, HEAD\r\n" in answer


def test_head_has_the_headers_of_get_and_no_body(server: AdminServer) -> None:
    head = talk(server, b"HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n", LAST)
    assert head.count(OK) == 2
    assert head.count(b"Content-Length: 3\r\n") == 2
    assert head.count(b"ok\n") == 1


def test_a_body_is_no_request(server: AdminServer) -> None:
    inner = b"GET /total HTTP/1.1\r\nHost: x\r\n\r\n"
    length = b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
    chunked = b"POST /livez HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
    for request in (length % (len(inner), inner), chunked % (len(inner), inner)):
        answer = talk(server, request, LAST)
        assert answer.count(b"HTTP/1.1 405") == 1
        assert answer.count(OK) == 1
        assert b"total" not in answer
    # Of more than is read nothing becomes a request, wherever the bound is.
    for pad in range(0, len(inner), 7):
        much = b" " * pad + inner * (3 * MOST_REQUEST_BYTES // len(inner))
        assert OK not in talk(server, length % (len(much), much), LAST)


def test_requests_of_all_kinds_are_answered_one_after_the_other(server: AdminServer) -> None:
    answer = talk(server, LIVEZ * 50 + b"GET /livez HTTP/1.1\nHost: x\n\n" * 50 + LAST)
    assert answer.count(OK) == 101
    assert talk(server, b"GET /livez HTTP/1.0\r\n\r\n").startswith(OK)
    kept = b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    assert talk(server, kept, LAST).count(OK) == 2
    assert talk(server, *(bytes([byte]) for byte in LAST)).count(OK) == 1
    assert talk(server, LIVEZ, b"\r\n" + LAST).count(OK) == 2
