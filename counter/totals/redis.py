"""The total in Redis or Valkey: shared by any number of servers, as durable as that Redis is set.

The key holds 24 bytes: a mark, the total and the number of commits so far, big-endian. Redis adds
to 64-bit fields of a string exactly and wraps (BITFIELD); INCRBY is signed and a number in a script
is a double, so a total passes through the script as the bytes of a string. The number of commits
only grows: where it is lower than this process has seen, Redis lost what it had answered.

Each commit carries this writer's identity and a number. The script applies a number above the
writer's last and remembers the answer for a day; otherwise it gives the answer again. So a commit
whose reply was lost is asked for again, on a new connection, and is applied once. All keys share
one hash slot.

redis-py's connection is used without its pool and its retries, which would send an addition twice.
It waits as the caller's socket module does: in a greenlet where that is gevent's.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.retry import Retry

from counter.options.values import masked
from counter.totals.store import Found, InDoubt, Store, StoreAway, StoreError
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

# KEYS: total, record of the writer. ARGV: number, amount as a signed integer, life of the record.
# Gives back the value before the commit. Every read is before the first write: a script that fails
# has changed nothing.
_SCRIPT: Final = b"""
local value = redis.call('GET', KEYS[1])
local number, answer = unpack(redis.call('HMGET', KEYS[2], 'number', 'answer'))
if number and tonumber(number) >= tonumber(ARGV[1]) then
  return answer
end
if not value then
  value = 'counter1' .. string.rep('\\0', 16)
  redis.call('SET', KEYS[1], value)
elseif #value ~= 24 or string.sub(value, 1, 8) ~= 'counter1' then
  return redis.error_reply('ERR the key holds no total of this program')
end
redis.call('BITFIELD', KEYS[1], 'OVERFLOW', 'WRAP',
           'INCRBY', 'i64', 64, ARGV[2], 'INCRBY', 'i64', 128, 1)
redis.call('HSET', KEYS[2], 'number', ARGV[1], 'answer', value)
redis.call('EXPIRE', KEYS[2], ARGV[3])
return value
"""
_SCRIPT_HASH: Final = hashlib.sha1(_SCRIPT, usedforsecurity=False).hexdigest()


class RedisStore(Store):
    """The total at `key` of the Redis at `url`."""

    blocks = False

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._key = key
        self._writer = uuid.uuid4().hex
        self._number = 0
        self._seen = 0  # the highest number of commits that any answer told
        self._doubted: tuple[int, float] | None = None  # amount of the commit in doubt, since when
        pool = redis.ConnectionPool.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=REPLY_TIMEOUT_S,
            socket_connect_timeout=REPLY_TIMEOUT_S,
            socket_keepalive=True,
            driver_info=None,
        )
        self._connection: Any = pool.connection_class(**pool.connection_kwargs)

    def check(self, set_total: int | None = None, force: bool = False) -> Found:
        where = f"{masked(self._url)} key {self._key!r}"
        try:
            self._connect()
            self._check_version()
            self._check_exactness()
            before = self._read_value()
            is_new = before is None
            if set_total is not None and before is not None and not force:
                raise StoreError(
                    f"the total is {before[0]:,} and --setTotal would make it {set_total:,}; "
                    "leave --setTotal out to go on from there, or add --force to overwrite it"
                )
            if before is None or set_total is not None:
                self._write_value(set_total or 0, before)
            total = self.read()
            return Found(total, is_new, self._survives(), tuple(self._warnings()))
        except (RedisError, OSError, StoreAway, StoreError) as error:
            raise StoreError(f"cannot use {where}: {_said(error)}") from None

    def commit(self, amount: Callable[[], int]) -> int:
        assert self._doubted is None
        self._connect()
        add = amount() & TOTAL_MASK
        self._number += 1
        self._doubted = add, monotonic()
        try:
            return self._apply(add)
        except ResponseError as error:
            self._doubted = None  # Redis says that it did not do it
            raise StoreAway(_said(error)) from None

    def settle(self) -> int | None:
        assert self._doubted is not None
        add, since = self._doubted
        if monotonic() - since > SETTLE_WITHIN_S:
            self._doubted = None
            return None
        self._connect()
        try:
            return self._apply(add)
        except ResponseError as error:
            raise InDoubt(_said(error)) from None

    def read(self) -> int:
        self._connect()
        try:
            value = self._read_value()
        except (ResponseError, StoreError) as error:
            raise StoreAway(_said(error)) from None
        except (RedisError, OSError) as error:
            self._connection.disconnect()
            raise StoreAway(_said(error)) from None
        if value is None:
            value = 0, 0
        self._note(value[1])
        return value[0]

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

    def _connect(self) -> None:
        try:
            self._connection.connect()
        except (RedisError, OSError) as error:
            raise StoreAway(_said(error)) from None

    def _apply(self, add: int) -> int:
        """Has the script apply the present commit; ResponseError says that it did not.

        InDoubt where the connection broke: the reply may have been on its way.
        """
        record = f"{self._tagged()}:writer:{self._writer}"
        try:
            value = self._run(self._key, record, self._number, add)
        except ResponseError:
            raise
        except (RedisError, OSError) as error:
            raise InDoubt(_said(error)) from None
        self._doubted = None
        _, before, commits = _VALUE.unpack(value)
        self._note(commits + 1, commits)
        return int(before)

    def _run(self, key: str, record: str, number: int, amount: int) -> bytes:
        """The value before the commit. A reply that did not come ends the connection, so that it is
        never taken for the answer to another question."""
        signed = amount - (1 << 64) if amount >> 63 else amount
        arguments = (2, key, record, number, signed, RECORD_LIFE_S)
        try:
            return bytes(self._ask("EVALSHA", _SCRIPT_HASH, *arguments))
        except NoScriptError:
            return bytes(self._ask("EVAL", _SCRIPT, *arguments))

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
            raise StoreError(
                f"the key holds a {kind} that is no total of this program; "
                "name another key in the URL, as in ?key=counter"
            )
        _, total, commits = _VALUE.unpack(value)
        return total, commits

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
                answers = [self._run(key, record, number, amount) for amount in (1, 1)]
                _, total, commits = _VALUE.unpack(self._ask("GET", key))
                if answers != [value] * 2 or (total, commits) != ((before + 1) & TOTAL_MASK, 8):
                    raise StoreError(f"it does not add 1 to {before} exactly")
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


def _said(error: Exception) -> str:
    """The error in one line; Redis' own explanations can be pages long."""
    text = str(error) or type(error).__name__
    return masked(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…")
