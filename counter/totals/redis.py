"""The total in Redis or Valkey: shared by any number of servers, as durable as that Redis is set.

The key holds 24 bytes: a mark, the total and the number of commits so far, big-endian. The number
of commits only grows: where it is lower than this process has seen, Redis lost what it had
answered. A commit is a script (redis_script.py) that Redis applies once, however often it is asked
for: one whose reply was lost is asked for again, on a new connection. All keys share one hash slot.

An error reply means that nothing was added only where Redis gives it before a command runs, or the
script says so itself; any other leaves doubt, as one of a proxy between may. Each ends the
connection, since a new one may lead to the primary that has taken over.

A writer's identity is its own: a process forked from it takes a new one, and so does a writer that
finds its record written by another, such as a copy of its machine.

redis-py's connection is used without its pool and its retries, which would send an addition twice.
It waits as the caller's socket module does: in a greenlet where that is gevent's.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AskError, InvalidResponse, NoScriptError, RedisError, ResponseError
from redis.retry import Retry

from counter.options.values import masked
from counter.totals.redis_script import NOT_ADDED, NOT_MINE, SCRIPT, SCRIPT_HASH, UNDONE
from counter.totals.redis_tls import check_files
from counter.totals.store import (
    Found,
    InDoubt,
    Store,
    StoreAway,
    StoreError,
    counts_already,
)
from protocol import TOTAL_MASK

MARK: Final = b"counter1"
_VALUE: Final = struct.Struct(">8sQQ")  # mark, total, commits

# So long is a reply waited for; then the connection is given up and the commit asked for again.
REPLY_TIMEOUT_S: Final = 5.0

RECORD_LIFE_S: Final = 24 * 3600
# A commit in doubt is not asked for again when its record may be gone: half of that is safe.
SETTLE_WITHIN_S: Final = RECORD_LIFE_S / 2

LONGEST_TEXT: Final = 200
MINIMUM_VERSION: Final = (6, 2)


class _NotAdded(Exception):
    """Redis says that it did not apply a commit this time; the text says why."""


class _NotMine(_NotAdded):
    """Another writer has this one's identity, which is therefore given up."""


@dataclass(frozen=True)
class _Commit:
    """One commit, the same however often it is asked for."""

    number: int
    token: str
    amount: int
    since: float  # a monotonic time


