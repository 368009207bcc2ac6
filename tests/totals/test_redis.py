"""The total in Redis: the contract of all counters, what it refuses, says and notices."""

from __future__ import annotations

import socket
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pytest

from counter.options.values import StoreAddress, parse_store
from counter.processes.child import ask_child
from counter.totals import redis as redis_store
from counter.totals.counter import Counter
from counter.totals.redis import MARK, RedisStore
from counter.totals.redis_script import SCRIPT_HASH
from counter.totals.store import Found, InDoubt, StoreAway, StoreError
from kit.counter_contract import TOP, SharedCounterContract
from kit.harness import PATIENCE_S, ScriptedServer, wait_until
from kit.redis_server import RedisServer, free_port

# What a new connection says before anything else, its name.
NAMING = b"*3\r\n$6\r\nCLIENT\r\n"

VALUE = struct.Struct(">8sQQ")  # mark, total, commits: what the key holds


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """One Redis for all tests that do nothing to it but in a key of their own."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis to which a test may do anything."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def key() -> str:
    return f"counter-{uuid.uuid4().hex}"


def open_at(address: str | StoreAddress) -> RedisStore:
    parsed = parse_store(address) if isinstance(address, str) else address
    return RedisStore(parsed.url, parsed.key)


@contextmanager
def opened(redis: RedisServer, key: str = "counter") -> Iterator[RedisStore]:
    with closing(open_at(redis.url(key))) as store:
        yield store


def check(
    redis: RedisServer, key: str = "counter", set_total: int | None = None, force: bool = False
) -> Found:
    with opened(redis, key) as store:
        return store.check(set_total, force)


def refused(url: str, set_total: int | None = None, force: bool = False) -> str:
    """What check() says of a Redis or key that it does not take."""
    with closing(open_at(url)) as store:
        with pytest.raises(StoreError) as caught:
            store.check(set_total, force)
    return str(caught.value)


class TestRedisStore(SharedCounterContract):
    redis: RedisServer

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _take_redis(cls, redis: RedisServer) -> None:
        cls.redis = redis

    def share_counter(self, start: int) -> Callable[[], Counter]:
        key = uuid.uuid4().hex
        check(self.redis, key, set_total=start)
        return lambda: open_at(self.redis.url(key))


@pytest.mark.parametrize("parameter", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_a_file_of_tls_that_cannot_be_read_is_named(parameter: str) -> None:
    said = refused(f"rediss://127.0.0.1:{free_port()}/0?{parameter}=/nowhere/x.pem")
    assert said.endswith(f": {parameter} /nowhere/x.pem: no such file or directory")


def test_a_key_log_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", "/nowhere/keys")
    port = free_port()
    assert "SSLKEYLOGFILE /nowhere/keys: no such file" in refused(f"rediss://127.0.0.1:{port}/0")
    assert "SSLKEYLOGFILE" not in refused(f"redis://127.0.0.1:{port}/0")


# What check() finds.


def test_a_new_key_begins_at_nothing(redis: RedisServer, key: str) -> None:
    with opened(redis, key) as store:
        found = store.check()
        assert (found.total, found.is_new, found.warnings) == (0, True, ())
        assert store.add(5) == 0
        assert store.add(1) == 5


def test_a_new_key_begins_at_what_it_is_told(redis: RedisServer, key: str) -> None:
    assert check(redis, key, TOP - 1).total == TOP - 1
    with opened(redis, key) as store:
        assert store.add(2) == TOP - 1
        assert store.total() == 1


def test_a_key_that_counted_goes_on(redis: RedisServer, key: str) -> None:
    check(redis, key, 41)
    with opened(redis, key) as store:
        store.add(1)
    found = check(redis, key)
    assert (found.total, found.is_new) == (42, False)


def test_a_total_is_not_set_over_another(redis: RedisServer, key: str) -> None:
    check(redis, key, 1234567)
    assert refused(redis.url(key), set_total=5000) == (
        f"cannot use redis://{redis.address}/0 key {key!r}: "
        "the total is 1,234,567 and --setTotal would make it 5,000; "
        "leave --setTotal out to go on from there, or add --force to overwrite it"
    )
    assert check(redis, key).total == 1234567


def test_force_sets_a_total_over_another_and_is_no_loss(redis: RedisServer, key: str) -> None:
    with opened(redis, key) as store:
        store.check(1234567)
        store.add(1)
        found = check(redis, key, TOP - 2, force=True)
        assert (found.total, found.is_new) == (TOP - 2, False)
        assert store.add(3) == TOP - 2
        assert store.total() == 1
        assert store.losses == 0


def test_a_check_leaves_nothing_but_the_total(own_redis: RedisServer) -> None:
    check(own_redis)
    assert own_redis.ask("KEYS", "*") == [b"counter"]


def test_the_key_is_counter_unless_the_url_names_another(own_redis: RedisServer) -> None:
    with closing(open_at(own_redis.url())) as store:
        store.check(5)
    with closing(open_at(own_redis.url("a b/ä?&#%"))) as store:
        store.check(6)
    with closing(open_at(own_redis.url("counter", db=3))) as store:
        store.check(7)
    assert VALUE.unpack(own_redis.ask("GET", "counter")) == (MARK, 5, 0)
    assert VALUE.unpack(own_redis.ask("GET", "a b/ä?&#%")) == (MARK, 6, 0)
    assert VALUE.unpack(own_redis.ask("GET", "counter", db=3)) == (MARK, 7, 0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisServer]:
    """A cluster of one node: it refuses a script whose keys are not of one hash slot."""
    with RedisServer(cluster_enabled="yes", cluster_port=str(free_port())) as server:
        server.ask("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_until(
            lambda: b"cluster_state:ok" in server.ask("CLUSTER", "INFO"), "the cluster is ready"
        )
        yield server


@pytest.mark.parametrize("key", ["counter", "{user1000}:visits", "visits:{user1000}", "a:{b}:c"])
def test_all_keys_of_a_total_share_its_hash_slot(cluster: RedisServer, key: str) -> None:
    with opened(cluster, key) as store:
        assert store.check(40).total == 40
        assert store.add(1) == 40
    assert VALUE.unpack(cluster.ask("GET", key))[1] == 41


def test_the_record_of_a_writer_ends_by_itself(own_redis: RedisServer) -> None:
    check(own_redis)
    with opened(own_redis) as store:
        store.add(1)
        (record,) = set(own_redis.ask("KEYS", "*")) - {b"counter"}
        assert record.startswith(b"{counter}:writer:")
        assert redis_store.SETTLE_WITHIN_S < own_redis.ask("TTL", record) <= 24 * 3600


# What it says it survives, and its warnings.


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"appendonly": True, "appendfsync": "always"}, "power loss"),
        ({"appendonly": True, "appendfsync": "everysec"}, "last second or two"),
        ({"appendonly": True, "appendfsync": "no"}, "what the kernel has written"),
        ({"save": "3600 1"}, "what its last snapshot holds"),
        ({}, "nothing but Redis' own life"),
    ],
)
def test_what_an_addition_survives_is_what_redis_is_set_to(
    server: dict[str, Any], said: str
) -> None:
    with RedisServer(**server) as redis:
        assert said in check(redis).survives


def test_a_redis_that_does_not_tell_its_settings_survives_unknown_things(
    own_redis: RedisServer,
) -> None:
    own_redis.ask("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "-config")
    with closing(open_at(own_redis.url(user="app", password="secret"))) as store:
        found = store.check()
        assert "unknown" in found.survives
        assert found.warnings == ()
        assert store.add(1) == 0


def test_a_redis_that_does_not_tell_its_version_is_tried(own_redis: RedisServer) -> None:
    own_redis.ask("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "-info")
    with closing(open_at(own_redis.url(user="app", password="secret"))) as store:
        assert store.check().total == 0


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_redis_that_throws_keys_away_is_warned_of(own_redis: RedisServer, policy: str) -> None:
    own_redis.ask("CONFIG", "SET", "maxmemory-policy", policy)
    (warning,) = check(own_redis).warnings
    assert policy in warning
    assert "noeviction" in warning


def test_a_key_that_expires_is_warned_of(redis: RedisServer, key: str) -> None:
    check(redis, key)
    redis.ask("EXPIRE", key, 1000)
    (warning,) = check(redis, key).warnings
    assert "expires" in warning
    assert "PERSIST" in warning
    redis.ask("PERSIST", key)
    assert check(redis, key).warnings == ()


# What check() refuses.


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (["RPUSH", "{}", "1"], "list"),
        (["HSET", "{}", "total", "1"], "hash"),
        (["SET", "{}", ""], "string"),
        (["SET", "{}", "-42"], "string"),
        (["SET", "{}", "042"], "string"),
        (["SET", "{}", "4.2"], "string"),
        (["SET", "{}", str(TOP)], "string"),
        (["SET", "{}", MARK + bytes(15)], "string"),
        (["SET", "{}", b"counter2" + bytes(16)], "string"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_key_that_holds_something_else_is_left_as_it_is(
    redis: RedisServer, key: str, command: list[Any], kind: str, force: bool
) -> None:
    redis.ask(*[key if part == "{}" else part for part in command])
    before = redis.ask("DUMP", key)
    text = refused(redis.url(key), 5, force)
    assert f"holds a {kind} that is no total of this program" in text
    assert "?key=" in text
    assert redis.ask("DUMP", key) == before


@pytest.mark.parametrize("number", [0, 42, 2**63 - 1, TOP - 1])
def test_how_to_go_on_from_a_plain_number_is_said(
    redis: RedisServer, key: str, number: int
) -> None:
    """What INCR kept until this program is to take over."""
    redis.ask("SET", key, number)
    text = refused(redis.url(key), 5, force=True)
    said = f"--setTotal {number}"
    assert f"holds the plain number {number}, as INCR keeps it" in text
    assert text.endswith(f"name another key, as in ?key={key}-total, and start once with {said}")
    assert redis.ask("GET", key) == str(number).encode()
    with opened(redis, f"{key}-total") as store:
        assert store.check(number).total == number
        assert store.add(1) == number


def test_where_nobody_listens_the_address_is_said_without_the_password() -> None:
    text = refused(f"redis://user:hunter2@127.0.0.1:{free_port()}/0?key=k")
    assert text.startswith("cannot use redis://user:***@127.0.0.1:")
    assert "refused" in text
    assert "hunter2" not in text


@pytest.mark.parametrize("password", ["", "hunter2", "hunter2@/:"])
def test_a_password_is_never_shown(password: str) -> None:
    with RedisServer(password="right") as redis:
        address = redis.url("k", password=password) if password else f"redis://{redis.address}/0"
        text = refused(address)
        assert "hunter2" not in text
        assert "assword" in text or "uthentication" in text
        with closing(open_at(redis.url("k"))) as store:
            assert store.check().total == 0


def test_a_user_who_may_not_write_the_key_is_refused(own_redis: RedisServer) -> None:
    own_redis.ask("ACL", "SETUSER", "app", "on", ">secret", "~other*", "+@all")
    text = refused(own_redis.url("k", user="app", password="secret"))
    assert "secret" not in text
    assert "permission" in text.lower() or "key" in text


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


class FakeRedis:
    """As much of Redis as check() and an addition need, in Python; `ScriptedServer` runs it.

    A subclass does wrongly what a test is about.
    """

    version = "7.0.0"

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.records: dict[bytes, tuple[bytes, bytes]] = {}

    def serve(self, sock: socket.socket) -> None:
        with sock.makefile("rb") as stream:
            while command := self.read(stream):
                sock.sendall(self.reply(*command))

    def read(self, stream: Any) -> list[bytes]:
        """A command: `*COUNT`, then `$LENGTH` and the bytes of each part."""
        count = stream.readline()
        return [self.read_part(stream) for _ in range(int(count[1:] or 0))]

    def read_part(self, stream: Any) -> bytes:
        length = int(stream.readline()[1:])
        return bytes(stream.read(length + 2)[:length])

    def reply(self, name: bytes, *arguments: bytes) -> bytes:
        handler = getattr(self, f"on_{name.decode().lower()}", None)
        if handler is None:
            return b"+OK\r\n"
        answer: bytes = handler(*arguments)
        return answer

    def on_info(self, _section: bytes) -> bytes:
        return bulk(f"# Server\r\nredis_version:{self.version}\r\n".encode())

    def on_type(self, key: bytes) -> bytes:
        return b"+string\r\n" if key in self.values else b"+none\r\n"

    def on_get(self, key: bytes) -> bytes:
        return bulk(self.values[key])

    def on_set(self, key: bytes, value: bytes, *_how: bytes) -> bytes:
        self.values[key] = value
        return b"+OK\r\n"

    def on_ttl(self, key: bytes) -> bytes:
        return b":1000\r\n" if key in self.records else b":-1\r\n"

    def on_config(self, *_arguments: bytes) -> bytes:
        return b"-ERR unknown command 'CONFIG'\r\n"

    def on_evalsha(self, _script: bytes, _keys: bytes, key: bytes, *arguments: bytes) -> bytes:
        record, number, token, high, low, _life = arguments
        last, answer = self.records.get(record, (b"", b""))
        if last == number + token:
            return bulk(answer)
        before = self.values[key]
        mark, total, commits = VALUE.unpack(before)
        amount = int(high) * 2**32 + int(low)
        self.values[key] = VALUE.pack(mark, self.sum(total, amount), commits + 1)
        self.records[record] = number + token, before
        return bulk(before)

    def sum(self, total: int, amount: int) -> int:
        return (total + amount) % TOP


class OldRedis(FakeRedis):
    version = "6.0.16"


class InFloats(FakeRedis):
    """Adds doubles, as scripts do."""

    def sum(self, total: int, amount: int) -> int:
        return int(float(total) + amount) % TOP


class Saturating(FakeRedis):
    """Does not wrap."""

    def sum(self, total: int, amount: int) -> int:
        return min(total + amount, TOP - 1)


class SignedOnly(FakeRedis):
    """Ends at 2^63, as INCRBY does."""

    def sum(self, total: int, amount: int) -> int:
        return min(total + amount, 2**63 - 1)


class WithoutRecords(FakeRedis):
    """Applies a commit as often as it is asked for."""

    def on_evalsha(self, *arguments: bytes) -> bytes:
        self.records.clear()
        return super().on_evalsha(*arguments)


class TellsTheTotalAfter(FakeRedis):
    """Gives back the value after the commit instead of the one before."""

    def on_evalsha(self, script: bytes, keys: bytes, key: bytes, *arguments: bytes) -> bytes:
        super().on_evalsha(script, keys, key, *arguments)
        return bulk(self.values[key])


class KeepsRecords(FakeRedis):
    """Has records stay for ever, as a Redis does that refuses EXPIRE."""

    def on_ttl(self, _key: bytes) -> bytes:
        return b":-1\r\n"


def check_fake(fake: FakeRedis) -> Found:
    with ScriptedServer(fake.serve) as server:
        with closing(open_at(f"redis://{server.address}/0")) as store:
            return store.check(5)


def test_a_server_that_speaks_as_redis_does_is_as_good() -> None:
    found = check_fake(FakeRedis())
    assert (found.total, found.is_new) == (5, True)
    assert "unknown" in found.survives


def test_a_redis_that_is_too_old_is_refused() -> None:
    with pytest.raises(StoreError, match=r"it is Redis 6\.0\.16; 6\.2 or newer is needed"):
        check_fake(OldRedis())


@pytest.mark.parametrize(
    "fake", [InFloats, SignedOnly, Saturating, WithoutRecords, TellsTheTotalAfter]
)
def test_a_server_that_does_not_add_exactly_is_refused(fake: type[FakeRedis]) -> None:
    server = fake()
    with pytest.raises(StoreError, match=r"it does not add 1 to \d+ exactly"):
        check_fake(server)
    assert b"counter" not in server.values


def test_a_redis_that_keeps_records_for_ever_is_refused() -> None:
    with pytest.raises(StoreError, match="would stay for ever: EXPIRE is refused"):
        check_fake(KeepsRecords())


# While it is used.


class Relay:
    """Passes commands and replies between a store and Redis; cuts the connection when told to.

    `redis` may be changed to another, to which new connections lead, as after a failover.
    """

    def __init__(self, redis: RedisServer) -> None:
        self.redis = redis
        self.cut_before = threading.Event()  # the next command is not passed on
        self.cut_after = threading.Event()  # the next reply is not passed on
        self.server = ScriptedServer(self.pass_on)

    def pass_on(self, sock: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self.redis.port), PATIENCE_S) as upstream:
            while command := sock.recv(65536):
                to_be_cut = not command.startswith(NAMING)
                if to_be_cut and self.cut_before.is_set():
                    self.cut_before.clear()
                    return
                upstream.sendall(command)
                reply = upstream.recv(65536)
                if to_be_cut and self.cut_after.is_set():
                    self.cut_after.clear()
                    return
                sock.sendall(reply)


@pytest.fixture
def relay(redis: RedisServer) -> Iterator[Relay]:
    relay = Relay(redis)
    with relay.server:
        yield relay


@pytest.fixture
def store(relay: Relay, key: str) -> Iterator[RedisStore]:
    """A store with a total of 40, which reaches Redis through the relay."""
    with closing(open_at(f"redis://{relay.server.address}/0?key={key}")) as store:
        store.check(40)
        assert store.add(0) == 40
        yield store


@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
def test_an_addition_whose_reply_was_cut_is_applied_once(
    store: RedisStore, relay: Relay, redis: RedisServer, key: str, cut: str
) -> None:
    getattr(relay, cut).set()
    with pytest.raises(InDoubt):
        store.add(5)
    assert check(redis, key).total == (40 if cut == "cut_before" else 45)
    assert store.settle() == 40
    assert check(redis, key).total == 45
    assert store.add(1) == 45
    assert store.losses == 0


def test_an_addition_may_be_asked_for_many_times(store: RedisStore, relay: Relay) -> None:
    relay.cut_after.set()
    with pytest.raises(InDoubt):
        store.add(5)
    for cut in (relay.cut_before, relay.cut_after, relay.cut_after):
        cut.set()
        with pytest.raises(InDoubt):
            store.settle()
    assert store.settle() == 40
    assert store.total() == 45


def test_an_answer_that_was_cut_is_the_same_though_others_added_since(
    store: RedisStore, relay: Relay, redis: RedisServer, key: str
) -> None:
    relay.cut_after.set()
    with pytest.raises(InDoubt):
        store.add(5)
    with opened(redis, key) as other:
        assert other.add(1000) == 45
    assert store.settle() == 40
    assert store.add(1) == 1045
    assert store.losses == 0


def test_an_addition_too_long_in_doubt_stays_unknown(
    store: RedisStore, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis may have forgotten its record, and would apply it again."""
    relay.cut_after.set()
    with pytest.raises(InDoubt):
        store.add(5)
    monkeypatch.setattr(redis_store, "SETTLE_WITHIN_S", -1.0)
    assert store.settle() is None
    assert store.add(1) == 45


