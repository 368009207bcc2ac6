"""The life of a serving process, from patching it to the end of its drain.

What it shares with others is made before it is forked and handed to it; it obeys its master alone.
"""

from __future__ import annotations

import gc
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gevent
from gevent import monkey
from gevent.event import Event

from counter.options.server import ServerSettings
from counter.processes.signals import CUT_SIGNAL
from counter.processes.slots import Slots
from counter.serving.server import CounterServer
from counter.tls.certificates import Certificates
from counter.totals.keeper import Keeper


class ServingProcess:
    """Serves in the process that calls run(), which is in the place `index` of its server's."""

    # Ctrl-C in a terminal is for the master, which ends its processes by SIGTERM.
    stop_signals: ClassVar[Sequence[signal.Signals]] = (signal.SIGTERM,)

    def __init__(
        self,
        settings: ServerSettings,
        listener: socket.socket,
        keeper: Keeper,
        slots: Slots,
        workers: int,
        index: int = 0,
        certificates: Certificates | None = None,
    ) -> None:
        self.settings = settings
        self.listener = listener
        self.keeper = keeper
        self.slots = slots
        self.workers = workers
        self.index = index
        self.certificates = certificates
        self.server: CounterServer | None = None

    def run(self, ready: Callable[[], None]) -> None:
        """Serves until a signal ends it, and drains; `ready` is called once it serves."""
        monkey.patch_all()
        # Where each greenlet was spawned is of no use here and costs 2 us a connection.
        gevent.config.track_greenlet_tree = False
        stop, cut = Event(), Event()
        # Before the certificates are read: one that is told to read them again has it done.
        handlers = self._handle_signals(stop, cut)
        server = self.server = CounterServer(
            self.listener,
            self.keeper.open(),
            self.workers,
            self.settings,
            self.slots,
            self.index,
            self.certificates,
        )
        server.start()
        self.on_start()
        # What exists now lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        ready()
        stop.wait()
        self.on_drain()
        server.drain(self.settings.drain_timeout_s, cut)
        self.on_end()
        for handler in handlers:
            handler.cancel()

    def _handle_signals(self, stop: Event, cut: Event) -> list[Any]:
        def on_stop() -> None:
            (cut if stop.is_set() else stop).set()

        def on_cut() -> None:
            stop.set()
            cut.set()

        return [
            *(gevent.signal_handler(number, on_stop) for number in self.stop_signals),
            gevent.signal_handler(CUT_SIGNAL, on_cut),
            gevent.signal_handler(signal.SIGHUP, self._reload),
            gevent.signal_handler(signal.SIGUSR1, self.on_dump),
        ]

    def _reload(self) -> None:
        if self.server is not None and self.on_reload():
            self.server.take_certificates()

    def on_start(self) -> None:
        """It serves, and nobody was told yet."""

    def on_drain(self) -> None:
        """The drain begins."""

    def on_end(self) -> None:
        """The drain is over."""

    def on_reload(self) -> bool:
        """SIGHUP came; true if certificates that were published are to be taken.

        A terminal that is closed tells all processes, also where there are none.
        """
        return self.certificates is not None

    def on_dump(self) -> None:
        """SIGUSR1 came."""
        dump_stacks()


def dump_stacks() -> None:
    """Writes the stack of every greenlet and thread of this process to standard error."""
    from gevent.util import print_run_info

    gc.unfreeze()  # what is frozen is not found
    try:
        print_run_info(file=sys.stderr)
        sys.stderr.flush()
    finally:
        gc.freeze()
