"""Certificates for the tests, made by the openssl command once per session, and peers that use TLS.

There is one authority for servers and clients, and a foreign one; what they sign is good, expired,
for another host, or has a key with a passphrase.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import shutil
import socket
import ssl
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from counter.tls.session import Session
from kit.harness import Peer
from protocol import parse_address

PASSPHRASE = "secret of the tests"

# What a verifier that is strict about RFC 5280 demands, as Python's own default is since 3.13.
AUTHORITY = """\
[req]
distinguished_name=name
x509_extensions=authority
[name]
[authority]
basicConstraints=critical,CA:TRUE
keyUsage=critical,keyCertSign,cRLSign
subjectKeyIdentifier=hash
"""
LEAF = """\
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=serverAuth,clientAuth
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid
"""

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Pair:
    """The files of a certificate and of its private key."""

    cert: Path
    key: Path

    def server_flags(self) -> tuple[str, ...]:
        return "--tlsCert", str(self.cert), "--tlsKey", str(self.key)

    client_flags = server_flags


class Kit:
    """What is signed by whom, in a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = self._authority("authority")
        self.foreign_ca = self._authority("foreign-authority")
        self.server = self.issue("localhost")
        self.client = self.issue("a-client")
        self.foreign_client = self.issue("a-foreign-client", self.foreign_ca)
        self.expired_client = self.issue("an-expired-client", is_expired=True)
        self.expired_server = self.issue("localhost", is_expired=True)
        self.other_host = self.issue("elsewhere.invalid", names="DNS:elsewhere.invalid")
        self.mismatched = Pair(self.server.cert, self.client.key)
        self.encrypted = Pair(self.server.cert, self._encrypt(self.server.key))

    def authority_below(self, name: str) -> Pair:
        """A new authority that the kit's own has signed."""
        extensions = AUTHORITY.partition("[authority]\n")[2] + "authorityKeyIdentifier=keyid\n"
        return self._sign(name, self.ca, extensions, is_expired=False)

    def issue(
        self,
        name: str,
        authority: Pair | None = None,
        names: str = "DNS:localhost,IP:127.0.0.1,IP:::1",
        is_expired: bool = False,
    ) -> Pair:
        """A new certificate with a new key."""
        extensions = f"{LEAF}subjectAltName={names}\n"
        return self._sign(name, authority or self.ca, extensions, is_expired)

    def _sign(self, name: str, authority: Pair, extensions: str, is_expired: bool) -> Pair:
        pair = self._files(name)
        request, extension = pair.cert.with_suffix(".csr"), pair.cert.with_suffix(".ext")
        extension.write_text(extensions)
        self._key(pair.key)
        openssl("req", "-new", "-key", pair.key, "-subj", f"/CN={name}", "-out", request)
        database = pair.cert.with_suffix(".index")
        database.write_text("")
        config = pair.cert.with_suffix(".cnf")
        config.write_text(
            f"[ca]\ndefault_ca=it\n[it]\ndatabase={database}\nnew_certs_dir={self.folder}\n"
            "rand_serial=yes\ndefault_md=sha256\nunique_subject=no\npolicy=any\n"
            "[any]\ncommonName=supplied\n"
        )
        span = ("-startdate", "200101000000Z", "-enddate", "200102000000Z")
        openssl(
            *("ca", "-batch", "-notext", "-config", config, "-in", request, "-out", pair.cert),
            *("-cert", authority.cert, "-keyfile", authority.key, "-extfile", extension),
            *(span if is_expired else ("-days", "30")),
        )
        return pair

    def _authority(self, name: str) -> Pair:
        pair = self._files(name)
        config = pair.cert.with_suffix(".cnf")
        config.write_text(AUTHORITY)
        self._key(pair.key)
        openssl(
            *("req", "-x509", "-new", "-config", config, "-key", pair.key, "-subj", f"/CN={name}"),
            *("-days", "30", "-out", pair.cert),
        )
        return pair

    def _encrypt(self, key: Path) -> Path:
        encrypted = key.with_suffix(".encrypted")
        openssl(
            *("pkey", "-in", key, "-aes256", "-passout", f"pass:{PASSPHRASE}", "-out", encrypted)
        )
        return encrypted

    def _files(self, name: str) -> Pair:
        base = self.folder / f"{name}-{next(_numbers)}"
        return Pair(base.with_suffix(".crt"), base.with_suffix(".key"))

    @staticmethod
    def _key(path: Path) -> None:
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)


def openssl(*arguments: str | Path) -> None:
    """Runs the openssl command; an error shows what it said."""
    command = ["openssl", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{command}: {ran.stderr}"


@functools.cache
def kit() -> Kit:
    """The certificates of this session; they are removed at its end."""
    folder = tempfile.mkdtemp(prefix="certificates-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Kit(Path(folder))


def trusting(
    ca: Path | None = None,
    own: Pair | None = None,
    version: ssl.TLSVersion | None = None,
) -> ssl.SSLContext:
    """A client's context that trusts an authority, the kit's unless it is given.

    It is as strict on every Python as the default is since 3.13.
    """
    context = ssl.create_default_context(cafile=str(ca or kit().ca.cert))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if own:
        context.load_cert_chain(own.cert, own.key)
    if version:
        context.minimum_version = context.maximum_version = version
    return context


class TlsPeer(Peer):
    """A stock TLS client: the ssl module's blocking socket."""

    def __init__(self, address: str, context: ssl.SSLContext | None = None) -> None:
        super().__init__(address)
        plain = self.sock
        try:
            self.tls = (context or trusting()).wrap_socket(
                plain, server_hostname=parse_address(address)[0], suppress_ragged_eofs=False
            )
        except BaseException:
            plain.close()
            raise
        self.sock = self.tls

    def certificate(self) -> bytes:
        """The server's certificate."""
        found = self.tls.getpeercert(binary_form=True)
        assert found
        return found


class SplitPeer(Peer):
    """A TLS client that has its ciphertext in its own hands."""

    def __init__(self, address: str, context: ssl.SSLContext | None = None) -> None:
        super().__init__(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.session = Session(context or trusting(), parse_address(address)[0])

    def shake_hands(self, step: int = 1 << 20) -> None:
        """The whole handshake, its bytes sent `step` at a time."""
        self.session.start()
        while True:
            data = self.session.outgoing()
            for start in range(0, len(data), step):
                self.send(data[start : start + step])
            if self.session.handshaken:
                return
            received = self.sock.recv(65536)
            assert received, "the server ended the handshake"
            self.session.receive(received)

    def plain(self, size: int) -> bytes:
        """At least so many bytes of the application."""
        data = b""
        while len(data) < size:
            received = self.sock.recv(65536)
            assert received, f"the stream ended after {len(data)} of {size} bytes"
            data += self.session.receive(received)
        return data

    def everything_plain(self) -> bytes:
        """What comes until EOF, which close_notify has to announce."""
        data = b""
        while received := self.sock.recv(65536):
            data += self.session.receive(received)
        assert self.session.ended, "no close_notify before the FIN"
        return data

    def plain_then_farewell(self, size: int) -> bytes:
        """So many bytes of the application, then this end says farewell."""
        data = self.plain(size) if size else b""
        with contextlib.suppress(OSError):  # the server may have ended already
            self.send(self.session.farewell())
            self.sock.shutdown(socket.SHUT_WR)
        return data


def der(pair: Pair) -> bytes:
    """A certificate as a peer shows it."""
    return ssl.PEM_cert_to_DER_cert(pair.cert.read_text())
