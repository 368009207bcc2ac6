"""Pages of sessions: what is packed is read again, and a record says what was applied."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counter.totals.session_page import PageError, Record, pack, unpack
from protocol import MAX_WINDOW, TOTAL_MASK

PROPERTY = settings(deadline=None, derandomize=True)

ids = st.integers(0, 2**128 - 1)
windows = st.integers(1, MAX_WINDOW)
words = st.integers(0, 2**64 - 1)

# Of each commit: the total before it, and of each read of the session the frames and their amount.
commits = st.lists(
    st.tuples(words, st.lists(st.tuples(st.integers(1, 50), words), max_size=4)), max_size=12
)


def played(session_id: int, window: int, history: list) -> tuple[Record, list]:  # type: ignore[type-arg]
    """A record after some commits, and all the runs that there were."""
    record, runs, applied = Record(session_id, window), [], 0
    for before, reads in history:
        offset = 0
        for frames, amount in reads:
            offset = (offset + amount) & TOTAL_MASK
            applied += frames
            record = record.advance(frames, offset)
            runs.append((applied, (before + offset) & TOTAL_MASK))
        record = record.settled(before)
    return record, runs


@PROPERTY
@given(ids, windows, commits)
def test_a_record_has_all_runs_that_its_client_may_lack(
    session_id: int,
    window: int,
    history: list,  # type: ignore[type-arg]
) -> None:
    record, runs = played(session_id, window, history)
    assert record.applied == (runs[-1][0] if runs else 0)
    for have in {record.applied, max(0, record.applied - 1), max(0, record.applied - window)}:
        assert record.runs_behind(have) == tuple(run for run in runs if run[0] > have)


@PROPERTY
@given(ids, st.integers(1, 5), commits)
def test_a_record_keeps_no_more_runs_than_its_window_has_frames(
    session_id: int,
    window: int,
    history: list,  # type: ignore[type-arg]
) -> None:
    record, _ = played(session_id, window, history)
    assert len(record.runs_behind(0)) <= window
    assert all(last > record.applied - window for last, _ in record.runs_behind(0))


def test_runs_take_as_few_bytes_as_their_largest_needs_and_few_again_later() -> None:
    record, total = Record(1, 4), 0
    sizes = []
    for rise in [1, 300, 70000, 1, 2**40, 1, 1, 1, 1, 1, 1, 1]:
        total += rise
        record = record.after(1, total)
        sizes.append(len(record.runs) // len(record.runs_behind(0)))
    assert sizes == [3, 3, 6, 6, 12, 12, 12, 3, 3, 3, 3, 3]


@PROPERTY
@given(st.lists(st.tuples(ids, windows, commits), max_size=5))
def test_what_is_packed_is_read_again(sessions: list) -> None:  # type: ignore[type-arg]
    records = [played(*session)[0] for session in sessions]
    assert unpack(pack(records)) == records


@PROPERTY
@given(st.lists(st.tuples(ids, windows, commits), max_size=5), st.lists(words, max_size=5), words)
def test_runs_of_the_commit_under_way_become_totals_by_the_total_before_it(
    sessions: list,  # type: ignore[type-arg]
    amounts: list[int],
    before: int,
) -> None:
    records = [played(*session)[0] for session in sessions]
    offsets = [total & TOTAL_MASK for total in accumulate(amounts)]
    under_way = [
        record.advance(1, offset) for record, offset in zip(records, offsets, strict=False)
    ]
    records[: len(under_way)] = under_way
    assert unpack(pack(records), before) == [record.settled(before) for record in records]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_page_that_is_cut_is_refused(count: int) -> None:
    records = [Record(i, 7).advance(2, 5).settled(3) for i in range(1, count + 1)]
    data = pack(records)
    length = len(data.rstrip(b"\0")) if count > 1 else len(data)
    for size in range(length):
        with pytest.raises(PageError):
            unpack(data[:size])


def test_a_page_of_another_layout_is_refused() -> None:
    with pytest.raises(PageError, match="layout 2, this release reads 1"):
        unpack(b"\x02" + pack([])[1:])


def test_a_page_that_grows_a_little_keeps_its_length() -> None:
    one, lengths = Record(1, 64), set()
    for total in range(64):
        one = one.after(1, total)
        lengths.add(len(pack([one, Record(2, 64)])))
    assert lengths == {1024}
