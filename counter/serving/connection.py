"""One connection, from its first byte to its last: what its engine leaves to be decided.

The life of a connection:
  1. accepted, it is opened in the engine, and takes a worker if one is free;
  2. while it has one its frames are read, verified, added and answered by the engine, many
     connections at once (counter/turn); nothing of that comes here;
  3. without a worker it is parked until it has something unread, then waits for its turn
     (workers.py);
  4. it is not read, and holds no worker, while replies wait for its peer to read them, or very many
     frames for the store;
  5. one that begins with a hello belongs to a session (sessions.py): the hello is read here, then
     nothing until that is answered, and from then on it is served as any other;
  6. at the end what it is owed goes out first. A peer that may still be sending gets FIN, and its
     socket lingers until the peer is quiet, because closing it with unread bytes would send RST and
     could destroy replies that were already sent.

The invariant: a frame is added and answered once, in the order of its connection, or it is not
added at all. Nothing here waits: what is waited for is an event, or a deadline that the server's
one coarse sweep keeps.
"""

from __future__ import annotations

import _socket
import socket
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

from counter.serving.additions import Additions
from counter.serving.deadlines import Deadlines
from counter.serving.ending import Ending
from counter.serving.sessions import Sessions
from counter.serving.workers import Workers
from counter.system.sockets import silent_for_s, unread_bytes
from counter.turn.engine import Engine, Interest, Kind
from protocol import (
    HELLO_SIZE,
    REQUEST_SIZE,
    Answer,
    BadFrame,
    Control,
    decode_control,
    decode_hello,
    format_address,
)


class State(Enum):
    """What a connection is at."""

    NEW = "not known to the engine yet"
    PARKED = "no worker, and nothing unread that is known of"
    WAITING = "something unread, and no worker yet"
    SERVED = "a worker: it is read"
    GREETING = "not read until its hello, or the end of its session, is answered"
    STALLED = "not read until its replies are taken, or its frames answered"
    DRAINING = "read to the end of what its socket held when the drain began"
    ENDING = "not read any more; ends when it is owed nothing"
    CLOSED = "gone"


class Host(Protocol):
    """What a Connection may ask of the server that holds it."""

    engine: Engine
    additions: Additions
    sessions: Sessions | None  # None where there are none
    workers: Workers[Connection]
    frame_deadlines: Deadlines[Connection]  # of frames that have begun
    write_deadlines: Deadlines[Connection]  # of replies that the kernel has not taken
    is_draining: bool

    def note_closed(self, connection: Connection) -> None:
        """A connection has ended: its descriptor is another's next."""

    def linger(self, sock: _socket.socket) -> None:
        """Sends FIN, and closes the socket when its peer is quiet."""

    def refused(self, why: Ending, detail: str) -> None:
        """Counts and logs that a peer was turned away."""

    def failed(self, detail: str) -> None:
        """Logs an error of the program's own."""

    def explain(self, frame: bytes) -> str:
        """Why a frame is refused, in words."""


