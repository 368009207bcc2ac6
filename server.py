"""python server.py: one exact total that any number of connections add to.

Here is the command: what the processes of one server share, which kinds of them there are, and what
signals mean to the whole. Serving itself is counter/serving's; how processes are kept alive is
counter/processes'.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

if __name__ == "__main__" and sys.flags.safe_path:
    # python -P leaves out the folder of the program, whose own modules are no strangers'.
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

try:
    from counter.admin.dump import dump
    from counter.admin.status import Status
    from counter.options.parser import read_settings, unknown_variables
    from counter.options.server import ServerSettings
    from counter.processes.child import CannotServe, Child
    from counter.processes.master import CannotBoot, Master
    from counter.processes.orders import Order, Orders
    from counter.processes.signals import (
        STOP_SIGNALS,
        Stopped,
        ignore_stop_signals,
        name_of,
        stopped_by_signals,
    )
    from counter.processes.slots import REQUESTS, Slots
    from counter.serving.process import ServingProcess
    from counter.system.exits import EXIT_CANNOT_BOOT, EXIT_CANNOT_START, EXIT_USAGE
    from counter.system.limits import available_cpus, raise_descriptor_limit, split_evenly
    from counter.system.log import configure_log
    from counter.system.sockets import VANISHED_S, listen, longest_backlog
    from counter.system.streams import prepare_streams, write_error, write_result
    from counter.system.systemd import notify, notify_reloading
    from counter.tls.certificates import Certificates, check_aside, check_here
    from counter.tls.snapshot import CertificateError, Snapshot
    from counter.totals.keeper import Keeper, make_keeper
    from counter.totals.store import StoreError
    from counter.turn.library import EngineMissing, choose
    from protocol import format_address
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.stderr.write(f"server.py: {error.name} is not installed; pip install -r requirements.txt\n")
    from counter.system.exits import EXIT_USAGE

    sys.exit(EXIT_USAGE)

if TYPE_CHECKING:
    from counter.admin.http import Admin

ADMIN_BACKLOG: Final = 128

# So much later than --writeTimeout the kernel gives a peer up that does not read.
UNREAD_GRACE_S: Final = 15.0

_log = logging.getLogger("server")


def connection_shares(settings: ServerSettings, workers: int, processes: int) -> list[int]:
    """How many connections each process may have open; says so where descriptors bound it.

    Raises the limit on descriptors, which the processes inherit, as far as it may be.
    """
    descriptors = raise_descriptor_limit()
    limit = settings.connection_limit(workers, processes, descriptors)
    wanted = settings.wanted_connections(workers)
    if limit < wanted:
        # Of the default more is there than most need, as long as every worker can be taken.
        is_missed = settings.max_connections is not None or limit < workers
        _log.log(
            logging.WARNING if is_missed else logging.INFO,
            "at most %d connections at once instead of %d, as each process may open %d "
            "descriptors; to have more, raise that (ulimit -Hn)",
            limit,
            wanted,
            descriptors,
        )
    return list(split_evenly(limit, processes))


@dataclass(frozen=True)
class Shared:
    """What all processes of one server have in common, made before the first is forked."""

    settings: ServerSettings
    workers: int
    connection_shares: list[int]  # how many connections each process may have open
    listener: socket.socket
    keeper: Keeper
    certificates: Certificates | None
    slots: Slots
    admin: socket.socket | None  # where the admin port listens
    address: str  # where it serves; the listener may be closed when it is asked for

    def status(self) -> Status:
        """What the admin port tells, for the process that serves it."""
        in_memory = self.settings.store.kind == "memory"
        read_total = self.keeper.open().total if in_memory else None
        found, store = self.keeper.found, str(self.settings.store)
        ledger = self.keeper.ledger
        return Status(
            self.slots,
            store,
            read_total,
            found.total,
            self.address,
            found.survives,
            ledger.table.count if ledger else None,
        )

    def announce(self) -> None:
        """Says where the server listens, with how many workers, on what total."""
        found = self.keeper.found
        count = f"{len(self.slots)} processes" if len(self.slots) > 1 else "1 process"
        store = str(self.settings.store)
        if not found.is_new:
            store += f", total: {found.total:,}"
        say(
            self.settings,
            f"Listening on {self.address} with {self.workers} workers in {count} (store: {store})",
            address=self.address,
            workers=self.workers,
            processes=len(self.slots),
            store=str(self.settings.store),
            total=str(found.total),
        )

    def reload_certificates(self, check: Callable[[Snapshot], str]) -> bool:
        """Publishes the certificate files as they are now, after SIGHUP; true if all shall take
        them. Files that cannot be used leave everything as it is.
        """
        notify_reloading()
        try:
            return _reload(self.certificates, check)
        finally:
            notify("READY=1")


class ServingChild(Child):
    """A serving process under the master."""

    name = "serving process"

    def __init__(self, shared: Shared, index: int, workers: int) -> None:
        self._shared = shared
        self._index = index
        self._workers = workers

    def live(self, orders: Orders, ready: Callable[[], None]) -> int:
        shared = self._shared
        if shared.admin:
            shared.admin.close()  # it is the admin process's
        ServingProcess(
            shared.settings,
            shared.listener,
            shared.keeper,
            shared.slots,
            self._workers,
            self._index,
            shared.certificates,
            orders,
            shared.connection_shares[self._index],
        ).run(ready)
        return 0

    def on_death(self) -> None:
        self._shared.slots.clear_gauges(self._index)
        self._shared.keeper.bury(self._index)


class AdminChild(Child):
    """The process of the admin port."""

    name = "admin process"
    is_vital = False

    def __init__(self, shared: Shared, listener: socket.socket) -> None:
        self._shared = shared
        self._listener = listener

    def live(self, orders: Orders, ready: Callable[[], None]) -> int:
        # Whoever holds it keeps the port open.
        self._shared.listener.close()
        from counter.admin.process import serve_admin

        serve_admin(self._listener, self._shared.status(), orders, ready)
        return 0


class Supervised:
    """The server as its master sees it."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def run(self) -> None:
        """Serves in forked processes until a signal ends it; CannotBoot if they cannot start."""
        shared = self._shared
        shares = split_evenly(shared.workers, len(shared.slots))
        children: list[Child] = [
            ServingChild(shared, index, workers) for index, workers in enumerate(shares)
        ]
        if shared.admin:
            children.append(AdminChild(shared, shared.admin))
        Master(children, shared.settings.drain_timeout_s, self).run()

    def on_ready(self) -> None:
        self._shared.announce()
        notify("READY=1", f"STATUS=serving with {self._shared.workers} workers")

    def on_stop(self) -> None:
        notify("STOPPING=1")
        self._shared.listener.close()
        if self._shared.admin:
            self._shared.admin.close()

    def on_reload(self) -> bool:
        return self._shared.reload_certificates(check_aside)

    def on_dump(self) -> None:
        dump(self._shared.settings, self._shared.status())


