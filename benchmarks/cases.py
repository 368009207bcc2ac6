"""Question: which loads are compared, between whom, and what are both called?

Command: none, compare.py uses it. Nothing here starts or measures anything.

Invalid if: the peers of one case do not promise the same. Those that are durable are held against
those that are, and the others are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import peers
from peers import Peer
from results import Case

FAST: Final = ("floor", "server", "plain", "go", "redis")
SLOW: Final = ("gevent", "uvloop")

PLAIN_ENGINE: Final = ("--engine", "plain")

_MANY: Final = ("--connections", "4000")
_RANDOM: Final = ("--amount", "random", "--in-flight")
CASES: Final = (
    Case("steady-4", "1 in flight, 4 connections", ("--connections", "4"), FAST),
    Case("steady-10", "1 in flight, 10 connections", ("--connections", "10"), FAST),
    Case("steady-40", "1 in flight, 40 connections", (), (*FAST, *SLOW)),
    Case("steady-400", "1 in flight, 400 connections", ("--connections", "400"), (*FAST, *SLOW)),
    Case("steady-4000", "1 in flight, 4,000 connections", _MANY, (*FAST, *SLOW)),
    Case("flight-16", "16 in flight, 40 connections", ("--in-flight", "16"), FAST),
    Case("flight-256", "256 in flight, 40 connections", ("--in-flight", "256"), FAST),
    Case("flight-1024", "1,024 in flight, 40 connections", ("--in-flight", "1024"), FAST),
    Case("flight-4096", "4,096 in flight, 40 connections", ("--in-flight", "4096"), FAST),
    Case("random-256", "64-bit amounts, 256 in flight", (*_RANDOM, "256"), FAST),
    Case("random-4096", "64-bit amounts, 4,096 in flight", (*_RANDOM, "4096"), FAST),
    Case("churn", "connect, add one, close, 40 at a time", ("--mode", "churn"), (*FAST, *SLOW)),
)

# On the disk before the reply. These are measured longer: a disk has moods, and SQLite copies its
# log into the database once in a thousand commits.
DURABLE_LENGTH: Final = 2
_DURABLE: Final = (("sqlite", "sqlite_plain", "redis_always"), DURABLE_LENGTH)
DURABLE: Final = (
    Case("durable-40", "1 in flight, 40 connections", (), *_DURABLE),
    Case("durable-400", "1 in flight, 400 connections", ("--connections", "400"), *_DURABLE),
    Case("durable-16", "16 in flight, 40 connections", ("--in-flight", "16"), *_DURABLE),
)
SHARED_FILE: Final = Case(
    "durable-processes",
    "1 in flight, 40 connections",
    (),
    ("sqlite_one", "sqlite_two"),
    DURABLE_LENGTH,
)
SHARED_REDIS: Final = Case(
    "redis-store",
    "1 in flight, 400 connections",
    ("--connections", "400"),
    ("server", "redis_store", "redis_store_plain"),
)

PAIR: Final = Case(
    "pair", "server and client", (), ("pair", "pair_default", "pair_plain", "go_pair")
)
IDLE: Final = Case("idle", "memory", ("--mode", "idle"), (*FAST, *SLOW))
PAIR_CONNECTIONS: Final = 40
IDLE_CONNECTIONS: Final = 4000
IDLE_FIRST: Final = 20  # held before, so that what a server allocates once is not counted
# Redis shrinks an idle client's buffers after some seconds, and its allocator takes ten more.
IDLE_SETTLE_S: Final = 15.0

EVERY: Final = (*CASES, *DURABLE, SHARED_FILE, SHARED_REDIS, PAIR, IDLE)

NAMES: Final = {
    "floor": "C floor",
    "server": "this server",
    "plain": "this server, plain engine",
    "go": "Go, GOMAXPROCS=1",
    "redis": "Redis, INCRBY 1",
    "gevent": "gevent, textbook",
    "uvloop": "asyncio, uvloop",
    "sqlite": "this server, SQLite store",
    "sqlite_plain": "the same, plain engine",
    "redis_always": "Redis, appendfsync always",
    "sqlite_one": "SQLite store, 1 process",
    "sqlite_two": "SQLite store, 2 processes",
    "redis_store": "this server, Redis store",
    "redis_store_plain": "the same, plain engine",
    "pair": "this project's, one process each",
    "pair_default": "this project's, processes by default",
    "pair_plain": "this project's, one process each, plain engine",
    "go_pair": "Go",
}

# Peers that use every CPU; the others have the server's alone. A second process has nothing to run
# on where it has to share the CPU of the first, so one and two processes get all there are.
EVERYWHERE: Final = {*PAIR.peers, *SHARED_FILE.peers}

# Peers that are this project: where one does not start, the comparison has failed.
OWN: Final = {
    "server",
    "plain",
    "pair",
    "pair_default",
    "pair_plain",
    "sqlite",
    "sqlite_plain",
    *SHARED_FILE.peers,
    "redis_store",
    "redis_store_plain",
}


def make_peer(key: str, directory: Path) -> Peer:
    """The server that NAMES calls so; PeerError if this machine lacks what it needs."""
    match key:
        case "floor":
            return peers.floor(directory)
        case "server" | "pair":
            return peers.this_server("--processes", "1")
        case "plain" | "pair_plain":
            return peers.this_server("--processes", "1", *PLAIN_ENGINE)
        case "pair_default":
            return peers.this_server()
        case "sqlite" | "sqlite_one":
            return peers.sqlite_store_server(directory / f"{key}.db", "--processes", "1")
        case "sqlite_plain":
            file = directory / f"{key}.db"
            return peers.sqlite_store_server(file, "--processes", "1", *PLAIN_ENGINE)
        case "sqlite_two":
            return peers.sqlite_store_server(directory / f"{key}.db", "--processes", "2")
        case "redis_store":
            return peers.redis_store_server(directory)
        case "redis_store_plain":
            return peers.redis_store_server(directory, *PLAIN_ENGINE)
        case "go":
            return peers.go(directory, {"GOMAXPROCS": "1"})
        case "go_pair":
            return peers.go(directory)
        case "redis":
            return peers.redis(directory)
        case "redis_always":
            return peers.redis(directory, "--appendonly", "yes", "--appendfsync", "always")
        case _:
            return peers.python_peer(f"peer_{key}.py", key)
