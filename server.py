"""python server.py: one exact total that any number of connections add to.

Here is the command: what the processes of one server share, what each of them does from its first
line to its last, and what signals mean. Serving itself is counter/serving's; how processes are kept
alive is counter/processes'.
"""

from __future__ import annotations

import gc
import logging
import math
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

try:
    import gevent
    from gevent.event import Event

    from counter.admin.dump import dump, dump_stacks
    from counter.admin.status import Status
    from counter.options.parser import EXIT_USAGE, ServerSettings, read_settings
    from counter.processes.master import (
        CUT_SIGNAL,
        EXIT_CANNOT_BOOT,
        CannotBoot,
        Master,
        Stopped,
        split_evenly,
        stop_on_signals,
    )
    from counter.processes.slots import (
        PID,
        REQUESTS,
        Slots,
    )
    from counter.serving.server import CounterServer
    from counter.system.limits import available_cpus, raise_descriptor_limit
    from counter.system.log import configure_log
    from counter.system.sockets import listen
    from counter.system.systemd import notify, notify_reloading
    from counter.tls.certificates import (
        CertificateError,
        Certificates,
        Snapshot,
        check_aside,
        check_here,
    )
    from counter.totals.keeper import Keeper, make_keeper
    from counter.totals.store import StoreError
    from protocol import format_address
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"server.py: {error.name} is not installed; pip install -r requirements.txt")

EXIT_CANNOT_START: Final = 1
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

# The admin process ends when the serving ones have; it looks so often.
ADMIN_LOOK_S: Final = 0.02
ADMIN_BACKLOG: Final = 128

# Descriptors besides the workers' own: the process's, and sockets that linger.
SPARE_DESCRIPTORS: Final = 64


_log = logging.getLogger("server")


def warn_of_descriptors(workers: int, limit: float) -> None:
    """Warns when the workers need more descriptors than this process may open."""
    if workers + SPARE_DESCRIPTORS > limit:
        _log.warning(
            "%d workers need more than the %d descriptors this process may open; "
            "raise the limit (ulimit -Hn) or lower --multiplier",
            workers,
            limit,
        )


@dataclass(frozen=True)
class Shared:
    """What all processes of one server have in common, made before the first is forked."""

    settings: ServerSettings
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
        return Status(self.slots, store, read_total, found.total, self.address, found.survives)


def serve(settings: ServerSettings) -> int:
    """Serves as the settings say until SIGTERM or SIGINT; gives back the exit code."""
    cpus = available_cpus()
    workers, processes = settings.workers(cpus), settings.process_count(cpus)
    warn_of_descriptors(math.ceil(workers / max(1, processes)), raise_descriptor_limit())
    try:
        listener = listen(settings.host, settings.port, settings.backlog)
        # The store comes last: it may be given a total, which a start that fails must not do.
        shared = Shared(
            settings=settings,
            slots=Slots(max(1, processes)),
            listener=listener,
            address=format_address(*listener.getsockname()[:2]),
            admin=listen_admin(settings),
            certificates=make_certificates(settings),
            keeper=make_keeper(settings, processes),
        )
    except (OSError, StoreError, CertificateError) as error:
        return fail(str(error), EXIT_CANNOT_START)
    found = shared.keeper.found
    _log.info("CPUs to use: %g; an answered addition survives %s", cpus, found.survives)
    for warning in found.warnings:
        _log.warning("store %s: %s", settings.store, warning)

    if shared.admin:
        where = format_address(*shared.admin.getsockname()[:2])
        _log.info("the admin port is at http://%s/", where)

    def announce() -> None:
        count = f"{processes} processes" if processes > 1 else "1 process"
        store = f"{settings.store}" if found.is_new else f"{settings.store}, total: {found.total:,}"
        say(f"Listening on {shared.address} with {workers} workers in {count} (store: {store})")

    if processes:
        if not serve_forked(shared, workers, announce):
            return EXIT_CANNOT_BOOT
    else:
        serve_here(shared, 0, workers, announce, STOP_SIGNALS)
    say(f"Counter value: {shared.keeper.last_total(shared.slots):,}")
    say(f"Server stopped after processing total requests: {shared.slots.sum(REQUESTS):,}")
    return 0


def serve_forked(shared: Shared, workers: int, announce: Callable[[], None]) -> bool:
    """Serves in forked processes under a master; false, after saying why, if they cannot start."""
    shares = split_evenly(workers, len(shared.slots))

    def serve_share(index: int, ready: Callable[[], None]) -> int:
        if index == len(shared.slots):
            serve_admin(shared, ready)
            return 0
        # The master ends a process by SIGTERM; Ctrl-C is for the master.
        serve_here(shared, index, shares[index], ready, (signal.SIGTERM,))
        return 0

    def note_death(index: int) -> None:
        if index < len(shared.slots):
            shared.slots.clear_gauges(index)

    def close_listeners() -> None:
        notify("STOPPING=1")
        shared.listener.close()
        if shared.admin:
            shared.admin.close()

    master = Master(
        len(shared.slots) + (shared.admin is not None),
        serve_share,
        shared.settings.drain_timeout_s,
        note_death,
        partial(reload_certificates, shared, check_aside),
        lambda: dump(shared.settings, shared.status()),
        aside=int(shared.admin is not None),
    )

    def on_ready() -> None:
        announce()
        notify("READY=1", f"STATUS=serving with {workers} workers")

    try:
        master.run(on_ready, on_stop=close_listeners)
    except CannotBoot as error:
        sys.stderr.write(f"server.py: {error}\n")
        return False
    return True


