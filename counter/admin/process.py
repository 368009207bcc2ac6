"""The life of the admin process: it answers until the serving processes have ended."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Final

import gevent
from gevent import monkey
from gevent.event import Event

from counter.admin.status import Status
from counter.processes.signals import CUT_SIGNAL
from counter.processes.slots import PID

# It ends when the serving processes have; it looks so often.
LOOK_S: Final = 0.02


def serve_admin(listener: socket.socket, status: Status, ready: Callable[[], None]) -> None:
    """Serves the admin port in this process; `ready` is called once it answers."""
    monkey.patch_all()
    from counter.admin.http import Admin

    stop, cut = Event(), Event()
    handlers = [
        gevent.signal_handler(signal.SIGTERM, stop.set),
        gevent.signal_handler(CUT_SIGNAL, cut.set),
    ]
    admin = Admin(listener, status)
    admin.start()
    ready()
    stop.wait()
    admin.status.draining = True
    while any(status.slots.cells(PID)) and not cut.wait(LOOK_S):
        pass
    admin.stop()
    for handler in handlers:
        handler.cancel()
