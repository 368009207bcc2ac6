"""The admin port: health, metrics, the total and a page, over HTTP.

It is served by a process of its own (a greenlet where the server is one process), never through the
Pool, so that it answers while every worker is taken. It only reads: nothing that comes in over this
port changes anything. gevent's HTTP server is meant for trusted networks, and so is this port.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any, Final

import gevent
from gevent.pool import Pool
from gevent.pywsgi import WSGIServer

from counter.admin.metrics import scrape
from counter.admin.status import Status
from counter.system.log import LimitedLog

SAMPLE_S: Final = 1.0
PAGE: Final = Path(__file__).with_name("page.html")

# What this port takes at most, in connections and in time for each read.
MOST_CONNECTIONS: Final = 100
REQUEST_TIMEOUT_S: Final = 10.0
ACCEPT_PAUSE_S: Final = 0.1

_limited_log = LimitedLog(logging.getLogger("server"))

Answer = tuple[str, str, bytes]  # status line, content type, body
_TEXT: Final = "text/plain; charset=utf-8"
_JSON: Final = "application/json"


class _Server(WSGIServer):
    """gevent's, with a bound on time and a calm word where descriptors have run out."""

    def do_read(self) -> Any:
        try:
            return super().do_read()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            _limited_log.warning("admin", "the admin port cannot accept: %s", error.strerror)
            self.stop_accepting()
            gevent.spawn_later(ACCEPT_PAUSE_S, self._resume)
            return None

    def handle(self, sock: Any, address: Any) -> None:
        sock.settimeout(REQUEST_TIMEOUT_S)
        super().handle(sock, address)

    def _resume(self) -> None:
        if self.started:
            self.start_accepting()


class Admin:
    """Answers HTTP on a listening socket, from a Status."""

    def __init__(self, listener: Any, status: Status) -> None:
        self.status = status
        self._page = PAGE.read_text(encoding="utf-8")
        self._server = _Server(
            listener, self._serve, log=None, error_log=None, spawn=Pool(MOST_CONNECTIONS)
        )
        self._answers: dict[str, Callable[[], Answer]] = {
            "/livez": lambda: ("200 OK", _TEXT, b"ok\n"),
            "/readyz": self._readyz,
            "/metrics": lambda: ("200 OK", "text/plain; version=0.0.4", scrape(status)),
            "/total": self._total,
            "/status": lambda: ("200 OK", _JSON, json.dumps(status.as_json()).encode()),
            "/": self._show_page,
        }
        self._sampling: Any = None

    def start(self) -> None:
        """Starts to answer; gives back at once."""
        self._server.start()
        self._sampling = gevent.spawn(self._sample)

    def stop(self) -> None:
        """Answers no more."""
        self._sampling.kill()
        self._server.stop(timeout=0)

    def _sample(self) -> None:
        while True:
            self.status.sample()
            gevent.sleep(SAMPLE_S)

    def _serve(self, environ: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            answer = "405 Method Not Allowed", _TEXT, b"this port only tells\n"
        else:
            known = self._answers.get(environ["PATH_INFO"])
            paths = ", ".join(self._answers)
            answer = known() if known else ("404 Not Found", _TEXT, f"try {paths}\n".encode())
        line, kind, body = answer
        headers = [
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
        ]
        respond(line, headers)
        return [body] if environ["REQUEST_METHOD"] != "HEAD" else []

    def _readyz(self) -> Answer:
        readiness = self.status.readiness()
        if readiness.ready:
            return "200 OK", _TEXT, b"ok\n"
        return "503 Service Unavailable", _TEXT, f"{readiness.reason}\n".encode()

    def _total(self) -> Answer:
        total, age_s = self.status.total()
        text = json.dumps({"total": str(total), "age_s": round(age_s, 3)})
        return "200 OK", _JSON, text.encode() + b"\n"

    def _show_page(self) -> Answer:
        """The page with the present state in it, which it shows before, or without, its script."""
        state = json.dumps(self.status.as_json()).replace("<", "\\u003c")
        plain = self._plain()
        page = self._page.replace("{{state}}", state).replace("{{plain}}", plain)
        return "200 OK", "text/html; charset=utf-8", page.encode()

    def _plain(self) -> str:
        """The numbers for a browser without JavaScript."""
        state = self.status.as_json()
        rows = {
            "Total": f"{int(state['total']):,}",
            "Requests": f"{state['requests']:,}",
            "Workers taken": f"{state['connections']:,} of {state['workers']:,}",
            "Waiting": f"{state['waiting']:,}",
            "Refused": f"{sum(state['refused'].values()):,}",
            "Ready": "yes" if state["ready"] else f"no, {state['reason']}",
        }
        cells = (f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
        return f"<table>{''.join(cells)}</table>"
