"""What an engine does with connections, held against both: the same bytes in give the same turns,
replies and events, however they are split."""

from __future__ import annotations

import _socket
import select
import socket
import time
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counter.processes.slots import READS, REQUESTS, Slots
from counter.totals.memory import make_shared_counter
from counter.turn.compiled import CompiledEngine
from counter.turn.engine import HELLO_ROOM, TURN_PARTS, Engine, Interest, KeptTurn, Kind, Turn
from counter.turn.plain import PlainEngine
from kit.engine import ENGINES, make_engine
from kit.harness import wait_until
from protocol import (
    MAX_AMOUNT,
    MAX_UNREAD_FRAMES,
    REPLY_SIZE,
    TOTAL_MASK,
    BadFrame,
    Decoder,
    decode_totals,
    encode_frame,
)

ONE = encode_frame(1)
BAD = bytes(16)


class Table:
    """An engine, and peers whose other ends it has."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.peers: list[socket.socket] = []
        self.socks: list[_socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=200)

    def connect(self, interest: Interest = Interest.FRAMES) -> tuple[socket.socket, int]:
        """A peer, and the descriptor that the engine knows it by."""
        return self.accept(self.dial(), interest)

    def dial(self) -> socket.socket:
        """A peer that is not accepted yet."""
        peer = socket.create_connection(self.listener.getsockname())
        peer.settimeout(10)
        return peer

    def accept(
        self, peer: socket.socket, interest: Interest = Interest.FRAMES
    ) -> tuple[socket.socket, int]:
        ours, _ = self.listener.accept()
        sock = _socket.socket(ours.family, ours.type, 0, ours.detach())
        sock.setblocking(False)
        self.engine.open(sock, interest)
        self.peers.append(peer)
        self.socks.append(sock)
        return peer, sock.fileno()

    def wait(self) -> None:
        """Until something is ready."""
        assert select.select([self.engine.fileno()], [], [], 10)[0], "nothing became ready"

    def receive(self) -> Turn:
        """The next turn that asks for anything."""
        deadline = time.monotonic() + 10
        while True:
            assert time.monotonic() < deadline
            self.wait()
            turn = self.engine.receive()
            if turn is not None:
                return turn

    def events(self) -> list[tuple[int, int, bytes]]:
        """What there is to decide, taken from the engine."""
        events = self.engine.events[:]
        self.engine.events.clear()
        return events

    def event(self) -> tuple[int, int, bytes]:
        """The next thing to decide; what is asked meanwhile is answered from 0."""
        deadline = time.monotonic() + 10
        while not self.engine.events:
            assert time.monotonic() < deadline
            self.wait()
            turn = self.engine.receive()
            if turn is not None:
                turn.answer(0)
        return self.engine.events.pop(0)

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        for sock in self.socks:
            sock.close()
        self.listener.close()
        self.engine.close()


@pytest.fixture(params=ENGINES)
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    table = Table(make_engine(request.param))
    yield table
    table.close()


def replies(peer: socket.socket, count: int) -> list[int]:
    data = b""
    while len(data) < count * REPLY_SIZE:
        more = peer.recv(65536)
        assert more, "the stream ended"
        data += more
    return list(decode_totals(data)[0])


def test_what_all_ask_is_one_turn_and_each_gets_its_own_totals(table: Table) -> None:
    peers = [table.connect()[0] for _ in range(3)]
    for amount, peer in enumerate(peers, 1):
        peer.sendall(encode_frame(amount) * amount)
    turn = table.receive()
    while turn.reads < 3:  # they may have come one by one
        turn.answer(0)
        for amount, peer in enumerate(peers, 1):
            peer.sendall(encode_frame(amount) * amount)
        turn = table.receive()
    assert turn.frames >= 6
    assert turn.amount >= 1 + 4 + 9


def test_a_turn_is_answered_in_the_order_of_its_connections(table: Table) -> None:
    (first, _), (second, _) = table.connect(), table.connect()
    first.sendall(ONE)
    turn = table.receive()
    assert (turn.amount, turn.frames, turn.reads) == (1, 1, 1)
    turn.answer(41)
    assert replies(first, 1) == [42]
    second.sendall(encode_frame(5) + encode_frame(7))
    turn = table.receive()
    turn.answer(42)
    assert replies(second, 2) == [47, 54]
    assert table.events() == []


def test_totals_wrap(table: Table) -> None:
    peer, _ = table.connect()
    peer.sendall(encode_frame(MAX_AMOUNT) + encode_frame(3))
    turn = table.receive()
    assert turn.amount & TOTAL_MASK == 2
    turn.answer(MAX_AMOUNT)
    assert replies(peer, 2) == [MAX_AMOUNT - 1, 1]


def test_a_frame_that_comes_in_parts_is_told_of_and_counted_once(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(ONE[:5])
    assert table.event() == (Kind.BEGUN, fd, b"")
    assert table.engine.held(fd) == 5
    peer.sendall(ONE[5:9])
    wait_until(lambda: quiet_with(table, fd, 9), "more of it was read")
    peer.sendall(ONE[9:])
    turn = table.receive()
    assert turn.frames == 1
    assert table.events() == [(Kind.COMPLETED, fd, b"")]
    turn.answer(0)
    assert replies(peer, 1) == [1]


def quiet_with(table: Table, fd: int, held: int) -> bool:
    assert table.engine.receive() is None
    assert table.events() == []
    return table.engine.held(fd) == held


def test_a_frame_that_begins_behind_another_is_a_new_one(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(ONE[:3])
    assert table.event()[0] == Kind.BEGUN
    peer.sendall(ONE[3:] + ONE[:7])
    turn = table.receive()
    assert table.events() == [(Kind.BEGUN, fd, b"")]
    assert table.engine.held(fd) == 7
    turn.answer(0)


@pytest.mark.parametrize("before", [0, 1, 5, 200])
def test_what_came_before_a_bad_frame_is_asked_for(table: Table, before: int) -> None:
    peer, fd = table.connect()
    peer.sendall(ONE * before + BAD + ONE)
    if before:
        turn = table.receive()
        while turn.frames < before and not table.engine.events:
            turn.answer(0)
            turn = table.receive()
        turn.answer(0)
    else:
        table.wait()
        assert table.engine.receive() is None
    first = (Kind.HELLO, fd, BAD + ONE)  # which may be one, as nobody says here
    assert table.events() == [(Kind.CHECKSUM, fd, BAD) if before else first]


@pytest.mark.parametrize("size", [16, 17, 48, 49, 63, 64, 65, 200])
def test_what_a_connection_begins_with_and_is_no_frame_is_told_whole(
    table: Table, size: int
) -> None:
    peer, fd = table.connect()
    peer.sendall(bytes(range(size)))
    table.wait()
    wait_for_bytes(table, size)
    assert table.engine.receive() is None
    assert table.events() == [(Kind.HELLO, fd, bytes(range(min(size, HELLO_ROOM))))]
    assert table.engine.held(fd) == 0


def test_a_hello_that_comes_in_parts_has_begun_and_is_not_complete(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(BAD[:9])
    assert table.event() == (Kind.BEGUN, fd, b"")
    peer.sendall(BAD[9:] + b"more")
    assert table.event() == (Kind.HELLO, fd, BAD + b"more")


def test_no_hello_comes_behind_a_frame_or_another_hello(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(ONE)
    table.receive().answer(0)
    peer.sendall(BAD)
    assert table.event() == (Kind.CHECKSUM, fd, BAD)
    peer, fd = table.connect()
    peer.sendall(BAD)
    assert table.event() == (Kind.HELLO, fd, BAD)
    peer.sendall(BAD)
    assert table.event() == (Kind.CHECKSUM, fd, BAD)


def test_what_bears_a_tag_is_told_apart_in_the_order_of_the_addition(table: Table) -> None:
    (plain, _), (first, one), (second, two) = (table.connect() for _ in range(3))
    table.engine.join(one, 7)
    table.engine.join(two, 2**32 - 1)
    for peer, frames in ((plain, ONE), (first, ONE * 2), (second, encode_frame(MAX_AMOUNT))):
        peer.sendall(frames)
    for sock, size in zip(table.socks, (16, 32, 16), strict=True):
        wait_until(partial(has_unread, sock, size), "it came")
    turn = table.receive()
    assert (turn.frames, turn.tagged) == (4, 2)
    turn.answer(100)
    by_tag = {tag: (frames, (100 + offset) & TOTAL_MASK) for tag, frames, offset in turn.shares()}
    assert by_tag == {7: (2, replies(first, 2)[-1]), 2**32 - 1: (1, replies(second, 1)[0])}
    assert len(replies(plain, 1)) == 1


def has_unread(sock: _socket.socket, size: int) -> bool:
    return len(sock.recv(1 << 20, socket.MSG_PEEK)) == size


def test_who_has_asked_before_is_added_with_those_that_bear_a_tag(table: Table) -> None:
    (plain, _), (member, fd), (other, _) = (table.connect() for _ in range(3))
    for peer in (plain, member, other):
        peer.sendall(ONE)
        table.receive().answer(0)
        assert replies(peer, 1) == [1]
    table.engine.join(fd, 9)
    for peer, amount in ((plain, 10), (member, 20), (other, 40)):
        peer.sendall(encode_frame(amount))
    for sock in table.socks:
        wait_until(partial(has_unread, sock, 16), "it came")
    turn = table.receive()
    assert (turn.frames, turn.reads, turn.amount, turn.tagged) == (3, 3, 70, 1)
    turn.answer(100)
    ((tag, frames, offset),) = turn.shares()
    assert (tag, frames, 100 + offset) == (9, 1, replies(member, 1)[0])
    assert {replies(plain, 1)[0], replies(other, 1)[0], 100 + offset} >= {170}


def test_who_has_asked_before_is_still_read_to_a_limit_and_no_further(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(ONE)
    table.receive().answer(0)
    table.engine.limit(fd, 16)
    peer.sendall(ONE)
    table.receive().answer(1)
    assert table.events() == [(Kind.DRAINED, fd, b"")]


def test_without_a_tag_there_is_no_share(table: Table) -> None:
    peer, _ = table.connect()
    peer.sendall(ONE)
    turn = table.receive()
    assert (turn.tagged, turn.shares()) == (0, [])
    turn.answer(0)


def test_a_kept_turn_has_its_shares_until_they_are_purged(table: Table) -> None:
    (first, one), (second, two), (third, three) = (table.connect() for _ in range(3))
    for tag, fd in enumerate((one, two, three), 1):
        table.engine.join(fd, tag)
    for peer, sock in zip((first, second, third), table.socks, strict=True):
        peer.sendall(ONE)
        wait_until(partial(has_unread, sock, 16), "it came")
    turn = table.receive().keep()
    table.engine.void(two)
    table.engine.forget(three)
    assert sorted(tag for tag, _, _ in turn.shares()) == [1, 2, 3]  # as it may be under way
    turn.purge()
    assert turn.shares() == [(1, 1, 1)]
    assert turn.tagged == 1
    turn.answer(0)
    second.sendall(ONE)
    kept = table.receive().keep()
    assert kept.shares() == [(2, 1, 1)]  # what is void takes no tag away
    kept.answer(1)


def test_an_amount_above_the_limit_is_refused_after_its_checksum() -> None:
    for name in ENGINES:
        table = Table(make_engine(name, max_amount=9))
        try:
            peer, fd = table.connect()
            peer.sendall(encode_frame(9) + encode_frame(10))
            table.receive().answer(0)
            assert table.event() == (Kind.LIMIT, fd, encode_frame(10))
            other, fd = table.connect()
            other.sendall(ONE + encode_frame(10)[:15] + b"!")
            table.receive().answer(9)
            assert table.event()[0] == Kind.CHECKSUM
        finally:
            table.close()


def test_the_end_of_a_stream_comes_after_what_it_held(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(ONE)
    peer.shutdown(socket.SHUT_WR)
    table.receive().answer(0)
    assert table.event() == (Kind.END, fd, b"")
    assert replies(peer, 1) == [1]


def test_what_a_peer_that_reset_has_left_is_not_read(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(ONE)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    mask = select.poll()
    mask.register(fd, select.POLLIN)
    wait_until(lambda: bool(mask.poll(0)[0][1] & select.POLLERR), "the reset is there")
    assert table.engine.receive() is None
    assert table.events() == [(Kind.RESET, fd, b"")]


def test_replies_to_one_that_is_gone_tell_of_it(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(ONE)
    turn = table.receive()
    table.socks[0].shutdown(socket.SHUT_WR)
    turn.answer(0)
    assert table.events() == [(Kind.RESET, fd, b"")]


def test_replies_that_the_kernel_does_not_take_are_told_of_in_order(table: Table) -> None:
    peer, fd = table.connect()
    table.socks[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    asked = 0
    while not table.engine.events:
        peer.sendall(ONE * 1000)
        turn = table.receive()
        turn.answer(asked)
        asked += turn.frames
    (kind, told, unsent), *more = table.events()
    assert (kind, told, more) == (Kind.UNSENT, fd, [])
    left = asked * REPLY_SIZE - len(unsent)
    got = replies(peer, left // REPLY_SIZE) if left % REPLY_SIZE == 0 else None
    # From here on all come to be kept behind these, until somebody says that they are out.
    peer.sendall(ONE)
    turn = table.receive()
    while asked + turn.frames < asked + 1:
        turn = table.receive()
    turn.answer(asked)
    assert table.events() == [(Kind.UNSENT, fd, (asked + 1).to_bytes(8))]
    if got is not None:
        assert got == list(range(1, left // REPLY_SIZE + 1))
    table.engine.hold(fd, False)
    peer.sendall(ONE)
    table.receive().answer(asked + 1)


def test_one_that_is_served_elsewhere_is_only_told_of(table: Table) -> None:
    peer, fd = table.connect(Interest.BYTES)
    peer.sendall(b"hello")
    assert table.event() == (Kind.READY, fd, b"")
    assert table.event() == (Kind.READY, fd, b"")
    assert peer is table.peers[0]
    assert table.socks[0].recv(10) == b"hello"


def test_one_that_is_parked_is_told_of_once_and_read_when_it_is_served(table: Table) -> None:
    peer, fd = table.connect(Interest.ARRIVAL)
    peer.sendall(ONE)
    assert table.event() == (Kind.READY, fd, b"")
    assert not select.select([table.engine.fileno()], [], [], 0.05)[0]
    table.engine.watch(fd, Interest.FRAMES)
    table.receive().answer(0)
    assert replies(peer, 1) == [1]
    table.engine.watch(fd, Interest.ARRIVAL)
    peer.sendall(ONE)
    assert table.event() == (Kind.READY, fd, b"")


def test_one_can_be_read_without_being_ready(table: Table) -> None:
    peer, fd = table.connect(Interest.ARRIVAL)
    assert table.engine.receive(fd) is None
    assert table.events() == []
    peer.sendall(ONE)
    table.wait()
    turn = table.engine.receive(fd)
    assert turn is not None
    turn.answer(0)
    assert replies(peer, 1) == [1]


def test_no_more_is_read_than_the_limit_says(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(ONE * 3)
    wait_for_bytes(table, 48)
    table.engine.limit(fd, 40)
    turn = table.receive()
    assert turn.frames == 2
    assert [kind for kind, _, _ in table.events()] == [Kind.BEGUN, Kind.DRAINED]
    turn.answer(0)
    assert len(table.socks[0].recv(100)) == 8


def test_a_turn_that_is_kept_is_answered_later_and_owed_meanwhile(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(ONE * 2)
    first = table.receive()
    while first.frames < 2:
        first.answer(0)
        peer.sendall(ONE * 2)
        first = table.receive()
    first = first.keep()
    assert table.engine.owed(fd) == first.frames
    peer.sendall(encode_frame(9))
    second = table.receive().keep()
    assert second.askers() == [fd]
    table.engine.tell_answered(fd)
    before, count = 100, first.frames
    first.answer(before)
    assert table.events() == []
    second.answer(before + count)
    assert table.events() == [(Kind.ANSWERED, fd, b"")]
    assert table.engine.owed(fd) == 0
    assert replies(peer, count + 1)[-2:] == [before + count, before + count + 9]


def test_what_is_void_is_neither_added_nor_answered(table: Table) -> None:
    (gone, gone_fd), (there, there_fd) = table.connect(), table.connect()
    gone.sendall(encode_frame(5))
    there.sendall(encode_frame(7))
    turns: list[KeptTurn] = []
    while sum(turn.reads for turn in turns) < 2:
        turns.append(table.receive().keep())
    table.engine.void(gone_fd)
    assert table.engine.owed(gone_fd) == 0
    assert sum(turn.live_frames() for turn in turns) == 1
    assert [fd for turn in turns for fd in turn.askers()] == [there_fd]
    for turn in turns:
        turn.purge()
    assert sum(turn.amount for turn in turns) == 7
    for turn in turns:
        turn.answer(10)
    assert replies(there, 1) == [17]
    gone.setblocking(False)
    with pytest.raises(BlockingIOError):
        gone.recv(1)


def test_a_part_that_became_void_under_way_is_counted_and_not_answered(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(encode_frame(5))
    turn = table.receive().keep()
    table.engine.forget(fd)
    assert turn.amount == 5
    assert turn.live_frames() == 0
    turn.answer(10)
    assert table.events() == []
    peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        peer.recv(1)


def test_a_descriptor_that_is_used_again_gets_nothing_of_what_another_asked(table: Table) -> None:
    peer, fd = table.connect()
    peer.sendall(encode_frame(5))
    turn = table.receive().keep()
    table.engine.forget(fd)
    other = table.dial()
    table.socks.pop().close()
    _, again = table.accept(other)
    assert again == fd
    turn.answer(10)
    other.sendall(ONE)
    table.receive().answer(20)
    assert replies(other, 1) == [21]


def test_very_many_that_are_owed_are_told_of(table: Table) -> None:
    peer, fd = table.connect()
    kept: list[KeptTurn] = []
    while not table.engine.events:
        peer.sendall(ONE * 1024)
        kept.append(table.receive().keep())
    assert table.events() == [(Kind.FULL, fd, b"")]
    assert table.engine.owed(fd) >= MAX_UNREAD_FRAMES
    before = 0
    for turn in kept:
        turn.answer(before)
        before += turn.amount
    assert table.events() == [(Kind.ANSWERED, fd, b"")]


def test_a_turn_has_so_many_connections_at_most(table: Table) -> None:
    peers = [table.connect()[0] for _ in range(TURN_PARTS + 10)]
    for peer in peers:
        peer.sendall(ONE)
    asked = 0
    while asked < len(peers):
        turn = table.receive()
        assert turn.reads <= TURN_PARTS
        turn.answer(asked)
        asked += turn.frames
    assert sorted(replies(peer, 1)[0] for peer in peers) == list(range(1, len(peers) + 1))


def test_the_moment_of_the_last_read_is_known(table: Table) -> None:
    peer, fd = table.connect()
    assert table.engine.read_at(fd) == 0
    before = time.monotonic()
    peer.sendall(ONE)
    table.receive().answer(0)
    assert before <= table.engine.read_at(fd) <= time.monotonic()


def test_a_total_in_memory_is_added_to_until_nothing_is_ready(table: Table) -> None:
    counter, slot = make_shared_counter(40), Slots(1)[0]

    def ask(turn: Turn) -> None:
        before = counter.add(turn.amount)
        slot[REQUESTS] += turn.frames
        slot[READS] += turn.reads
        turn.answer(before)

    exchange = table.engine.in_one_call(counter, slot, ask)
    (first, _), (second, fd) = table.connect(), table.connect()
    first.sendall(ONE)
    second.sendall(encode_frame(2) + BAD)
    while slot[REQUESTS] < 2:
        table.wait()
        exchange() if exchange else table.engine.each_turn(ask)
    assert counter.total() == 43
    assert slot[READS] == 2
    assert table.events() == [(Kind.CHECKSUM, fd, BAD)]
    assert sorted(replies(first, 1) + replies(second, 1)) in ([41, 43], [42, 43])


def test_the_compiled_one_serves_a_total_in_memory_in_one_call() -> None:
    engine = make_engine("compiled")
    assert engine.in_one_call(make_shared_counter(), Slots(1)[0], lambda _: None) is not None
    engine.close()


def test_a_turn_in_which_anything_bears_a_tag_is_not_added_in_one_call(table: Table) -> None:
    counter, slot = make_shared_counter(40), Slots(1)[0]
    taken: list[tuple[int, int, int]] = []

    def take(turn: Turn) -> None:
        taken.extend(turn.shares())
        turn.answer(counter.add(turn.amount))

    exchange = table.engine.in_one_call(counter, slot, take)
    (plain, _), (member, fd) = table.connect(), table.connect()
    table.engine.join(fd, 3)
    for number in (1, 2):
        plain.sendall(ONE)
        member.sendall(encode_frame(2))
        for sock in table.socks:
            wait_until(partial(has_unread, sock, 16), "it came")
        exchange() if exchange else table.engine.each_turn(take)
        assert counter.total() == 40 + 3 * number
    assert [(tag, frames) for tag, frames, _ in taken] == [(3, 1)] * 2
    assert slot[REQUESTS] == 0  # what is added elsewhere is counted there
    plain.sendall(ONE)
    table.wait()
    exchange() if exchange else table.engine.each_turn(take)
    assert slot[REQUESTS] == (1 if exchange else 0)
    assert counter.total() == 47


Chunks = st.lists(
    st.one_of(
        st.integers(0, 300).map(encode_frame),
        st.integers(0, MAX_AMOUNT).map(encode_frame),
        st.binary(min_size=16, max_size=16),
        st.builds(lambda frame, count: frame * count, st.just(ONE), st.integers(2, 300)),
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(Chunks, st.data())
def test_both_engines_make_the_same_of_the_same_bytes(
    chunks: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(chunks)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=4).map(sorted))
    limit = data.draw(st.sampled_from([MAX_AMOUNT, 255, 10**9]))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if a < b]
    seen = [told_by(make_engine(name, max_amount=limit), parts) for name in ENGINES]
    assert seen[0] == seen[1]
    assert seen[0][0] == expected(Decoder(limit), stream)


def expected(decoder: Decoder, stream: bytes) -> list[int]:
    """The replies to a stream, from 0."""
    totals, total = [], 0
    for at in range(0, len(stream) - 15, 16):
        try:
            amount = decoder.verify(stream[at : at + 16])
        except BadFrame:
            break
        total = (total + amount) & TOTAL_MASK
        totals.append(total)
    return totals


def told_by(engine: Engine, parts: list[bytes]) -> tuple[list[int], list[tuple[int, bytes]], int]:
    """The replies that a peer gets, what is refused, and how much is held of a frame that, as was
    told, has begun."""
    table = Table(engine)
    try:
        peer, fd = table.connect()
        events: list[tuple[int, bytes]] = []
        total = frames = 0
        for part in parts:
            peer.sendall(part)
            wait_for_bytes(table, len(part))
            while not is_refused(events) and (turn := engine.receive()):
                amount, frames = turn.amount, frames + turn.frames
                turn.answer(total)
                total = (total + amount) & TOTAL_MASK
                events += [(kind, data) for kind, _, data in table.events()]
            events += [(kind, data) for kind, _, data in table.events()]
            if is_refused(events):
                break
        # Reads may be of any length, so that a frame may begin and be completed within one part.
        steps = [kind for kind, _ in events if kind in (Kind.BEGUN, Kind.COMPLETED)]
        held = engine.held(fd)
        refused = [event for event in events if is_refused([event])]
        begun = steps[-1:] == [Kind.BEGUN] and not (refused and refused[0][0] == Kind.HELLO)
        assert bool(held) == begun
        return (replies(peer, frames) if frames else []), refused, held
    finally:
        table.close()


def is_refused(events: list[tuple[int, bytes]]) -> bool:
    return any(kind in (Kind.CHECKSUM, Kind.LIMIT, Kind.HELLO) for kind, _ in events)


def wait_for_bytes(table: Table, count: int) -> None:
    def have_come() -> bool:
        return len(table.socks[0].recv(1 << 20, socket.MSG_PEEK)) >= count

    table.wait()
    wait_until(have_come, "all of it came")


def test_an_engine_of_each_name_is_what_it_says() -> None:
    makers: dict[str, type[Engine]] = {"compiled": CompiledEngine, "plain": PlainEngine}
    for name, kind in makers.items():
        engine = make_engine(name)
        assert isinstance(engine, kind)
        assert engine.name == name
        engine.close()
