"""Who keeps the total: asked by a process of its own before the server serves, read at the end."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from counter.options.server import ServerSettings
from counter.options.values import Seconds, parse_store
from counter.processes.child import ChildError, ask_child
from counter.processes.slots import TOTAL, TOTAL_AT_MS, Slots
from counter.system.signals import handled
from counter.totals import keeper
from counter.totals.keeper import MemoryKeeper, StoreKeeper, make_keeper
from counter.totals.sqlite import SqliteStore
from counter.totals.store import Found, InDoubt, StoreAway, StoreError
from kit.harness import children, is_alive

# Python 3.12 warns of every fork beside a thread, which another test may have left; what is forked
# here only answers and exits.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def hang() -> str:
    """Longer than any test."""
    while True:
        signal.pause()


def fail() -> str:
    raise RuntimeError("a bug")


def die() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


# A process that answers one question.


@pytest.mark.parametrize("answer", ["", "ä\n" * 100_000, None, 2**64, Found(1, False, "much")])
def test_a_helping_process_gives_its_answer(answer: object) -> None:
    before = children(os.getpid())
    assert ask_child(lambda: answer, 20) == answer
    assert children(os.getpid()) == before


def test_a_helping_process_is_another_one_and_ends_with_its_answer() -> None:
    pid = ask_child(os.getpid, 20)
    assert pid != os.getpid()
    assert not is_alive(pid)


def test_what_a_helping_process_does_is_not_done_here() -> None:
    name = "a_module_of_the_child"

    def work() -> str:
        sys.modules[name] = sys
        return "done"

    assert ask_child(work, 20) == "done"
    assert name not in sys.modules


@pytest.mark.parametrize("work", [fail, die, lambda: sys])
def test_a_helping_process_that_fails_has_no_answer(work: Callable[[], object]) -> None:
    before = children(os.getpid())
    with pytest.raises(ChildError, match="it failed; the log says why"):
        ask_child(work, 20)
    assert children(os.getpid()) == before


def test_what_a_helping_process_raises_is_raised_here_if_it_is_expected() -> None:
    def refuse() -> str:
        raise InDoubt("cut")

    with pytest.raises(InDoubt, match="cut"):
        ask_child(refuse, 20, raises=(StoreAway,))
    with pytest.raises(ChildError, match="it failed"):
        ask_child(refuse, 20, raises=(StoreError,))


def test_a_helping_process_says_why_it_failed_before_it_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "log"
    handler = logging.FileHandler(path)
    log = logging.getLogger("server")
    log.addHandler(handler)
    try:
        for _ in range(10):
            with pytest.raises(ChildError):
                ask_child(fail, 20)
    finally:
        log.removeHandler(handler)
        handler.close()
    assert path.read_text().count("RuntimeError: a bug") == 10


def test_a_helping_process_that_is_too_slow_is_ended() -> None:
    before = children(os.getpid())
    with pytest.raises(ChildError, match=r"no answer within 0\.05 s"):
        ask_child(hang, 0.05)
    assert children(os.getpid()) == before


@pytest.mark.timeout(20)  # a child that goes on as its parent would hang the tests
def test_a_helping_process_runs_no_handler_of_its_parents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fork() -> int:
        pid = real_fork()
        if not pid:
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    real_fork = os.fork
    monkeypatch.setattr(os, "fork", fork)
    with handled([signal.SIGTERM], lambda *_: os._exit(7)):
        assert ask_child(lambda: "5", 20) == "5"


def test_a_helping_process_leaves_no_descriptor() -> None:
    before = set(os.listdir("/proc/self/fd"))
    ask_child(lambda: "5", 20)
    with pytest.raises(ChildError):
        ask_child(hang, 0.01)
    assert set(os.listdir("/proc/self/fd")) <= before


# A total in memory.


@pytest.mark.parametrize("processes", [0, 2])
def test_a_total_in_memory_is_the_same_for_all(processes: int) -> None:
    kept = make_keeper(replace(ServerSettings(), set_total=40), processes)
    assert isinstance(kept, MemoryKeeper)
    assert (kept.found.total, kept.found.is_new) == (40, True)
    assert kept.open().add(2) == 40
    assert kept.open().add(1) == 42
    assert kept.last_total(Slots(1)) == 43


def test_what_a_total_in_memory_survives_is_said() -> None:
    assert MemoryKeeper(0, 0).found.survives == "nothing"
    assert "death of a serving process" in MemoryKeeper(0, 1).found.survives


# A total in a store.


def settings_for(path: Path, **changes: object) -> ServerSettings:
    store = parse_store(f"sqlite:{path}")
    return replace(ServerSettings(), store=store, **changes)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "counter.db"


def test_a_store_is_made_by_another_process_and_opened_by_each(path: Path) -> None:
    kept = make_keeper(settings_for(path, set_total=40), 2)
    assert isinstance(kept, StoreKeeper)
    assert (kept.found.total, kept.found.is_new) == (40, True)
    assert str(path) not in " ".join(os.readlink(f"/proc/self/fd/{fd}") for fd in descriptors())
    with closing(kept.open()) as one, closing(kept.open()) as other:
        assert one.add(1) == 40
        assert other.add(1) == 41
    found = make_keeper(settings_for(path), 2).found
    assert (found.total, found.is_new) == (42, False)


def descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def test_a_store_that_cannot_be_used_is_said_in_its_own_words(path: Path) -> None:
    path.write_text("hello")
    with pytest.raises(StoreError, match="it is not a SQLite database"):
        make_keeper(settings_for(path), 2)
    path.unlink()
    make_keeper(settings_for(path, set_total=5), 2)
    with pytest.raises(StoreError, match=r"the total is 5 .* leave --setTotal out"):
        make_keeper(settings_for(path, set_total=7), 2)
    assert make_keeper(settings_for(path, set_total=7, force=True), 2).found.total == 7


def test_a_store_that_does_not_answer_is_said_with_its_timeout(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SqliteStore, "check", lambda *_: hang())
    before = children(os.getpid())
    with pytest.raises(StoreError, match=r"cannot use sqlite:.*no answer within 0\.05 s") as caught:
        make_keeper(settings_for(path, store_timeout_s=Seconds(0.05)), 2)
    assert "--storeTimeout is 50ms" in str(caught.value)
    assert children(os.getpid()) == before


def test_warnings_of_a_store_reach_the_keeper(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Found(5, False, "much", ("one", "two"))
    monkeypatch.setattr(SqliteStore, "check", lambda *_: found)
    kept = make_keeper(settings_for(path), 2)
    assert (kept.found.total, tuple(kept.found.warnings)) == (5, ("one", "two"))


@pytest.mark.parametrize("processes", [0, 2])
def test_the_last_total_is_what_the_store_holds(path: Path, processes: int) -> None:
    kept = make_keeper(settings_for(path), processes)
    with closing(SqliteStore(str(path))) as another:
        another.add(7)
    assert kept.last_total(Slots(1)) == 7


@pytest.mark.parametrize("processes", [0, 2])
def test_the_last_total_of_a_store_that_is_away_is_the_last_it_told(
    path: Path, processes: int, caplog: pytest.LogCaptureFixture
) -> None:
    kept = make_keeper(settings_for(path, set_total=40), processes)
    path.rename(path.with_name("elsewhere.db"))
    slots = Slots(2)
    with caplog.at_level(logging.WARNING):
        assert kept.last_total(slots) == 40  # what was found, where nothing was told since
        slots[0][TOTAL], slots[0][TOTAL_AT_MS] = 50, 2000
        slots[1][TOTAL], slots[1][TOTAL_AT_MS] = 49, 1000
        assert kept.last_total(slots) == 50
    assert caplog.text.count("cannot be read at the end") == 2


def test_the_last_total_where_nothing_can_be_forked_is_the_last_that_was_told(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fork() -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    kept = make_keeper(settings_for(path, set_total=40), 2)
    slots = Slots(1)
    before = descriptors()
    monkeypatch.setattr(os, "fork", fork)
    assert kept.last_total(slots) == 40
    assert "cannot be read at the end" in caplog.text
    assert not set(descriptors()) - set(before)


@pytest.mark.timeout(20)  # whoever waits for it waits for ever
def test_the_last_total_of_a_store_that_hangs_is_not_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = make_keeper(settings_for(path, set_total=40), 2)
    with closing(SqliteStore(str(path))) as another:
        another.add(7)  # so that 40 is what was told and not what is held
    before = children(os.getpid())
    monkeypatch.setattr(keeper, "LAST_READING_S", 0.05)
    monkeypatch.setattr(SqliteStore, "read", lambda _self: hang())
    assert kept.last_total(Slots(1)) == 40
    assert "cannot be read at the end (no answer within 0.05 s)" in caplog.text
    assert children(os.getpid()) == before
