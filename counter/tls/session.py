"""TLS without sockets: bytes of the wire in, bytes of the application out, and the other way round.

A Session is one end of one connection; whoever has the socket moves its bytes. So a callback of the
loop can serve TLS as it serves plain connections, and nothing waits in a handshake. Here are the
contexts of both ends too: TLS 1.2 or newer, and a peer's certificate is verified or there is none.
"""

from __future__ import annotations

import os
import ssl
from contextlib import suppress
from typing import IO, Final

from counter.options.client import ClientSettings
from counter.tls.certificates import CertificateError, Snapshot

RECORD_HEADER: Final = 5
# What OpenSSL says of files that are something else, or not whole.
NO_PEM: Final = ("no start line", "bad end line", "pem lib", "not enough data", "empty")
ENCRYPTED: Final = (
    "the key is encrypted; store it without a passphrase, readable by this user alone"
)


class TlsError(Exception):
    """A handshake or a record was refused; outgoing() holds the alert that tells the peer."""


class Session:
    """One end of a TLS connection. `handshaken` once application bytes may pass."""

    __slots__ = ("_head", "_incoming", "_left", "_outgoing", "_tls", "ended", "handshaken")

    def __init__(self, context: ssl.SSLContext, server_name: str | None = None) -> None:
        """A server's end, or a client's with the name of the server it means."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_name is None,
            server_hostname=server_name,
        )
        self.handshaken = False
        self.ended = False  # the peer said that it sends no more
        self._head = b""  # of a record whose length is not known yet
        self._left = 0  # bytes that are missing of a record

    def start(self) -> None:
        """Begins the handshake; a client has something to send then."""
        self.receive(b"")

    def receive(self, data: bytes) -> bytes:
        """The application's bytes in what came from the peer; TlsError if it is refused.

        Nothing can be answered then, so what came before in the same bytes is not given back.
        """
        self._follow(data)
        self._incoming.write(data)
        parts = []
        try:
            if not self.handshaken:
                self._tls.do_handshake()
                self.handshaken = True
            while part := self._tls.read(65536):
                parts.append(part)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.ended = True
        except ssl.SSLError as error:
            raise TlsError(reason(error)) from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def is_within_record(self) -> bool:
        """Whether the peer has begun a record that it has not sent to its end."""
        return bool(self._head or self._left)

    def _follow(self, data: bytes) -> None:
        """Notes where records end: a header of five bytes has the length of what follows it."""
        data, self._head, end = self._head + data, b"", self._left
        while len(data) - end >= RECORD_HEADER:
            end += RECORD_HEADER + int.from_bytes(data[end + 3 : end + RECORD_HEADER])
        if end <= len(data):
            self._head = data[end:]
        self._left = max(0, end - len(data))

    def encrypt(self, data: bytes) -> bytes:
        """What to send to the peer for these bytes of the application."""
        self._tls.write(data)
        return self._outgoing.read()

    def outgoing(self) -> bytes:
        """What the handshake, or an alert, has to send to the peer."""
        return self._outgoing.read()

    def farewell(self) -> bytes:
        """What tells the peer that nothing more is sent."""
        if self.handshaken:
            with suppress(ssl.SSLError):
                self._tls.unwrap()
        return self._outgoing.read()


def reason(error: ssl.SSLError) -> str:
    """An error of OpenSSL in words."""
    verify = getattr(error, "verify_message", "")
    text = (error.reason or str(error.args[-1])).replace("_", " ").lower()
    return f"{text}: {verify}" if verify else text


def server_context(snapshot: Snapshot) -> ssl.SSLContext:
    """The context of a server; CertificateError if these certificates cannot make one.

    With a client CA, only clients whose certificate it has signed are let in.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # The ssl module takes files alone.
    with _memory_file(snapshot.cert) as cert, _memory_file(snapshot.key) as key:
        files = f"--tlsCert {snapshot.cert_file} with --tlsKey {snapshot.key_file}"
        _load_chain(context, _path(cert), _path(key), files)
    if snapshot.ca_file:
        try:
            context.load_verify_locations(cadata=snapshot.ca)
        except (ssl.SSLError, ValueError) as error:
            text = f"--tlsClientCA {snapshot.ca_file}: {_explained(_text(error))}"
            raise CertificateError(text) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(settings: ClientSettings) -> ssl.SSLContext:
    """The context of a client, which verifies the server's name against its certificate.

    Without --tlsCA the system's authorities are trusted. CertificateError if a file cannot be used.
    """
    ca, cert, key = settings.tls_ca, settings.tls_cert, settings.tls_key
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise CertificateError(f"--tlsCA {ca}: {_explained(_text(error))}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert:
        if not key and _is_without_key(cert):
            raise CertificateError(f"--tlsCert {cert} has no private key in it; give --tlsKey")
        _load_chain(context, cert, key, f"--tlsCert {cert} with --tlsKey {key or cert}")
    return context


def _is_without_key(cert: str) -> bool:
    """Whether a file has certificates alone."""
    try:
        with open(cert, "rb") as file:
            text = file.read()
    except (OSError, ValueError):
        return False
    return b"BEGIN CERTIFICATE" in text and b"PRIVATE KEY-----" not in text


def _load_chain(context: ssl.SSLContext, cert: str, key: str | None, files: str) -> None:
    """Has a context take a certificate and its key; CertificateError names them by `files`."""
    asked = []

    def passphrase() -> str:  # without this OpenSSL would ask the terminal
        asked.append(True)
        return ""

    try:
        context.load_cert_chain(cert, key, password=passphrase)
    except (OSError, ValueError) as error:
        text = ENCRYPTED if asked else _explained(_text(error))
        raise CertificateError(f"{files}: {text}") from None


def _text(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return reason(error)
    return (getattr(error, "strerror", None) or str(error)).lower()


def _explained(text: str) -> str:
    """The commonest words of OpenSSL, with what they mean here."""
    if "key values mismatch" in text:
        return "the key belongs to another certificate"
    if any(words in text for words in NO_PEM):
        return f"it is no PEM file of the kind that is needed ({text})"
    return text


def _memory_file(text: str) -> IO[str]:
    file = os.fdopen(os.memfd_create("tls"), "w+", encoding="ascii")
    file.write(text)
    file.flush()
    return file


def _path(file: IO[str]) -> str:
    return f"/proc/self/fd/{file.fileno()}"
