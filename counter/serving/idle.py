"""Room for those who wait: what a server does while every worker is taken.

An idle connection costs nobody anything as long as there are free workers. Once all are taken and
somebody waits in the listen queue, those that were idle for longer than --idleTimeout give their
workers up, the longest idle first, as many as wait. The kernel tells how long: the time in which a
connection waited in the queue itself counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from counter.processes.slots import WORKERS
from counter.system.sockets import waiting_connections

if TYPE_CHECKING:
    from counter.serving.server import CounterServer


class Room:
    """Makes room in one serving process; make() is called by its sweep while its Pool is full."""

    def __init__(self, server: CounterServer, idle_timeout_s: float) -> None:
        self._server = server
        self._idle_timeout_s = idle_timeout_s
        self.look_at = 0.0  # none that was there can have been idle for long enough before

    def make(self, now: float) -> None:
        """Warns that connections wait, if they do, and ends idle ones in their favour."""
        server = self._server
        if server.slots.fewest_connections(but=server.index) is not None:
            return  # another process has a free worker and takes what waits
        waiting = waiting_connections(server.socket)
        if not waiting:
            return
        self._warn(waiting)
        if now >= self.look_at:
            # Every process of a full server does this: together they end as many as wait.
            self._end_idle(now, -(-waiting // len(server.slots)))

    def _end_idle(self, now: float, wanted: int) -> None:
        """Ends up to `wanted` connections. Asking the kernel about each takes 1 us or two, so it is
        not done before one of them can be due."""
        asked = [(connection.idle_for_s(), connection) for connection in self._server.pool]
        idle = [(idle_s, connection) for idle_s, connection in asked if idle_s is not None]
        idle.sort(key=lambda pair: pair[0], reverse=True)
        due = [connection for idle_s, connection in idle if idle_s > self._idle_timeout_s]
        for connection in due[:wanted]:
            self._server.gave_up_idle(connection)
        longest_s = idle[len(due)][0] if len(due) < len(idle) else 0.0
        # A busy one may have been silent for long when it is done.
        any_busy = len(idle) < len(asked)
        self.look_at = now if due or any_busy else now + self._idle_timeout_s - longest_s

    def _warn(self, waiting: int) -> None:
        """The first of the processes says so, for all."""
        slots = self._server.slots
        first = next(i for i in range(len(slots)) if slots[i][WORKERS])
        if self._server.index == first:
            self._server.limited_log.warning(
                "full",
                "all %d workers are taken and %d connections wait; "
                "raise --multiplier to serve more at once",
                slots.sum(WORKERS),
                waiting,
            )