class RedisStore(Store):
    """The total at `key` of the Redis at `url`."""

    blocks = False

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._key = key
        self._seen = 0  # the highest number of commits that any answer told
        self._begin()

    def _begin(self) -> None:
        """Becomes a writer of its own, of this process, with a connection of its own."""
        self._process = os.getpid()
        self._doubted: _Commit | None = None
        self._take_identity()
        pool = redis.ConnectionPool.from_url(
            self._url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=REPLY_TIMEOUT_S,
            socket_connect_timeout=REPLY_TIMEOUT_S,
            socket_keepalive=True,
            driver_info=None,
            redis_connect_func=_greet,
        )
        self._connection: Any = pool.connection_class(**pool.connection_kwargs)

    def _take_identity(self) -> None:
        self._writer = uuid.uuid4().hex
        self._number = 0

    def check(self, set_total: int | None = None, force: bool = False) -> Found:
        where = f"{masked(self._url)} key {self._key!r}"
        try:
            check_files(self._url)
            self._connect()
            self._check_version()
            self._check_exactness()
            before = self._read_value()
            is_new = before is None
            if set_total is not None and before is not None and not force:
                raise StoreError(counts_already(before[0], set_total))
            if before is None or set_total is not None:
                self._write_value(set_total or 0, before)
            total = self.read()
            return Found(total, is_new, self._survives(), tuple(self._warnings()))
        except (RedisError, OSError, StoreAway, StoreError) as error:
            raise StoreError(f"cannot use {where}: {_said(error)}") from None

    def commit(self, amount: Callable[[], int]) -> int:
        self._be_of_this_process()
        assert self._doubted is None
        self._connect()
        self._number += 1
        add = amount() & TOTAL_MASK
        self._doubted = commit = _Commit(self._number, _make_token(), add, time.monotonic())
        try:
            return self._apply(commit)
        except _NotAdded as error:
            self._doubted = None
            raise StoreAway(str(error)) from None

    def settle(self) -> int | None:
        self._be_of_this_process()
        commit = self._doubted
        if commit is None:  # it was forked in doubt; the commit is the other process's
            return None
        if time.monotonic() - commit.since > SETTLE_WITHIN_S:
            self._doubted = None
            return None
        self._connect()
        try:
            return self._apply(commit)
        except _NotMine:
            self._doubted = None  # its record was overwritten, or is never written
            return None
        except _NotAdded as error:
            raise InDoubt(str(error)) from None

    def read(self) -> int:
        self._be_of_this_process()
        self._connect()
        try:
            value = self._read_value()
        except (RedisError, OSError, StoreError) as error:
            self._connection.disconnect()
            raise StoreAway(_said(error)) from None
        total, commits = value or (0, 0)
        self._note(commits)
        return total

    def probe(self) -> int:
        # A write, since Redis can still be read when it is full or a replica.
        try:
            return self.commit(lambda: 0)
        except InDoubt as error:  # whether nothing was added does not matter
            self._doubted = None
            raise StoreAway(str(error)) from None

    def close(self) -> None:
        self._doubted = None
        with suppress(RedisError, OSError):
            self._connection.disconnect()

    def _be_of_this_process(self) -> None:
        """Two processes that share an identity or a connection would take each other's answers."""
        if self._process != os.getpid():
            self._connection.disconnect()  # this process's copy of it
            self._begin()

    def _connect(self) -> None:
        try:
            self._connection.connect()
        except (RedisError, OSError) as error:
            raise StoreAway(_said(error)) from None

    def _apply(self, commit: _Commit) -> int:
        """Has the script apply a commit; gives back the total before.

        _NotAdded where Redis says that it did not, InDoubt where it may have.
        """
        record = f"{self._tagged()}:writer:{self._writer}"
        try:
            value = self._run(self._key, record, commit.number, commit.token, commit.amount)
        except (RedisError, OSError) as error:
            self._connection.disconnect()
            code, said = _code(error), _said(error)
            if code == NOT_MINE:
                self._take_identity()
                raise _NotMine(
                    "another writer has the same identity, as a copied machine has; "
                    "a new one is taken"
                ) from None
            raise (_NotAdded if code in UNDONE else InDoubt)(said) from None
        self._doubted = None
        _, before, commits = _VALUE.unpack(value)
        self._note(commits + 1, commits)
        return int(before)

    def _run(self, key: str, record: str, number: int, token: str, amount: int) -> bytes:
        """The value before the commit."""
        arguments = (2, key, record, number, token, amount >> 32, amount & 0xFFFFFFFF)
        try:
            value = self._ask("EVALSHA", SCRIPT_HASH, *arguments, RECORD_LIFE_S)
        except NoScriptError:
            value = self._ask("EVAL", SCRIPT, *arguments, RECORD_LIFE_S)
        if not isinstance(value, bytes) or len(value) != _VALUE.size:
            raise InvalidResponse(f"it answers {value!r}, which is no total")
        return value

    def _ask(self, *command: Any) -> Any:
        """One command and its reply. The connection is closed by any failure but an error reply."""
        answered = False
        try:
            self._connection.send_command(*command)
            reply = self._connection.read_response()
            answered = True
            return reply
        except ResponseError:
            answered = True
            raise
        except ValueError as error:  # redis-py's, of a redirection that it cannot read
            raise InvalidResponse(f"it answers what is no Redis reply ({error})") from None
        finally:
            if not answered:
                self._connection.disconnect()

    def _note(self, commits: int, before: int | None = None) -> None:
        """Compares the number of commits with what was seen before."""
        if (commits if before is None else before) < self._seen:
            self.losses += 1
        self._seen = commits

    def _tagged(self) -> str:
        """The start of the names of all further keys, which go to the slot of the total's."""
        return self._key if "{" in self._key else f"{{{self._key}}}"

    def _read_value(self) -> tuple[int, int] | None:
        """The total and the number of commits, None where there are none yet."""
        kind = self._ask("TYPE", self._key).decode()
        if kind == "none":
            return None
        value = self._ask("GET", self._key) if kind == "string" else b""
        if len(value) != _VALUE.size or not value.startswith(MARK):
            raise StoreError(self._alien(kind, value))
        _, total, commits = _VALUE.unpack(value)
        return total, commits

    def _alien(self, kind: str, value: bytes) -> str:
        """What is said of a key that holds something else: a plain number can be gone on from."""
        if re.fullmatch(rb"0|[1-9][0-9]{0,19}", value) and int(value) <= TOTAL_MASK:
            number = value.decode()
            return (
                f"the key holds the plain number {number}, as INCR keeps it; to go on from it, "
                f"name another key, as in ?key={quote(self._key)}-total, and start once with "
                f"--setTotal {number}"
            )
        return (
            f"the key holds a {kind} that is no total of this program; "
            "name another key in the URL, as in ?key=counter"
        )

    def _write_value(self, total: int, before: tuple[int, int] | None) -> None:
        """Sets the total of a key that holds none or, forced, the one that was read."""
        commits = before[1] + 1 if before else 0
        value = _VALUE.pack(MARK, total, commits)
        # Without a value before, another server's that was made in between is left as it is.
        self._ask("SET", self._key, value, *(() if before else ("NX",)))

    def _check_version(self) -> None:
        try:
            text = self._ask("INFO", "server").decode(errors="replace")
        except ResponseError:  # managed services may refuse it; the self-test still decides
            return
        info = _fields(text)
        parts = info.get("redis_version", "").split(".")[:2]
        if all(part.isdigit() for part in parts) and tuple(map(int, parts)) < MINIMUM_VERSION:
            raise StoreError(f"it is Redis {info['redis_version']}; 6.2 or newer is needed")

    def _check_exactness(self) -> None:
        """Adds across 2^63 and 2^64 on a key of its own, twice asked for each."""
        key = f"{self._tagged()}:test:{self._writer}"
        record = f"{key}:writer"
        try:
            for number, before in enumerate((2**53, 2**63 - 1, TOTAL_MASK), 1):
                value = _VALUE.pack(MARK, before, 7)
                self._ask("SET", key, value, "EX", 60)
                answers = [self._run(key, record, number, "test", 1) for _ in range(2)]
                _, total, commits = _VALUE.unpack(self._ask("GET", key))
                if answers != [value] * 2 or (total, commits) != ((before + 1) & TOTAL_MASK, 8):
                    raise StoreError(f"it does not add 1 to {before} exactly")
            if self._ask("TTL", record) < 0:
                raise StoreError("the records of writers would stay for ever: EXPIRE is refused")
        finally:
            with suppress(RedisError, OSError):
                self._ask("DEL", key, record)

    def _survives(self) -> str:
        """What this Redis is set to survive, in words."""
        config = self._config("appendonly", "appendfsync", "save")
        if config is None:
            return "what this Redis is set to, which cannot be asked: unknown"
        if config.get("appendonly") == "yes":
            return {
                "always": "power loss: appendfsync always",
                "everysec": "the death of Redis; of a power cut, all but the last second or two "
                "(appendfsync everysec)",
            }.get(config.get("appendfsync", ""), "what the kernel has written (appendfsync no)")
        if config.get("save"):
            return f"what its last snapshot holds (appendonly no, save {config['save']})"
        return "nothing but Redis' own life: it is set to keep nothing (appendonly no, no save)"

    def _warnings(self) -> list[str]:
        warnings = []
        policy = (self._config("maxmemory-policy") or {}).get("maxmemory-policy", "noeviction")
        if policy != "noeviction":
            warnings.append(
                f"maxmemory-policy is {policy}: Redis may throw the total or the records of "
                "its writers away; noeviction keeps them"
            )
        if self._ask("TTL", self._key) >= 0:
            warnings.append(f"the key {self._key!r} expires; PERSIST it, or the total ends with it")
        return warnings

    def _config(self, *names: str) -> dict[str, str] | None:
        """Settings of Redis; None where it does not tell, as managed services do."""
        found: dict[str, str] = {}
        try:
            for name in names:
                pairs = [text.decode() for text in self._ask("CONFIG", "GET", name)]
                found |= dict(zip(pairs[::2], pairs[1::2], strict=True))
        except ResponseError:
            return None
        return found


