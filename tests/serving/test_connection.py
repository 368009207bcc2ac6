"""What a connection decides, and how it ends."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import pytest

from counter.processes.slots import REQUESTS
from counter.serving.additions import InMemory
from counter.serving.connection import State
from counter.serving.ending import Ending
from counter.system.sockets import close_with_reset, unread_bytes
from counter.totals.counter import Counter
from counter.totals.memory import MemoryCounter, make_shared_counter
from counter.turn.engine import Kind
from kit.connection import (
    ONE,
    Bench,
    Held,
    fill,
    has_asked,
    has_room,
    holds,
    is_gone,
    state_of,
    take,
    tls,
    totals,
)
from kit.engine import ENGINES
from kit.harness import wait_until
from protocol import decode_totals, encode_frame


@pytest.fixture(params=ENGINES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()


def test_one_with_a_worker_is_served(bench: Bench) -> None:
    peer, connection = bench.connect()
    assert connection.state is State.SERVED
    peer.sendall(ONE * 3)
    bench.until(lambda: holds(peer, 24), "it is answered")
    assert totals(peer, 3) == [1, 2, 3]


def test_one_without_a_worker_gets_it_when_it_has_something_to_read(bench: Bench) -> None:
    (_, first), (peer, second) = bench.connect(), bench.connect()
    assert (first.state, second.state) == (State.SERVED, State.PARKED)
    peer.sendall(ONE)
    bench.until(lambda: holds(peer, 8), "it is answered")
    assert (first.state, second.state) == (State.PARKED, State.SERVED)


def test_one_that_waits_for_a_worker_is_not_read(bench: Bench) -> None:
    busy = bench.occupy()
    peer, connection = bench.connect()
    assert connection.state is State.PARKED
    peer.sendall(ONE)
    bench.until(lambda: connection.state is State.WAITING, "it waits for a worker")
    for _ in range(5):
        bench.host.turn()
    assert unread_bytes(connection.sock) == 16
    bench.host.workers.leave(busy)
    bench.until(lambda: holds(peer, 8), "it is answered")
    assert totals(peer, 1) == [1]


def test_a_peer_that_ends_is_answered_before(bench: Bench) -> None:
    peer, connection = bench.connect()
    peer.sendall(ONE)
    peer.shutdown(socket.SHUT_WR)
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert peer.recv(100) == (1).to_bytes(8)
    assert peer.recv(100) == b""
    assert bench.host.lingering == []
    assert bench.host.workers.taken == 0


def test_a_peer_that_reset_is_not_counted_and_the_worker_is_free(bench: Bench) -> None:
    peer, connection = bench.connect()
    peer.sendall(ONE)
    close_with_reset(peer)
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert bench.host.counter.total() == 0
    assert bench.host.workers.taken == 0
    assert bench.host.lingering == []


def test_a_peer_that_reset_while_it_was_parked_is_not_counted(bench: Bench) -> None:
    busy = bench.occupy()
    peer, connection = bench.connect()
    peer.sendall(ONE)
    close_with_reset(peer)
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert bench.host.counter.total() == 0
    bench.host.workers.leave(busy)
    assert bench.host.workers.taken == 0


def test_a_peer_that_reset_while_it_waited_is_not_counted_when_its_turn_comes(
    bench: Bench,
) -> None:
    busy = bench.occupy()
    peer, connection = bench.connect()
    peer.sendall(ONE)
    bench.until(lambda: connection.state is State.WAITING, "it waits for a worker")
    close_with_reset(peer)
    wait_until(lambda: is_gone(connection), "the reset has come")
    bench.host.workers.leave(busy)
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert bench.host.counter.total() == 0
    assert (bench.host.workers.taken, bench.host.workers.waiting) == (0, 0)


def test_a_peer_that_reset_while_its_replies_stay_leaves_no_deadline(bench: Bench) -> None:
    peer, connection = bench.connect()
    sent = fill(bench, peer, connection)
    peer.sendall(ONE + ONE[:7])
    close_with_reset(peer)
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert bench.host.counter.total() == sent
    assert not bench.host.write_deadlines.overdue(float("inf"))
    assert not bench.host.frame_deadlines.overdue(float("inf"))


def test_a_peer_that_reset_while_a_drain_reads_it_is_not_counted(bench: Bench) -> None:
    peer, connection = bench.connect()
    peer.sendall(ONE)
    wait_until(lambda: unread_bytes(connection.sock) == 16, "it has come")
    bench.host.is_draining = True
    connection.drain()
    close_with_reset(peer)
    wait_until(lambda: is_gone(connection), "the reset has come")
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert bench.host.counter.total() == 0
    assert bench.host.lingering == []


@pytest.mark.parametrize("before", [0, 1])
def test_one_that_is_refused_lingers_after_what_came_before_is_answered(
    bench: Bench, before: int
) -> None:
    peer, connection = bench.connect()
    peer.sendall(ONE * before + bytes(16) + ONE)
    bench.until(lambda: bench.host.lingering, "it lingers")
    assert bench.host.refusals == [Ending.CHECKSUM]
    assert connection.state is State.CLOSED
    assert bench.host.counter.total() == before
    assert holds(peer, 8 * before)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_amount_above_the_limit_is_refused_as_a_bad_checksum_is(engine: str) -> None:
    bench = Bench(engine, max_amount=9)
    try:
        peer, _ = bench.connect()
        peer.sendall(encode_frame(9) + encode_frame(10))
        bench.until(lambda: bench.host.lingering, "it lingers")
        assert bench.host.refusals == [Ending.LIMIT]
        assert totals(peer, 1) == [9]
        assert bench.host.counter.total() == 9
    finally:
        bench.close()


def test_one_that_lingers_is_nothing_of_the_engine_any_more(bench: Bench) -> None:
    peer, connection = bench.connect()
    peer.sendall(bytes(16))
    bench.until(lambda: bench.host.lingering, "it lingers")
    assert bench.host.lingering == [connection.sock]
    peer.sendall(ONE)
    wait_until(lambda: unread_bytes(connection.sock) == 16, "more has come")
    assert not select.select([bench.host.engine.fileno()], [], [], 0)[0]
    assert bench.host.engine.receive() is None


@pytest.mark.parametrize("kind", Kind)
def test_one_that_is_closed_decides_nothing(bench: Bench, kind: Kind) -> None:
    _, connection = bench.connect()
    connection.cut(Ending.CUT)
    connection.decide(kind, ONE)
    connection.end(Ending.GONE)
    connection.look()
    assert connection.state is State.CLOSED
    assert connection.ending is Ending.CUT
    assert (bench.host.refusals, bench.host.lingering, bench.host.failures) == ([], [], [])
    assert not bench.host.frame_deadlines.overdue(float("inf"))
    assert not bench.host.write_deadlines.overdue(float("inf"))


def test_the_deadline_of_a_frame_begins_with_its_first_byte_and_ends_with_its_last(
    bench: Bench,
) -> None:
    peer, connection = bench.connect()
    deadlines = bench.host.frame_deadlines
    peer.sendall(ONE[:1])
    bench.until(lambda: deadlines.overdue(float("inf")), "it is waited for")
    assert connection.overdue() == "a frame stopped after 1 bytes"
    peer.sendall(ONE[1:])
    bench.until(lambda: holds(peer, 8), "it is answered")
    assert not deadlines.overdue(float("inf"))


def test_a_last_look_takes_what_has_come_without_a_worker(bench: Bench) -> None:
    (_, _), (peer, connection) = bench.connect(), bench.connect()
    assert connection.state is State.PARKED
    peer.sendall(ONE)
    wait_until(lambda: unread_bytes(connection.sock) == 16, "it has come")
    connection.look()
    bench.host.decide()
    assert totals(peer, 1) == [1]
    assert connection.state is State.PARKED


def test_a_last_look_at_one_that_waits_leaves_it_its_place(bench: Bench) -> None:
    bench.occupy()
    peer, connection = bench.connect()
    peer.sendall(ONE)
    bench.until(lambda: connection.state is State.WAITING, "it waits for a worker")
    connection.look()
    bench.host.decide()
    assert totals(peer, 1) == [1]
    assert connection.state is State.WAITING
    assert bench.host.workers.waiting == 1


def test_a_last_look_at_one_that_reset_while_it_waited_counts_nothing(bench: Bench) -> None:
    bench.connect()
    peer, connection = bench.connect()
    connection.state = State.WAITING
    peer.sendall(ONE)
    close_with_reset(peer)
    hangs_up = select.poll()
    hangs_up.register(connection.fd, 0)
    assert hangs_up.poll(10_000), "the reset is there"
    connection.look()
    assert connection.state is State.CLOSED
    assert bench.host.counter.total() == 0


def test_a_last_look_does_not_read_one_whose_replies_stay(bench: Bench) -> None:
    peer, connection = bench.connect()
    sent = fill(bench, peer, connection)
    peer.sendall(ONE)
    wait_until(lambda: unread_bytes(connection.sock) == 16, "it has come")
    connection.look()
    assert bench.host.counter.total() == sent


def test_one_whose_replies_stay_is_not_read_and_holds_no_worker(bench: Bench) -> None:
    peer, connection = bench.connect()
    sent = fill(bench, peer, connection)
    assert connection.state is State.STALLED
    assert bench.host.workers.taken == 0
    peer.sendall(ONE)
    for _ in range(5):
        bench.host.turn()
    assert bench.host.slot[REQUESTS] == sent
    received: list[bytes] = []
    bench.until(lambda: take(peer, received) == 8 * (sent + 1), "everything is answered")
    assert list(decode_totals(b"".join(received))[0]) == list(range(1, sent + 2))
    assert bench.host.workers.taken == 1
    assert not bench.host.write_deadlines.overdue(float("inf"))


def test_a_peer_that_reads_a_little_has_its_whole_time_again(bench: Bench) -> None:
    peer, connection = bench.connect()
    connection.transmit(bytes(16 << 20))
    deadlines, before, moment = bench.host.write_deadlines, len(connection.unsent), time.monotonic()
    assert deadlines.overdue(moment + deadlines.timeout_s) == [connection]

    def is_less() -> bool:
        peer.recv(65536)
        return len(connection.unsent) < before

    bench.until(is_less, "the kernel takes more")
    assert connection.unsent
    assert deadlines.overdue(moment + deadlines.timeout_s) == []


def test_one_whose_peer_never_reads_is_dropped_when_it_is_judged(bench: Bench) -> None:
    peer, connection = bench.connect()
    fill(bench, peer, connection)
    assert bench.host.write_deadlines.overdue(float("inf")) == [connection]
    while connection.state is not State.CLOSED:
        connection.judge_unread()
    assert bench.host.refusals == [Ending.NOT_READING]
    assert not bench.host.write_deadlines.overdue(float("inf"))


def test_one_whose_peer_has_read_meanwhile_is_not_dropped_when_it_is_judged(bench: Bench) -> None:
    peer, connection = bench.connect()
    fill(bench, peer, connection)
    received: list[bytes] = []
    wait_until(lambda: bool(take(peer, received)) and has_room(connection), "there is room")
    connection.judge_unread()
    assert bench.host.refusals == []
    assert connection.state is not State.CLOSED


def test_one_that_reset_is_not_refused_when_it_is_judged(bench: Bench) -> None:
    peer, connection = bench.connect()
    fill(bench, peer, connection)
    close_with_reset(peer)
    wait_until(lambda: is_gone(connection), "the reset has come")
    connection.judge_unread()
    assert connection.state is State.CLOSED
    assert bench.host.refusals == []


def test_the_deadline_of_a_frame_stands_still_while_its_connection_is_not_read(
    bench: Bench,
) -> None:
    peer, connection = bench.connect()
    peer.sendall(ONE[:5])
    deadlines = bench.host.frame_deadlines
    bench.until(lambda: deadlines.overdue(float("inf")), "it is waited for")
    connection.stall()
    assert not deadlines.overdue(float("inf"))
    connection.proceed()
    assert deadlines.overdue(float("inf")) == [connection]
    assert connection.state is State.SERVED


def test_one_that_goes_on_asks_for_a_worker_as_a_new_one_does(bench: Bench) -> None:
    _, connection = bench.connect()
    connection.stall()
    busy = bench.occupy()
    connection.proceed()
    assert state_of(connection) is State.PARKED
    connection.stall()
    bench.host.workers.leave(busy)
    connection.proceed()
    assert state_of(connection) is State.SERVED


def test_one_that_waits_for_its_peer_and_for_the_store_goes_on_after_both(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(ONE)
    bench.until(lambda: held.kept, "it is asked for")
    first, held.kept = held.kept, []
    peer.sendall(ONE)
    bench.until(lambda: held.kept, "more is asked for")
    bench.host.engine.hold(connection.fd, True)  # as where the kernel takes nothing more
    first[0].answer(10)
    bench.host.decide()
    assert state_of(connection) is State.STALLED
    bench.until(lambda: not connection.unsent, "its replies are taken")
    assert state_of(connection) is State.STALLED
    held.answer()
    bench.host.decide()
    assert state_of(connection) is State.SERVED
    assert totals(peer, 2) == [11, 1]


def test_one_that_was_owed_very_much_goes_on_after_its_peer_has_room_for_that(
    bench: Bench,
) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    asked = 0
    while connection.state is not State.STALLED:
        peer.sendall(ONE * 1024)
        asked += 1024
        bench.until(partial(has_asked, held, asked), "they are asked for")
    bench.host.engine.hold(connection.fd, True)  # as where the kernel takes nothing more
    held.answer()
    bench.host.decide()
    assert state_of(connection) is State.STALLED
    bench.until(lambda: state_of(connection) is State.SERVED, "its replies are taken")
    assert totals(peer, asked) == list(range(1, asked + 1))


def test_one_that_ends_while_a_store_owes_it_is_answered_first(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(ONE + ONE[:7])
    peer.shutdown(socket.SHUT_WR)
    bench.until(lambda: connection.state is State.ENDING, "its end was seen")
    assert bench.host.workers.taken == 0
    assert not bench.host.frame_deadlines.overdue(float("inf"))
    held.answer()
    bench.host.decide()
    assert connection.state is State.CLOSED
    assert peer.recv(100) == (1).to_bytes(8)


def test_what_a_store_owes_to_one_that_reset_is_void(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(ONE)
    bench.until(lambda: held.kept, "it is asked for")
    close_with_reset(peer)
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert held.voids == 1
    assert sum(turn.amount for turn in held.kept) == 0


def test_what_a_store_owes_to_one_that_ended_and_reset_then_is_void(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(encode_frame(5) + bytes(16))
    bench.until(lambda: connection.state is State.ENDING, "it is refused")
    close_with_reset(peer)
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert held.voids == 1
    assert sum(turn.amount for turn in held.kept) == 0
    assert bench.host.lingering == []


def test_one_that_is_withdrawn_after_it_was_refused_ends_as_refused(bench: Bench) -> None:
    bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(ONE + bytes(16))
    bench.until(lambda: connection.state is State.ENDING, "it is refused")
    connection.withdraw()
    assert connection.ending is Ending.CHECKSUM
    assert bench.host.lingering == [connection.sock]
    assert holds(peer, 0)


def test_one_that_is_withdrawn_while_its_replies_stay_has_those_first(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(ONE)
    bench.until(lambda: held.kept, "it is asked for")
    bench.host.engine.hold(connection.fd, True)  # as where the kernel takes nothing more
    held.answer()
    bench.host.decide()
    connection.withdraw()
    assert connection.state is State.ENDING
    bench.until(lambda: bench.host.lingering, "it lingers")
    assert totals(peer, 1) == [1]


def test_one_that_is_withdrawn_lingers_unanswered(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(ONE)
    bench.until(lambda: held.kept, "it is asked for")
    connection.withdraw()
    assert bench.host.refusals == [Ending.STORE]
    assert bench.host.lingering
    held.answer()
    assert holds(peer, 0)


def test_one_that_is_owed_very_much_is_not_read_until_it_is_answered(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    sent = 0
    while connection.state is not State.STALLED:
        peer.sendall(ONE * 1024)
        sent += 1024
        bench.until(partial(has_asked, held, sent), "they are asked for")
    assert bench.host.workers.taken == 0
    peer.sendall(ONE)
    bench.host.turn()
    assert sum(turn.frames for turn in held.kept) == sent
    held.answer()
    bench.host.decide()
    assert bench.host.workers.taken == 1
    bench.until(lambda: sum(turn.frames for turn in held.kept) == 1, "it is read again")


@pytest.mark.parametrize("state", [State.SERVED, State.PARKED, State.WAITING])
def test_a_drain_reads_what_is_there_and_no_more_without_a_worker(
    bench: Bench, state: State
) -> None:
    if state is not State.SERVED:
        bench.connect()
    peer, connection = bench.connect()
    peer.sendall(ONE * 2 + ONE[:8])
    wait_until(lambda: unread_bytes(connection.sock) == 40, "it has come")
    connection.state = state
    bench.host.is_draining = True
    connection.drain()
    peer.sendall(ONE[8:])
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert totals(peer, 2) == [1, 2]
    assert bench.host.counter.total() == 2
    assert bench.host.lingering


def test_a_drain_ends_one_that_has_nothing_unread_at_once(bench: Bench) -> None:
    peer, connection = bench.connect()
    connection.drain()
    assert connection.state is State.CLOSED
    assert bench.host.lingering
    assert holds(peer, 0)


@pytest.mark.parametrize("frames", [0, 1])
def test_a_drain_ends_one_that_comes_from_the_backlog(bench: Bench, frames: int) -> None:
    peer, connection = bench.connect(is_admitted=False)
    peer.sendall(ONE * frames)
    wait_until(lambda: unread_bytes(connection.sock) == 16 * frames, "it has come")
    bench.host.is_draining = True
    connection.drain()
    bench.until(lambda: bench.host.lingering, "it lingers")
    assert bench.host.counter.total() == frames


def test_a_drain_leaves_one_alone_that_is_ending(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(ONE + bytes(16) + ONE)
    bench.until(lambda: connection.state is State.ENDING, "it is refused")
    peer.sendall(ONE)
    wait_until(lambda: unread_bytes(connection.sock) == 16, "more has come")
    bench.host.is_draining = True
    connection.drain()
    bench.host.turn()
    assert unread_bytes(connection.sock) == 16
    assert connection.ending is Ending.CHECKSUM
    held.answer()
    bench.host.decide()
    assert totals(peer, 1) == [1]
    assert bench.host.lingering


def test_a_drain_waits_for_the_store(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(ONE)
    bench.until(lambda: held.kept, "it is asked for")
    bench.host.is_draining = True
    connection.drain()
    assert connection.state is State.ENDING
    peer.sendall(ONE)
    wait_until(lambda: unread_bytes(connection.sock) == 16, "more has come")
    bench.host.turn()
    held.answer()
    bench.host.decide()
    assert totals(peer, 1) == [1]
    assert bench.host.lingering


def test_a_drain_waits_for_replies_that_stay_and_reads_then(bench: Bench) -> None:
    peer, connection = bench.connect()
    sent = fill(bench, peer, connection)
    peer.sendall(ONE)
    wait_until(lambda: unread_bytes(connection.sock) == 16, "it has come")
    bench.host.is_draining = True
    connection.drain()
    assert connection.state is State.STALLED
    bench.occupy()  # a drain asks for no worker
    received: list[bytes] = []
    bench.until(lambda: take(peer, received) == 8 * (sent + 1), "everything is answered")
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert bench.host.counter.total() == sent + 1


@pytest.mark.parametrize("make_counter", [MemoryCounter, make_shared_counter])
@pytest.mark.parametrize("end", ["a bad frame", "the stream's end", "a drain"])
def test_replies_that_stay_are_not_lost_with_the_end_that_came_with_their_frames(
    bench: Bench, make_counter: Callable[[], Counter], end: str
) -> None:
    host = bench.host
    host.counter = make_counter()
    host.additions = InMemory(host.counter, host.slot, host.engine)
    peer, connection = bench.connect()
    host.engine.hold(connection.fd, True)  # as where the kernel takes nothing more
    peer.sendall(ONE * 2 + (bytes(16) if end == "a bad frame" else b""))
    if end == "the stream's end":
        peer.shutdown(socket.SHUT_WR)
    wait_until(lambda: unread_bytes(connection.sock) >= 32, "it has come")
    if end == "a drain":
        host.is_draining = True
        connection.drain()
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert totals(peer, 2) == [1, 2]
    assert bool(host.lingering) == (end != "the stream's end")


def test_an_error_of_the_program_ends_its_connection_alone(bench: Bench) -> None:
    (_, first), (_, second) = bench.connect(), bench.connect()
    first.on_failed(b"Traceback")
    assert bench.host.failures == ["Traceback"]
    assert (first.state, second.state) == (State.CLOSED, State.PARKED)


def test_one_that_the_engine_cannot_take_leaves_nothing_behind(bench: Bench) -> None:
    _, connection = bench.connect(tls, is_admitted=False)
    bench.host.engine.close()  # so that nothing can be watched
    with pytest.raises((OSError, ValueError)):
        bench.host.workers.admit(connection)
    connection.abandon()
    assert connection.state is State.CLOSED
    assert bench.host.workers.taken == 0
    assert not bench.host.connections
    assert not bench.host.frame_deadlines.overdue(float("inf"))


def test_only_one_with_nothing_under_way_is_idle(bench: Bench) -> None:
    peer, connection = bench.connect()
    assert connection.idle_for_s() is not None
    peer.sendall(ONE)
    wait_until(lambda: unread_bytes(connection.sock) == 16, "it has come")
    assert connection.idle_for_s() is None
    bench.host.turn()
    connection.stall()
    assert connection.idle_for_s() is None


def test_an_ending_without_anybody_to_tell_is_not_replaced() -> None:
    for before, after in product(Ending, Ending):
        if before is not Ending.DRAIN and not before.lingers:
            assert not after.may_follow(before)
        if not after.lingers and before.lingers:
            assert after.may_follow(before)
    assert all(ending.may_follow(None) for ending in Ending)
    assert Ending.CHECKSUM.may_follow(Ending.DRAIN)
    assert not Ending.STORE.may_follow(Ending.CHECKSUM)
