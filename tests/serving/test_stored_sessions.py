"""Sessions of a process whose total is in a store: who is answered when, and who leaves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counter.processes.slots import (
    SESSIONS_EVICTED,
    SESSIONS_OPENED,
    SESSIONS_REFUSED,
    SESSIONS_RESUMED,
    Slots,
)
from counter.serving import stored_sessions
from counter.serving.stored_sessions import StoredSessions
from counter.totals.session_store import Claim, Granted, Park, Wish
from protocol import Answer, Control, Hello, Refused, encode_total

LIMIT, TIMEOUT_S = 1000, 5.0
OPEN, RESUME = Hello(5, Control.OPEN, 8), Hello(5, Control.RESUME, 0)


class FakeMember:
    """A connection that leaves its sessions as it ends, as connections do; `said` is what it was
    told, and how it left."""

    def __init__(self, sessions: StoredSessions) -> None:
        self.sessions = sessions
        self.tag = 0
        self.said: list[object] = []
        self.is_open = True

    def greet(self, hello: Hello) -> FakeMember:
        self.sessions.greet(self, hello)
        return self

    def welcome(self, tag: int, answer: Answer) -> None:
        assert self.is_open
        self.tag = tag
        self.said.append(answer)

    def turn_away(self, answer: bytes) -> None:
        assert self.is_open
        self.said.append(answer)
        self.close()

    def give_way(self) -> None:
        self.said.append("gave way")
        self.close()

    def withdraw(self) -> None:
        self.said.append("withdrawn")
        self.close()

    def close(self) -> None:
        assert self.is_open
        self.is_open = False
        self.sessions.leave(self)


class FakeStore:
    """Takes what is wished as a commit does; knows which sessions are in the page, and which are
    parked, and holds the process to what it may wish."""

    def __init__(self, sessions: StoredSessions) -> None:
        self.sessions = sessions
        self.applied: dict[int, int] = {}
        self.page: set[int] = set()
        self.refuses: Refused | None = None
        self.evicts = 0

    def take(self, *tags: int) -> list[Wish]:
        """Begins a commit with a frame of each tag."""
        wishes = self.sessions.take()
        self.frames = [self.sessions.ids[tag] for tag in tags]
        return wishes

    def make(self, wishes: list[Wish]) -> None:
        """Makes the commit."""
        for session_id in self.frames:
            assert session_id in self.page, "a frame of a session that is not this writer's"
            self.applied[session_id] += 1
        for wish in wishes:
            if isinstance(wish, Claim):
                wish.outcome, wish.evicted = self.claim(wish), self.evicts
            elif isinstance(wish, Park):
                self.page.discard(wish.session_id)
            elif wish.session_id in self.page:
                self.page.discard(wish.session_id)
                wish.applied = self.applied.pop(wish.session_id)

    def claim(self, claim: Claim) -> Granted | Refused:
        session_id, hello = claim.session_id, claim.hello
        if self.refuses is not None:
            return self.refuses
        if hello.kind is Control.OPEN:
            self.applied.setdefault(session_id, 0)
        elif session_id not in self.applied:
            return Refused.UNKNOWN
        applied = self.applied[session_id]
        if hello.kind is Control.RESUME and hello.value > applied:
            del self.applied[session_id]
            self.page.discard(session_id)
            return Granted(applied, (), is_over=True)
        self.page.add(session_id)
        return Granted(applied, ())

    def commit(self, *tags: int) -> None:
        """A commit with a frame of each tag, from its beginning to its end."""
        self.make(self.take(*tags))
        self.sessions.finish()

    def lose(self, session_id: int) -> None:
        """Another writer has taken a session: the next commit finds it."""
        self.take()
        self.page.discard(session_id)
        self.sessions.put_back()
        self.sessions.lose({session_id})


@pytest.fixture
def sessions() -> StoredSessions:
    return StoredSessions(LIMIT, Slots(1)[0], TIMEOUT_S)


@pytest.fixture
def store(sessions: StoredSessions) -> Iterator[FakeStore]:
    store = FakeStore(sessions)
    yield store
    # Whatever happened: what is in the page and what has a connection are the same in the end.
    for _ in range(3):
        store.commit()
    assert set(sessions._members) == store.page
    assert set(sessions.ids.values()) == store.page
    assert not sessions._claims
    assert not len(sessions)
    assert sessions.is_active == bool(store.page)


@pytest.fixture
def member(sessions: StoredSessions, store: FakeStore) -> FakeMember:
    """One that has opened session 5."""
    member = FakeMember(sessions).greet(OPEN)
    store.commit()
    return member


@pytest.fixture
def other(sessions: StoredSessions) -> FakeMember:
    return FakeMember(sessions)


def test_a_hello_is_answered_when_its_session_is_in_the_store(
    sessions: StoredSessions, store: FakeStore, other: FakeMember
) -> None:
    other.greet(OPEN)
    wishes = store.take()
    store.make(wishes)
    assert other.said == []
    sessions.finish()
    assert other.said == [Answer(0, LIMIT)]
    assert other.tag
    assert sessions._slot[SESSIONS_OPENED] == 1


def test_who_resumes_takes_the_place_of_the_connection_before(
    sessions: StoredSessions, store: FakeStore, member: FakeMember, other: FakeMember
) -> None:
    old_tag = member.tag
    store.commit(old_tag)
    other.greet(RESUME)
    assert member.is_open  # until it is known that the hello is a good one
    store.commit(old_tag)
    assert member.said[-1] == "gave way"
    assert other.said == [Answer(2, LIMIT)]
    assert other.tag != old_tag
    assert sessions._slot[SESSIONS_RESUMED] == 1
    store.commit(other.tag)
    assert store.applied == {5: 3}


def test_a_hello_that_is_refused_leaves_the_connection_before(
    sessions: StoredSessions, store: FakeStore, member: FakeMember, other: FakeMember
) -> None:
    store.refuses = Refused.UNKNOWN
    other.greet(RESUME)
    store.commit()
    assert other.said == [encode_total(Refused.UNKNOWN.value)]
    assert sessions._slot[SESSIONS_REFUSED] == 1
    store.commit(member.tag)


def test_who_has_more_than_was_applied_is_told_so_and_the_connection_before_leaves(
    store: FakeStore, member: FakeMember, other: FakeMember
) -> None:
    other.greet(Hello(5, Control.RESUME, 3))
    store.commit()
    assert other.said == [Answer(0, LIMIT).encode()]
    assert member.said[-1] == "gave way"


def test_two_that_want_one_session_get_it_one_after_the_other(
    sessions: StoredSessions, store: FakeStore, other: FakeMember
) -> None:
    other.greet(OPEN)
    last = FakeMember(sessions).greet(RESUME)
    store.commit()
    assert other.said == [Answer(0, LIMIT), "gave way"]
    assert last.said == [Answer(0, LIMIT)]
    store.commit(last.tag)


def test_what_was_asked_with_a_tag_is_the_session_s_though_its_connection_is_gone(
    store: FakeStore, member: FakeMember
) -> None:
    tag = member.tag
    member.close()
    wishes = store.take(tag)  # its frames are under way as it leaves
    store.make(wishes)
    store.sessions.finish()
    assert store.applied == {5: 1}
    assert store.page == set()


def test_a_session_whose_connection_is_gone_is_parked_and_found_again(
    store: FakeStore, member: FakeMember, other: FakeMember
) -> None:
    store.commit(member.tag)
    member.close()
    store.commit()
    assert store.page == set()
    other.greet(RESUME)
    store.commit()
    assert other.said == [Answer(1, LIMIT)]


def test_it_is_not_parked_while_somebody_claims_it(
    store: FakeStore, member: FakeMember, other: FakeMember
) -> None:
    other.greet(RESUME)
    member.close()
    store.commit()
    store.commit(other.tag)
    assert store.applied == {5: 1}


@pytest.mark.parametrize("how", ["goes before", "goes while it is under way", "is refused"])
def test_it_is_parked_where_who_claimed_it_did_not_get_it(
    store: FakeStore, member: FakeMember, other: FakeMember, how: str
) -> None:
    other.greet(RESUME)
    member.close()
    if how == "goes before":
        other.close()
    if how == "is refused":
        store.refuses = Refused.UNKNOWN
    wishes = store.take()
    if how == "goes while it is under way":
        other.close()
    store.make(wishes)
    store.sessions.finish()
    store.commit()
    assert store.page == set()


def test_who_goes_before_its_claim_is_committed_claims_nothing(
    store: FakeStore, other: FakeMember
) -> None:
    other.greet(OPEN)
    other.close()
    store.commit()
    assert store.applied == {}


def test_an_end_is_answered_with_what_was_applied(store: FakeStore, member: FakeMember) -> None:
    store.sessions.end(member)
    store.commit(member.tag)
    assert member.said[1:] == [encode_total(1)]
    assert store.applied == {}


def test_who_goes_before_the_end_is_answered_has_ended_it(
    store: FakeStore, member: FakeMember
) -> None:
    store.sessions.end(member)
    wishes = store.take()
    member.close()
    store.make(wishes)
    store.sessions.finish()
    assert store.applied == {}


def test_an_end_of_the_connection_before_does_not_end_what_another_claims(
    store: FakeStore, member: FakeMember, other: FakeMember
) -> None:
    other.greet(RESUME)
    store.sessions.end(member)
    assert member.said[-1] == "gave way"
    store.commit()
    store.commit(other.tag)


def test_a_client_that_is_broken_ends_its_session_with_what_it_asked_before(
    store: FakeStore, member: FakeMember
) -> None:
    tag = member.tag
    store.sessions.abandon(member)
    member.close()
    store.commit(tag)
    assert store.applied == {}


def test_a_session_that_went_on_elsewhere_has_no_connection_here(
    store: FakeStore, member: FakeMember, sessions: StoredSessions
) -> None:
    kept = FakeMember(sessions).greet(Hello(6, Control.OPEN, 1))
    store.commit()
    store.lose(5)
    assert member.said[-1] == "gave way"
    assert kept.is_open
    store.commit(kept.tag)


def test_a_session_that_is_lost_can_be_claimed_in_the_same_commit(
    store: FakeStore, member: FakeMember, other: FakeMember
) -> None:
    other.greet(RESUME)
    store.lose(5)
    assert member.said[-1] == "gave way"
    store.commit()
    store.commit(other.tag)


def test_an_end_that_waits_as_the_session_is_lost_ends_nothing(
    store: FakeStore, member: FakeMember
) -> None:
    store.sessions.end(member)
    store.lose(5)
    assert member.said[-1] == "gave way"
    store.commit()
    assert store.applied == {5: 0}


def test_what_was_not_committed_is_wished_again_in_its_order(
    store: FakeStore, member: FakeMember, other: FakeMember
) -> None:
    member.close()
    store.take()
    other.greet(RESUME)
    store.sessions.put_back()
    wishes = store.take()
    assert [type(wish) for wish in wishes] == [Park, Claim]
    store.make(wishes)
    store.sessions.finish()
    assert other.said == [Answer(0, LIMIT)]


def test_where_nobody_knows_what_became_of_a_commit_who_waits_is_withdrawn(
    store: FakeStore, sessions: StoredSessions, member: FakeMember, other: FakeMember
) -> None:
    other.greet(Hello(6, Control.OPEN, 1))
    sessions.end(member)
    store.make(store.take())
    sessions.fail()
    assert other.said == ["withdrawn"]
    assert member.said[-1] == "withdrawn"
    store.commit()
    assert store.applied == {6: 0}


def test_what_is_wished_again_stands_before_a_claim_that_came_since(
    store: FakeStore, sessions: StoredSessions, member: FakeMember, other: FakeMember
) -> None:
    member.close()
    store.take()
    other.greet(RESUME)
    sessions.fail()
    store.commit()
    assert other.said == [Answer(0, LIMIT)]
    store.commit(other.tag)


def test_who_waits_too_long_is_withdrawn(
    store: FakeStore, other: FakeMember, sessions: StoredSessions
) -> None:
    other.greet(OPEN)
    sessions.sweep(time.monotonic())
    assert other.is_open
    sessions.sweep(time.monotonic() + TIMEOUT_S)
    assert other.said == ["withdrawn"]
    late = FakeMember(sessions).greet(OPEN)
    wishes = store.take()
    sessions.sweep(time.monotonic() + TIMEOUT_S)
    assert late.said == ["withdrawn"]
    store.make(wishes)
    sessions.finish()
    store.commit()
    assert store.page == set()


def test_who_gave_way_to_others_is_counted(store: FakeStore, other: FakeMember) -> None:
    store.evicts = 2
    other.greet(OPEN)
    store.commit()
    assert store.sessions._slot[SESSIONS_EVICTED] == 2


def test_a_tag_is_not_given_twice_while_it_means_a_session(
    store: FakeStore, sessions: StoredSessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_sessions, "_MOST_TAGS", 4)
    numbers = count(1)
    members = [FakeMember(sessions).greet(Hello(next(numbers), Control.OPEN, 1)) for _ in range(3)]
    store.commit()
    kept = members[1]
    for _ in range(9):
        one = FakeMember(sessions).greet(Hello(next(numbers), Control.OPEN, 1))
        store.commit()
        assert one.tag not in {members[0].tag, kept.tag, members[2].tag}
        one.close()
        store.commit()


def test_a_process_that_ends_answers_nobody(
    store: FakeStore, other: FakeMember, sessions: StoredSessions
) -> None:
    other.greet(OPEN)
    sessions.close()
    store.commit()
    assert other.said == []


class Crowd:
    """Members of two sessions that do whatever they may at any moment, commits that fail in every
    way, and another writer that takes sessions away."""

    def __init__(self) -> None:
        self.sessions = StoredSessions(LIMIT, Slots(1)[0], TIMEOUT_S)
        self.store = FakeStore(self.sessions)
        self.members: list[FakeMember] = []
        self.asked: list[tuple[FakeMember, int]] = []  # frames that wait, by their tags
        self.wishes: list[Wish] | None = None  # of the commit under way
        self.frames: list[tuple[FakeMember, int]] = []  # that are in it

    def do(self, step: int, whom: int) -> None:
        """One of the things that can happen, if it can now."""
        open_members = [member for member in self.members if member.is_open]
        welcomed = [member for member in open_members if member.tag]
        waiting = [*self.sessions._asking]
        free = [member for member in welcomed if member not in waiting]
        if step == 0 and len(open_members) < 6:
            kind = Control.RESUME if whom & 2 else Control.OPEN
            member = FakeMember(self.sessions)
            self.members.append(member.greet(Hello(5 + whom % 2, kind, 1 if whom & 1 else 0)))
        elif step == 1 and open_members:
            open_members[whom % len(open_members)].close()
        elif step == 2 and free:
            member = free[whom % len(free)]
            self.asked.append((member, member.tag))
        elif step == 3 and free:
            self.sessions.end(free[whom % len(free)])
        elif step == 4 and free:
            member = free[whom % len(free)]
            self.sessions.abandon(member)
            member.close()
        elif step == 5 and self.wishes is None:
            self.begin()
        elif step == 6 and self.wishes is not None:
            self.end_commit(whom)
        elif step == 7:
            self.store.refuses = None if whom & 1 else Refused.NO_ROOM

    def begin(self) -> None:
        """Begins a commit, after what is void was taken out of what waits; some may end while it
        begins."""
        self.asked = [(member, tag) for member, tag in self.asked if member.is_open]
        self.frames, self.asked = self.asked, []
        self.wishes = self.store.take(*(tag for _, tag in self.frames))

    def end_commit(self, how: int) -> None:
        """The commit is made, is not made, is fenced, or nobody knows."""
        assert self.wishes is not None
        wishes, self.wishes = self.wishes, None
        if how % 8 == 7:
            self.sessions.put_back()
            self.asked[:0] = self.frames
        elif how % 8 == 6 and self.store.page:
            lost = min(self.store.page)
            self.store.page.discard(lost)
            self.sessions.put_back()
            self.asked[:0] = self.frames
            self.sessions.lose({lost})
        elif how % 8 == 5:
            if how & 8:
                self.store.make(wishes)
            for member, _ in self.frames:
                if member.is_open:
                    member.withdraw()
            self.sessions.fail()
        else:
            self.store.make(wishes)
            self.sessions.finish()


@settings(deadline=None, derandomize=True, max_examples=2000)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 15)), max_size=60))
def test_whatever_happens_frames_are_of_sessions_that_are_there(
    steps: list[tuple[int, int]],
) -> None:
    crowd = Crowd()
    for step, whom in steps:
        crowd.do(step, whom)
    for _ in range(4):
        if crowd.wishes is not None:
            crowd.end_commit(0)
        crowd.begin()
    crowd.end_commit(0)
    sessions = crowd.sessions
    assert set(sessions._members) == crowd.store.page == set(sessions.ids.values())
    assert not sessions._claims
    assert not sessions._orphans
    assert not sessions._asking
    holders = [member for member in crowd.members if member.is_open]
    assert sorted(map(id, holders)) == sorted(map(id, sessions._members.values()))
