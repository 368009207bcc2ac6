"""What systemd is told of this service, where it asked to be told (Type=notify): sd_notify(3).

Without NOTIFY_SOCKET in the environment nothing happens.
"""

from __future__ import annotations

import logging
import os
import socket
import time

_log = logging.getLogger("server")


def notify(*fields: str) -> None:
    """Sends fields such as READY=1 to the service manager; a failure is logged and no more."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    # A leading @ stands for the NUL of Linux' abstract names.
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto("\n".join(fields).encode(), address)
    except OSError as error:
        _log.warning("cannot notify the service manager at %s: %s", path, error.strerror)


def notify_reloading() -> None:
    """Says that a reload has begun; READY=1 is its end."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
