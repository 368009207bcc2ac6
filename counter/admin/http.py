"""The admin port: health, metrics, the total and a page, over HTTP.

It is served by a process of its own (a greenlet where the server is one process), never through the
Pool, so that it answers while every worker is taken. It only reads: nothing that comes in over this
port changes anything.

The invariant: whoever asks for /livez gets it, whatever others do to this port, because a probe
that fails ends the server. So a connection has one deadline for a whole request, and one for the
pause between two; the number of connections is bounded, and of too many the one that has waited
longest gives way to the new one; a peer that sends without end shares the loop with all others, and
is read up to a bound. Nothing that a peer sends is worth a line of the log. gevent's HTTP server
does the rest. It is meant for trusted networks, and so is this port.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Final

import gevent
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

from counter.admin.metrics import scrape
from counter.admin.page import TEMPLATE, render
from counter.admin.status import Status
from counter.system.accepting import PausingServer
from counter.system.log import LimitedLog

# Between two samples of the counts, and between two looks at the deadlines.
TICK_S: Final = 1.0

# From a request's first byte to its answer's last; from the accept, or the answer before, to that
# first byte. Far above what either takes, and below the patience of probes that fail three times.
REQUEST_TIMEOUT_S: Final = 10.0
MOST_CONNECTIONS: Final = 100

# A request's line, headers and body together. Nothing here needs more than its line.
MOST_REQUEST_BYTES: Final = 65536

# Who is overdue is looked at once more so much later: when this process was stopped, the loop has
# not seen yet what came meanwhile.
SECOND_LOOK_S: Final = 0.001

METHODS: Final = ("GET", "HEAD")
_ABSOLUTE_FORM: Final = re.compile(r"https?://[^/]*", re.IGNORECASE)  # what a proxy is asked for

_limited_log = LimitedLog(logging.getLogger("server"))

_BAD_REQUEST: Final = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

Answer = tuple[str, str, bytes]  # status line, content type, body
_TEXT: Final = "text/plain; charset=utf-8"
_JSON: Final = "application/json"


class _Incoming(io.RawIOBase):
    """What a peer sends, as much of each request as is allowed; then comes the end of the stream.

    Each read lets others have their turn first, also where bytes are there already.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.allowed_bytes = 0
        self.has_ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        gevent.sleep(0)
        room = memoryview(buffer)[: self.allowed_bytes]
        size = int(self._sock.recv_into(room)) if room else 0
        self.allowed_bytes -= size
        self.has_ended = not size
        return size


class _Handler(WSGIHandler):
    """One connection, request after request."""

    rfile: Any  # of the base class; the stubs leave it out

    def __init__(self, sock: Any, address: Any, server: Any) -> None:
        super().__init__(sock, address, server)
        self._sock = sock
        self._incoming = _Incoming(sock)
        self.rfile = io.BufferedReader(self._incoming)
        self.since = time.monotonic()  # what its deadline is counted from

    def handle_one_request(self) -> Any:
        gevent.sleep(0)  # those that came together would otherwise be answered in one go
        if self._incoming.has_ended:
            return None  # perhaps within a request that was too long: its rest is no other one
        self._incoming.allowed_bytes = MOST_REQUEST_BYTES
        self.since = time.monotonic()
        return super().handle_one_request()

    def read_requestline(self) -> str:
        if self.rfile.peek(1):
            self.since = time.monotonic()
        line = str(super().read_requestline())
        # RFC 9112, 2.2: a client may leave an empty line behind a body.
        return line if line.strip("\r\n") or not line else str(super().read_requestline())

    def read_request(self, raw_requestline: str) -> Any:
        if len(raw_requestline.split()) != 3:  # HTTP/0.9 too: it knows neither status nor headers
            raise ValueError("no request line")
        is_read = super().read_request(raw_requestline)
        if self._incoming.has_ended:
            raise ValueError("the headers do not end, or are too long")
        return is_read

    def cut(self) -> None:
        """Ends the connection: whatever it waits for is over at once."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _handle_client_error(self, ex: Exception) -> Any:
        """400 for what is no request; nothing is left to be said to a peer that is gone."""
        return None if isinstance(ex, OSError) else ("400", _BAD_REQUEST)

    def _log_error(self, t: Any, v: Any, tb: Any) -> None:
        if not issubclass(t, (OSError, gevent.GreenletExit)):
            failed("".join(traceback.format_exception(t, v, tb)))


class _Server(PausingServer, WSGIServer):
    """gevent's, with bounds on time and on connections, and silent about its peers."""

    def __init__(self, listener: Any, serve: Callable[..., Iterable[bytes]]) -> None:
        super().__init__(
            listener,
            serve,
            log=None,
            error_log=None,
            spawn=Pool(),
            handler_class=_Handler,
            environ={"SERVER_NAME": ""},  # otherwise the name servers are asked for it
        )
        self._open: set[_Handler] = set()

    def do_read(self) -> Any:
        return self.accept_or_pause(self._accept, self._warn_of_lack)

    def _accept(self) -> Any:
        try:
            return super().do_read()
        except ConnectionAbortedError:
            return None

    def _warn_of_lack(self, error: OSError) -> None:
        _limited_log.warning("admin", "the admin port cannot accept: %s", error.strerror)

    def handle(self, sock: Any, address: Any) -> None:
        handler = _Handler(sock, address, self)
        self._open.add(handler)
        if len(self._open) > MOST_CONNECTIONS:
            _limited_log.warning(
                "admin connections",
                "more than %d connections to the admin port: the one that waited longest is closed",
                MOST_CONNECTIONS,
            )
            self._cut(min(self._open, key=lambda one: one.since))
        try:
            handler.handle()
        except OSError:
            pass  # the peer is gone
        except Exception:
            failed(traceback.format_exc())
        finally:
            self._open.discard(handler)

    def end_overdue(self) -> None:
        """Ends the connections whose deadline is over."""
        if self._overdue():
            gevent.sleep(SECOND_LOOK_S)
            for handler in self._overdue():
                self._cut(handler)

    def _overdue(self) -> list[_Handler]:
        latest = time.monotonic() - REQUEST_TIMEOUT_S
        return [handler for handler in self._open if handler.since < latest]

    def _cut(self, handler: _Handler) -> None:
        self._open.discard(handler)
        handler.cut()