def test_a_store_that_was_closed_in_doubt_can_be_used_again(
    store: RedisStore, relay: Relay
) -> None:
    relay.cut_after.set()
    with pytest.raises(InDoubt):
        store.add(5)
    store.close()
    assert store.add(1) == 45


def test_a_probe_that_was_cut_is_an_outage_without_doubt(store: RedisStore, relay: Relay) -> None:
    relay.cut_after.set()
    with pytest.raises(StoreAway) as caught:
        store.probe()
    assert not isinstance(caught.value, InDoubt)
    assert store.probe() == 40


@pytest.fixture
def primary() -> Iterator[RedisServer]:
    with RedisServer(repl_diskless_sync_delay="0") as primary:
        yield primary


@pytest.fixture
def replica(primary: RedisServer) -> Iterator[RedisServer]:
    with RedisServer(repl_diskless_sync_delay="0") as replica:
        replica.ask("REPLICAOF", "127.0.0.1", primary.port)
        yield replica


def fail_over(relay: Relay, old: RedisServer, new: RedisServer) -> None:
    """The old primary lives on as a replica, to which connections stay open."""
    offset = old.ask("INFO", "replication")["master_repl_offset"]
    wait_until(
        lambda: new.ask("INFO", "replication").get("slave_repl_offset", 0) >= offset,
        "the replica has everything",
    )
    new.ask("REPLICAOF", "NO", "ONE")
    old.ask("REPLICAOF", "127.0.0.1", new.port)
    relay.redis = new


