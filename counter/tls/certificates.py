"""The certificate files of a server as they were at one moment, the same for all its processes.

The master reads the files, has a helping process find out whether they can be used, and publishes
them in memory; every process, one that replaces another included, takes exactly that snapshot,
whatever becomes of the files meanwhile. No ssl here: the master must not import it before it forks.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import asdict
from typing import Final

from counter.processes.child import ChildError, ask_child
from counter.tls.snapshot import CertificateError, Snapshot

# How long the certificate files may take to be looked at, which is done in a helping process.
CHECK_S: Final = 10.0

_LENGTH = struct.Struct("=Q")


class Certificates:
    """What --tlsCert, --tlsKey and --tlsClientCA name; load() before anything else."""

    def __init__(self, cert_file: str, key_file: str, ca_file: str | None) -> None:
        self._files = cert_file, key_file, ca_file or ""
        self._shared = SharedText()

    def load(self, check: Callable[[Snapshot], None]) -> None:
        """Reads the files and publishes them if `check` finds nothing wrong.

        CertificateError otherwise; what was published before is kept.
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
        check(snapshot)
        self._shared.publish(json.dumps(asdict(snapshot)))

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

    Each text is put behind the ones before in a file in memory; then one aligned store says where
    it begins. Whoever reads gets a whole one, whenever that is.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("shared-text")
        self._place = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._end = 0

    def publish(self, text: str) -> None:
        """Replaces the text, for whoever reads it from now on."""
        data = text.encode()
        os.pwrite(self._file, _LENGTH.pack(len(data)) + data, self._end)
        self._place[0] = self._end
        self._end += _LENGTH.size + len(data)

    def read(self) -> str:
        """The text that was published last."""
        place = self._place[0]
        (length,) = _LENGTH.unpack(os.pread(self._file, _LENGTH.size, place))
        return os.pread(self._file, length, place + _LENGTH.size).decode()


def check_here(snapshot: Snapshot) -> None:
    """CertificateError if these certificates cannot be used."""
    from counter.tls.contexts import server_context

    server_context(snapshot)


def check_aside(snapshot: Snapshot) -> None:
    """The same by a helping process: the one that is still to fork must not import ssl."""
    try:
        ask_child(lambda: check_here(snapshot), CHECK_S, raises=(CertificateError,))
    except ChildError as error:
        raise CertificateError(f"--tlsCert {snapshot.cert_file}: {error}") from None