class Unsupervised(ServingProcess):
    """The server that serves in this very process, and is its own master."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(
            shared.settings,
            shared.listener,
            shared.keeper,
            shared.slots,
            shared.workers,
            certificates=shared.certificates,
            most_connections=shared.connection_shares[0],
        )
        self._shared = shared
        self._admin: Admin | None = None
        self._is_stopping = False

    def serve(self) -> None:
        """Serves until a signal ends it, and drains."""
        self.run(self._announce)

    def _announce(self) -> None:
        self._shared.announce()
        notify("READY=1")

    def listen_to_orders(self) -> list[Any]:
        """Signals are its orders; to the end, as none may find what the system does by default."""
        import gevent

        for number in STOP_SIGNALS:
            gevent.signal_handler(number, self._on_stop, number)
        gevent.signal_handler(signal.SIGHUP, self.obey, Order.RELOAD)
        gevent.signal_handler(signal.SIGUSR1, self.obey, Order.DUMP)
        gevent.get_hub().NOT_ERROR += (Stopped,)  # it ends a wait, which needs no traceback
        return []

    def _on_stop(self, number: int) -> None:
        limit = f"{self.settings.drain_timeout_s:g} s"
        if self._is_stopping:
            _log.info("%s: what is left is cut", name_of(number))
        else:
            _log.info("%s: draining; what is not done in %s is cut", name_of(number), limit)
        self.obey(Order.CUT if self._is_stopping else Order.DRAIN)
        self._is_stopping = True

    def on_start(self) -> None:
        if self._shared.admin:
            from counter.admin.http import Admin

            self._admin = Admin(self._shared.admin, self._shared.status())
            self._admin.start()

    def on_drain(self) -> None:
        notify("STOPPING=1")
        if self._admin:
            self._admin.status.draining = True

    def on_end(self) -> None:
        if self._admin:
            self._admin.stop()
        ignore_stop_signals()

    def on_reload(self) -> bool:
        return self._shared.reload_certificates(check_here)

    def on_dump(self) -> None:
        dump(self._shared.settings, self._shared.status())
        super().on_dump()


def missing_package(settings: ServerSettings) -> str:
    """A package that is not installed, of those that only the processes import; none if empty."""
    needed = ["numpy"]  # of the plain engine, and of TLS
    if settings.admin_port is not None:
        needed.append("prometheus_client")
    if settings.store.kind in ("redis", "rediss"):
        needed.append("redis")
    return next((name for name in needed if not find_spec(name)), "")


def serve(settings: ServerSettings) -> int:
    """Serves as the settings say until SIGTERM or SIGINT; gives back the exit code."""
    cpus = available_cpus()
    workers, processes = settings.workers(cpus), settings.process_count(cpus)
    if problem := settings.too_few_connections(workers):
        return fail(problem, EXIT_USAGE)
    try:
        engine, why_plain = choose(settings.engine)
    except EngineMissing as missing:
        return fail(f"--engine compiled: {missing}", EXIT_USAGE)
    shares = connection_shares(settings, workers, max(1, processes))
    try:
        listener = listen_for_peers(settings)
        # The store comes last: it may be given a total, which a start that fails must not do.
        shared = Shared(
            settings=settings,
            workers=workers,
            connection_shares=shares,
            slots=Slots(max(1, processes)),
            listener=listener,
            address=format_address(*listener.getsockname()[:2]),
            admin=listen_admin(settings),
            certificates=make_certificates(settings),
            keeper=make_keeper(settings, processes),
        )
    except (OSError, StoreError, CertificateError) as error:
        return fail(str(error), EXIT_CANNOT_START)
    introduce(shared, cpus, f"{engine} ({why_plain})" if why_plain else engine)
    try:
        if processes:
            Supervised(shared).run()
        else:
            Unsupervised(shared).serve()
    except CannotBoot as error:
        return fail(str(error), EXIT_CANNOT_BOOT)
    except CannotServe as error:
        return fail(str(error), EXIT_CANNOT_START)
    total, requests = shared.keeper.last_total(shared.slots), shared.slots.sum(REQUESTS)
    say(settings, f"Counter value: {total:,}", total=str(total))
    stopped = f"Server stopped after processing total requests: {requests:,}"
    say(settings, stopped, requests=requests)
    return 0


def introduce(shared: Shared, cpus: float, engine: str) -> None:
    """The first lines of the log: with what it counts, what that survives, what is amiss in it.

    `engine` is the one that serves: compiled or plain.
    """
    found, store = shared.keeper.found, shared.settings.store
    keeps_nothing = store.kind != "memory" and found.survives.startswith("nothing")
    _log.log(
        logging.WARNING if keeps_nothing else logging.INFO,
        "CPUs to use: %g; the engine: %s; an answered addition survives %s",
        cpus,
        engine,
        found.survives,
    )
    for warning in found.warnings:
        _log.warning("store %s: %s", store, warning)
    if shared.settings.sessions and shared.keeper.why_no_sessions:
        _log.info("clients can have no sessions: %s", shared.keeper.why_no_sessions)
    if shared.admin:
        where = format_address(*shared.admin.getsockname()[:2])
        _log.info("the admin port is at http://%s/", where)


def listen_for_peers(settings: ServerSettings) -> socket.socket:
    """The listening socket of the counter; OSError."""
    longest = longest_backlog()
    if longest is not None and longest < settings.backlog:
        _log.warning(
            "the kernel cuts --backlog %d to %d (sysctl net.core.somaxconn)",
            settings.backlog,
            longest,
        )
    # A peer whose window stays shut is --writeTimeout's to judge, which says so.
    vanished_s = max(VANISHED_S, settings.write_timeout_s + UNREAD_GRACE_S)
    host, port = settings.host, settings.port
    return listen(host, port, settings.backlog, format_address(host, port), vanished_s=vanished_s)


def listen_admin(settings: ServerSettings) -> socket.socket | None:
    """The admin port's listening socket, None where there is to be none; OSError."""
    if settings.admin_port is None:
        return None
    try:
        host, port, flags = settings.admin_host, settings.admin_port, ("--adminHost", "--adminPort")
        return listen(host, port, ADMIN_BACKLOG, format_address(host, port), flags)
    except OSError as error:
        raise OSError(f"admin port: {error}") from None


