"""The certificate files of a server as they were at one moment, the same for all its processes.

The master reads the files, has a helping process find out whether they can be used, and publishes
them in memory; every process, one that replaces another included, takes exactly that snapshot,
whatever becomes of the files meanwhile. No ssl here: the master must not import it before it forks.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Final

from counter.processes.child import ChildError, ask_child
from counter.tls.snapshot import CertificateError, Snapshot

# How long the certificate files may take to be looked at, which is done in a helping process.
CHECK_S: Final = 10.0

# A text is replaced in microseconds; whoever meets that waits so often and so long.
READ_ATTEMPTS: Final = 100
READ_PAUSE_S: Final = 0.001

_COUNT, _LENGTH = 0, 1  # cells: of changes, two for each; bytes of the text


class Certificates:
    """What --tlsCert, --tlsKey and --tlsClientCA name; load() before anything else."""

    def __init__(self, cert_file: str, key_file: str, ca_file: str | None) -> None:
        self._files = cert_file, key_file, ca_file or ""
        self._shared = SharedText()

    def load(self, check: Callable[[Snapshot], str]) -> str:
        """Reads the files and publishes them if `check` finds that they can be used.

        Gives back what is to be said of them, mostly nothing. CertificateError otherwise; what was
        published before is kept.
        """
        cert, key, ca = self._files
        snapshot = Snapshot(
            cert=_read("--tlsCert", cert),
            key=_read("--tlsKey", key),
            ca=_read("--tlsClientCA", ca) if ca else "",
            cert_file=cert,
            key_file=key,
            ca_file=ca,
        )
        warning = check(snapshot)
        self._shared.publish(json.dumps(asdict(snapshot)))
        if not warning:
            return ""
        remedy = "look at this machine's clock, and at the day it begins"
        if "expired" in warning:
            remedy = "renew it"
        return f"--tlsCert {cert}: {warning}, clients refuse it; {remedy}"

    def snapshot(self) -> Snapshot:
        """What was published last, by this process or the one that it was forked from."""
        return Snapshot(**json.loads(self._shared.read()))


def _read(flag: str, name: str) -> str:
    if os.path.exists(name) and not os.path.isfile(name):
        # Reading a pipe could wait for ever, and it has its content once.
        raise CertificateError(f"{flag} {name}: it is not a regular file")
    try:
        with open(name, "rb") as file:
            data = file.read()
    except OSError as error:
        text = (error.strerror or str(error)).lower()
        raise CertificateError(f"{flag} {name}: {text}") from None
    # What counts is ASCII; bundles of authorities have names in other letters between.
    return data.decode("ascii", "replace").replace("\ufffd", "?")


class SharedText:
    """A text that one process writes and those forked from it read, never half of it.

    Only the last one is kept: a private key that was replaced is gone. A count that is odd while
    the text is written tells readers that it has changed under them, and they read again.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("shared-text")
        self._cells = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    def publish(self, text: str) -> None:
        """Replaces the text, for whoever reads it from now on."""
        data = text.encode()
        self._cells[_COUNT] += 1
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, data, 0)
        self._cells[_LENGTH] = len(data)
        self._cells[_COUNT] += 1

    def read(self) -> str:
        """The text that was published last; BlockingIOError if it is still being written."""
        for _ in range(READ_ATTEMPTS):
            count, length = self._cells[_COUNT], self._cells[_LENGTH]
            data = os.pread(self._file, length, 0)
            if count % 2 == 0 and self._cells[_COUNT] == count:
                return data.decode()
            time.sleep(READ_PAUSE_S)
        raise BlockingIOError(errno.EAGAIN, "the certificates are being replaced")


def check_here(snapshot: Snapshot) -> str:
    """What clients hold against these certificates; CertificateError if they cannot be used."""
    from counter.tls.contexts import invalid_now, server_context

    server_context(snapshot)
    return invalid_now(snapshot)


def check_aside(snapshot: Snapshot) -> str:
    """The same by a helping process: the one that is still to fork must not import ssl."""
    try:
        return ask_child(lambda: check_here(snapshot), CHECK_S, raises=(CertificateError,))
    except ChildError as error:
        raise CertificateError(f"--tlsCert {snapshot.cert_file}: {error}") from None
