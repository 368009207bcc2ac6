"""What a Redis store promises, by real processes: Redis killed or paused, connections cut between
a commit and its reply, several servers on several machines.

Each test has a long form with more of the same, which `make chaos` runs.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial

import pytest

from kit.fault_proxy import FaultProxy
from kit.faults import (
    LONG,
    Load,
    expect_back,
    first_total,
    let_pass,
    machines,
    serve,
    serve_together,
    stop_together,
)
from kit.harness import Command, ServerCommand, children, peers, wait_until
from kit.redis_server import RedisServer
from protocol import encode_frame

pytestmark = [
    pytest.mark.timeout(900 if LONG else 120),
    pytest.mark.usefixtures("each_engine"),
]


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """One whose answers survive its death."""
    with RedisServer(appendonly=True, appendfsync="always") as redis:
        yield redis


def test_every_addition_is_answered_and_counted_once_though_redis_is_killed(
    redis: RedisServer,
) -> None:
    kills = 10 if LONG else 2
    pick = random.Random(1)
    with serve(redis.url()) as server:
        with Load(20, server.address) as load:
            for _ in range(kills):
                load.go_on()
                let_pass(pick.uniform(0, 0.2))
                redis.kill()
                server.error_line_with("is away (")
                redis.start()
                expect_back(server)
            load.go_on()
        total, _ = server.stop()
        assert "is away" not in server.errors()
    load.check(total)
    assert not load.waits
    assert total == load.answered
    with serve(redis.url()) as server:
        assert first_total(server) == total
    load.show(f"Redis killed {kills} times", total)


def test_nobody_is_closed_while_redis_pauses_for_less_than_the_timeout(redis: RedisServer) -> None:
    with serve(redis.url(), "--storeTimeout", "30s") as server:
        with Load(20, server.address) as load:
            load.go_on()
            redis.pause()
            server.error_line_with("is away (no answer for 1 s)")
            let_pass(10 if LONG else 1)
            redis.resume()
            expect_back(server)
            load.go_on()
        total, _ = server.stop()
        assert "is away" not in server.errors()
    load.check(total)
    assert not load.waits
    assert total == load.answered
    load.show("Redis paused, 30 s of patience", total)


def test_connections_close_unanswered_while_redis_pauses_for_longer(redis: RedisServer) -> None:
    pauses = 5 if LONG else 1
    with serve(redis.url(), "--storeTimeout", "1s") as server:
        with Load(20, server.address) as load:
            for _ in range(pauses):
                load.go_on()
                redis.pause()
                server.error_line_with("is away (no answer for 1 s)")
                with server.connect() as late:
                    started = time.monotonic()
                    late.send(encode_frame(7))
                    late.expect_eof()
                    assert 1 <= time.monotonic() - started < 3
                let_pass(8 if LONG else 0)
                redis.resume()
                expect_back(server)
            load.go_on()
        total, _ = server.stop()
        assert "is away" not in server.errors()
    load.check(total)
    assert len(load.waits) >= 20 * pauses
    assert min(load.waits) >= 1
    assert max(load.waits) < 3, sorted(load.waits)[-20:]
    assert not load.sum(lambda books: books.resets)
    assert not load.sum(lambda books: books.refusals)
    load.show(f"Redis paused {pauses} times, 1 s of patience", total)


def test_what_waits_behind_a_withdrawn_commit_is_not_counted_later(redis: RedisServer) -> None:
    """The first addition of a connection is part of a commit, the second never is."""
    with serve(redis.url(), "--storeTimeout", "1s") as server:
        with server.connect() as peer:
            peer.add(0)  # its process is connected to Redis
            redis.pause()
            peer.send(encode_frame(1))
            peer.expect_silence(0.7)
            peer.send(encode_frame(100))
            peer.expect_eof()
            server.error_line_with("is away (no answer for 1 s)")
            redis.resume()
            expect_back(server)
        assert server.stop()[0] == 1


def test_each_addition_waits_for_its_own_time(redis: RedisServer) -> None:
    with serve(redis.url(), "--storeTimeout", "2s", "--processes", "1") as server:
        with peers(server.address, 3) as clients:
            clients[0].add(0)
            redis.pause()
            sent_at = []
            for number, peer in enumerate(clients):
                sent_at.append(time.monotonic())
                peer.send(encode_frame(10**number))
                peer.expect_silence(0.3)
            for moment, peer in zip(sent_at, clients, strict=True):
                peer.expect_eof()
                assert 2 <= time.monotonic() - moment < 3
            server.error_line_with("is away (no answer for 1 s)")
            redis.resume()
            expect_back(server)
        assert server.stop()[0] == 1


def test_a_commit_whose_reply_is_lost_is_counted_once(redis: RedisServer) -> None:
    rounds = 50 if LONG else 10
    pick = random.Random(1)
    with FaultProxy(redis.port) as proxy, serve(proxy.url) as server:
        with Load(20, server.address) as load:
            for _ in range(rounds):
                load.go_on(pick.randrange(1, 50))
                wanted = proxy.cuts + pick.choice((1, 1, 3))
                proxy.cut(wanted - proxy.cuts)
                wait_until(lambda wanted=wanted: proxy.cuts == wanted, "the reply is lost")  # type: ignore[misc]
            load.go_on()
        total, _ = server.stop()
    load.check(total)
    assert not load.waits
    assert total == load.answered
    load.show(f"{proxy.cuts} replies of Redis lost", total)


def test_a_commit_that_arrives_after_it_was_asked_for_again_is_counted_once(
    redis: RedisServer,
) -> None:
    rounds = 50 if LONG else 10
    pick = random.Random(1)
    with FaultProxy(redis.port) as proxy, serve(proxy.url) as server:
        with Load(20, server.address) as load:
            for number in range(1, rounds + 1):
                load.go_on(pick.randrange(1, 50))
                proxy.hold(behind=pick.choice((0, 1, 10)))
                wait_until(lambda number=number: proxy.duplicates == number, "it has arrived")  # type: ignore[misc]
            load.go_on()
        total, _ = server.stop()
    load.check(total)
    assert not load.waits
    assert total == load.answered
    load.show(f"{proxy.duplicates} commits delivered late for the second time", total)


def test_a_permission_that_is_withdrawn_for_a_while_loses_and_repeats_nothing(
    redis: RedisServer,
) -> None:
    rounds = 20 if LONG else 2
    redis.ask("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all")
    with serve(redis.url(user="app", password="secret"), "--storeTimeout", "30s") as server:
        with Load(20, server.address) as load:
            for _ in range(rounds):
                load.go_on()
                redis.ask("ACL", "SETUSER", "app", "-expire")
                load.go_on()
                redis.ask("ACL", "SETUSER", "app", "+expire", "-mset")
                server.error_line_with("is away (")
                redis.ask("ACL", "SETUSER", "app", "+mset")
                expect_back(server)
            load.go_on()
        total, _ = server.stop()
    load.check(total)
    assert not load.waits
    assert total == load.answered
    load.show(f"a permission withdrawn {rounds} times", total)


def test_three_servers_on_one_redis_share_one_total(redis: RedisServer) -> None:
    start = partial(serve, redis.url())
    with serve_together(start, start, start) as servers:
        check_one_total(servers, 300 if LONG else 60, "Redis, three servers")


def test_three_servers_on_three_machines_share_one_total(redis: RedisServer) -> None:
    with machines(3) as made:
        redis.ask("CONFIG", "SET", "bind", " ".join(["127.0.0.1", *(one.ours for one in made)]))
        redis.ask("CONFIG", "SET", "protected-mode", "no")
        starts = [
            partial(
                serve,
                f"redis://{one.ours}:{redis.port}/0",
                "--host",
                one.address,
                inside=one.inside,
            )
            for one in made
        ]
        with serve_together(*starts) as servers:
            check_one_total(servers, 300 if LONG else 100, "Redis, three machines")


def check_one_total(servers: Sequence[ServerCommand], connections: int, what: str) -> None:
    addresses = [server.address for server in servers]
    with Load(connections, *addresses, ones=True) as load:
        wait_until(lambda: all(books.totals for books in load.books), "each has its answer")
        let_pass(20 if LONG else 1)
    load.check_permutation()
    total = load.count()
    assert stop_together(servers) == {total}
    load.show(what, total)


@pytest.mark.parametrize("fault", ["paused", "killed"])
def test_a_server_stops_in_order_while_redis_is_away(redis: RedisServer, fault: str) -> None:
    with serve(redis.url(), "--storeTimeout", "1h", "--drainTimeout", "1s") as server:
        with Load(10, server.address) as load:
            load.go_on()
            getattr(redis, {"paused": "pause", "killed": "kill"}[fault])()
            server.error_line_with("is away (")
            started = time.monotonic()
            server.signal(signal.SIGTERM)
            load.leave()
            total, _ = server.farewell()
            took_s = time.monotonic() - started
        assert "cannot be read at the end" in server.errors()
    # What is in the last commit is in doubt, and so not in what the server was told.
    load.check(total)
    assert total == load.answered
    # A Redis that gives no answer at all is waited for, once, for what is printed.
    assert took_s < (8 if fault == "paused" else 3)


def test_a_server_goes_on_from_what_it_printed_when_it_stopped(redis: RedisServer) -> None:
    printed = 0
    with Load(10) as load:
        for _ in range(3):
            with serve(redis.url()) as server:
                assert first_total(server) == printed
                load.resume(server.address)
                load.go_on()
                server.signal(signal.SIGTERM)
                printed, _ = server.farewell()
            load.pause()
            load.check(printed)
            redis.kill()
            redis.start()
    # Every reply of a drain arrives: what is not answered was not counted.
    assert printed == load.answered


def test_a_server_whose_redis_is_away_says_so_in_one_line() -> None:
    # No free port: one of the local range may be the very one that the connection gets for itself.
    store = "redis://127.0.0.1:1/0"
    with Command("server.py", "--port", "0", "--store", store) as server:
        assert server.finish() == 1
        (line,) = server.errors().splitlines()
        assert line.startswith(f"server.py: cannot use {store} key 'counter': ")
        assert "refused" in line
        assert not server.output()


def test_a_server_whose_redis_gives_no_answer_says_so_in_one_line(redis: RedisServer) -> None:
    redis.pause()
    arguments = ("--port", "0", "--store", redis.url(), "--storeTimeout", "1s")
    with Command("server.py", *arguments) as server:
        assert server.finish() == 1
        (line,) = server.errors().splitlines()
        assert line == (
            f"server.py: cannot use {redis.url()}: no answer within 1 s; --storeTimeout is 1s"
        )
        assert not server.output()


def test_a_process_that_is_killed_while_redis_pauses_is_replaced_and_recovers(
    redis: RedisServer,
) -> None:
    rounds = 5 if LONG else 1
    with serve(redis.url()) as server:
        with Load(20, server.address) as load:
            for _ in range(rounds):
                load.go_on()
                redis.pause()
                server.error_line_with("is away (no answer for 1 s)")
                before = children(server.process.pid)
                os.kill(before[0], signal.SIGKILL)
                server.error_line_with("was killed by signal 9 and is replaced")
                wait_until(
                    lambda before=before: (  # type: ignore[misc]
                        len(children(server.process.pid)) == 2
                        and children(server.process.pid) != before
                    ),
                    "it is replaced",
                )
                let_pass(1.5)  # so that those that live have noticed by themselves
                redis.resume()
                server.error_line_with("is back after")
                load.go_on()
        total, _ = server.stop()
    load.check(total)
    load.show(f"a process killed {rounds} times while Redis is paused", total)