def _fields(text: str) -> dict[str, str]:
    """INFO's lines of `name:value`."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value for name, _, value in pairs if value}


def _make_token() -> str:
    """Like no other commit's, not of a copied machine either, whose random numbers may repeat."""
    return f"{time.time_ns():x}-{os.urandom(8).hex()}"


def _greet(connection: Any) -> None:
    """What is done on every new connection, before anything is asked."""
    sock = connection._sock
    # To a local port where nobody listens, TCP may connect a socket to itself.
    if sock.getsockname() == sock.getpeername():
        # Reset, so that the port is free for Redis at once.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        raise redis.ConnectionError(
            f"{connection.host}:{connection.port} connected to itself: nobody listens there"
        )
    connection.on_connect()


def _code(error: Exception) -> str:
    """The first word of an error reply; nothing for an error that is none."""
    code: str | None = getattr(error, "status_code", None)
    if not code and isinstance(error, ResponseError):
        code = str(error).partition(" ")[0]
    return code or ""


def _said(error: Exception) -> str:
    """The error in one line; Redis' own explanations can be pages long."""
    text = str(error).removeprefix(f"{NOT_ADDED} ") or type(error).__name__
    if isinstance(error, StoreError):
        return masked(text)
    if isinstance(error, AskError):  # redis-py leaves only a slot and an address of it
        text = f"{_code(error)} {text}: the key is at another node of the cluster"
    return masked(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…")
