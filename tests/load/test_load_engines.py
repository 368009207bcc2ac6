"""The contract of a load engine: what both do alike, whatever the peer does.

Each connection is first answered rightly, so that the compiled engine has it on loan when it comes
to what the test is about.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic_ns as clock
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from counter.load.compiled import CompiledEngine
from counter.load.meter import NEVER
from counter.load.recording import Recording
from counter.options.values import AmountRange
from counter.results.histogram import Histogram
from counter.system.sockets import unread_bytes
from kit.engine import compiled
from kit.harness import receive_exactly, wait_until
from kit.played import ENGINES, Play, engine, playing
from protocol import REPLY_SIZE, REQUEST_SIZE, encode_frame, encode_total

__all__ = ["engine"]

HALF = 2**63
PROPERTY = settings(deadline=None, derandomize=True, max_examples=250)


def lent(play: Play, index: int = 0) -> bool:
    """Whether C has a connection on loan."""
    engine = play.process.engine
    if not isinstance(engine, CompiledEngine):
        return False
    return bool(engine._states[play.sock(index).fileno()].bursts)


def reset(peer: socket.socket) -> None:
    """Ends a connection with RST."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


@contextmanager
def steady(engine: str, **options: Any) -> Iterator[Play]:
    """One connection that has been answered rightly, and is on loan where there is a lender."""
    with playing(engine, **options) as play:
        for _ in range(2):
            play.exchange(options.get("pipeline", 1))
        assert lent(play) == (engine == "compiled")
        yield play


# What needs no decision


@pytest.mark.parametrize("pipeline", [1, 2, 16, 700])
def test_replies_are_counted_and_measured_and_as_many_frames_are_sent_again(
    engine: str, pipeline: int
) -> None:
    with steady(engine, pipeline=pipeline) as play:
        for _ in range(3):
            play.answer(pipeline)
        result = play.process.result
        assert (result.sent, result.answered) == (6 * pipeline, 5 * pipeline)
        assert result.answered_sum == 5 * pipeline
        assert len(result.latencies) == 5 * pipeline
        assert result.latencies.sum_ns >= result.latencies.max_ns > 0
        assert (result.wrong, result.errors, result.rises_checked) == (0, {}, True)
        asked = receive_exactly(play.peers[0], 6 * pipeline * REQUEST_SIZE)
        assert asked == encode_frame(1) * 6 * pipeline
        assert play.asked() == b""


