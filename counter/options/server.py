"""What `python server.py` can be asked to do: its options, and which of them contradict."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from counter.options.declare import RUNNING, Settings, option
from counter.options.values import (
    Seconds,
    StoreAddress,
    parse_choice,
    parse_host,
    parse_path,
    parse_port,
    parse_seconds,
    parse_store,
    parse_switch,
    parse_whole,
)
from counter.system.limits import whole_share
from protocol import MAX_AMOUNT

_LISTEN, _SIZE, _COUNT, _TIME = "where to listen", "how much at once", "counting", "deadlines"
_TLS = "encryption"

# Open connections in all processes unless --maxConnections says otherwise: an idle one costs a
# kilobyte or so, and so many ten megabytes.
DEFAULT_CONNECTIONS: Final = 10_000

# Descriptors besides the connections' own in each process: its files, and sockets that linger.
SPARE_DESCRIPTORS: Final = 64


@dataclass(frozen=True, kw_only=True)
class ServerSettings(Settings):
    """What `python server.py` was asked to do."""

    program = "server.py"
    purpose = "A shared counter: one exact total, added to over TCP."
    prefix = "COUNTER_SERVER_"
    examples = """examples:
  python server.py                                  serve this machine on port 8080
  python server.py --port :9000 --multiplier 100    another port, five times the workers
  python server.py --host 0.0.0.0                   serve other machines as well
  python server.py --store sqlite:counter.db        the total survives a restart and a power cut
  python server.py --store redis://cache.example    share the total with other servers
  COUNTER_SERVER_PORT=9000 python server.py --printConfig