def test_a_primary_that_was_demoted_is_left_for_the_new_one(
    primary: RedisServer, replica: RedisServer
) -> None:
    relay = Relay(primary)
    with relay.server, closing(open_at(f"redis://{relay.server.address}/0")) as store:
        store.check(40)
        fail_over(relay, primary, replica)
        with pytest.raises(StoreAway, match="read only replica") as caught:
            store.add(5)
        assert not isinstance(caught.value, InDoubt)
        assert store.add(1) == 40
        assert VALUE.unpack(replica.ask("GET", "counter"))[1] == 41


def test_a_commit_in_doubt_is_settled_at_the_new_primary(
    primary: RedisServer, replica: RedisServer
) -> None:
    """Not by the record of the old one, of which the new one may never have heard."""
    relay = Relay(primary)
    with relay.server, closing(open_at(f"redis://{relay.server.address}/0")) as store:
        store.check(40)
        relay.cut_after.set()
        with pytest.raises(InDoubt):
            store.add(5)
        store._connect()  # to the old one, before it is demoted
        fail_over(relay, primary, replica)
        with pytest.raises(InDoubt, match="read only replica"):
            store.settle()
        assert store.settle() == 40
        assert store.add(1) == 45


def test_a_total_that_is_read_from_what_fails_is_read_by_a_new_connection(
    own_redis: RedisServer,
) -> None:
    own_redis.ask("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all")
    with closing(open_at(own_redis.url(user="app", password="secret"))) as store:
        store.check(40)
        own_redis.ask("ACL", "SETUSER", "app", "-get")
        with pytest.raises(StoreAway, match="permission"):
            store.read()
        assert store._connection._sock is None
        own_redis.ask("ACL", "SETUSER", "app", "+get")
        assert store.read() == 40


