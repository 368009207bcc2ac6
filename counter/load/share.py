"""A run divided among its processes: what each of them is asked to do.

Made by the parent before it forks, and never changed. Every process has at least one connection
and one request; the shares of a run add up to what was asked for.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from counter.options.client import ClientSettings
from counter.system.limits import split_evenly, whole_share

SocketAddress = tuple[int, Any]
"""A family and an address of it, as socket.connect takes it."""


@dataclass(frozen=True)
class Share:
    """One process's part of a run."""

    settings: ClientSettings
    addresses: tuple[SocketAddress, ...]  # of the server, in the order to try them
    connections: int
    requests: int | None
    rate: float  # requests a second, 0 for a closed loop
    processes: int
    engine: str  # as engines.py names them


def resolve(host: str, port: int) -> tuple[SocketAddress, ...]:
    """The addresses of a host, in the order to try them; OSError if it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple((family, address) for family, _, _, _, address in found)


def split(
    settings: ClientSettings, cpus: float, addresses: tuple[SocketAddress, ...], engine: str
) -> list[Share]:
    """Each process's share of the run."""
    connections = settings.connections or whole_share(cpus, settings.multiplier)
    wanted = settings.processes or max(1, int(cpus))
    processes = min(wanted, connections, settings.requests or wanted)
    requests: list[int | None] = [None] * processes
    if settings.requests is not None:
        requests = [*split_evenly(settings.requests, processes)]
    return [
        Share(settings, addresses, own, due, settings.rate / processes, processes, engine)
        for own, due in zip(split_evenly(connections, processes), requests, strict=True)
    ]