"""

    host: str = option(
        "--host",
        _LISTEN,
        "interface to listen on; 0.0.0.0 serves other machines",
        default="127.0.0.1",
        parse=parse_host,
        metavar="HOST",
    )
    port: int = option(
        "--port",
        _LISTEN,
        "port, also written :8080; 0 takes a free one",
        default=8080,
        parse=parse_port,
        metavar="PORT",
    )
    backlog: int = option(
        "--backlog",
        _LISTEN,
        "connections that may wait to be accepted (the kernel's net.core.somaxconn bounds it)",
        default=1024,
        parse=parse_whole(1, 2**31 - 1),
    )
    multiplier: int = option(
        "--multiplier",
        _SIZE,
        "workers per CPU: so many connections are served at once, more of them take turns",
        default=20,
        parse=parse_whole(1, 1_000_000),
    )
    processes: int | None = option(
        "--processes",
        _SIZE,
        "serving processes that share the workers, under a master that replaces those that die; "
        "0 serves in this very process, without one",
        parse=parse_whole(0, 1024),
        shown_default="one per whole CPU",
    )
    slice_s: float = option(
        "--slice",
        _SIZE,
        "while others wait for a worker, a busy connection gives its own up after so long",
        default=Seconds(0.05),
        parse=parse_seconds(0.001),
        metavar="TIME",
    )
    max_connections: int | None = option(
        "--maxConnections",
        _SIZE,
        "open connections in all processes, those without a worker included; further ones wait in "
        "the backlog",
        parse=parse_whole(1, 1_000_000_000),
        shown_default=f"{DEFAULT_CONNECTIONS}, or the workers where there are more",
    )
    engine: str = option(
        "--engine",
        _SIZE,
        "what receives and answers: compiled (C), plain (Python), or auto, the first that is there",
        default="auto",
        parse=parse_choice("auto", "compiled", "plain"),
        metavar="ENGINE",
    )
    store: StoreAddress = option(
        "--store",
        _COUNT,
        "where the total is kept: memory, sqlite:PATH, redis://HOST:PORT/0?key=counter or "
        "rediss://… (TLS)",
        default=StoreAddress("memory", "memory"),
        parse=parse_store,
        metavar="STORE",
    )
    set_total: int | None = option(
        "--setTotal",
        _COUNT,
        "start from this total; refused where the store holds one already",
        parse=parse_whole(0),
    )
    force: bool = option(
        "--force",
        _COUNT,
        "let --setTotal overwrite the store's total",
        default=False,
        parse=parse_switch,
        metavar="true|false",
    )
    max_increment: int = option(
        "--maxIncrement",
        _COUNT,
        "refuse larger amounts as a wrong checksum is refused",
        default=MAX_AMOUNT,
        parse=parse_whole(0),
    )
    sessions: int = option(
        "--sessions",
        _COUNT,
        "sessions kept at once, of clients that want each addition counted exactly once; 0: none",
        default=10_000,
        parse=parse_whole(0, 1_000_000),
    )
    frame_timeout_s: float = option(
        "--frameTimeout",
        _TIME,
        "from a frame's first byte to its last",
        default=Seconds(5),
        parse=parse_seconds(0.001),
        metavar="TIME",
    )
    idle_timeout_s: float = option(
        "--idleTimeout",
        _TIME,
        "while --maxConnections is reached and others wait in the backlog, a connection that was "
        "idle for longer is closed",
        default=Seconds(60),
        parse=parse_seconds(0.001),
        metavar="TIME",
    )
    write_timeout_s: float = option(
        "--writeTimeout",
        _TIME,
        "a peer that does not read its replies for so long is dropped",
        default=Seconds(30),
        parse=parse_seconds(0.001),
        metavar="TIME",
    )
    store_timeout_s: float = option(
        "--storeTimeout",
        _TIME,
        "frames wait so long for a store that is away, then their connections close unanswered",
        default=Seconds(30),
        parse=parse_seconds(0.001),
        metavar="TIME",
    )
    drain_timeout_s: float = option(
        "--drainTimeout",
        _TIME,
        "after SIGTERM or SIGINT, what is not finished by then is cut",
        default=Seconds(5),
        parse=parse_seconds(0),
        metavar="TIME",
    )
    admin_port: int | None = option(
        "--adminPort",
        RUNNING,
        "serve health, metrics, the total and a page over HTTP on this port; 0 takes a free one",
        parse=parse_port,
        metavar="PORT",
        shown_default="off",
    )
    admin_host: str = option(
        "--adminHost",
        RUNNING,
        "interface of the admin port; whoever reaches it can read, not change",
        default="127.0.0.1",
        parse=parse_host,
        metavar="HOST",
    )
    tls_cert: str | None = option(
        "--tlsCert",
        _TLS,
        "serve TLS with this certificate, and those between it and its authority, in PEM form; "
        "SIGHUP reads the files again",
        parse=parse_path,
        metavar="FILE",
    )
    tls_key: str | None = option(
        "--tlsKey", _TLS, "its private key, without a passphrase", parse=parse_path, metavar="FILE"
    )
    tls_client_ca: str | None = option(
        "--tlsClientCA",
        _TLS,
        "let in only clients whose certificate these authorities signed",
        parse=parse_path,
        metavar="FILE",
    )
    log_level: str = option(
        "--logLevel",
        RUNNING,
        "debug, info, warning or error; the log goes to standard error",
        default="info",
        parse=parse_choice("debug", "info", "warning", "error"),
        metavar="LEVEL",
    )
    log_format: str = option(
        "--logFormat",
        RUNNING,
        "text or json",
        default="text",
        parse=parse_choice("text", "json"),
        metavar="FORMAT",
    )

    def conflict(self, on_command_line: Collection[str]) -> str | None:
        """As Settings has it."""
        if bool(self.tls_cert) != bool(self.tls_key):
            return "--tlsCert and --tlsKey need each other; give both"
        if self.tls_client_ca and not self.tls_cert:
            return "--tlsClientCA needs --tlsCert and --tlsKey"
        # Where the environment or a file says so for every start, it is left alone.
        if self.force and self.set_total is None and "force" in on_command_line:
            return "--force needs --setTotal, without which it does nothing"
        return None

    def workers(self, cpus: float) -> int:
        """How many connections are served at once: ceil(CPUs × multiplier)."""
        return whole_share(cpus, self.multiplier)

    def too_few_connections(self, workers: int) -> str | None:
        """Why --maxConnections is too small for so many workers and what to do; None if it is not.

        How many workers there are hangs on the machine, so conflict() cannot know.
        """
        if self.max_connections is None or self.max_connections >= workers:
            return None
        return (
            f"--maxConnections {self.max_connections} is fewer than the {workers} workers; "
            f"raise it to {workers} at least, or lower --multiplier"
        )

    def wanted_connections(self, workers: int) -> int:
        """Open connections in all processes as they were asked for, whatever the system allows."""
        return self.max_connections or max(DEFAULT_CONNECTIONS, workers)

    def connection_limit(self, workers: int, processes: int, descriptors: float) -> int:
        """How many connections may be open in all processes together, one in each at least.

        `descriptors` is how many each process may open, perhaps infinite; where those do not
        suffice for what is wanted, they are the limit.
        """
        each = max(1, descriptors - SPARE_DESCRIPTORS)
        return int(min(self.wanted_connections(workers), processes * each))

    def process_count(self, cpus: float) -> int:
        """How many processes serve, 0 for this very one: never more than there are workers."""
        wanted = max(1, int(cpus)) if self.processes is None else self.processes
        return min(wanted, self.workers(cpus))