class ConnectsToItself(socket.socket):
    """Has the address that it connects to for its own, as the kernel may choose by chance."""

    def connect(self, address: Any) -> None:
        self.bind(address)
        super().connect(address)


@pytest.mark.parametrize("access", ["", "user:secret@"])
def test_a_connection_to_itself_is_an_outage(
    monkeypatch: pytest.MonkeyPatch, key: str, access: str
) -> None:
    """Its own words would come back as answers, and it would keep Redis from its port."""
    port = free_port()
    with closing(open_at(f"redis://{access}127.0.0.1:{port}/0?key={key}")) as store:
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socket", ConnectsToItself)
            for act in (partial(store.add, 5), store.probe, store.read, store.check):
                with pytest.raises((StoreAway, StoreError), match="connected to itself") as caught:
                    act()
                assert not isinstance(caught.value, InDoubt)
        socket.create_server(("127.0.0.1", port)).close()


# Python 3.12 warns of every fork beside a thread, which another test may have left.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_is_forked_shares_neither_identity_nor_connection(
    redis: RedisServer, key: str
) -> None:
    with opened(redis, key) as store:
        store.check()
        assert store.add(1) == 0
        writer = store._writer

        def add_in_child() -> str:
            answers = [store.add(10), store.add(10)]
            assert store._writer != writer
            store.close()
            return repr(answers)

        assert ask_child(add_in_child, PATIENCE_S) == "[1, 11]"
        assert [store.add(1), store.add(1)] == [21, 22]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_is_forked_in_doubt_leaves_it_to_the_other(
    store: RedisStore, relay: Relay
) -> None:
    relay.cut_before.set()
    with pytest.raises(InDoubt):
        store.add(5)
    assert ask_child(lambda: repr([store.settle(), store.add(1)]), PATIENCE_S) == "[None, 40]"
    assert store.settle() == 41
    assert store.add(1) == 46


