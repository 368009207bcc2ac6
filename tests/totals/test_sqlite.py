"""The total in a SQLite file: the contract of all counters, what it refuses, what it survives."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from counter.processes.child import ask_child
from counter.totals import sqlite as sqlite_store
from counter.totals.counter import Counter
from counter.totals.sqlite import SqliteStore
from counter.totals.sqlite_file import APPLICATION_ID, SCHEMA_VERSION
from counter.totals.store import InDoubt, StoreAway, StoreError
from kit.counter_contract import TOP, SharedCounterContract

NOBODY = 65534


class TestSqliteStore(SharedCounterContract):
    folder = ""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _make_folder(cls) -> Iterator[None]:
        """A folder in memory where there is one: the contract commits some 20,000 times."""
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            cls.folder = folder
            yield

    def share_counter(self, start: int) -> Callable[[], Counter]:
        number, path = tempfile.mkstemp(dir=self.folder)  # an empty file is as good as none
        os.close(number)
        with closing(SqliteStore(path)) as store:
            store.check(set_total=start)
        return lambda: SqliteStore(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "counter.db")


@pytest.fixture
def store(path: str) -> Iterator[SqliteStore]:
    with closing(make_store(path)) as store:
        yield store


def make_store(path: str, total: int = 0) -> SqliteStore:
    """A store with a new file."""
    store = SqliteStore(path)
    store.check(set_total=total)
    return store


def refused(path: str, set_total: int | None = None) -> str:
    """What check() says of a file that it does not take."""
    with closing(SqliteStore(path)) as store:
        with pytest.raises(StoreError) as caught:
            store.check(set_total)
    return str(caught.value)


def run_sql(path: str, *statements: str) -> list[Any]:
    """What another program does to a file; gives back what the last statement does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            rows = db.execute(statement).fetchall()
    return rows


def total_in_file(path: str) -> str:
    """The total as a person reads it."""
    ((total,),) = run_sql(path, "SELECT total FROM counter")
    return str(total)


def queue_is_free(path: str) -> bool:
    """Whether another writer could have its turn now."""
    return subprocess.run(["flock", "-n", path + "-queue", "true"]).returncode == 0


# What check() finds.


def test_a_new_file_begins_at_nothing(path: str) -> None:
    with closing(SqliteStore(path)) as store:
        found = store.check()
        assert (found.total, found.is_new, found.warnings) == (0, True, ())
        assert "power loss" in found.survives
        assert store.add(5) == 0


def test_a_new_file_begins_at_what_it_is_told(path: str) -> None:
    with closing(SqliteStore(path)) as store:
        assert store.check(set_total=TOP - 1).total == TOP - 1
    assert total_in_file(path) == str(TOP - 1)


def test_a_file_that_counted_goes_on(path: str) -> None:
    with closing(make_store(path, 41)) as store:
        store.add(1)
    with closing(SqliteStore(path)) as store:
        found = store.check()
        assert (found.total, found.is_new) == (42, False)
        assert store.add(1) == 42


def test_a_file_is_in_wal_mode_and_written_through(store: SqliteStore, path: str) -> None:
    assert run_sql(path, "PRAGMA journal_mode") == [("wal",)]
    store.add(1)
    assert store._db is not None
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_total_is_not_set_over_another(path: str) -> None:
    make_store(path, 1234567).close()
    assert refused(path, set_total=5000) == (
        f"cannot use {path}: the total is 1,234,567 and --setTotal would make it 5,000; "
        "leave --setTotal out to go on from there, or add --force to overwrite it"
    )
    assert total_in_file(path) == "1234567"


def test_force_sets_a_total_over_another(path: str) -> None:
    make_store(path, 1234567).close()
    with closing(SqliteStore(path)) as store:
        found = store.check(set_total=TOP - 2, force=True)
        assert (found.total, found.is_new) == (TOP - 2, False)
        assert store.add(3) == TOP - 2
        assert store.total() == 1


def test_force_alone_changes_nothing(path: str) -> None:
    make_store(path, 7).close()
    with closing(SqliteStore(path)) as store:
        assert store.check(force=True).total == 7


