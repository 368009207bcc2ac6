"""Sockets as the kernel has them: how one listens, what it tells of its queue and its peers."""

from __future__ import annotations

import array
import errno
import fcntl
import socket
import struct
import termios
from pathlib import Path
from typing import Any, Final

# A peer that is silent so long is asked whether it is still there, and after so many questions
# without an answer it is gone: 45 s in all.
KEEPALIVE_IDLE_S: Final = 30
KEEPALIVE_INTERVAL_S: Final = 5
KEEPALIVE_PROBES: Final = 3
VANISHED_S: Final = 45.0

# What the kernel keeps of replies for a peer that does not read them. Left to itself it goes up to
# 4 MB for each; what a client may leave unread by docs/protocol.md is 32 KB.
SEND_BUFFER_BYTES: Final = 128 * 1024

_SOMAXCONN: Final = Path("/proc/sys/net/core/somaxconn")

# Of struct tcp_info: a listener's tcpi_unacked is its queue's length; a connection's
# tcpi_last_data_recv the milliseconds since its last byte came, or since it was made.
_UNACKED = struct.Struct("24xI")
_LAST_DATA_RECV = struct.Struct("52xI")


def listen(
    host: str,
    port: int,
    backlog: int,
    where: str = "a port",
    flags: tuple[str, str] = ("--host", "--port"),
    vanished_s: float = VANISHED_S,
) -> socket.socket:
    """A listening socket; OSError, with a text that says what to do, if there can be none.

    `where` is how errors write the address, `flags` the options that gave it. Of a name with
    several addresses the first that can be listened on is taken. Peers that acknowledge nothing for
    `vanished_s` are given up.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", "not a host name")
        raise OSError(f"cannot listen on host {host!r}: {reason}; see {flags[0]}") from None
    failures: list[OSError] = []
    for family, kind, proto, _, address in found:
        try:
            return _listen(family, kind, proto, address, backlog, vanished_s)
        except OSError as error:
            failures.append(error)
    # A family that this machine does not have says less than what another address failed of.
    failures.sort(key=lambda error: error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL))
    failure = failures[0]
    remedy = {
        errno.EADDRINUSE: "; stop the program that has it, or choose another "
        f"{flags[1]} (0 takes a free one)",
        errno.EACCES: "; ports below 1024 need root",
        errno.EADDRNOTAVAIL: f"; no interface has it, {flags[0]} 0.0.0.0 serves all",
        errno.EAFNOSUPPORT: f"; this machine has no IPv6, {flags[0]} 0.0.0.0 serves all of IPv4",
    }.get(failure.errno or 0, "")
    reason = (failure.strerror or str(failure)).lower()
    raise OSError(f"cannot listen on {where}: {reason}{remedy}")


def _listen(
    family: int, kind: int, proto: int, address: Any, backlog: int, vanished_s: float
) -> socket.socket:
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit these: fewer system calls for each. Without the first a reply can
        # wait 40 ms for the acknowledgement of the one before (Nagle's algorithm and delayed ACK).
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        notice_vanished(listener, vanished_s)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def notice_vanished(sock: Any, vanished_s: float = VANISHED_S) -> None:
    """Has the kernel give up a peer that vanished without a word, idle or with replies on the way.

    Without it, the first holds its connection for ever, the second for a quarter of an hour.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    longest_ms = min(2**31 - 1, int(vanished_s * 1000))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, longest_ms)


def meets_itself(sock: Any) -> bool:
    """Whether a connected socket is its own peer.

    Where nobody listens on a port of this machine's own range, the kernel may give that very port
    to a socket that connects to it, and TCP lets two ends open at once, be they the same one.
    """
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:  # it was reset at once, which whoever reads from it finds out
        return False


def close_with_reset(sock: Any) -> None:
    """Closes a socket with RST: its port is free at once, as no connection is left to wait for."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def longest_backlog() -> int | None:
    """What the kernel cuts every backlog to, net.core.somaxconn; None where it does not tell."""
    try:
        return int(_SOMAXCONN.read_text())
    except (OSError, ValueError):
        return None


def waiting_connections(listener: Any) -> int:
    """How many connections wait in the backlog of a listening socket."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKED.size)
    return int(_UNACKED.unpack(info)[0])


def silent_for_s(sock: Any) -> float:
    """Seconds since the kernel received a byte on a connection, in the backlog or since."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_RECV.size)
    return int(_LAST_DATA_RECV.unpack(info)[0]) / 1000


def unread_bytes(sock: Any) -> int:
    """How many bytes the kernel holds that were not read yet."""
    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.FIONREAD, count)
    return count[0]
