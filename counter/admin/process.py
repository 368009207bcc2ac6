"""The life of the admin process: it answers until the serving processes have ended."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

import gevent
from gevent import monkey
from gevent.event import Event

from counter.admin.status import Status
from counter.processes.orders import Order, Orders
from counter.processes.slots import PID
from counter.system.libev import READ, choose_libev

# It ends when the serving processes have; it looks so often.
LOOK_S: Final = 0.02


def serve_admin(
    listener: socket.socket, status: Status, orders: Orders, ready: Callable[[], None]
) -> None:
    """Serves the admin port in this process; `ready` is called once it answers."""
    choose_libev()
    monkey.patch_all()
    from counter.admin.http import Admin

    stop, cut = Event(), Event()

    def obey() -> None:
        for order in orders.take():
            if order in (Order.DRAIN, Order.CUT):
                stop.set()
            if order is Order.CUT:
                cut.set()

    listening: Any = gevent.get_hub().loop.io(orders.fileno(), READ)
    listening.start(obey)
    admin = Admin(listener, status)
    admin.start()
    ready()
    stop.wait()
    admin.status.draining = True
    while any(status.slots.cells(PID)) and not cut.wait(LOOK_S):
        pass
    admin.stop()
    listening.close()
