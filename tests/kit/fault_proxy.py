"""A proxy between servers and Redis that breaks connections where it hurts: when a commit was
applied and its reply is on the way, or so that a commit arrives long after it was asked for again.

A store sends one command, waits for its reply and sends the next, each by one small write. So what
one read of the loopback gives here is a whole command or a whole reply.
"""

from __future__ import annotations

import socket
import threading

from kit.harness import PATIENCE_S, ScriptedServer

_LARGEST = 1 << 16
_COMMIT = b":writer:"  # in the name of a key, of no command but a commit
_PROBE = b"$1\r\n0\r\n"  # adds 0, which is not asked for again
_APPLIED = b"$24\r\n"  # how the reply to a commit begins that is applied


class FaultProxy(ScriptedServer):
    """Passes on what servers and the Redis at `port` say to each other, but for what it is told.

    A commit is known by its bytes: a server that asks for it again sends the same.
    """

    def __init__(self, port: int) -> None:
        super().__init__(self._live)
        self.url = f"redis://{self.address}/0"
        self._port = port
        self._changed = threading.Condition()
        self._to_cut = 0
        self._to_hold = 0
        self._behind = 0
        self._held: dict[bytes, int] = {}  # commits that were answered since it was asked for again
        self._ending = False
        self.cuts = 0  # applied commits whose reply was thrown away
        self.duplicates = 0  # commits that Redis got for the second time, from a dead connection

    def cut(self, count: int) -> None:
        """Of the next so many commits that Redis applies, throws the reply away and hangs up."""
        with self._changed:
            self._to_cut = count

    def hold(self, behind: int) -> None:
        """Hangs up on the next server that asks for a commit, and delivers it nevertheless, after
        it was asked for again and answered, and so many other commits behind it."""
        with self._changed:
            self._to_hold, self._behind = 1, behind

    def _live(self, near: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._port), PATIENCE_S) as far:
            self._open.append(far)
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while command := near.recv(_LARGEST):
                if self._is_to_be_held(command):
                    near.close()
                    self._deliver_late(command, far)
                    return
                far.sendall(command)
                reply = far.recv(_LARGEST)
                if self._is_to_be_cut(command, reply):
                    return
                if not reply:
                    return
                near.sendall(reply)

    def _is_to_be_held(self, command: bytes) -> bool:
        with self._changed:
            if not self._to_hold or _COMMIT not in command or _PROBE in command:
                return False
            self._to_hold = 0
            self._held[command] = -1
            return True

    def _is_to_be_cut(self, command: bytes, reply: bytes) -> bool:
        """Takes note of a reply, which is to be passed on unless this is true."""
        if _COMMIT not in command or not reply.startswith(_APPLIED):
            return False
        with self._changed:
            if self._to_cut:
                self._to_cut -= 1
                self.cuts += 1
                return True
            for held, behind in self._held.items():
                if behind >= 0 or held == command:
                    self._held[held] = behind + 1
            self._changed.notify_all()
            return False

    def _deliver_late(self, command: bytes, far: socket.socket) -> None:
        behind = self._behind
        with self._changed:
            self._changed.wait_for(
                lambda: self._ending or self._held[command] >= behind, PATIENCE_S
            )
            is_due = self._held.pop(command) >= behind
        if is_due:
            far.sendall(command)
            if far.recv(_LARGEST).startswith(_APPLIED):
                with self._changed:
                    self.duplicates += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        super().__exit__()