@pytest.mark.parametrize(
    "name", ["a b?c#d%20.db", "ä&mode=memory.db", os.fsdecode(b"caf\xe9.db"), "new\nline.db"]
)
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    make_store(path, 5).close()
    assert total_in_file(path) == "5"


def test_a_name_without_a_folder_is_in_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_store("counter.db", 5).close()
    assert total_in_file(str(tmp_path / "counter.db")) == "5"


# What check() refuses.


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("text", ["hello", "hello\n" * 10_000])
def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    assert refused(str(path), 5) == (
        f"cannot use {path}: it is not a SQLite database; name another file"
    )
    assert files_of(tmp_path) == {"notes.txt": text.encode()}


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
@pytest.mark.parametrize(
    "mark",
    ["CREATE TABLE counter (id, total)", "PRAGMA application_id = 7", "PRAGMA user_version = 1"],
)
def test_another_programs_database_is_left_as_it_is(tmp_path: Path, mode: str, mark: str) -> None:
    path = str(tmp_path / "other.db")
    run_sql(path, f"PRAGMA journal_mode = {mode}", mark)
    before = files_of(tmp_path)
    assert refused(path, 5) == (
        f"cannot use {path}: it is another program's database; name another file"
    )
    assert files_of(tmp_path) == before


def test_another_programs_database_is_known_while_all_of_it_is_in_the_wal(tmp_path: Path) -> None:
    path = str(tmp_path / "other.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE counter (id, total)")
        before = files_of(tmp_path)
        assert "another program's database" in refused(path)
        after = files_of(tmp_path)
        # The index of the WAL tells how far readers are.
        before.pop("other.db-shm")
        after.pop("other.db-shm")
        assert after == before


def test_a_file_of_a_newer_release_is_left_as_it_is(tmp_path: Path) -> None:
    path = str(tmp_path / "counter.db")
    make_store(path, 5).close()
    run_sql(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}", "PRAGMA journal_mode = DELETE")
    before = files_of(tmp_path)
    text = refused(path, 7)
    assert "a newer release wrote it" in text
    assert f"schema {SCHEMA_VERSION + 1}" in text
    assert files_of(tmp_path) == before


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere" / "counter.db")
    assert refused(path) == f"cannot use {path}: there is no such folder"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert refused(str(tmp_path)) == f"cannot use {tmp_path}: it is a folder; name a file in it"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_is_what_it_leads_to(tmp_path: Path, existing: bool, relative: bool) -> None:
    """Two names have one queue, and nothing is made beside the link."""
    folder = tmp_path / "data"
    folder.mkdir()
    link = tmp_path / "link.db"
    link.symlink_to("data/counter.db" if relative else folder / "counter.db")
    path = str(folder / "counter.db")
    if existing:
        make_store(path, 5).close()
    with closing(SqliteStore(str(link))) as store:
        assert store.check(None if existing else 5).total == 5
        with closing(SqliteStore(path)) as other:
            assert [store.add(1), other.add(1), store.add(1)] == [5, 6, 7]
            with closing(os.fdopen(os.dup(store._lock))) as queue:
                fcntl.flock(queue, fcntl.LOCK_EX)
                assert not queue_is_free(path)
                fcntl.flock(queue, fcntl.LOCK_UN)
    assert sorted(os.listdir(tmp_path)) == ["data", "link.db"]


def test_a_link_that_is_turned_elsewhere_is_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "LOOK_S", 0.0)
    for name, total in (("one", 10), ("other", 20)):
        make_store(str(tmp_path / name), total).close()
    link = tmp_path / "link"
    link.symlink_to("one")
    with closing(SqliteStore(str(link))) as store:
        assert store.add(1) == 10
        link.unlink()
        link.symlink_to("other")
        with pytest.raises(StoreAway, match="was replaced"):
            store.add(1)
        store.close()
        assert store.add(1) == 20


def test_a_link_into_no_folder_is_said(tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "nowhere" / "counter.db")
    assert refused(str(link)) == (
        f"cannot use {link}, which leads to {tmp_path}/nowhere/counter.db: there is no such folder"
    )
    assert os.listdir(tmp_path) == ["link.db"]


