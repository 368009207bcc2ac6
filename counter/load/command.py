"""python client.py: the load, or one addition or read for shells; what is said and with which code.

The library is client.py's, which no module here imports: what the command needs of it is handed
over as a Library. Whatever takes time to import is imported when it is needed: a read is quick, and
a Ctrl-C meanwhile ends the command as it does later.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from counter.system.exits import (
    EXIT_CANNOT_CONNECT,
    EXIT_ERRORS,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
)
from counter.system.signals import undo_inherited
from counter.system.streams import prepare_streams, write_error, write_result
from counter.tls.snapshot import CertificateError
from protocol import format_address

if TYPE_CHECKING:
    import ssl

    from counter.options.client import ClientSettings


@dataclass(frozen=True)
class Library:
    """What the command needs of the library."""

    # The total after one addition: address, timeout in seconds, TLS context, amount.
    add: Callable[[str, float, ssl.SSLContext | None, int], int]
    # The same of the one addition that a file is, which is the last argument.
    add_of_file: Callable[[str, float, ssl.SSLContext | None, int, str], int]
    connect_error: type[Exception]  # nothing was sent
    file_errors: tuple[type[Exception], ...]  # nothing was sent, and the file is why
    counter_error: type[Exception]  # any other: an outcome is unknown, or was not kept
    explain: Callable[[OSError | UnicodeError, str, int], str]  # a failure to connect
    is_it_one: str  # what to ask oneself where a peer does not answer as a server


def run(arguments: Sequence[str] | None, library: Library) -> int:
    """The whole command; gives back its exit code. `arguments` are the process's unless given."""
    prepare_streams()
    try:
        undo_inherited()
        return _obey(arguments, library)
    except CertificateError as error:
        return _fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def _obey(arguments: Sequence[str] | None, library: Library) -> int:
    from counter.options.client import ClientSettings
    from counter.options.parser import read_settings, unknown_variables
    from counter.system.log import configure_log

    settings = read_settings(ClientSettings, arguments)
    configure_log(settings.log_level, settings.log_format)
    for warning in unknown_variables(ClientSettings):
        logging.getLogger("client").warning(warning)
    if settings.read or settings.add is not None:
        return _ask_once(settings, library)
    return _load(settings, library)


def _ask_once(settings: ClientSettings, library: Library) -> int:
    address, timeout_s = str(settings.server_address), settings.timeout_s
    amount, path = settings.add or 0, settings.session_file
    try:
        tls = _tls_context(settings)
        if path is None:
            total = library.add(address, timeout_s, tls, amount)
        else:
            total = library.add_of_file(address, timeout_s, tls, amount, path)
    except library.connect_error as error:
        return _fail(str(error), EXIT_CANNOT_CONNECT)
    except library.file_errors as error:
        return _fail(str(error), EXIT_USAGE)
    except library.counter_error as error:
        return _fail(str(error), EXIT_ERRORS)
    try:
        write_result(f"{total}\n")
    except OSError as error:
        return _fail(f"cannot write the result: {error.strerror}; it was: {total}", EXIT_ERRORS)
    return 0


def _tls_context(settings: ClientSettings) -> ssl.SSLContext | None:
    """The context that the settings ask for, None for a plain connection; CertificateError."""
    if not settings.wants_tls():
        return None
    from counter.tls.contexts import client_context

    return client_context(settings)


def _load(settings: ClientSettings, library: Library) -> int:
    from counter.load.run import CannotBegin, LoadProcessDied, run_load
    from counter.report import files
    from counter.report.check import exit_code
    from counter.report.progress import ProgressBar
    from counter.report.thresholds import hold
    from counter.system.limits import available_cpus, raise_descriptor_limit

    try:
        files.check(settings)
    except files.OutputError as error:
        return _fail(str(error), EXIT_USAGE)
    _tls_context(settings)  # a file that cannot be used is found before anything is started
    raise_descriptor_limit()
    address, cpus = settings.server_address, available_cpus()
    patience = f"up to {settings.timeout_s:g} s for the replies in flight"
    waiting = f"interrupted; waiting {patience}, Ctrl-C again to stop waiting"
    try:
        with ProgressBar(settings, sys.stderr) as bar:
            result = run_load(settings, cpus, bar.update, lambda: bar.end(waiting))
    except EOFError:
        where = format_address(address.host, address.port)
        why = f"{where} closed the connection without an answer; {library.is_it_one}"
        return _fail(why, EXIT_CANNOT_CONNECT)
    except (OSError, UnicodeError) as error:
        return _fail(library.explain(error, address.host, address.port), EXIT_CANNOT_CONNECT)
    except CannotBegin as error:
        return _fail(str(error), EXIT_USAGE)
    except LoadProcessDied as error:
        return _fail(str(error), EXIT_ERRORS)
    outcomes = hold(result, settings.threshold)
    return files.write(result, settings, outcomes, cpus, exit_code(result, outcomes))


def _fail(message: str, code: int) -> int:
    write_error(f"client.py: {message}\n")
    return code
