"""A proxy that cuts connections at any byte, in either direction."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle

from kit.harness import PATIENCE_S, ScriptedServer


@dataclass(frozen=True)
class Cut:
    """Where a connection ends: after so many bytes to the server, or so many to the client; None of
    a direction that ends nothing."""

    there: int | None = None
    back: int | None = None


class CuttingProxy(ScriptedServer):
    """Passes on what clients and the server at `port` say to each other, up to a cut; with `others`
    each connection goes to the next of the ports.

    `cuts` are those of the first connections, in order; the others are not cut. `at_cut` is called
    when nothing more will pass and nobody can have noticed.
    """

    def __init__(
        self,
        port: int,
        cuts: Sequence[Cut],
        at_cut: Callable[[], object] = lambda: None,
        others: Sequence[int] = (),
    ) -> None:
        super().__init__(self._live)
        self._ports = cycle((port, *others))
        self._cuts = list(cuts)
        self._at_cut = at_cut
        self._taking = threading.Lock()
        self.connections = 0
        self.made = 0  # so many cuts

    def _live(self, near: socket.socket) -> None:
        with self._taking:
            self.connections += 1
            cut = self._cuts.pop(0) if self._cuts else Cut()
            port = next(self._ports)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as far:
            far.settimeout(None)
            self._open.append(far)
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=self._pass, args=(far, near, cut.back), daemon=True)
            back.start()
            self._pass(near, far, cut.there)
            back.join()

    def _pass(self, source: socket.socket, sink: socket.socket, left: int | None) -> None:
        """Passes bytes on until the stream ends, or so many have passed; then ends the other."""
        with suppress(OSError):
            while left is None or left > 0:
                data = source.recv(65536 if left is None else left)
                if not data:
                    break
                sink.sendall(data)
                left = None if left is None else left - len(data)
        if left == 0:
            with self._taking:
                self.made += 1
            self._at_cut()
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