def test_links_in_a_circle_are_said(tmp_path: Path) -> None:
    link = tmp_path / "one"
    link.symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    assert "its links lead in a circle" in refused(str(link))
    assert sorted(os.listdir(tmp_path)) == ["one", "other"]


def test_another_programs_database_is_left_as_it_is_by_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    run_sql(str(folder / "other.db"), "PRAGMA journal_mode = WAL", "CREATE TABLE t (x)")
    link = tmp_path / "link.db"
    link.symlink_to("theirs/other.db")
    before = files_of(folder)
    assert refused(str(link), 5) == (
        f"cannot use {link}, which leads to {folder}/other.db: "
        "it is another program's database; name another file"
    )
    assert files_of(folder) == before
    assert sorted(os.listdir(tmp_path)) == ["link.db", "theirs"]


def test_a_database_that_another_program_begins_in_the_same_moment_is_left(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_other(_file: str) -> str:
        run_sql(path, "CREATE TABLE theirs (x)")
        return ""

    monkeypatch.setattr(sqlite_store, "wrong_content", begin_other)
    assert "it is another program's database" in refused(path, 5)
    assert run_sql(path, "SELECT name FROM sqlite_master") == [("theirs",)]
    assert run_sql(path, "PRAGMA journal_mode") == [("delete",)]


def test_a_file_with_several_names_is_refused(tmp_path: Path) -> None:
    """SQLite would keep a WAL beside each, and neither would know of the other."""
    path = tmp_path / "counter.db"
    make_store(str(path), 5).close()
    other = tmp_path / "other.db"
    os.link(path, other)
    before = files_of(tmp_path)
    for name in (path, other):
        assert "several names (hard links)" in refused(str(name), 7)
    assert files_of(tmp_path) == before
    other.unlink()
    assert total_in_file(str(path)) == "5"


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero", "fifo", "socket"])
@pytest.mark.parametrize("by_link", [False, True])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, name: str, by_link: bool) -> None:
    path = os.path.join(tmp_path, name)
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        if name == "socket":
            sock.bind(path)
        if name == "fifo":
            os.mkfifo(path)
        if by_link:
            os.symlink(path, tmp_path / "link")
            path = str(tmp_path / "link")
        before = os.listdir(tmp_path)
        assert refused(path, 5).endswith(": it is not a regular file; name another")
        assert os.listdir(tmp_path) == before
    assert not os.path.exists(name + "-queue")


def test_an_open_file_without_a_name_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "gone", "w+b") as file:
        (tmp_path / "gone").unlink()
        assert "has no name" in refused(f"/proc/self/fd/{file.fileno()}", 5)
    assert not os.listdir(tmp_path)


def test_a_file_that_is_mounted_by_itself_is_refused(tmp_path: Path) -> None:
    """As a container is given it: what is newest would be beside it, and end with the container."""
    outside = tmp_path / "outside.db"
    make_store(str(outside), 5).close()
    inside = tmp_path / "in side.db"
    inside.touch()
    mount = ["mount", "--bind", str(outside), str(inside)]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting takes root and the right to mount")
    try:
        assert "it is mounted by itself" in refused(str(inside), 7)
    finally:
        subprocess.run(["umount", str(inside)], check=True)
    assert total_in_file(str(outside)) == "5"


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_wal_whose_database_is_gone_is_not_thrown_away(tmp_path: Path, is_empty: bool) -> None:
    """SQLite deletes it with the newest commits in it as it begins a new database."""
    path = tmp_path / "counter.db"
    with closing(make_store(str(path), 40)) as store:
        store.add(2)
        for end in ("", "-wal"):
            (tmp_path / f"kept{end}").write_bytes(Path(f"{path}{end}").read_bytes())
    for file in list(tmp_path.glob("counter.db*")):
        file.unlink()
    (tmp_path / "kept-wal").rename(tmp_path / "counter.db-wal")
    if is_empty:
        path.touch()
    before = files_of(tmp_path)
    text = refused(str(path), 5)
    assert f"{path}-wal is left of a database that is gone from there" in text
    assert files_of(tmp_path) == before
    (tmp_path / "kept").rename(path)
    with closing(SqliteStore(str(path))) as store:
        assert store.check().total == 42


