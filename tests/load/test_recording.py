"""Recordings of several processes become one history, also where one of them ended half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from counter.load import run
from counter.load.recording import WRITE_BYTES, Recording, history
from counter.proof.history import UNDECIDED
from counter.results.result import PROCESS_DIED, Result
from protocol import Batch, UniformBatch, encode_total


@pytest.fixture
def make() -> Iterator[Callable[[int | None], Recording]]:
    """Makes recordings, and closes them at the end."""
    made: list[Recording] = []

    def one(amount: int | None) -> Recording:
        made.append(Recording(amount))
        return made[-1]

    yield one
    for recording in made:
        recording.close()


def replies(*totals: int) -> bytes:
    return b"".join(map(encode_total, totals))


def test_bursts_are_spread_out_and_keep_their_connection(
    make: Callable[[int | None], Recording],
) -> None:
    first, second = make(3), make(3)
    first.answered(1, 10, 20, 1, replies(3), None)
    first.answered(2, 11, 21, 2, replies(9, 12), None)
    second.answered(1, 12, 22, 1, replies(6), None)
    second.unanswered(30, UniformBatch(3, 2))
    for recording in (first, second):
        recording.write()
    whole = history([first, second], 0, 12)
    assert whole.sent.tolist() == [10, 11, 11, 12]
    assert whole.answered.tolist() == [20, 21, 21, 22]
    assert whole.amount.tolist() == [3, 3, 3, 3]
    assert whole.total.tolist() == [3, 9, 12, 6]
    assert (whole.lost_sent.tolist(), whole.lost_amount.tolist()) == ([30, 30], [3, 3])
    assert [whole.name(index) for index in range(4)] == [
        "connection 1 of process 1",
        "connection 2 of process 1",
        "connection 2 of process 1",
        "connection 1 of process 2",
    ]


def test_amounts_that_differ_are_recorded_each(make: Callable[[int | None], Recording]) -> None:
    recording = make(None)
    recording.answered(1, 1, 2, 3, replies(5, 5, 2**64 - 1), Batch([5, 0, 2**64 - 6]))
    recording.unanswered(7, Batch([8, 9]))
    recording.write()
    whole = history([recording], 0, None)
    assert whole.amount.tolist() == [5, 0, 2**64 - 6]
    assert whole.lost_amount.tolist() == [8, 9]


def test_a_process_that_ended_half_way_leaves_what_all_its_files_have(
    make: Callable[[int | None], Recording],
) -> None:
    recording = make(None)
    recording.answered(1, 1, 2, 1, replies(5), Batch([5]))
    recording.write()
    recording.answered(1, 3, 4, 2, replies(6, 7), Batch([1, 1]))
    recording.totals.write()
    recording.bursts.write()
    assert history([recording], 0, None).total.tolist() == [5], "two amounts were not written"


def test_nothing_recorded_is_an_empty_history(make: Callable[[int | None], Recording]) -> None:
    whole = history([make(1), make(1)], 5, 5)
    assert (len(whole.total), len(whole.lost_sent)) == (0, 0)


def test_what_is_recorded_does_not_pile_up_in_memory(
    make: Callable[[int | None], Recording],
) -> None:
    recording = make(1)
    for _ in range(WRITE_BYTES // 8000 + 1):
        recording.answered(1, 1, 2, 1000, bytes(8000), None)
    assert len(recording.totals.waiting) < WRITE_BYTES
    assert len(history([recording], 0, None).total) >= WRITE_BYTES // 8


@pytest.mark.parametrize(
    ("error", "reason"),
    [(KeyboardInterrupt, "interrupted before the end"), (MemoryError, "not enough memory")],
)
def test_a_proof_that_cannot_end_is_undecided(
    error: type[BaseException], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(run, "verify", fail)
    proof = run.prove(Result(total_before=0, total_after=0), [Recording(1)], shared=False)
    assert proof.word == UNDECIDED
    assert reason in proof.reason


def test_what_is_missing_is_named() -> None:
    result = Result(answered=12, total_before=0, total_after=10)
    proof = run.prove(result, [Recording(1)], shared=False)
    assert proof.word == UNDECIDED
    assert "10 answered additions could not be written" in proof.reason
    result.errors[PROCESS_DIED] = 1
    assert PROCESS_DIED in run.prove(result, [Recording(1)], shared=False).reason
