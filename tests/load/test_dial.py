"""How connections of the load begin: whom a name leads to, and which ends are none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import gevent
import pytest

from counter.load import name
from counter.load.dial import Dialler, connect
from counter.load.name import ServerName
from counter.load.patience import Patience
from counter.load.share import Share
from counter.options.client import ClientSettings
from counter.options.values import Address
from counter.system.sockets import VANISHED_S

OLD = ((socket.AF_INET, ("127.0.0.1", 1)),)


@contextmanager
def listening() -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()


def leading_to(*found: tuple[str, int]) -> Any:
    """What getaddrinfo gives for a name with these addresses."""
    return lambda *_, **__: [
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in found
    ]


def dialler_of(*addresses: tuple[str, int], timeout_s: float = 5.0) -> Dialler:
    settings = ClientSettings(server_address=Address("counter.test", 1), timeout_s=timeout_s)
    known = tuple((int(socket.AF_INET), address) for address in addresses)
    return Dialler(Share(settings, known, 1, None, 0.0, 1, "plain"))


def test_a_name_that_leads_elsewhere_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name, "LOOKUP_S", 0)
    with listening() as here:
        monkeypatch.setattr(name, "getaddrinfo", leading_to(here))
        sock, _ = dialler_of(("127.0.0.1", 1)).connect()
        with closing(sock):
            assert sock.getpeername() == here


def test_lost_connections_look_a_name_up_together(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = []

    def look_up(*_: object, **__: object) -> list[Any]:
        gevent.sleep(0.01)
        lookups.append(1)
        raise OSError("no answer")

    monkeypatch.setattr(name, "LOOKUP_S", 0)
    monkeypatch.setattr(name, "getaddrinfo", look_up)
    server = ServerName("counter.test", 1, OLD)
    monkeypatch.setattr(name, "LOOKUP_S", 1000)
    asking = [gevent.spawn(server.addresses) for _ in range(50)]
    gevent.joinall(asking, timeout=5)
    assert [greenlet.value for greenlet in asking] == [OLD] * 50, "what was known is kept"
    assert lookups == [1]
    assert server.addresses() == OLD
    assert lookups == [1], "and not again so soon"


def test_a_lookup_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name, "LOOKUP_S", 0)
    monkeypatch.setattr(name, "PATIENCE_S", 0.05)
    monkeypatch.setattr(name, "getaddrinfo", lambda *_, **__: gevent.sleep(1000))
    server = ServerName("counter.test", 1, OLD)
    with gevent.Timeout(5):
        assert [server.addresses() for _ in range(3)] == [OLD] * 3


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_is_not_looked_up(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(name, "LOOKUP_S", 0)
    monkeypatch.setattr(name, "getaddrinfo", leading_to(("127.0.0.1", 2)))
    assert ServerName(host, 1, OLD).addresses() == OLD


def test_a_silent_address_leaves_time_for_the_next() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent, listening() as here:
        address = silent.getsockname()
        queued = [socket.socket() for _ in range(4)]
        for each in queued:  # its queue is full: a further one gets no answer
            each.setblocking(False)
            each.connect_ex(address)
        with gevent.Timeout(5):
            sock, _ = dialler_of(address, here, timeout_s=0.6).connect()
        with closing(sock):
            assert sock.getpeername() == here
        for each in queued:
            each.close()


def test_what_came_while_the_process_stood_still_makes_a_connection() -> None:
    with listening() as here:
        opening = gevent.spawn(dialler_of(here, timeout_s=0.2).connect)
        gevent.sleep(0)
        threading.Event().wait(0.5)
        sock, _ = opening.get(timeout=5)
        sock.close()


def test_a_connection_that_meets_itself_is_refused() -> None:
    """With nobody at a port of the local range, TCP lets a socket open with itself."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()
        with pytest.raises(ConnectionRefusedError, match="Connection refused"):
            connect(sock, port, Patience(5))
    socket.create_server(port).close()  # whose port it was is not kept from it


def test_the_kernel_gives_up_a_server_that_vanished() -> None:
    with listening() as here:
        for timeout_s, longest_s in ((1.0, VANISHED_S), (600.0, 600.0)):
            sock, _ = dialler_of(here, timeout_s=timeout_s).connect()
            with closing(sock):
                option = (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                assert sock.getsockopt(*option) == longest_s * 1000
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
