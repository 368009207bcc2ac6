"""A server with an admin port, and what is asked of it over HTTP."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request

from kit.harness import PATIENCE_S, ServerCommand
from protocol import parse_address


class AdminServer(ServerCommand):
    """python server.py with an admin port on a free port."""

    def __init__(self, *arguments: str, workers: int | None = None) -> None:
        super().__init__("--adminPort", "0", *arguments, workers=workers)
        line = self.error_line_with("the admin port is at ")
        found = re.search(r"http://(\S+?)/", line)  # in text or in JSON
        assert found, line
        self.admin, self.admin_address = found[0], found[1]

    def __enter__(self) -> AdminServer:
        return self

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an address."""
        try:
            with urllib.request.urlopen(self.admin + path, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """The value of one metric, with its labels as they are written."""
        lines = self.get("metrics")[1].splitlines()
        (value,) = [line.split()[-1] for line in lines if line.startswith(name + " ")]
        return float(value)

    def metrics(self) -> dict[str, float]:
        """All metrics without labels, of one moment."""
        lines = [line.split() for line in self.get("metrics")[1].splitlines()]
        plain = [line for line in lines if line[0] != "#" and "{" not in line[0]]
        return {name: float(value) for name, value in plain}

    def http(self) -> socket.socket:
        """A connection to the admin port."""
        return connect_http(self.admin_address)


def connect_http(address: str) -> socket.socket:
    """A plain socket to HOST:PORT."""
    return socket.create_connection(parse_address(address), PATIENCE_S)


def everything(sock: socket.socket) -> bytes:
    """What comes until the peer ends the connection, also by a reset."""
    data = b""
    try:
        while more := sock.recv(65536):
            data += more
    except ConnectionError:
        pass
    return data