def serve_here(
    shared: Shared,
    index: int,
    workers: int,
    ready: Callable[[], None],
    stop_signals: Sequence[signal.Signals],
) -> None:
    """Serves in this process, from patching it to the end of the drain."""
    from gevent import monkey

    monkey.patch_all()
    # Where each greenlet was spawned is of no use here and costs 2 us a connection.
    gevent.config.track_greenlet_tree = False
    stop, cut = Event(), Event()
    is_alone = signal.SIGINT in stop_signals  # its own master

    def on_stop() -> None:
        (cut if stop.is_set() else stop).set()

    def on_cut() -> None:
        stop.set()
        cut.set()

    def on_reload() -> None:
        # A terminal that is closed tells all processes.
        if reload_certificates(shared, check_here) if is_alone else shared.certificates:
            server.take_certificates()

    def on_dump() -> None:
        if is_alone:
            dump(shared.settings, shared.status())
        dump_stacks()

    handlers = [gevent.signal_handler(number, on_stop) for number in stop_signals]
    handlers.append(gevent.signal_handler(CUT_SIGNAL, on_cut))
    handlers.append(gevent.signal_handler(signal.SIGHUP, on_reload))
    handlers.append(gevent.signal_handler(signal.SIGUSR1, on_dump))
    server = CounterServer(
        shared.listener,
        shared.keeper.open(),
        workers,
        shared.settings,
        shared.slots,
        index,
        shared.certificates,
    )
    server.start()
    admin = None
    if shared.admin and not is_alone:
        shared.admin.close()  # it is the admin process's
    elif shared.admin:
        from counter.admin.http import Admin

        admin = Admin(shared.admin, shared.status())
        admin.start()
    # What exists now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    ready()
    if is_alone:
        notify("READY=1")
    stop.wait()
    if is_alone:
        notify("STOPPING=1")
    if admin:
        admin.status.draining = True
    server.drain(shared.settings.drain_timeout_s, cut)
    if admin:
        admin.stop()
    for handler in handlers:
        handler.cancel()
    if is_alone:
        stop_on_signals()  # gevent has reset them


def serve_admin(shared: Shared, ready: Callable[[], None]) -> None:
    """Serves the admin port in this process until the serving ones have ended."""
    from gevent import monkey

    monkey.patch_all()
    from counter.admin.http import Admin

    assert shared.admin is not None
    # Whoever holds it keeps the port open.
    shared.listener.close()
    stop, cut = Event(), Event()
    handlers = [
        gevent.signal_handler(signal.SIGTERM, stop.set),
        gevent.signal_handler(CUT_SIGNAL, cut.set),
    ]
    admin = Admin(shared.admin, shared.status())
    admin.start()
    ready()
    stop.wait()
    admin.status.draining = True
    while any(shared.slots.cells(PID)) and not cut.wait(ADMIN_LOOK_S):
        pass
    admin.stop()
    for handler in handlers:
        handler.cancel()


def listen_admin(settings: ServerSettings) -> socket.socket | None:
    """The admin port's listening socket, None where there is to be none; OSError."""
    if settings.admin_port is None:
        return None
    try:
        flags = "--adminHost", "--adminPort"
        return listen(settings.admin_host, settings.admin_port, ADMIN_BACKLOG, flags)
    except OSError as error:
        raise OSError(f"admin port: {error}") from None


def make_certificates(settings: ServerSettings) -> Certificates | None:
    """The certificates that the settings name, loaded; CertificateError if they cannot be used."""
    if not settings.tls_cert or not settings.tls_key:
        return None
    certificates = Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    certificates.load(check_aside)
    return certificates


def reload_certificates(shared: Shared, check: Callable[[Snapshot], None]) -> bool:
    """Publishes the certificate files as they are now, after SIGHUP; true if all shall take them.

    Files that cannot be used leave everything as it is.
    """
    notify_reloading()
    try:
        return _reload(shared, check)
    finally:
        notify("READY=1")


def _reload(shared: Shared, check: Callable[[Snapshot], None]) -> bool:
    if shared.certificates is None:
        _log.warning("SIGHUP: there is nothing to load again, TLS is off (--tlsCert)")
        return False
    try:
        shared.certificates.load(check)
    except (CertificateError, OSError) as error:
        _log.error("SIGHUP: the certificates are kept as they were: %s", error)
        return False
    _log.info("SIGHUP: the certificates were loaded again")
    return True


def say(line: str) -> None:
    """Writes one line of the result to standard output at once, also into a pipe."""
    try:
        print(line, flush=True)
    except OSError as error:
        _log.warning("cannot write to standard output (%s): %s", error.strerror, line)


def fail(message: str, code: int) -> int:
    """Says in one line why the program ends; gives back its exit code."""
    sys.stderr.write(f"server.py: {message}\n")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives back its exit code."""
    settings = read_settings(
        ServerSettings,
        "server.py",
        "A shared counter: one exact total, added to over TCP.",
        arguments,
    )
    configure_log(settings.log_level, settings.log_format)
    if bool(settings.tls_cert) != bool(settings.tls_key):
        return fail("--tlsCert and --tlsKey need each other; give both", EXIT_USAGE)
    if settings.tls_client_ca and not settings.tls_cert:
        return fail("--tlsClientCA needs --tlsCert and --tlsKey", EXIT_USAGE)
    stop_on_signals()
    try:
        return serve(settings)
    except Stopped:  # before it served: there is nothing to tell
        return 0


if __name__ == "__main__":
    sys.exit(main())