def test_a_redis_that_is_not_there_is_an_outage_and_the_amount_is_not_taken(key: str) -> None:
    def amount() -> int:
        raise AssertionError("nothing can be added yet")

    with closing(open_at(f"redis://127.0.0.1:{free_port()}/0?key={key}")) as store:
        for act in (partial(store.commit, amount), store.probe):
            with pytest.raises(StoreAway, match="refused") as caught:
                act()
            assert not isinstance(caught.value, InDoubt)


def test_a_redis_that_does_not_answer_leaves_doubt_until_it_does(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "REPLY_TIMEOUT_S", 0.1)
    with opened(own_redis) as store:
        store.check(40)
        own_redis.pause()
        with pytest.raises(InDoubt):
            store.add(5)
        own_redis.resume()
        assert store.settle() == 40
        assert store.add(1) == 45


def test_a_redis_that_was_restarted_goes_on(own_redis: RedisServer) -> None:
    with RedisServer(appendonly=True) as redis, opened(redis) as store:
        store.check(40)
        assert store.add(1) == 40
        redis.kill()
        with pytest.raises(InDoubt):
            store.add(5)
        with pytest.raises(StoreAway, match="refused"):
            store.settle()
        redis.start()
        assert store.settle() == 41
        assert store.add(1) == 46
        assert store.losses == 0


