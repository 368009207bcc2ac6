"""Each commit is applied once, whatever fails between two commands, is refused, lost or late."""

from __future__ import annotations

import itertools
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import redis as redis_py

from counter.options.values import parse_store
from counter.totals.redis import RedisStore
from counter.totals.redis_script import UNDONE
from counter.totals.store import InDoubt, StoreAway
from kit.counter_contract import TOP
from kit.faults import LONG
from kit.harness import ScriptedServer
from kit.redis_server import RedisServer, free_port

# The unprivileged user of the tests, and what the documents say that it needs.
USER = ("ACL", "SETUSER", "app")
COMMANDS = ["eval", "evalsha", "get", "set", "mset", "type", "ttl", "del", "expire"]


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        server.ask(*USER, "on", ">secret", "~counter", "~{counter}:*")
        server.ask(*USER, *(f"+{name}" for name in COMMANDS))
        yield server


def url_of(redis: RedisServer) -> str:
    return parse_store(redis.url(user="app", password="secret")).url


@pytest.fixture
def store(redis: RedisServer) -> Iterator[RedisStore]:
    """A store that may do what the documents say that it must, with a total of 40."""
    with closing(RedisStore(url_of(redis), "counter")) as store:
        store.check(40)
        yield store


def kept(redis: RedisServer) -> dict[bytes, bytes]:
    return {key: redis.ask("GET", key) for key in redis.ask("KEYS", "*")}


def total_in(redis: RedisServer) -> int:
    return int.from_bytes(redis.ask("GET", "counter")[8:16], "big")


def pack(number: int) -> bytes:
    return number.to_bytes(8, "big")


# What fails in the middle.