def test_a_journal_whose_database_is_gone_is_not_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("CREATE TABLE t (x)")
        db.execute("BEGIN")
        db.execute("INSERT INTO t VALUES (1)")
        journal = Path(f"{path}-journal").read_bytes()
    path.unlink()
    Path(f"{path}-journal").write_bytes(journal)
    before = files_of(tmp_path)
    assert "-journal is left of a database" in refused(str(path), 5)
    assert files_of(tmp_path) == before


def test_a_database_whose_making_was_cut_short_is_made_anew(path: str) -> None:
    """As a power cut leaves it: an empty file, and a journal that says that it was empty."""
    Path(path).touch()
    Path(f"{path}-journal").write_bytes(b"\xd9\xd5\x05\xf9 \xa1c\xd7" + bytes(504))
    with closing(SqliteStore(path)) as store:
        assert store.check(5).is_new
        assert store.add(1) == 5


# What the promise rests on.


def vacuum_into(path: str, copy: str) -> None:
    """The copy of a total as a user makes it, which is in no WAL mode."""
    run_sql(path, f"VACUUM INTO '{copy}'")
    assert run_sql(copy, "PRAGMA journal_mode") == [("delete",)]


@pytest.mark.parametrize("checked", [False, True])
def test_a_copy_that_lost_its_wal_mode_gets_it_back(
    tmp_path: Path, path: str, checked: bool
) -> None:
    make_store(path, 5).close()
    copy = str(tmp_path / "copy.db")
    vacuum_into(path, copy)
    with closing(SqliteStore(copy)) as store:
        if checked:
            assert store.check().total == 5
        assert store.add(1) == 5
        assert run_sql(copy, "PRAGMA journal_mode") == [("wal",)]


def test_a_file_that_cannot_be_put_into_wal_mode_is_refused_until_it_can(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "BUSY_S", 0.05)
    make_store(path, 5).close()
    copy = str(tmp_path / "copy.db")
    vacuum_into(path, copy)
    with closing(sqlite3.connect(copy, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM counter").fetchall()
        assert "it cannot be put into WAL mode: database is locked" in refused(copy)
        with closing(SqliteStore(copy)) as store:
            with pytest.raises(StoreAway, match="cannot be put into WAL mode") as caught:
                store.add(1)
            assert not isinstance(caught.value, InDoubt)
            reader.execute("COMMIT")
            assert store.add(1) == 5


class WithoutWal(sqlite3.Connection):
    """As on a file system whose files cannot be shared memory: WAL mode is refused in silence."""

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        return super().execute(sql.replace("journal_mode = WAL", "journal_mode"), parameters)


class WithoutFull(sqlite3.Connection):
    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        return super().execute(
            sql.replace("synchronous = FULL", "synchronous = NORMAL"), parameters
        )


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (WithoutWal, "in journal mode delete with synchronous 2"),
        (WithoutFull, "in journal mode wal with synchronous 1"),
    ],
)
def test_a_file_that_is_not_kept_as_promised_is_refused(
    path: str, monkeypatch: pytest.MonkeyPatch, factory: type[sqlite3.Connection], said: str
) -> None:
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=factory))
    text = refused(path)
    assert said in text
    assert "network" in text
    with closing(SqliteStore(path)) as store:
        with pytest.raises(StoreAway, match=said):
            store.add(1)


