"""The contexts of both ends: TLS 1.2 or newer; a peer's certificate is verified or there is none.

What OpenSSL says of a file that cannot be used is said again here in words that name the file, the
option and the remedy.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import replace
from typing import IO, Final

from counter.options.client import ClientSettings
from counter.system.key_log import key_log_error
from counter.tls.session import Session, TlsError, reason
from counter.tls.snapshot import CertificateError, Snapshot

# What OpenSSL says of files that are something else, or not whole.
NO_PEM: Final = ("no start line", "bad end line", "pem lib", "not enough data", "empty")
ENCRYPTED: Final = (
    "the key is encrypted; store it without a passphrase, readable by this user alone"
)


def server_context(snapshot: Snapshot) -> ssl.SSLContext:
    """The context of a server; CertificateError if these certificates cannot make one.

    With a client CA, only clients whose certificate it has signed are let in.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # The ssl module takes files alone.
    with _memory_file(snapshot.cert) as cert, _memory_file(snapshot.key) as key:
        files = f"--tlsCert {snapshot.cert_file} with --tlsKey {snapshot.key_file}"
        if not os.path.exists(_path(cert)):
            raise CertificateError(
                f"{files}: TLS needs /proc, by which OpenSSL gets the key; mount it"
            )
        _load_chain(context, _path(cert), _path(key), files)
    _trust_intermediates(context)
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
    if wrong := key_log_error():
        raise CertificateError(wrong)
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise CertificateError(f"--tlsCA {ca}: {_explained(_text(error))}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _trust_intermediates(context)
    if cert:
        if not key and _is_without_key(cert):
            raise CertificateError(f"--tlsCert {cert} has no private key in it; give --tlsKey")
        _load_chain(context, cert, key, f"--tlsCert {cert} with --tlsKey {key or cert}")
    return context


def invalid_now(snapshot: Snapshot) -> str:
    """What makes clients refuse a server's certificate at this time, empty if nothing does: that it
    has expired, or is not yet valid.

    It is asked of OpenSSL, by a handshake with a client that trusts this certificate alone.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cadata=snapshot.cert)
    _trust_intermediates(client)
    near, far = Session(client, "localhost"), Session(_without_client_ca(snapshot))
    try:
        near.start()
        for _ in range(2):  # flights each way
            far.receive(near.outgoing())
            near.receive(far.outgoing())
    except TlsError as error:
        for words in ("has expired", "not yet valid"):
            if words in str(error):
                return f"it {'is ' * (words != 'has expired')}{words}"
    return ""


def _without_client_ca(snapshot: Snapshot) -> ssl.SSLContext:
    return server_context(replace(snapshot, ca="", ca_file=""))


def _trust_intermediates(context: ssl.SSLContext) -> None:
    """An authority that is given to be trusted is, though another has signed it. What is trusted
    without being given are roots."""
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN


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
    if "key values mismatch" in text or "no certificate assigned" in text:  # of another algorithm
        return "the key belongs to another certificate; its own stands first in the file"
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