FAULTS: dict[str, tuple[list[Any], list[Any]]] = {
    **{
        f"-{name}": ([*USER, f"-{name}"], [*USER, f"+{name}"])
        for name in ("evalsha", "get", "mset")
    },
    "no key": ([*USER, "resetkeys"], [*USER, "~counter", "~{counter}:*"]),
    "no records": ([*USER, "resetkeys", "~counter"], [*USER, "~{counter}:*"]),
    "full": (["CONFIG", "SET", "maxmemory", 1], ["CONFIG", "SET", "maxmemory", 0]),
    "demoted": (["REPLICAOF", "127.0.0.1", 1], ["REPLICAOF", "NO", "ONE"]),
    "no replicas": (
        ["CONFIG", "SET", "min-replicas-to-write", 1],
        ["CONFIG", "SET", "min-replicas-to-write", 0],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused_changes_nothing_and_is_said_to_change_nothing(
    store: RedisStore, redis: RedisServer, fault: str
) -> None:
    break_it, mend_it = FAULTS[fault]
    assert store.add(1) == 40
    before = kept(redis)
    redis.ask(*break_it)
    for _ in range(3):
        with pytest.raises(StoreAway) as caught:
            store.add(5)
        assert not isinstance(caught.value, InDoubt), caught.value
        assert "NOTADDED" not in str(caught.value)
    assert kept(redis) == before
    redis.ask(*mend_it)
    assert store.add(5) == 41
    assert store.losses == 0


def test_a_record_that_cannot_be_let_expire_costs_no_addition(
    store: RedisStore, redis: RedisServer
) -> None:
    redis.ask(*USER, "-expire")
    assert [store.add(1), store.add(1)] == [40, 41]
    assert total_in(redis) == 42


def test_a_commit_writes_total_and_record_by_one_command(
    store: RedisStore, redis: RedisServer
) -> None:
    store.add(1)
    redis.ask("CONFIG", "RESETSTAT")
    store.add(1)
    stats = redis.ask("INFO", "commandstats")
    assert stats["cmdstat_mset"]["calls"] == stats["cmdstat_expire"]["calls"] == 1
    assert not {f"cmdstat_{name}" for name in ("set", "hset", "bitfield")} & set(stats)


def test_a_total_is_added_to_exactly_at_every_carry(store: RedisStore, redis: RedisServer) -> None:
    halves = [0, 1, 2**31, 2**32 - 1]
    numbers = [high * 2**32 + low for high in halves for low in halves]
    with redis_py.Redis(port=redis.port) as admin:
        for total, commits, amount in itertools.product(numbers, [2**32 - 1, 2**53 + 1], numbers):
            store._seen = 0
            admin.set("counter", b"counter1" + pack(total) + pack(commits))
            assert store.add(amount) == total
            after = b"counter1" + pack((total + amount) % TOP) + pack(commits + 1)
            assert admin.get("counter") == after


def test_an_addition_takes_the_keys_end_away(store: RedisStore, redis: RedisServer) -> None:
    redis.ask("EXPIRE", "counter", 1000)
    store.add(1)
    assert redis.ask("TTL", "counter") == -1


# Every order of everything that can happen to the commits of two writers.


class Lost(redis_py.ConnectionError):
    pass


class FaultyStore(RedisStore):
    """What happens to its next commit is `fault`; `admin` may do anything."""

    def __init__(self, url: str, admin: Any) -> None:
        super().__init__(url, "counter")
        self.admin = admin
        self.fault = "none"
        self.late: list[tuple[Any, ...]] = []

    def _ask(self, *command: Any) -> Any:
        if command[0] != "EVALSHA":
            return super()._ask(*command)
        fault, self.fault = self.fault, "none"
        if fault == "lost":
            raise Lost
        if fault == "late":
            self.late.append(command)
            raise Lost
        if fault.startswith("-"):
            with self.withdrawn(fault[1:]):
                return super()._ask(*command)
        reply = super()._ask(*command)
        if fault == "unanswered":
            raise Lost
        return reply

    @contextmanager
    def withdrawn(self, permission: str) -> Iterator[None]:
        self.admin.execute_command(*USER, f"-{permission}")
        try:
            yield
        finally:
            self.admin.execute_command(*USER, f"+{permission}")

    def deliver_late(self) -> None:
        """What was on the way to Redis arrives, and nobody waits for an answer."""
        if self.late:
            command = self.late.pop(0)
            with suppress(redis_py.ResponseError):  # NOTMINE where it is behind another
                self.admin.execute_command(*command)


class Books:
    """What two writers were told of their commits, each of which adds a power of two of its own."""

    def __init__(self, stores: list[FaultyStore]) -> None:
        self.stores = stores
        self.amounts = [0, 0]
        self.sent = 0
        self.answers: list[tuple[int, int]] = []  # total before, amount

    def act(self, who: int, fault: str) -> None:
        store = self.stores[who]
        store.fault = fault
        if store._doubted is None:
            amount = self.amounts[who] = 1 << self.sent
            self.sent += 1
            act: Callable[[], int | None] = partial(store.add, amount)
        else:
            act = store.settle
        try:
            before = act()
        except InDoubt:
            assert store._doubted is not None
        except StoreAway:
            assert store._doubted is None
        else:
            assert before is not None
            self.answers.append((before, self.amounts[who]))

    def finish(self) -> None:
        for who in (0, 1):
            self.act(who, "none")
            self.act(who, "none")
        for store in self.stores:
            while store.late:
                store.deliver_late()

    def check(self, value: bytes) -> None:
        end = 0
        for before, amount in sorted(self.answers):
            assert before == end
            end += amount
        total, commits = int.from_bytes(value[8:16], "big"), int.from_bytes(value[16:], "big")
        assert (total, commits) == (end, len(self.answers))


def test_two_writers_are_exact_under_every_order_of_faults(redis: RedisServer) -> None:
    redis.ask(*USER, "~*")
    faults = ("none", "lost", "late", "unanswered", "-mset", "-expire")
    steps: list[tuple[int, str]] = [(who, fault) for who in (0, 1) for fault in faults]
    steps += [(0, "deliver"), (1, "deliver")]
    with redis_py.Redis(port=redis.port) as admin:
        stores = [FaultyStore(url_of(redis), admin) for _ in (0, 1)]
        stores[0].check()
        for plan in itertools.product(steps, repeat=4 if LONG else 3):
            if plan[0][0]:  # the other writer first is the same
                continue
            admin.flushdb()
            for store in stores:
                store._take_identity()
                store._seen = 0
            books = Books(stores)
            try:
                for who, what in plan:
                    if what == "deliver":
                        stores[who].deliver_late()
                    else:
                        books.act(who, what)
                books.finish()
                books.check(admin.get("counter"))
            except AssertionError as error:
                raise AssertionError(f"{plan}: {books.answers}") from error
        for store in stores:
            assert store.losses == 0
            store.close()


# Two writers of one identity.


def copy_of(store: RedisStore, redis: RedisServer) -> RedisStore:
    """A writer as a restored copy of the machine has it."""
    copy = RedisStore(url_of(redis), "counter")
    copy._writer, copy._number, copy._seen = store._writer, store._number, store._seen
    copy._doubted = store._doubted
    return copy


@pytest.mark.parametrize("ahead", [1, 2, 12])
def test_nothing_is_answered_from_the_record_of_another_with_the_same_identity(
    store: RedisStore, redis: RedisServer, ahead: int
) -> None:
    store.add(1)
    with closing(copy_of(store, redis)) as copy:
        writer = store._writer
        assert [copy.add(10) for _ in range(ahead)] == [41 + 10 * done for done in range(ahead)]
        total = 41 + 10 * ahead
        with pytest.raises(StoreAway, match="same identity") as caught:
            store.add(5)
        assert not isinstance(caught.value, InDoubt)
        assert total_in(redis) == total
        assert store._writer != writer
        assert [store.add(5), copy.add(10), store.add(5)] == [total, total + 5, total + 15]
        assert (store.losses, copy.losses) == (0, 0)


def test_a_commit_in_doubt_is_not_settled_by_the_record_of_another(
    store: RedisStore, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(copy_of(store, redis)) as copy:
        with monkeypatch.context() as patch:
            patch.setattr(store, "_ask", lambda *_: (_ for _ in ()).throw(Lost()))
            with pytest.raises(InDoubt):
                store.add(5)
        assert copy.add(10) == 40
        assert store.settle() is None
        assert [store.add(5), copy.add(1)] == [50, 55]


def test_a_record_that_was_damaged_is_not_answered_from(
    store: RedisStore, redis: RedisServer
) -> None:
    store.add(1)
    redis.ask("SET", f"{{counter}}:writer:{store._writer}", "nonsense")
    with pytest.raises(StoreAway, match="identity"):
        store.add(5)
    assert store.add(5) == 41


# What an error reply says.


def add_where_the_answer_is(reply: bytes) -> StoreAway:
    """What a store makes of a reply to its commit."""

    def serve(sock: socket.socket) -> None:
        while sock.recv(65536):
            sock.sendall(reply)

    with ScriptedServer(serve) as server:
        with closing(RedisStore(f"redis://{server.address}/0", "counter")) as store:
            with pytest.raises(StoreAway) as caught:
                store.add(5)
            assert store._connection._sock is None
    return caught.value


@pytest.mark.parametrize("code", sorted(UNDONE - {"MOVED", "ASK", "NOTMINE"}))
def test_an_error_reply_of_redis_itself_leaves_no_doubt(code: str) -> None:
    error = add_where_the_answer_is(b"-%s what is wrong\r\n" % code.encode())
    assert not isinstance(error, InDoubt)
    assert str(error).endswith("what is wrong")


@pytest.mark.parametrize("code", ["MOVED", "ASK"])
def test_a_slot_that_moved_is_said(code: str) -> None:
    error = add_where_the_answer_is(b"-%s 3999 127.0.0.1:6381\r\n" % code.encode())
    assert not isinstance(error, InDoubt)
    assert re.fullmatch(f"{code} 3999 127.0.0.1:6381: the key is at another node.*", str(error))


@pytest.mark.parametrize(
    "reply",
    [
        b"-ERR upstream failure\r\n",
        b"-upstream failure\r\n",
        b"-ERR Connection timed out\r\n",
        b"+OK\r\n",
        b":24\r\n",
        b"*1\r\n$2\r\nno\r\n",
        b"$-1\r\n",
        b"$3\r\nabc\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"-MOVED nonsense\r\n",
    ],
)
def test_any_other_answer_leaves_doubt(reply: bytes) -> None:
    assert isinstance(add_where_the_answer_is(reply), InDoubt)


def test_a_redis_that_is_not_there_leaves_no_doubt() -> None:
    with closing(RedisStore(f"redis://127.0.0.1:{free_port()}/0", "counter")) as store:
        with pytest.raises(StoreAway) as caught:
            store.add(5)
        assert not isinstance(caught.value, InDoubt)


def test_each_commit_has_a_token_of_its_own(store: RedisStore, redis: RedisServer) -> None:
    store.add(1)
    name = f"{{counter}}:writer:{store._writer}"
    tokens = set()
    for _ in range(10):
        store.add(1)
        tokens.add(redis.ask("GET", name).split(b" ")[1])
    assert len(tokens) == 10
    assert uuid.UUID(store._writer)
