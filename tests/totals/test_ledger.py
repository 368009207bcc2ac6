"""The addition that a crash leaves decidable: every interleaving of its steps in a model, and the
real one killed at each of its stores."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

from counter.totals.ledger import OwnLedger, SharedLedger, unavailable
from counter.totals.memory import AtomicCounter, LockedCounter, MemoryCounter, make_shared_counter
from counter.totals.sessions import Claimed, SessionTable
from counter.turn.engine import Engine
from kit.engine import ENGINES, make_engine
from kit.faults import LONG
from kit.harness import wait_until
from protocol import MAX_AMOUNT, Control, Hello

MODULUS: Final = 4


@dataclass(frozen=True)
class Case:
    """What is explored: what each process adds, one after the other, the plain additions beside
    them, how many crash at most, and what is wrong on purpose.

    Amounts that bring the total back to what it was leave the tag alone to tell two states apart.
    """

    adds: tuple[tuple[int, ...], ...] = ((1, 3), (3, 1))
    plain: tuple[int, ...] = (1, 3)
    crashes: int = 1
    broken: str = ""

    def begin(self) -> World:
        """What all begins with."""
        count = len(self.adds)
        return World(notes=((0,) * count,) * count, places=(Place(),) * count)


@dataclass(frozen=True)
class Place:
    """A process and what outlives it: `step` is what it does next, as ledger.py names the steps."""

    step: str = "number"
    done: int = 0  # additions that it has ended
    number: int = 0
    journal: tuple[int, int, int] = (0, 0, 0)  # the operation, the total before, which addition
    read: tuple[int, tuple[int, int]] = (0, (0, 0))  # total and tag
    records: tuple[tuple[int, int], ...] = ()  # additions that were recorded, with the total before


@dataclass(frozen=True)
class World:
    """All that the processes share, and what is true, which none of them sees."""

    total: int = 0
    tag: tuple[int, int] = (-1, 0)  # the place, and the number
    notes: tuple[tuple[int, ...], ...] = ()  # of a place, by who noted
    places: tuple[Place, ...] = ()
    plain: int = 0
    crashes: int = 0
    made: tuple[tuple[int, int, int], ...] = ()  # place, which addition, the total before


def followers(world: World, case: Case) -> Iterator[World]:
    """Every world that may come next."""
    if world.plain < len(case.plain):
        total = (world.total + case.plain[world.plain]) % MODULUS
        yield replace(world, total=total, plain=world.plain + 1)
    for index, place in enumerate(world.places):
        if place.step == "number" and place.done == len(case.adds[index]):
            continue
        yield STEPS[place.step](world, index, case)
        if world.crashes < case.crashes and place.step != "dead":
            yield put(replace(world, crashes=world.crashes + 1), index, step="dead")


def put(world: World, index: int, **changes: Any) -> World:
    places = list(world.places)
    places[index] = replace(places[index], **changes)
    return replace(world, places=tuple(places))


def take_number(world: World, index: int, case: Case) -> World:
    return put(world, index, step="journal", number=world.places[index].number + 1)


def write_journal(world: World, index: int, case: Case) -> World:
    place = world.places[index]
    journal = place.number, place.journal[1], place.done
    return put(world, index, step="read the total", journal=journal)


def read_total(world: World, index: int, case: Case) -> World:
    return put(world, index, step="read the tag", read=(world.total, (-1, 0)))


def read_tag(world: World, index: int, case: Case) -> World:
    read = world.places[index].read[0], world.tag
    return put(world, index, step="help", read=read)


def help_other(world: World, index: int, case: Case) -> World:
    owner, number = world.places[index].read[1]
    world = put(world, index, step="before")
    if owner in (-1, index) or case.broken == "no help":
        return world
    notes = [list(row) for row in world.notes]
    notes[owner][0 if case.broken == "one note for all" else index] = number
    return replace(world, notes=tuple(map(tuple, notes)))


def write_before(world: World, index: int, case: Case) -> World:
    place = world.places[index]
    journal = place.journal[0], place.read[0], place.journal[2]
    return put(world, index, step="swap", journal=journal)


def swap(world: World, index: int, case: Case) -> World:
    place = world.places[index]
    if (world.total, world.tag) != place.read:
        return put(world, index, step="read the total")
    total = (world.total + case.adds[index][place.done]) % MODULUS
    made = (*world.made, (index, place.done, world.total))
    world = replace(world, total=total, tag=(index, place.number), made=tuple(sorted(made)))
    return put(world, index, step="record")


def record(world: World, index: int, case: Case) -> World:
    place = world.places[index]
    _, before, which = place.journal
    others = tuple(known for known in place.records if known[0] != which)
    return put(world, index, step="clear", records=(*others, (which, before)))


def clear(world: World, index: int, case: Case) -> World:
    place = world.places[index]
    journal = 0, place.journal[1], place.journal[2]
    return put(world, index, step="number", journal=journal, done=place.done + 1)


def bury(world: World, index: int, case: Case) -> World:
    place = world.places[index]
    if place.journal[0]:
        first = "look at the notes" if case.broken == "notes before the tag" else "look at the tag"
        return put(world, index, step=first)
    number = 0 if case.broken == "numbers begin anew" else place.number
    return put(world, index, step="number", number=number, done=len(place.records))


def look_at_tag(world: World, index: int, case: Case) -> World:
    if world.tag == (index, world.places[index].journal[0]):
        return judged(world, index, True)
    if case.broken == "notes before the tag":
        return judged(world, index, False)
    return put(world, index, step="look at the notes")


def look_at_notes(world: World, index: int, case: Case) -> World:
    if max(world.notes[index]) >= world.places[index].journal[0]:
        return judged(world, index, True)
    if case.broken == "notes before the tag":
        return put(world, index, step="look at the tag")
    return judged(world, index, False)


def judged(world: World, index: int, was_made: bool) -> World:
    """What the burial says of a journal, held against what is true."""
    _, before, which = world.places[index].journal
    truly = [told for place, made, told in world.made if (place, made) == (index, which)]
    assert truly == ([before] if was_made else []), f"said {was_made} of {which} in {world}"
    if was_made:
        return put(world, index, step="record again")
    return put(world, index, step="clear again")


def record_again(world: World, index: int, case: Case) -> World:
    return put(record(world, index, case), index, step="clear again")


def clear_again(world: World, index: int, case: Case) -> World:
    place = world.places[index]
    return put(world, index, step="dead", journal=(0, place.journal[1], place.journal[2]))


STEPS: Final[dict[str, Callable[[World, int, Case], World]]] = {
    "number": take_number,
    "journal": write_journal,
    "read the total": read_total,
    "read the tag": read_tag,
    "help": help_other,
    "before": write_before,
    "swap": swap,
    "record": record,
    "clear": clear,
    "dead": bury,
    "look at the tag": look_at_tag,
    "look at the notes": look_at_notes,
    "record again": record_again,
    "clear again": clear_again,
}


def explore(case: Case) -> int:
    """Goes through all worlds; gives back how many there are."""
    seen: set[World] = set()
    left = [case.begin()]
    while left:
        world = left.pop()
        if world in seen:
            continue
        seen.add(world)
        before = len(left)
        left.extend(followers(world, case))
        if len(left) == before:
            judge_end(world, case)
    return len(seen)


def judge_end(world: World, case: Case) -> None:
    """Everything was made once, and recorded as it was."""
    for index, place in enumerate(world.places):
        made = sorted((which, before) for at, which, before in world.made if at == index)
        assert sorted(place.records) == made, f"the records differ in {world}"
        assert len(made) == len(case.adds[index]), f"{index} has not ended in {world}"
    assert world.total == (sum(map(sum, case.adds)) + sum(case.plain)) % MODULUS


CASES: Final = {
    "a crash": Case(plain=(1,)),
    "three processes": Case(adds=((1,), (1,), (2,)), plain=()),
}
LONG_CASES: Final = {
    "two crashes": Case(crashes=2),
    "a helper of each of two": Case(adds=((1, 3), (1,), (2,)), plain=(1,)),
}


@pytest.mark.parametrize("name", [*CASES, *(LONG_CASES if LONG else ())])
def test_no_interleaving_and_no_killing_makes_it_wrong(name: str) -> None:
    assert explore((CASES | LONG_CASES)[name]) > 10_000


@pytest.mark.parametrize(
    "case",
    [
        Case(broken="no help"),
        Case(broken="notes before the tag"),
        Case(broken="one note for all", adds=((1, 1), (1,), (1,)), plain=()),
        Case(broken="numbers begin anew", crashes=2),
    ],
    ids=lambda case: case.broken,
)
def test_the_model_finds_what_is_broken(case: Case) -> None:
    with pytest.raises(AssertionError):
        explore(case)


class DyingWords:
    """Shared words of which the store number `last` is the last thing that a process does."""

    stores = 0

    def __init__(self, words: memoryview[int], last: int) -> None:
        self.words = words
        self.last = last

    def __getitem__(self, at: Any) -> Any:
        return self.words[at]

    def __len__(self) -> int:
        return len(self.words)

    def __setitem__(self, at: int, value: int) -> None:
        self.words[at] = value
        DyingWords.stores += 1
        if DyingWords.stores == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


class Shared:
    """A total, its sessions and their ledger, of three places."""

    def __init__(self, way: str, start: int = 0) -> None:
        counter = make_shared_counter(start)
        assert isinstance(counter, AtomicCounter)
        self.counter = counter
        self.start = start
        self.table = SessionTable(30, 3)
        self.engine: Engine = make_engine(way)
        self.ledger = SharedLedger(counter, self.table, 3)
        self.use_engine(0)
        self.slots = [self.open(1), self.open(2)]

    def use_engine(self, place: int) -> None:
        ledger = self.ledger
        words = ledger.memory, ledger.before_at(place), ledger.notes_at, ledger.places
        tagged_add = self.engine.tagged_add(self.counter.address, *words)
        assert (tagged_add is None) == (self.engine.name == "plain")
        if tagged_add:
            ledger.use(tagged_add)

    def open(self, session_id: int) -> int:
        with self.table.lock:
            claim = self.table.claim(0, Hello(session_id, Control.OPEN, 8), MAX_AMOUNT)
        assert isinstance(claim, Claimed)
        assert claim.slot is not None
        return claim.slot

    def add(self) -> int:
        """Adds a turn of four reads: of one session, of nobody, of the other, of the first."""
        first, second = self.slots
        return self.ledger.add(0, 10, [(first, 2, 3), (second, 1, 6), (first, 1, 10)])

    def killed(self, act: Callable[[], object], last: int) -> bool:
        """Has a process of its own do something and die at a store; whether it came so far."""
        pid = os.fork()
        if not pid:
            try:
                DyingWords.stores = 0
                self.have_words_die(last)
                act()
            finally:
                os._exit(1 if DyingWords.stores < last else 2)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) in (1, -signal.SIGKILL)
        return os.WIFSIGNALED(status)

    def have_words_die(self, last: int) -> None:
        """Puts itself between all stores and the memory."""
        ledger: Any = self.ledger
        table: Any = self.table
        ledger._words = [DyingWords(words, last) for words in ledger._words]
        ledger._notes = DyingWords(ledger._notes, last)
        for column in (
            "_window",
            "_owner",
            "_wanted",
            "_applied",
            "_written",
            "_used_ms",
            "_rings",
        ):
            setattr(table, column, DyingWords(getattr(table, column), last))

    def judge(self, added_since: int) -> None:
        """The turn is in the total or not, and its sessions say the same."""
        was_made = (self.counter.total() - self.start - added_since) % 2**64
        assert was_made in (0, 10)
        runs = []
        with self.table.lock:
            for session_id in (1, 2):
                claim = self.table.claim(2, Hello(session_id, Control.RESUME, 0), MAX_AMOUNT)
                assert isinstance(claim, Claimed), "its holder died, and it was not let go of"
                runs.append((claim.answer.applied, claim.answer.runs))
        if not was_made:
            assert runs == [(0, ()), (0, ())]
            return
        before = (runs[1][1][0][1] - 6) % 2**64
        assert (before - self.start) % 2**64 in (0, added_since)
        assert runs == [
            (3, ((2, (before + 3) % 2**64), (3, (before + 10) % 2**64))),
            (1, ((1, (before + 6) % 2**64),)),
        ]


needs_the_swap = pytest.mark.skipif(
    bool(unavailable(make_shared_counter(), 3)), reason=unavailable(make_shared_counter(), 3)
)


def nothing(_: Shared) -> int:
    return 0


def plain_addition(shared: Shared) -> int:
    shared.counter.add(7)
    return 7


def addition_of_another(shared: Shared) -> int:
    """One that helps, as it replaces the tag."""
    shared.use_engine(1)
    shared.ledger.add(1, 100, [])
    return 100


def additions_of_two_others(shared: Shared) -> int:
    shared.use_engine(2)
    shared.ledger.add(2, 100, [])
    shared.use_engine(1)
    shared.ledger.add(1, 100, [])
    return 200


@needs_the_swap
@pytest.mark.parametrize("way", ENGINES)
@pytest.mark.parametrize(
    "meanwhile", [nothing, plain_addition, addition_of_another, additions_of_two_others]
)
@pytest.mark.parametrize("start", [0, 2**64 - 5])
def test_who_is_killed_at_any_store_has_added_all_of_it_or_nothing(
    way: str, meanwhile: Callable[[Shared], int], start: int
) -> None:
    last = 0
    was_killed = True
    while was_killed:
        last += 1
        shared = Shared(way, start)
        was_killed = shared.killed(shared.add, last)
        added = meanwhile(shared)
        shared.ledger.bury(0)
        shared.judge(added)
        shared.engine.close()
    assert last > 20


@needs_the_swap
@pytest.mark.parametrize("way", ENGINES)
def test_a_burial_that_is_killed_at_any_store_is_done_again(way: str) -> None:
    stores_before_the_record = next(
        last for last in range(1, 100) if not_yet_recorded(way, last) is False
    )
    last = 0
    was_killed = True
    while was_killed:
        last += 1
        shared = Shared(way)
        assert shared.killed(shared.add, stores_before_the_record)
        was_killed = shared.killed(lambda shared=shared: shared.ledger.bury(0), last)  # type: ignore[misc]
        shared.ledger.bury(0)
        shared.judge(0)
        assert shared.counter.total() == 10
        shared.engine.close()
    assert last > 10


def not_yet_recorded(way: str, last: int) -> bool:
    """Whether an addition that is killed there has changed the total no more than the sessions."""
    shared = Shared(way)
    assert shared.killed(shared.add, last)
    shared.engine.close()
    return shared.counter.total() == 0


@needs_the_swap
@pytest.mark.parametrize("way", ENGINES)
def test_processes_that_are_killed_at_random_lose_and_double_nothing(way: str) -> None:
    shared = Shared(way)
    stop = shared.counter.words  # keeps the memory
    for _ in range(200 if LONG else 20):
        pid = os.fork()
        if not pid:
            while True:
                shared.add()
        begun = shared.table.progress(shared.slots[0])[0]
        wait_until(lambda begun=begun: has_passed(shared, begun), "it adds")  # type: ignore[misc]
        shared.counter.add(1000)
        shared.counter.add(2**64 - 1000)
        shared.use_engine(1)
        shared.ledger.add(1, 0, [])
        shared.use_engine(0)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        shared.ledger.bury(0)
        applied = shared.table.progress(shared.slots[0])[0]
        assert applied % 3 == 0
        assert shared.counter.total() == applied // 3 * 10
        assert shared.table.progress(shared.slots[1])[0] == applied // 3
    assert stop
    shared.engine.close()


def has_passed(shared: Shared, applied: int) -> bool:
    return shared.table.progress(shared.slots[0])[0] > applied + 30


def test_a_total_of_one_process_keeps_its_sessions_in_step() -> None:
    table = SessionTable(4, 1)
    counter = MemoryCounter(2**64 - 2)
    ledger = OwnLedger(counter, table)
    claim = table.claim(0, Hello(7, Control.OPEN, 2), 9)
    assert isinstance(claim, Claimed)
    assert claim.slot is not None
    assert ledger.add(0, 5, [(claim.slot, 2, 3), (claim.slot, 1, 5)]) == 2**64 - 2
    ledger.bury(0)
    again = table.claim(0, Hello(7, Control.RESUME, 1), 9)
    assert isinstance(again, Claimed)
    assert again.answer.runs == ((2, 1), (3, 3))


def test_where_the_swap_is_not_certain_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "libatomic is missing" in unavailable(LockedCounter(), 2)
    counter = make_shared_counter()
    assert "more than the 255" in unavailable(counter, 256)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "not known of aarch64" in unavailable(counter, 2)