def test_a_redis_that_forgot_the_script_is_told_it_again(own_redis: RedisServer) -> None:
    with opened(own_redis) as store:
        store.check()
        assert store.add(1) == 0
        own_redis.ask("SCRIPT", "FLUSH")
        assert store.add(1) == 1
        assert own_redis.ask("SCRIPT", "EXISTS", SCRIPT_HASH) == [True]


def test_a_total_that_was_thrown_away_is_noticed(own_redis: RedisServer) -> None:
    with opened(own_redis) as store:
        store.check(40)
        store.add(1)
        own_redis.ask("FLUSHALL")
        assert store.losses == 0
        assert store.add(5) == 0
        assert store.losses == 1
        assert store.add(1) == 5
        assert store.losses == 1


def test_a_total_that_went_back_is_noticed(own_redis: RedisServer) -> None:
    """As after a failover to a replica that had not heard of the last commits."""
    with opened(own_redis) as store:
        store.check(40)
        store.add(1)
        older = own_redis.ask("GET", "counter")
        store.add(1)
        own_redis.ask("SET", "counter", older)
        assert store.add(1) == 41
        assert store.losses == 1
        own_redis.ask("SET", "counter", older)
        assert store.probe() == 41
        assert store.losses == 2


def test_what_others_add_is_no_loss(redis: RedisServer, key: str) -> None:
    with opened(redis, key) as one, opened(redis, key) as other:
        one.check()
        for total in range(0, 20, 2):
            assert one.add(1) == total
            assert other.add(1) == total + 1
        assert (one.losses, other.losses) == (0, 0)