def failed(trace: str) -> None:
    """Logs an error of the admin port's own."""
    _limited_log.warning("admin failed", "the admin port failed: %s", trace)


class Admin:
    """Answers HTTP on a listening socket, from a Status."""

    def __init__(self, listener: Any, status: Status) -> None:
        self.status = status
        self._template = TEMPLATE.read_text(encoding="utf-8")
        self._server = _Server(listener, self._serve)
        self._answers: dict[str, Callable[[], Answer]] = {
            "/livez": lambda: ("200 OK", _TEXT, b"ok\n"),
            "/readyz": self._readyz,
            "/metrics": lambda: ("200 OK", "text/plain; version=0.0.4", scrape(status)),
            "/total": self._total,
            "/status": lambda: ("200 OK", _JSON, json.dumps(status.as_json()).encode()),
            "/": self._show_page,
        }
        self._ticking: Any = None

    def start(self) -> None:
        """Starts to answer; gives back at once."""
        self._server.start()
        self._ticking = gevent.spawn(self._tick)

    def stop(self) -> None:
        """Answers no more."""
        self._ticking.kill()
        self._server.stop(timeout=0)

    def _tick(self) -> None:
        while True:
            self.status.sample()
            self._server.end_overdue()
            gevent.sleep(TICK_S)

    def _serve(self, environ: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        headers = [("Cache-Control", "no-store")]
        if environ["REQUEST_METHOD"] in METHODS:
            line, kind, body = self._answer(environ["PATH_INFO"])
        else:
            line, kind, body = "405 Method Not Allowed", _TEXT, b"this port only tells\n"
            headers.append(("Allow", ", ".join(METHODS)))
        headers += [("Content-Type", kind), ("Content-Length", str(len(body)))]
        respond(line, headers)
        return [body] if environ["REQUEST_METHOD"] != "HEAD" else []

    def _answer(self, path: str) -> Answer:
        if absolute := _ABSOLUTE_FORM.match(path):
            path = path[absolute.end() :] or "/"
        known = self._answers.get(path)
        if known:
            return known()
        return "404 Not Found", _TEXT, f"try {', '.join(self._answers)}\n".encode()

    def _readyz(self) -> Answer:
        readiness = self.status.readiness()
        if readiness.ready:
            words = ", ".join(filter(None, ("ok", self.status.crowd())))
            return "200 OK", _TEXT, f"{words}\n".encode()
        return "503 Service Unavailable", _TEXT, f"{readiness.reason}\n".encode()

    def _total(self) -> Answer:
        total, age_s = self.status.total()
        text = json.dumps({"total": str(total), "age_s": round(age_s, 3)})
        return "200 OK", _JSON, text.encode() + b"\n"

    def _show_page(self) -> Answer:
        page = render(self._template, self.status.as_json())
        return "200 OK", "text/html; charset=utf-8", page.encode()
