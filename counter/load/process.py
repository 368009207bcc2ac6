"""One process of the load generator: its connections, from the first connect to the last reply.

It says when what is sent: at once in a closed loop, when it is due in an open one, and how the run
begins and ends. What a connection does is connection.py's, what is counted meter.py's; everything
here but opening connections is a callback of gevent's loop. Its engine serves the connections.
"""

from __future__ import annotations

from time import monotonic_ns as clock
from typing import Any, Final

import gevent
from gevent.event import Event
from gevent.pool import Group

from counter.load.connection import LoadConnection
from counter.load.dial import Dialler
from counter.load.draw import Draw
from counter.load.engines import make_engine
from counter.load.meter import NEVER, Meter
from counter.load.patience import Sweeps
from counter.load.recording import Recording
from counter.load.schedule import Pace, Slot
from counter.load.share import Share
from counter.results.result import Result

RECONNECT_S: Final = 0.1  # between attempts to open a lost connection again
LOOK_S: Final = 0.002  # between looks whether the last replies have come


class LoadProcess:
    """The Generator that connections ask, and whoever orders the run about.

    A run that is to be proved is written to its `recording`.
    """

    def __init__(self, share: Share, recording: Recording | None = None) -> None:
        self.loop: Any = gevent.get_hub().loop
        self.dialler, self.draw, self.meter = Dialler(share), Draw(share.settings), Meter(share)
        self.engine = make_engine(
            share.engine, self.loop, self, share.settings.amount.low, recording
        )
        self.ready: list[LoadConnection] = []
        self.sending = False
        make = LoadConnection if recording is None else recording.connection
        self.connections = [make(self) for _ in range(share.connections)]
        self._settings = share.settings
        self._sweeps = Sweeps(share.settings.timeout_s)
        self._requests_left = share.requests
        self._measure_from_ns = 0
        self._stopped_ns = 0
        self._is_cut = False  # replies in flight are not waited for
        self._done = Event()
        self._reopening = Group()  # of lost connections
        self._pace = Pace(self.loop, self, share.rate) if share.rate else None
        # In a closed loop without TLS or a bound, nothing has to be asked between two frames.
        self._is_simple = not (share.rate or self.dialler.encrypts or share.requests)

    @property
    def result(self) -> Result:
        """What was done; whole when run() has returned."""
        return self.meter.result

    def so_far(self) -> Result:
        """What was done until now."""
        return self.meter.so_far()

    def read_total(self) -> int | None:
        """The server's total, as Dialler.read_total() reads it; counted in the result."""
        return self.dialler.read_total(self.meter.result)

    def open_all(self) -> None:
        """Opens the connections; those that fail are tried again later."""

        def attempt(connection: LoadConnection) -> None:
            try:
                connection.open()
            except OSError as error:
                connection.lose(error)

        gevent.joinall([gevent.spawn(attempt, connection) for connection in self.connections])

    def run(self) -> None:
        """Sends until the run ends, then waits for what is outstanding."""
        now = clock()
        self._measure_from_ns = now + int(self._settings.warmup_s * 1e9)
        if self._pace:
            self._pace.start(now, self._measure_from_ns)
        timers = self._start_timers()
        self.sending = True
        for connection in self.connections:
            self.refill(connection, self._settings.pipeline)
        self._done.wait()
        gevent.spawn(self._join_outstanding).join()
        for timer in timers:
            timer.close()
        behind = 0
        if self._pace:
            behind = self._pace.behind(self._stopped_ns, self._requests_left)
            self._pace.close()
        self.meter.finish(behind)

    def _start_timers(self) -> list[Any]:
        """Begins the account of the run, and everything that happens at a time of its own."""
        warmup_s, planned_duration_s = self._settings.warmup_s, self._settings.planned_duration_s
        interval_s = self.meter.start(self._measure_from_ns, planned_duration_s)
        sweeping = self.loop.timer(self._sweeps.interval_s, self._sweeps.interval_s)
        sweeping.start(self._sweep)
        sampling = self.loop.timer(warmup_s + interval_s, interval_s)
        sampling.start(self.meter.tick)
        measuring = self.loop.timer(warmup_s)
        measuring.start(self.meter.count_from_here)
        timers = [sweeping, sampling, measuring]
        if planned_duration_s is not None:
            ending = self.loop.timer(warmup_s + planned_duration_s)
            ending.start(self.stop)
            timers.append(ending)
        return timers

    def stop(self) -> None:
        """No further request is sent."""
        self.sending = False
        self.engine.recall(NEVER)
        self._stopped_ns = clock()
        self.meter.stop(self._stopped_ns)
        self._done.set()

    def cut(self) -> None:
        """The replies in flight are not waited for."""
        self._is_cut = True

    def close(self) -> None:
        """Closes every connection, and opens none any more; waits a moment."""
        self._reopening.kill()
        self.engine.recall(NEVER)
        for connection in self.connections:
            connection.close()
        self.engine.close()

    def refill(self, connection: LoadConnection, count: int) -> None:
        """Has `count` further requests sent: now, or, in an open loop, when they are due."""
        if not self.sending or not connection.is_open:
            return
        if self._pace:
            self._pace.offer(connection, count)
            return
        count = self._take_requests(count, clock())
        if count:
            connection.send(self.draw.batch(count))

    def send_due(self, connection: Slot, due_ns: int) -> bool:
        """Sends one request that was due then, false if no further one may be sent."""
        if not self._take_requests(1, due_ns):
            return False
        connection.send(self.draw.batch(1), due_ns)
        return True

    def _take_requests(self, count: int, due_ns: int) -> int:
        """How many of `count` requests may still be sent; the last of the run ends it."""
        if self._requests_left is not None and due_ns >= self._measure_from_ns:
            count = min(count, self._requests_left)
            self._requests_left -= count
            if not self._requests_left:
                self.stop()
        return count

    def allowance(self) -> int:
        """How many requests may be sent before somebody has to decide."""
        checkable = self.meter.checkable_requests()
        if self._requests_left is None:
            return checkable
        return min(checkable, self._requests_left)

    def spend(self, requests: int) -> None:
        """So many requests of the measured part were sent."""
        if self._requests_left is not None:
            self._requests_left -= requests

    def end_turn(self) -> None:
        """Counts the replies to lone frames that were read in this turn, and sends as many again.

        As the server, the client reads all that has arrived before it sends.
        """
        if not self.ready:
            return
        sent = 0
        if self.sending and self._is_simple:
            for connection in self.ready:
                sent += connection.send_lone()
        else:
            for connection in self.ready:
                self.refill(connection, 1)
        self.meter.exchanged(len(self.ready), sent)
        self.ready.clear()

    def reopen(self, connection: LoadConnection) -> None:
        """Opens a lost connection again, for as long as the run sends."""

        def attempt() -> None:
            while not self._done.wait(RECONNECT_S):
                try:
                    connection.open()
                except OSError as error:
                    self.meter.error(f"connect: {(error.strerror or str(error)).lower()}")
                    continue
                self.refill(connection, self._settings.pipeline)
                return

        self._reopening.spawn(attempt)

    def _sweep(self) -> None:
        late_before = self._sweeps.note(clock())
        self.engine.recall(late_before)
        for connection in self.connections:
            if connection.is_overdue(late_before):
                connection.judge(late_before)
        self.end_turn()

    def _join_outstanding(self) -> None:
        """Waits for the replies in flight, until cut; the sweep ends those that do not come."""
        while not self._is_cut and any(connection.is_waiting for connection in self.connections):
            gevent.sleep(LOOK_S)