@pytest.mark.parametrize("damage", [["SET", "{}", "42"], ["LPUSH", "{}", "42"]])
def test_a_key_damaged_while_it_is_used_is_an_outage_until_it_is_mended(
    redis: RedisServer, key: str, damage: list[str]
) -> None:
    with opened(redis, key) as store:
        store.check(40)
        store.add(1)
        good = redis.ask("GET", key)
        redis.ask("DEL", key)
        redis.ask(*[key if part == "{}" else part for part in damage])
        damaged = redis.ask("DUMP", key)
        for act in (partial(store.add, 5), store.probe):
            with pytest.raises(StoreAway) as caught:
                act()
            assert not isinstance(caught.value, InDoubt)
        assert redis.ask("DUMP", key) == damaged
        redis.ask("SET", key, good)
        assert store.add(1) == 41
        assert store.losses == 0


def test_a_full_redis_is_an_outage_that_ends(own_redis: RedisServer) -> None:
    with opened(own_redis) as store:
        store.check(40)
        own_redis.ask("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(StoreAway, match="maxmemory") as caught:
            store.add(5)
        assert not isinstance(caught.value, InDoubt)
        own_redis.ask("CONFIG", "SET", "maxmemory", "0")
        assert store.add(5) == 40


def test_a_closed_store_opens_again(redis: RedisServer, key: str) -> None:
    with opened(redis, key) as store:
        store.check()
        assert store.add(1) == 0
        store.close()
        store.close()
        assert store.add(1) == 1