@pytest.mark.parametrize("pipeline", [1, 4])
def test_what_needs_no_decision_is_done_in_c(
    pipeline: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled()
    decided: list[object] = []
    with steady("compiled", pipeline=pipeline) as play:
        monkeypatch.setattr(play.process.engine, "_decide", decided.append)
        for _ in range(3):
            play.answer(pipeline)
        assert play.process.result.answered == 5 * pipeline
        assert decided == []
        play.say(play.replies(1)[:-1])
        assert len(decided) == 1


def test_some_of_the_replies_that_are_due_are_taken_and_the_rest_waits(engine: str) -> None:
    with steady(engine, pipeline=5) as play:
        before = play.process.result.answered
        for count in (2, 1, 4, 5, 3):
            play.answer(count)
        assert play.process.result.answered == before + 15
        assert lent(play) == (engine == "compiled"), "bursts that were cut need no decision"
        play.process.stop()
        play.answer(5)
        assert play.process.result.errors == {}
        assert not play.connections[0].is_waiting


def test_more_bursts_than_are_lent_are_served_all_the_same(engine: str) -> None:
    with steady(engine, pipeline=60) as play:
        for _ in range(3 * 60):
            play.answer(1)
        play.answer(60)
        result = play.process.result
        assert (result.sent, result.answered) == (420, 360)
        assert (result.wrong, result.errors) == (0, {})
        assert lent(play) == (engine == "compiled"), "they are one burst again"


def test_all_connections_are_served_whatever_their_descriptors(engine: str) -> None:
    count = 150
    with playing(engine, connections=count) as play:
        for _ in range(3):
            for index in range(count):
                play.peers[index].sendall(play.replies(1))
                play.arrived(index)
            play.turn()
            while play.process.result.answered % count:
                play.turn()
        assert play.process.result.sent == 4 * count
        assert all(lent(play, index) == (engine == "compiled") for index in range(count))


def test_a_turn_ends_though_there_is_more_to_take(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's other work, such as the end of the run, must not wait."""
    monkeypatch.setattr("counter.load.compiled.LONGEST_NS", 0)
    reads = 3
    count = reads * 65536 // REPLY_SIZE
    with playing(engine, pipeline=count, receive_bytes=2**20) as play:
        for _ in range(2):
            receive_exactly(play.peers[0], count * REQUEST_SIZE)
            play.exchange(count)
        play.peers[0].sendall(play.replies(count))
        sock = play.sock()
        wait_until(lambda: unread_bytes(sock) == count * REPLY_SIZE, "every reply has come")
        for read in range(reads):
            assert play.process.result.answered == 2 * count + read * count // reads
            play.turn()


def test_only_what_was_sent_in_the_measured_part_is_measured(engine: str) -> None:
    with playing(engine) as play:
        play.process.meter.measure_from_ns = NEVER
        for _ in range(3):
            play.answer()
        assert (play.process.result.answered, len(play.process.result.latencies)) == (3, 0)
    with steady(engine) as play:
        assert len(play.process.result.latencies) == 2


def test_a_total_of_64_bits_may_pass_zero(engine: str) -> None:
    with playing(engine, pipeline=3) as play:
        play.total = 2**64 - 8
        for _ in range(4):
            play.answer(3)
        assert (play.process.result.wrong, play.process.result.answered) == (0, 12)


@pytest.mark.parametrize("amount", [0, 7, 2**40])
def test_any_one_amount_is_sent_and_held_against_its_replies(engine: str, amount: int) -> None:
    with steady(engine, amount=AmountRange(amount, amount), pipeline=2) as play:
        play.answer(2)
        assert play.process.result.answered_sum == 6 * amount
        assert play.process.result.wrong == 0
        asked = receive_exactly(play.peers[0], 8 * REQUEST_SIZE)
        assert asked == encode_frame(amount) * 8
        if amount:
            play.say(encode_total(play.total + amount - 1))
            assert play.process.result.wrong == 1


# What is wrong, or ends


@pytest.mark.parametrize(
    ("after", "example"),
    [
        (0, "{last} after {last}, where 1 was added"),
        (-1, "{total} after {last}, where 1 was added"),
        (HALF + 1, "{total} after {last}, where 1 was added"),
    ],
)
@pytest.mark.parametrize("right", [0, 3])
def test_a_total_that_cannot_be_right_is_told(
    engine: str, after: int, example: str, right: int
) -> None:
    with steady(engine, pipeline=4) as play:
        replies = play.replies(right)
        last = play.total
        play.say(replies + encode_total(last + after))
        result = play.process.result
        assert result.wrong == 1
        assert result.wrong_examples == [example.format(last=last, total=last + after)]
        assert (result.answered, result.errors) == (8 + right + 1, {})


def test_what_others_added_meanwhile_is_no_wrong_total(engine: str) -> None:
    with steady(engine, pipeline=4) as play:
        for others in (1, 1000, HALF - 10**6):
            play.total += others
            play.answer(4)
        assert (play.process.result.wrong, play.process.result.answered) == (0, 20)


def is_reset(peer: socket.socket) -> bool:
    """How a stream ends: by a reset, or as it should."""
    try:
        while peer.recv(2**20):
            pass
    except ConnectionResetError:
        return True
    return False


def test_a_connection_that_gives_up_on_a_reply_resets(engine: str) -> None:
    with steady(engine, connections=2) as play:
        late = clock()
        play.process.engine.recall(late)
        play.connections[0].judge(late)
        assert play.process.result.errors == {"timeout": 1}
        assert is_reset(play.peers[0])
        play.process.close()
        assert is_reset(play.peers[1])


def test_replies_that_nothing_asked_for_are_wrong_and_end_the_connection(engine: str) -> None:
    with steady(engine, pipeline=2) as play:
        play.say(play.replies(5))
        result = play.process.result
        assert result.wrong_examples == ["3 replies that nothing asked for"]
        assert result.answered == 4 + 2
        assert result.errors == {"connection closed": 1}
        assert not play.connections[0].is_open


@pytest.mark.parametrize("pipeline", [1, 3])
def test_replies_may_be_cut_at_any_byte(engine: str, pipeline: int) -> None:
    for at in range(1, pipeline * REPLY_SIZE):
        with steady(engine, pipeline=pipeline) as play:
            before, replies = play.process.result.answered, play.replies(pipeline)
            play.say(replies[:at])
            assert play.process.result.answered == before + at // REPLY_SIZE
            play.say(replies[at:])
            assert play.process.result.answered == before + pipeline
            play.answer(pipeline)
            assert (play.process.result.wrong, play.process.result.errors) == (0, {})
            assert lent(play) == (engine == "compiled")


@pytest.mark.parametrize("pipeline", [1, 3])
def test_the_end_of_a_connection_leaves_what_is_in_flight_unknown(
    engine: str, pipeline: int
) -> None:
    with steady(engine, pipeline=pipeline) as play:
        play.peers[0].shutdown(socket.SHUT_WR)
        play.arrived()
        play.turn()
        result = play.process.result
        assert result.errors == {"connection closed": 1}
        assert (result.unknown, result.unknown_sum) == (pipeline, pipeline)
        assert (result.sent, result.answered) == (3 * pipeline, 2 * pipeline)
        assert play.connections[0]._last_total == play.total, "the next one is held against it"


def test_a_reset_is_told_from_an_end(engine: str) -> None:
    with steady(engine) as play:
        reset(play.peers[0])
        play.arrived()
        play.turn()
        assert play.process.result.errors == {"connection reset by peer": 1}
        assert play.process.result.unknown == 1


def test_replies_with_the_end_behind_them_count(engine: str) -> None:
    with steady(engine, pipeline=3) as play:
        play.peers[0].sendall(play.replies(3))
        play.peers[0].shutdown(socket.SHUT_WR)
        play.turn_until(lambda: not play.connections[0].is_open, "the end was found")
        result = play.process.result
        assert (result.answered, result.unknown, result.sent) == (9, 3, 12)


def test_a_frame_that_cannot_be_sent_any_more_is_sent_and_unknown(engine: str) -> None:
    with steady(engine) as play:
        play.sock().shutdown(socket.SHUT_WR)
        play.answer()
        result = play.process.result
        assert result.errors == {"broken pipe": 1}
        assert (result.sent, result.answered, result.unknown) == (4, 3, 1)


def test_the_others_of_a_turn_are_served_whatever_comes_of_one(engine: str) -> None:
    with playing(engine, connections=4) as play:
        for _ in range(2):
            for index in range(4):
                play.answer(1, index)
        wrong = f"0 after {play.total}, where 1 was added"
        play.peers[3].sendall(encode_total(0))
        reset(play.peers[1])
        for index in (0, 2):
            play.peers[index].sendall(play.replies(1))
        for index in range(4):
            play.arrived(index)
        play.turn_until(lambda: play.process.result.answered == 11, "all are served")
        assert play.process.result.errors == {"connection reset by peer": 1}
        assert play.process.result.wrong_examples == [wrong]
        assert play.process.result.sent == 15
        for index in (0, 2):
            play.answer(1, index)
        assert play.process.result.answered == 13


# What the kernel refuses, and who is late


@pytest.mark.parametrize("pipeline", [1, 1000])
def test_a_server_that_answers_before_it_reads_gets_every_frame_whole(
    engine: str, pipeline: int
) -> None:
    with steady(engine, pipeline=pipeline, buffer_bytes=16384) as play:
        connection, received, answered = play.connections[0], b"", 2 * pipeline
        while len(connection._unsent) < 10 * REQUEST_SIZE:
            play.exchange(pipeline)
            answered += pipeline
            assert play.process.result.errors == {}, "a full socket is no lost connection"
        while len(received) < (answered + pipeline) * REQUEST_SIZE:
            received += play.asked()
            play.turn()
        assert received == encode_frame(1) * (answered + pipeline)
        assert play.process.result.sent == answered + pipeline
        play.exchange(pipeline)
        assert lent(play) == (engine == "compiled"), "it waits for nothing but replies again"


@pytest.mark.parametrize("answers", ["none", "all", "the end"])
def test_who_is_overdue_is_read_once_more_before_he_is_given_up(engine: str, answers: str) -> None:
    with steady(engine, pipeline=3) as play:
        process, late = play.process, clock()
        if answers == "all":
            play.peers[0].sendall(play.replies(3))
            play.arrived()
        elif answers == "the end":
            play.peers[0].shutdown(socket.SHUT_WR)
            play.arrived()
        process.engine.recall(late)
        assert play.connections[0].is_overdue(late)
        play.connections[0].judge(late)
        expected = {"none": {"timeout": 1}, "all": {}, "the end": {"connection closed": 1}}
        assert process.result.errors == expected[answers]
        assert process.result.answered == (9 if answers == "all" else 6)


def test_a_connection_is_read_to_its_end_before_it_is_given_up(engine: str) -> None:
    """The replies to a deep pipeline are more than one read, and the oldest is the last of them."""
    count = 10_000
    with steady(engine, pipeline=count, receive_bytes=4 * count * REPLY_SIZE) as play:
        for _ in range(2):
            receive_exactly(play.peers[0], count * REQUEST_SIZE)
        late = clock()
        play.peers[0].sendall(play.replies(count))
        sock = play.sock()
        wait_until(lambda: unread_bytes(sock) == count * REPLY_SIZE, "every reply has come")
        play.process.sending = False
        play.process.engine.recall(late)
        play.connections[0].judge(late)
        assert play.process.result.errors == {}
        assert play.process.result.answered == 3 * count


def test_who_is_not_overdue_stays_as_he_is(engine: str) -> None:
    with steady(engine) as play:
        play.process.engine.recall(clock() - 10**9)
        assert lent(play) == (engine == "compiled")
        assert not play.connections[0].is_overdue(clock() - 10**9)


# How a run ends


def test_a_run_of_so_many_requests_sends_just_so_many(engine: str) -> None:
    count = 6
    with playing(engine, requests=83, connections=count, pipeline=4) as play:
        asked = 0
        while any(connection.is_waiting for connection in play.connections) or play.process.sending:
            for index in range(count):
                frames = len(play.asked(index)) // REQUEST_SIZE
                asked += frames
                play.peers[index].sendall(play.replies(frames))
                if frames:
                    play.arrived(index)
            play.turn()
        assert asked == 83
        assert (play.process.result.sent, play.process.result.answered) == (83, 83)
        assert len(play.process.result.latencies) == 83
        assert play.process.result.wrong == 0


def test_after_the_end_replies_are_taken_and_nothing_is_sent(engine: str) -> None:
    with steady(engine, pipeline=3) as play:
        receive_exactly(play.peers[0], 9 * REQUEST_SIZE)
        play.process.stop()
        assert play.connections[0].is_waiting
        play.answer(1)
        play.answer(2)
        assert not play.connections[0].is_waiting
        assert (play.process.result.sent, play.process.result.answered) == (9, 9)
        assert play.asked() == b""


def test_what_is_in_flight_at_a_cut_is_unknown(engine: str) -> None:
    with steady(engine, pipeline=3) as play:
        play.process.stop()
        play.process.close()
        assert play.process.result.unknown == 3


def test_beyond_sums_of_2_63_nothing_is_claimed(engine: str) -> None:
    with playing(engine, amount=AmountRange(2**59, 2**59), pipeline=2) as play:
        for _ in range(8):
            assert play.process.result.rises_checked
            play.answer(2)
        play.answer(2)
        play.say(encode_total(0))
        result = play.process.result
        assert (result.answered, result.sent, result.wrong) == (19, 21, 0)
        assert not result.rises_checked
        assert result.answered_sum == 19 * 2**59


# What is recorded


@contextmanager
def recorded(amount: int = 1) -> Iterator[Recording]:
    recording = Recording(amount)
    try:
        yield recording
    finally:
        recording.close()


def test_what_is_recorded_is_what_was_answered_and_when(engine: str) -> None:
    with recorded() as recording:
        asked_at: list[int] = []
        with playing(engine, connections=2, pipeline=3, recording=recording) as play:
            for count, bursts in ((3, 1), (3, 1), (2, 1), (3, 2), (3, 1)):
                for index in range(2):
                    asked_at += [clock()] * bursts
                    play.answer(count, index)
        recording.write()
        tape = recording.bursts.read("=u8").reshape(-1, 4)
        assert recording.totals.read(">u8").tolist() == list(range(1, 29))
        assert tape[:, 2:].tolist() == [
            *([1, 3], [2, 3], [1, 3], [2, 3], [1, 2], [2, 2]),
            *([1, 1], [1, 2], [2, 1], [2, 2], [1, 3], [2, 3]),
        ]
        assert (tape[:, 0] < asked_at).all()
        assert (tape[:, 1] > asked_at).all()
        assert recording.lost.read("=u8")[1::2].tolist() == [1] * 6


def test_whatever_comes_at_once_is_recorded(engine: str) -> None:
    """More than what one call of C has room for."""
    count, connections = 8192, 10
    with recorded() as recording:
        with playing(
            engine,
            connections=connections,
            pipeline=count,
            recording=recording,
            receive_bytes=4 * count * REPLY_SIZE,
        ) as play:
            for index in range(connections):
                for _ in range(2):
                    receive_exactly(play.peers[index], count * REQUEST_SIZE)
                    play.exchange(count, index)
            before = play.process.result.answered
            for index in range(connections):
                sock = play.sock(index)
                play.peers[index].sendall(play.replies(count))
                wait_until(lambda: unread_bytes(sock) == count * REPLY_SIZE, "all have come")  # noqa: B023
                assert lent(play, index) == (engine == "compiled")
            answered = before + connections * count
            play.turn_until(lambda: play.process.result.answered == answered, "all are taken")
        recording.write()
        totals = recording.totals.read(">u8").tolist()
        assert sorted(totals) == list(range(1, answered + 1))
        at = 0
        for burst in recording.bursts.read("=u8").reshape(-1, 4)[:, 3].tolist():
            assert totals[at : at + burst] == list(range(totals[at], totals[at] + burst))
            at += burst
        assert at == answered


# Both engines, whatever comes

Step = tuple[str, int, int]  # what, on which connection, how much


@st.composite
def scripts(draw: st.DrawFn) -> list[Step]:
    whats = ["answer"] * 6 + ["cut", "cut", "wrong", "extra", "end", "reset", "recall", "stop"]
    step = st.tuples(st.sampled_from(whats), st.integers(0, 1), st.integers(0, 40))
    return draw(st.lists(step, max_size=25))


def run_script(engine: str, pipeline: int, script: list[Step]) -> list[object]:
    """Plays a script; gives back all that can be seen of it."""
    ends = {"end": lambda peer: peer.shutdown(socket.SHUT_WR), "reset": reset}
    with (
        recorded() as recording,
        playing(engine, connections=2, pipeline=pipeline, recording=recording) as play,
    ):
        due, is_stopped = [pipeline, pipeline], False
        for what, index, number in script:
            count = min(due[index], 1 + number % (pipeline + 1))
            if not play.connections[index].is_open:
                continue
            if what in ("answer", "cut", "wrong") and count:
                replies = play.replies(count)
                if what == "wrong":
                    replies = replies[:-REPLY_SIZE] + encode_total(max(0, play.total - number))
                if what == "cut" and (at := number % len(replies)):
                    play.say(replies[:at], index)
                    replies = replies[at:]
                play.say(replies, index)
                due[index] -= count if is_stopped else 0
            elif what == "extra":
                # As many as one read of a lone reply's size finds.
                play.say(play.replies(due[index] + 1 + number % 5), index)
            elif what in ("end", "reset"):
                ends[what](play.peers[index])
                play.arrived(index)
                play.turn()
            elif what == "recall":
                play.process.engine.recall(NEVER)
            elif what == "stop" and number > 30:
                play.process.stop()
                is_stopped = True
        asked = [play.asked(index) for index in range(2) if play.connections[index].is_open]
        play.process.stop()
        play.process.close()
        recording.write()
        tapes = [
            recording.totals.read(">u8").tolist(),
            recording.bursts.read("=u8").reshape(-1, 4)[:, 2:].tolist(),
            recording.lost.read("=u8")[1::2].tolist(),
        ]
        seen = vars(play.process.result).copy()
    latencies = seen.pop("latencies")
    del seen["raw_latencies"]
    return [seen, len(latencies), asked, tapes]


@PROPERTY
@given(st.sampled_from([1, 2, 5, 40]), scripts())
@example(1, [("answer", 0, 0), ("answer", 0, 0), ("wrong", 0, 3), ("answer", 0, 0)])
@example(5, [("answer", 0, 4), ("answer", 0, 4), ("cut", 0, 13), ("answer", 0, 1)])
@example(2, [("answer", 1, 1), ("answer", 1, 1), ("stop", 0, 40), ("answer", 1, 0)])
def test_both_engines_see_the_same(pipeline: int, script: list[Step]) -> None:
    compiled()
    plain, other = (run_script(name, pipeline, script) for name in ENGINES)
    assert other == plain


@PROPERTY
@given(st.integers(0, 2**43))
@example(0)
@example(255)
@example(256)
@example(2**42 - 1)
@example(2**42)
def test_both_engines_count_a_time_into_the_same_bucket(took_ns: int) -> None:
    compiled()
    with steady("compiled", pipeline=3) as play:
        histogram = Histogram()
        histogram.merge(play.process.result.latencies)
        state = play.process.engine._states[play.sock().fileno()]  # type: ignore[attr-defined]
        state.burst[0].sent_ns = clock() - took_ns
        play.process.meter.measure_from_ns = -(2**62)
        play.process.engine._load.measure_from_ns = -(2**62)  # type: ignore[attr-defined]
        before_ns = histogram.sum_ns
        play.answer(3)
        result = play.process.result
        histogram.count((result.latencies.sum_ns - before_ns) // 3, 3)
        assert list(result.latencies.counts) == list(histogram.counts)
        assert result.latencies.sum_ns == histogram.sum_ns
        assert result.latencies.max_ns == histogram.max_ns