def test_a_reader_that_stays_leaves_no_wal_of_its_length(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 100_000
    monkeypatch.setattr(sqlite_store, "WAL_LIMIT_BYTES", limit)
    with closing(make_store(path)) as store:
        assert store._db is not None
        store._db.execute("PRAGMA wal_autocheckpoint = 10")
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM counter").fetchall()
            while os.path.getsize(path + "-wal") < 3 * limit:
                store.add(1)
        for _ in range(20):
            store.add(1)
        assert os.path.getsize(path + "-wal") <= limit


def test_writers_meet_again_when_the_queue_was_removed(
    store: SqliteStore, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "LOOK_S", 0.0)
    store.close()
    store.add(1)
    with closing(SqliteStore(path)) as other:
        os.unlink(path + "-queue")
        assert [other.add(1), store.add(1)] == [1, 2]
        assert os.path.samestat(os.fstat(store._lock), os.fstat(other._lock))
        assert os.path.samestat(os.fstat(store._lock), os.stat(path + "-queue"))


# Python 3.12 warns of every fork beside a thread, which another test may have left.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_that_cannot_be_written_is_said_with_the_remedy(existing: bool) -> None:
    # Not tmp_path, which nobody but its owner may enter.
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "counter.db")
        if existing:
            make_store(path, 5).close()
        os.chmod(folder, 0o555)

        def check() -> str:
            if os.geteuid() == 0:  # to root every folder can be written
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            return refused(path)

        text = ask_child(check, 20)
        os.chmod(folder, 0o755)
        assert text.startswith(f"cannot use {path}: ")
        assert "the file and its folder must be writable" in text


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM counter",
        "UPDATE counter SET total = ''",
        "UPDATE counter SET total = 'many'",
        "UPDATE counter SET total = -1",
        "UPDATE counter SET total = 1.5",
        "UPDATE counter SET total = '007'",
        "UPDATE counter SET total = ' 7'",
        "UPDATE counter SET total = '٧'",
        "UPDATE counter SET total = '18446744073709551616'",
        "UPDATE counter SET total = x'37'",
        "DROP TABLE counter",
    ],
)
def test_a_total_damaged_by_hand_is_told_and_not_added_to(path: str, damage: str) -> None:
    with closing(make_store(path, 5)) as store:
        store.add(1)
        run_sql(path, damage)
        text = refused(path)
        assert "where its total should be" in text or "no such table" in text
        with pytest.raises(StoreAway):
            store.add(1)
        with pytest.raises(StoreAway):
            store.probe()
        # It is mended while the server runs, which goes on by itself.
        if "DROP" not in damage:
            run_sql(path, "INSERT OR REPLACE INTO counter VALUES (1, '70')")
            assert store.add(1) == 70


# While it is open.


def test_a_total_changed_by_hand_is_added_to(store: SqliteStore, path: str) -> None:
    assert store.add(1) == 0
    run_sql(path, "UPDATE counter SET total = 1000")
    assert store.add(1) == 1000
    assert store.add(1) == 1001
    run_sql(path, f"UPDATE counter SET total = '{TOP - 1}'")
    assert store.add(2) == TOP - 1
    assert total_in_file(path) == "1"


def test_an_addition_is_in_the_file_before_it_is_answered(store: SqliteStore, path: str) -> None:
    for total in (1, 2, 3):
        store.add(1)
        assert total_in_file(path) == str(total)


def test_adding_nothing_writes_nothing(store: SqliteStore, path: str) -> None:
    store.add(5)
    size = os.path.getsize(path + "-wal")
    assert [store.add(0), store.total(), store.add(TOP)] == [5, 5, 5]
    assert os.path.getsize(path + "-wal") == size


def test_an_amount_is_asked_for_when_its_turn_has_come(store: SqliteStore, path: str) -> None:
    """What comes while another writer has its turn is part of the same commit."""
    asked = threading.Event()
    befores = []

    def amount() -> int:
        asked.set()
        return 5

    def commit() -> None:
        befores.append(store.commit(amount))

    with open(path + "-queue") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        thread = threading.Thread(target=commit)
        thread.start()
        assert not asked.wait(0.05)
    thread.join(20)
    assert asked.is_set()
    assert befores == [0]


def test_a_lock_of_another_program_is_an_outage_that_ends(
    store: SqliteStore, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "BUSY_S", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as backup:
        store.close()
        assert store.add(1) == 0
        backup.execute("BEGIN IMMEDIATE")
        for act in (partial(store.add, 1), store.probe):
            with pytest.raises(StoreAway, match="locked") as caught:
                act()
            assert not isinstance(caught.value, InDoubt)
            assert queue_is_free(path)
        backup.execute("COMMIT")
        assert store.add(1) == 1


def test_a_short_lock_of_another_program_is_waited_for(store: SqliteStore, path: str) -> None:
    store.add(1)
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as backup:
        backup.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.05, backup.execute, ("COMMIT",))
        timer.start()
        assert store.add(1) == 1
        timer.join(20)


