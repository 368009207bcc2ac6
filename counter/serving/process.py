"""The life of a serving process, from patching it to the end of its drain.

What it shares with others is made before it is forked and handed to it; it obeys the orders of its
master alone.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable
from io import StringIO
from typing import Any

import gevent
from gevent import monkey
from gevent.event import Event

from counter.options.server import DEFAULT_CONNECTIONS, ServerSettings
from counter.processes.orders import Order, Orders
from counter.processes.slots import Slots
from counter.serving.server import CounterServer
from counter.system.libev import READ, choose_libev
from counter.system.streams import write_error
from counter.tls.certificates import Certificates
from counter.totals.keeper import Keeper


class ServingProcess:
    """Serves in the process that calls run(), which is in the place `index` of its server's."""

    def __init__(
        self,
        settings: ServerSettings,
        listener: socket.socket,
        keeper: Keeper,
        slots: Slots,
        workers: int,
        index: int = 0,
        certificates: Certificates | None = None,
        orders: Orders | None = None,
        most_connections: int = DEFAULT_CONNECTIONS,
    ) -> None:
        self.settings = settings
        self.listener = listener
        self.keeper = keeper
        self.slots = slots
        self.workers = workers
        self.index = index
        self.certificates = certificates
        self.most_connections = most_connections
        self._orders = orders
        self.server: CounterServer | None = None
        self._stop: Any = None  # events, which are made when gevent is there
        self._cut: Any = None

    def run(self, ready: Callable[[], None]) -> None:
        """Serves until it is told to end, and drains; `ready` is called once it serves."""
        choose_libev()
        monkey.patch_all()
        # Where each greenlet was spawned is of no use here and costs 2 us a connection.
        gevent.config.track_greenlet_tree = False
        self._stop, self._cut = Event(), Event()
        # Before the certificates are read: who is told to read them again has it done.
        listening = self.listen_to_orders()
        server = self.server = CounterServer(
            self.listener,
            self.keeper.open(),
            self.workers,
            self.settings,
            self.slots,
            self.index,
            self.certificates,
            self.most_connections,
            self.keeper.ledger,
            self.keeper.bells,
        )
        server.start()
        self.on_start()
        # What exists now lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        ready()
        self._stop.wait()
        self.on_drain()
        server.drain(self.settings.drain_timeout_s, self._cut)
        self.on_end()
        for one in listening:
            one.close()

    def listen_to_orders(self) -> list[Any]:
        """Has obey() called with each order; gives back what is to be closed at the end."""
        orders = self._orders
        assert orders is not None
        watcher = gevent.get_hub().loop.io(orders.fileno(), READ)
        watcher.start(lambda: gevent.spawn(self._obey_all, orders.take()))
        return [watcher]

    def _obey_all(self, orders: list[Order]) -> None:
        for order in orders:
            self.obey(order)

    def obey(self, order: Order) -> None:
        """Does what an order says; in a greenlet."""
        if order is Order.RELOAD:
            if self.server is not None and self.on_reload():
                self.server.take_certificates()
        elif order is Order.DUMP:
            self.on_dump()
        else:
            if order is Order.CUT:
                self._cut.set()
            self._stop.set()

    def on_start(self) -> None:
        """It serves, and nobody was told yet."""

    def on_drain(self) -> None:
        """The drain begins."""

    def on_end(self) -> None:
        """The drain is over."""

    def on_reload(self) -> bool:
        """Whether certificates that were published are to be taken."""
        return self.certificates is not None

    def on_dump(self) -> None:
        """Writes what it is at to standard error."""
        dump_stacks()


def dump_stacks() -> None:
    """Writes the stack of every greenlet and thread of this process to standard error."""
    from gevent.util import print_run_info

    text = StringIO()
    gc.unfreeze()  # what is frozen is not found
    try:
        print_run_info(file=text)
    finally:
        gc.freeze()
    write_error(text.getvalue())