def make_certificates(settings: ServerSettings) -> Certificates | None:
    """The certificates that the settings name, loaded; CertificateError if they cannot be used."""
    if not settings.tls_cert or not settings.tls_key:
        return None
    certificates = Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    if warning := certificates.load(check_aside):
        _log.warning(warning)
    return certificates


def _reload(certificates: Certificates | None, check: Callable[[Snapshot], str]) -> bool:
    if certificates is None:
        _log.warning("SIGHUP: there is nothing to load again, TLS is off (--tlsCert)")
        return False
    try:
        warning = certificates.load(check)
    except (CertificateError, OSError) as error:
        _log.error("SIGHUP: the certificates are kept as they were: %s", error)
        return False
    _log.info("SIGHUP: the certificates were loaded again")
    if warning:
        _log.warning(warning)
    return True


def say(settings: ServerSettings, line: str, **fields: str | int) -> None:
    """Writes one line of the result to standard output at once, also into a pipe.

    As JSON where the log is, with what it tells in fields; totals are text, as numbers end at 2^53.
    """
    if settings.log_format == "json":
        line = json.dumps({"message": line, **fields}, ensure_ascii=False)
    try:
        write_result(f"{line}\n")
    except OSError as error:
        _log.warning("cannot write to standard output (%s): %s", error.strerror, line)


def fail(message: str, code: int) -> int:
    """Says in one line why the program ends; gives back its exit code."""
    write_error(f"server.py: {message}\n")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives back its exit code."""
    prepare_streams()
    settings = read_settings(ServerSettings, arguments)
    configure_log(settings.log_level, settings.log_format)
    for warning in unknown_variables(ServerSettings):
        _log.warning(warning)
    if missing := missing_package(settings):
        return fail(f"{missing} is not installed; pip install -r requirements.txt", EXIT_USAGE)
    try:
        with stopped_by_signals():
            return serve(settings)
    except Stopped:  # before it served: there is nothing to tell
        return 0


if __name__ == "__main__":
    sys.exit(main())