def test_a_file_that_was_replaced_is_an_outage(
    store: SqliteStore, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is added to a file that nobody can find any more would be lost."""
    monkeypatch.setattr(sqlite_store, "LOOK_S", 0.0)
    store.close()
    assert store.add(1) == 0
    os.rename(path, path + ".old")
    with pytest.raises(StoreAway, match="no such file"):
        store.add(1)
    make_store(path + ".new", 100).close()
    os.rename(path + ".new", path)
    before = Path(path).read_bytes()
    for _ in range(2):
        with pytest.raises(StoreAway, match="was replaced"):
            store.add(1)
    assert Path(path).read_bytes() == before
    os.rename(path + ".old", path)
    assert store.add(1) == 1


@pytest.mark.parametrize("end", ["-wal", "-shm"])
def test_a_wal_that_was_removed_is_an_outage_and_what_it_held_is_kept(
    store: SqliteStore, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Whoever opens the file then makes a new one, and would count from an older total."""
    monkeypatch.setattr(sqlite_store, "LOOK_S", 0.0)
    store.close()
    assert [store.add(5), store.add(5)] == [0, 5]
    os.rename(path + end, path + ".old")
    for _ in range(2):
        with pytest.raises(StoreAway, match="was removed while it was in use"):
            store.add(1)
    alone = tmp_path / "alone.db"
    shutil.copy(path, alone)
    with closing(sqlite3.connect(alone)) as db:
        assert db.execute("SELECT total FROM counter").fetchone() == ("10",)
    os.rename(path + ".old", path + end)
    assert store.add(1) == 10


def test_a_file_is_looked_for_once_a_second_not_at_each_addition(
    store: SqliteStore, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    looked: list[Any] = []
    plain_stat: Callable[..., os.stat_result] = os.stat

    def stat(name: Any, **how: Any) -> os.stat_result:
        if name == path:
            looked.append(name)
        return plain_stat(name, **how)

    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    monkeypatch.setattr(os, "stat", stat)
    store.close()
    for _ in range(3):
        store.add(1)
    assert len(looked) == 1
    now_s += 1.0
    store.add(1)
    assert len(looked) == 2


def test_a_missing_file_is_an_outage_and_not_made_anew(path: str) -> None:
    """Only check() makes a file: a total that begins at nothing again would be a wrong one."""
    with closing(SqliteStore(path)) as store:
        for _ in range(2):
            with pytest.raises(StoreAway, match="no such file"):
                store.add(1)
        assert not os.path.exists(path)
        make_store(path, 5).close()
        assert store.add(1) == 5


def test_a_closed_store_opens_again(store: SqliteStore) -> None:
    assert store.add(1) == 0
    store.close()
    store.close()
    assert store.add(1) == 1


# Disks that fail.


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: writing fails, as on a bad disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_is_in_doubt_until_the_disk_works(store: SqliteStore, path: str) -> None:
    assert [store.add(1) for _ in range(3)] == [0, 1, 2]
    with file_size_limit(os.path.getsize(path + "-wal") + 100):
        with pytest.raises(InDoubt, match="disk I/O error"):
            store.add(5)
        with pytest.raises(InDoubt, match="disk I/O error"):
            store.settle()
    assert store.settle() == 3
    assert store.total() == 8
    assert store.add(1) == 8
    store.close()
    assert total_in_file(path) == "9"


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of 256 KiB of its own at a folder."""
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = (
        os.geteuid() == 0 and not subprocess.run(command, stderr=subprocess.DEVNULL).returncode
    )
    if not mounted:
        pytest.skip("a disk of its own takes root and the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Writes to a file until the disk is full."""
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_loses_nothing_and_adds_again_when_there_is_space(tmp_path: Path) -> None:
    path = str(tmp_path / "counter.db")
    with small_disk(tmp_path):
        with closing(make_store(path)) as store:
            ballast = tmp_path / "ballast"
            fill(ballast)
            answered = 0

            def add_until_it_fails() -> NoReturn:
                nonlocal answered
                while True:  # the file beside it has to grow in the end
                    assert store.add(1) == answered
                    answered += 1

            with pytest.raises(StoreAway, match="full") as caught:
                add_until_it_fails()
            assert not isinstance(caught.value, InDoubt)
            with pytest.raises(StoreAway, match="full"):
                store.probe()
            text = refused(path)
            assert "full" in text
            assert text.endswith("; free some space")
            ballast.unlink()
            assert store.probe() == answered
            assert store.add(1) == answered
        assert total_in_file(path) == str(answered + 1)


class FaultyConnection(sqlite3.Connection):
    """A connection whose next replacements of the total fail as told: (error code, made first)."""

    faults: list[tuple[int, bool]]

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        if sql == sqlite_store._REPLACE and self.faults:
            code, made = self.faults.pop(0)
            if made:
                super().execute(sql, parameters)
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = code
            raise error
        return super().execute(sql, parameters)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """What goes wrong with every connection that is opened from now on."""
    plan: list[tuple[int, bool]] = []
    monkeypatch.setattr(FaultyConnection, "faults", plan, raising=False)
    connect = partial(sqlite3.connect, factory=FaultyConnection)
    monkeypatch.setattr(sqlite3, "connect", connect)
    return plan


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_WRITE, 10])
@pytest.mark.parametrize("made", [False, True])
def test_an_addition_in_doubt_is_made_once(
    faults: list[tuple[int, bool]], path: str, code: int, made: bool
) -> None:
    with closing(make_store(path, 40)) as store:
        store.add(1)
        faults += [(code, made)]
        with pytest.raises(InDoubt):
            store.add(5)
        assert total_in_file(path) == ("46" if made else "41")
        assert store.settle() == 41
        assert total_in_file(path) == "46"
        assert store.add(1) == 46