class Connection:
    """One peer. `ending` is None until the connection has to end, then the reason."""

    __slots__ = ("ending", "fd", "hello", "host", "sock", "state", "tag", "unsent")

    def __init__(self, host: Host, sock: _socket.socket) -> None:
        self.host = host
        self.sock = sock
        self.fd = sock.fileno()
        self.unsent = b""  # replies that the kernel did not take; nothing is read while there are
        self.hello = b""  # that has begun and is not whole
        self.tag = 0  # of its session; 0: it has none
        self.ending: Ending | None = None
        self.state = State.NEW

    @property
    def interest(self) -> Interest:
        """What its socket is watched for while it is read."""
        return Interest.BYTES if self.hello else Interest.FRAMES

    def abandon(self) -> None:
        """Ends one that the engine could not take."""
        self.state = State.CLOSED
        self.host.workers.leave(self)
        self.host.frame_deadlines.end(self)
        self.host.note_closed(self)
        self.sock.close()

    def decide(self, kind: int, data: bytes) -> None:
        """Acts on what the engine has to tell of this connection."""
        if self.state is not State.CLOSED:
            _DECISIONS[kind](self, data)

    def serve(self) -> None:
        """It has a worker: reads from now on."""
        self.watch(self.interest, State.SERVED)

    def park(self) -> None:
        """It has no worker: asks for one as soon as there is something to read."""
        self.watch(Interest.ARRIVAL, State.PARKED)

    def watch(self, interest: Interest, state: State) -> None:
        """Is watched for something else, in another state."""
        if self.state is State.NEW:
            self.host.engine.open(self.sock, interest)
        else:
            self.host.engine.watch(self.fd, interest)
        self.state = state

    def look(self) -> None:
        """Takes what has come, which may be what a deadline waits for: also without a worker, so
        that nobody is judged for what others have kept from being read."""
        if self.state in (State.GREETING, State.STALLED, State.ENDING, State.CLOSED):
            return
        # Of one that waits the engine tells nothing, a reset neither.
        if self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.on_reset(b"")
        else:
            self.read()

    def read(self) -> None:
        """Takes what has come."""
        if self.hello:
            self.read_hello()
            return
        turn = self.host.engine.receive(self.fd)
        if turn is not None:
            self.host.additions.ask(turn)

    # gevent's Pool links itself to what it holds, to hear of its end; a connection is taken out of
    # it instead. Where these two are missing it catches an AttributeError each time, for 1 us.

    def rawlink(self, _: Callable[[object], None]) -> None:
        """Nobody hears of its end in this way."""

    def unlink(self, _: Callable[[object], None]) -> None:
        """Nobody does."""

    def last_read_at(self) -> float:
        """When something was read last, by time.monotonic()."""
        return self.host.engine.read_at(self.fd)

    def idle_for_s(self) -> float | None:
        """Seconds since the peer's last byte; None while anything is under way."""
        if self.state not in (State.PARKED, State.SERVED):
            return None
        if self.owed() or unread_bytes(self.sock):
            return None
        return silent_for_s(self.sock)

    def on_ready(self, _: bytes) -> None:
        """There is something to read, or room for what is unsent."""
        if self.unsent:
            self.flush()
        elif self.state is State.PARKED:
            self.state = State.WAITING
            self.host.workers.request(self)
        elif self.state is State.SERVED and self.hello:
            self.read()

    def on_begun(self, _: bytes) -> None:
        self.host.frame_deadlines.begin(self)

    def on_completed(self, _: bytes) -> None:
        self.host.frame_deadlines.end(self)

    def on_hello(self, data: bytes) -> None:
        """Takes the first bytes of a connection that are no frame, and may be a hello's."""
        if self.host.sessions is None or decode_control(data[:REQUEST_SIZE]) is None:
            self.on_checksum(data[:REQUEST_SIZE])
        elif self.host.is_draining:
            self.end(Ending.DRAIN)  # unanswered, so that its client goes elsewhere
        else:
            self.take_hello(data)

    def read_hello(self) -> None:
        """Reads more of a hello."""
        try:
            data = self.sock.recv(HELLO_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self.on_reset(b"")
            return
        if data:
            self.take_hello(self.hello + data)
        else:
            self.end(Ending.GONE)

    def take_hello(self, data: bytes) -> None:
        """Takes a hello as far as it has come; has it answered once it is whole."""
        try:
            hello = decode_hello(data)
        except BadFrame as bad:
            self.refuse(Ending.HELLO, str(bad))
            return
        self.hello = data
        if hello is None:
            self.host.frame_deadlines.begin_unless_begun(self)
            if self.state is State.SERVED:
                self.serve()
            return
        self.hello = b""
        self.host.frame_deadlines.end(self)
        self.await_answer()
        self.sessions().greet(self, hello)

    def await_answer(self) -> None:
        """Is not read, and needs no worker, until its sessions have answered."""
        self.watch(Interest.NOTHING, State.GREETING)
        self.host.workers.leave(self)

    def welcome(self, tag: int, answer: Answer) -> None:
        """Its hello is answered: it belongs to a session, whose frames bear `tag`."""
        self.tag = tag
        self.join(tag)
        self.say(answer.encode())
        if self.state is State.GREETING:
            self.host.workers.admit(self)

    def turn_away(self, answer: bytes) -> None:
        """Its hello is answered, and there is no session for it, or not any more."""
        self.say(answer)
        self.end(Ending.SESSION)

    def give_way(self) -> None:
        """Its session goes on with another connection: what was not read of it is not added."""
        self.cut(Ending.CUT)

    def on_checksum(self, frame: bytes) -> None:
        control = decode_control(frame) if self.tag else None
        if control is not None and control[0] is Control.END:
            self.await_answer()
            self.sessions().end(self)
        else:
            self.on_bad_frame(Ending.CHECKSUM, frame)

    def on_limit(self, frame: bytes) -> None:
        self.on_bad_frame(Ending.LIMIT, frame)

    def on_bad_frame(self, why: Ending, frame: bytes) -> None:
        """Refuses a frame. A client of a session knows what is refused: it is broken, and its
        session over."""
        if self.tag:
            self.sessions().abandon(self)
        self.refuse(why, self.host.explain(frame))

    def sessions(self) -> Sessions:
        """Where there is a session to speak of."""
        assert self.host.sessions is not None
        return self.host.sessions

    def join(self, tag: int) -> None:
        """Has what it asks from now on bear a tag."""
        self.host.engine.join(self.fd, tag)

    def say(self, data: bytes) -> None:
        """Sends what is no reply."""
        self.transmit(data)

    def on_end(self, _: bytes) -> None:
        self.end(Ending.GONE)

    def on_reset(self, _: bytes) -> None:
        """Nobody is there to be answered: what has not been added is not any more."""
        self.ending = Ending.GONE
        self.release()

    def on_drained(self, _: bytes) -> None:
        self.end(Ending.DRAIN)

    def on_full(self, _: bytes) -> None:
        self.stall()

    def on_unsent(self, replies: bytes) -> None:
        """Keeps replies until the kernel takes them."""
        if not self.unsent:
            self.host.write_deadlines.begin(self)
            self.stall()
            self.host.engine.watch(self.fd, Interest.ROOM)
        self.unsent += replies

    def on_answered(self, _: bytes) -> None:
        self.proceed()

    def on_failed(self, detail: bytes) -> None:
        self.host.failed(detail.decode(errors="replace"))
        self.cut(Ending.FAILED)

    def owed(self) -> int:
        """How many frames wait for a store."""
        return self.host.engine.owed(self.fd)

    def tell_answered(self) -> None:
        """Has the engine tell when no frame waits for a store any more."""
        self.host.engine.tell_answered(self.fd)

    def void(self) -> None:
        """What it asked for and was not answered is not added, unless that is under way."""
        if self.owed():
            self.host.engine.void(self.fd)
            self.host.additions.note_void()

    def transmit(self, data: bytes) -> None:
        """Hands bytes to the kernel; what it does not take is kept."""
        sent = 0
        if not self.unsent:
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self.on_reset(b"")
                return
        if sent < len(data):
            self.host.engine.hold(self.fd, True)
            self.on_unsent(data[sent:])

    def flush(self) -> None:
        """Hands on what the kernel did not take before."""
        try:
            sent = self.sock.send(self.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.on_reset(b"")
            return
        self.unsent = self.unsent[sent:]
        if self.unsent:
            if sent:
                self.host.write_deadlines.begin(self)
            self.host.engine.watch(self.fd, Interest.ROOM)
        else:
            self.host.write_deadlines.end(self)
            self.host.engine.hold(self.fd, False)
            self.proceed()

    def judge_unread(self) -> None:
        """Ends a connection whose peer has read nothing in time, unless it has now."""
        before = len(self.unsent)
        self.flush()
        if len(self.unsent) == before and self.state is not State.CLOSED:
            self.unsent = b""
            self.refuse(Ending.NOT_READING, "does not read its replies")

    def stall(self) -> None:
        """Stops reading; the deadline of an incomplete frame stands still meanwhile."""
        if self.state in (State.ENDING, State.STALLED, State.GREETING):
            return
        self.watch(Interest.NOTHING, State.STALLED)
        self.host.frame_deadlines.pause(self)
        self.host.workers.leave(self)

    def proceed(self) -> None:
        """Goes on after what it waited for, if it waits for nothing else."""
        if self.unsent:
            return
        if self.state is State.ENDING:
            self.finish()
        elif self.state is State.STALLED and self.owed():
            self.tell_answered()
        elif self.state is State.STALLED:
            self.host.frame_deadlines.resume(self)
            if self.host.is_draining:
                self.read_rest()
            else:
                self.host.workers.admit(self)

    def refuse(self, why: Ending, detail: str) -> None:
        """Ends the connection for something that its peer did, which is counted and logged."""
        self.host.refused(why, f"{self.peer()}: {detail}")
        self.end(why)

    def withdraw(self) -> None:
        """Ends the connection without an answer to what waits for a store."""
        self.void()
        self.refuse(Ending.STORE, "the store did not answer in time")

    def end(self, why: Ending) -> None:
        """Ends the connection as soon as it is owed nothing; reads nothing more."""
        if self.state is State.CLOSED:
            return
        if why.may_follow(self.ending):
            self.ending = why
        if not (self.unsent or self.owed()):
            self.release()
            return
        if self.state is not State.ENDING:
            self.host.workers.leave(self)
            self.host.frame_deadlines.end(self)
            self.watch(Interest.ROOM if self.unsent else Interest.NOTHING, State.ENDING)
        self.finish()

    def finish(self) -> None:
        """Ends it now if it is owed nothing."""
        if self.ending is None or not self.ending.answers:
            self.release()
        elif self.owed():
            self.tell_answered()
        elif not self.unsent:
            self.release()

    def cut(self, why: Ending) -> None:
        """Ends the connection as it is."""
        self.ending = why
        self.release()

    def drain(self) -> None:
        """Ends the connection after what its socket holds now is counted and answered."""
        if self.state is State.ENDING:
            return
        if self.hello or self.state is State.GREETING:
            self.end(Ending.DRAIN)
            return
        if self.state is State.NEW:  # it was in the backlog
            self.watch(Interest.NOTHING, State.PARKED)
        unread = unread_bytes(self.sock)
        if not unread:
            self.end(Ending.DRAIN)
            return
        if self.state is State.STALLED:
            self.limit(unread)
        else:
            self.host.workers.leave(self)
            self.read_rest()
            self.limit(unread)

    def limit(self, count: int) -> None:
        """Reads so many bytes at most from now on."""
        self.host.engine.limit(self.fd, count)

    def read_rest(self) -> None:
        """Reads what a drain has left to be read, without a worker."""
        self.watch(self.interest, State.DRAINING)

    def release(self) -> None:
        """Lets go of the socket, which may linger, and of everything else."""
        if self.state is State.CLOSED:
            return
        self.void()
        host = self.host
        if self.tag or self.state is State.GREETING:
            self.sessions().leave(self)
        self.state = State.CLOSED
        host.workers.leave(self)
        host.frame_deadlines.end(self)
        host.write_deadlines.end(self)
        host.engine.forget(self.fd)
        host.note_closed(self)
        if self.ending is not None and self.ending.lingers:
            host.engine.unwatch(self.fd)
            host.linger(self.sock)
        else:
            self.sock.close()

    def peer(self) -> str:
        """The peer's address, for the log."""
        try:
            host, port = self.sock.getpeername()[:2]
        except OSError:
            return "a peer that is gone"
        return format_address(host, port)

    def overdue(self) -> str:
        """What the frame deadline has ended, for the log."""
        if self.hello:
            return f"a hello stopped after {len(self.hello)} bytes"
        return f"a frame stopped after {self.host.engine.held(self.fd)} bytes"


_DECISIONS: Final[dict[int, Callable[[Connection, bytes], None]]] = {
    Kind.READY: lambda connection, data: connection.on_ready(data),
    Kind.BEGUN: Connection.on_begun,
    Kind.COMPLETED: Connection.on_completed,
    Kind.CHECKSUM: Connection.on_checksum,
    Kind.LIMIT: Connection.on_limit,
    Kind.END: Connection.on_end,
    Kind.RESET: Connection.on_reset,
    Kind.DRAINED: Connection.on_drained,
    Kind.UNSENT: Connection.on_unsent,
    Kind.FULL: Connection.on_full,
    Kind.ANSWERED: Connection.on_answered,
    Kind.FAILED: Connection.on_failed,
    Kind.HELLO: Connection.on_hello,
}
