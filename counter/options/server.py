"""What `python server.py` can be asked to do: its options, and which of them contradict."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

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
        "connections that may wait for a worker (the kernel's net.core.somaxconn bounds it)",
        default=1024,
        parse=parse_whole(1, 2**31 - 1),
    )
    multiplier: int = option(
        "--multiplier",
        _SIZE,
        "workers per CPU: so many connections are served at once",
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
        "while every worker is taken and connections wait, one that was idle for so long gives its "
        "worker up",
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
        return None

    def workers(self, cpus: float) -> int:
        """How many connections are served at once: ceil(CPUs × multiplier)."""
        return whole_share(cpus, self.multiplier)

    def process_count(self, cpus: float) -> int:
        """How many processes serve, 0 for this very one: never more than there are workers."""
        wanted = max(1, int(cpus)) if self.processes is None else self.processes
        return min(wanted, self.workers(cpus))