def test_nobody_adds_while_an_addition_is_in_doubt(
    faults: list[tuple[int, bool]], path: str
) -> None:
    with closing(make_store(path)) as store:
        faults += [(sqlite3.SQLITE_IOERR_FSYNC, True), (sqlite3.SQLITE_IOERR_FSYNC, False)]
        with pytest.raises(InDoubt):
            store.add(5)
        assert not queue_is_free(path)
        assert store.settle() == 0
        assert queue_is_free(path)
        with pytest.raises(InDoubt):
            store.add(5)
        assert not queue_is_free(path)
        store.close()
        assert queue_is_free(path)


def test_settling_may_fail_and_is_asked_for_again(
    faults: list[tuple[int, bool]], path: str
) -> None:
    with closing(make_store(path)) as store:
        faults += [(sqlite3.SQLITE_IOERR_WRITE, False), (sqlite3.SQLITE_IOERR_FSYNC, True)]
        with pytest.raises(InDoubt):
            store.add(5)
        with pytest.raises(InDoubt):
            store.settle()
        assert store.settle() == 0
        assert store.total() == 5


def test_an_addition_in_doubt_over_a_total_changed_by_hand_stays_unknown(
    faults: list[tuple[int, bool]], path: str
) -> None:
    with closing(make_store(path)) as store:
        faults += [(sqlite3.SQLITE_IOERR_WRITE, False)]
        with pytest.raises(InDoubt):
            store.add(5)
        run_sql(path, "UPDATE counter SET total = 1000")
        assert store.settle() is None
        assert queue_is_free(path)
        assert store.add(1) == 1000


@pytest.mark.parametrize(
    "code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR_SHMMAP]
)
def test_a_failure_before_anything_is_written_leaves_no_doubt(
    faults: list[tuple[int, bool]], path: str, code: int
) -> None:
    with closing(make_store(path)) as store:
        faults += [(code, False)]
        with pytest.raises(StoreAway) as caught:
            store.add(5)
        assert not isinstance(caught.value, InDoubt)
        assert queue_is_free(path)
        assert store.add(1) == 0


def test_a_store_that_was_closed_in_doubt_can_be_used_again(
    faults: list[tuple[int, bool]], path: str
) -> None:
    with closing(make_store(path)) as store:
        faults += [(sqlite3.SQLITE_IOERR_WRITE, False)]
        with pytest.raises(InDoubt):
            store.add(5)
        store.close()
        assert store.add(1) == 0


def test_a_file_is_marked_as_this_projects(path: str) -> None:
    make_store(path).close()
    assert run_sql(path, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert run_sql(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
