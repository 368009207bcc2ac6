"""What a SQLite store promises, by real processes: killed at any instant, out of space, shared.

Each test has a long form with more of the same, which `make chaos` runs.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kit.faults import (
    LONG,
    Load,
    SmallDisk,
    check_integrity,
    expect_back,
    first_total,
    kept_total,
    kill_everything,
    let_pass,
    serve,
    serve_together,
    small_disk,
    stop_together,
)
from kit.harness import Command, wait_until
from protocol import encode_frame

pytestmark = [
    pytest.mark.timeout(900 if LONG else 120),
    pytest.mark.usefixtures("each_engine"),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def test_nothing_answered_is_lost_when_every_process_is_killed_at_once(tmp_path: Path) -> None:
    kills = 50 if LONG else 5
    database = tmp_path / "counter.db"
    pick = random.Random(1)
    with Load(20) as load:
        for _ in range(kills):
            with serve(f"sqlite:{database}") as server:
                total = first_total(server)
                load.check(total)
                with server.connect() as peer:
                    assert peer.add(0) == total
                load.resume(server.address)
                load.go_on()
                let_pass(pick.uniform(0, 0.2))
                kill_everything(server)
            load.pause()
    with serve(f"sqlite:{database}") as server:
        total = first_total(server)
        assert server.stop() == (total, 0)
    assert kept_total(database) == total
    load.check(total)
    check_integrity(database)
    load.show(f"SQLite, {kills} kills of every process", total)


def test_additions_wait_for_space_on_a_full_disk_and_go_on(disk: SmallDisk) -> None:
    outages = 20 if LONG else 3
    with serve(f"sqlite:{disk.database}", "--storeTimeout", "30s") as server:
        with Load(20, server.address) as load:
            for _ in range(outages):
                load.go_on()
                disk.fill()
                server.error_line_with("is away (database or disk is full)")
                before = kept_total(disk.database)
                with server.connect() as late:
                    late.send(encode_frame(7))
                    late.expect_silence(0.3)
                    assert kept_total(disk.database) == before
                    disk.empty()
                    load.note(7, late.totals(1)[0])
                expect_back(server)
        total, _ = server.stop()
        assert "is away" not in server.errors()
    load.check(total)
    assert total == load.answered
    assert not load.waits
    assert not load.sum(lambda books: books.refusals)
    check_integrity(disk.database)
    load.show(f"SQLite, disk full {outages} times", total)


def test_what_is_withdrawn_while_the_disk_is_full_is_never_counted(disk: SmallDisk) -> None:
    outages = 10 if LONG else 2
    with serve(f"sqlite:{disk.database}", "--storeTimeout", "1s") as server:
        with Load(20, server.address) as load:
            for _ in range(outages):
                load.go_on()
                closed = [len(books.waits) for books in load.books]
                disk.fill()
                server.error_line_with("is away (database or disk is full)")
                with server.connect() as late:
                    started = time.monotonic()
                    late.send(encode_frame(7))
                    late.expect_eof()
                    assert 1 <= time.monotonic() - started < 3
                wait_until(
                    lambda closed=closed: all(  # type: ignore[misc]
                        len(books.waits) > before
                        for books, before in zip(load.books, closed, strict=True)
                    ),
                    "every connection was closed",
                )
                disk.empty()
                expect_back(server)
        total, _ = server.stop()
        assert "is away" not in server.errors()
    load.check(total)
    assert total == load.answered
    assert min(load.waits) >= 1
    assert max(load.waits) < 3
    assert not load.sum(lambda books: books.resets)
    assert not load.sum(lambda books: books.refusals)
    check_integrity(disk.database)
    load.show(f"SQLite, disk full {outages} times, withdrawn after 1 s", total)


def test_a_server_stops_in_order_while_its_disk_is_full(disk: SmallDisk) -> None:
    arguments = ("--storeTimeout", "1h", "--drainTimeout", "1s")
    with serve(f"sqlite:{disk.database}", *arguments) as server:
        with Load(10, server.address) as load:
            load.go_on()
            disk.fill()
            server.error_line_with("is away (database or disk is full)")
            started = time.monotonic()
            server.signal(signal.SIGTERM)
            load.leave()
            total, _ = server.farewell()
            assert time.monotonic() - started < 3
    load.check(total)
    assert total == load.answered == kept_total(disk.database)


@pytest.mark.parametrize("by_link", [False, True])
def test_two_servers_on_one_file_share_one_total(tmp_path: Path, by_link: bool) -> None:
    file = tmp_path / "counter.db"
    link = tmp_path / "links" / "counter.db"
    link.parent.mkdir()
    link.symlink_to(file)
    starts = [partial(serve, f"sqlite:{path}") for path in (file, link if by_link else file)]
    with serve_together(*starts) as servers:
        addresses = [server.address for server in servers]
        with Load(200 if LONG else 40, *addresses, ones=True) as load:
            wait_until(lambda: all(books.totals for books in load.books), "each has its answer")
            let_pass(30 if LONG else 1)
        load.check_permutation()
        total = load.count()
        assert stop_together(servers) == {total}
        assert not any("is away" in server.errors() for server in servers)
    assert os.listdir(link.parent) == ["counter.db"]
    load.show("SQLite, two servers on one file", total)


def test_a_server_goes_on_from_what_it_printed_when_it_stopped(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 'counter.db'}"
    printed = 0
    with Load(10) as load:
        for _ in range(3):
            with serve(store) as server:
                assert first_total(server) == printed
                load.resume(server.address)
                load.go_on()
                server.signal(signal.SIGTERM)
                printed, _ = server.farewell()
            load.pause()
            load.check(printed)
    # Every reply of a drain arrives: what is not answered was not counted.
    assert printed == load.answered


def test_a_server_whose_folder_is_missing_says_so_in_one_line(tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 'missing' / 'counter.db'}"
    with Command("server.py", "--port", "0", "--store", store) as server:
        assert server.finish() == 1
        assert server.errors() == (
            f"server.py: cannot use {store.removeprefix('sqlite:')}: there is no such folder\n"
        )
        assert not server.output()
