"""TLS: frames in it, who is let in, certificates that are renewed while the server serves."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from client import ConnectError, CounterClient, OutcomeUnknown
from counter.tls.session import TlsError
from kit.certificates import (
    PASSPHRASE,
    Kit,
    Pair,
    SplitPeer,
    TlsPeer,
    der,
    kit,
    openssl,
    trusting,
)
from kit.harness import (
    Command,
    Peer,
    ScriptedServer,
    ServerCommand,
    children,
    run_in_terminal,
    wait_until,
)
from protocol import REPLY_SIZE, decode_totals, encode_frame

ONE = encode_frame(1)
HOUR = "1h"
BOTH_VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
RENEWED = "SIGHUP: the certificates were loaded again"
KEPT = "SIGHUP: the certificates are kept as they were: "


@pytest.fixture(scope="module", name="certs")
def certs_of_the_session() -> Kit:
    return kit()


def tls_server(
    *arguments: str, pair: Pair | None = None, workers: int | None = None
) -> ServerCommand:
    flags = (pair or kit().server).server_flags()
    return ServerCommand(*flags, *arguments, workers=workers)


@pytest.fixture(scope="module", params=["0", "2"])
def shared(each_engine: str, request: pytest.FixtureRequest) -> Iterator[ServerCommand]:
    """A server for tests that read the total before and after what they do."""
    with tls_server("--frameTimeout", "400ms", "--processes", request.param) as server:
        yield server


@pytest.mark.parametrize("version", BOTH_VERSIONS)
def test_frames_are_added_under_tls(shared: ServerCommand, version: ssl.TLSVersion) -> None:
    with TlsPeer(shared.address, trusting(version=version)) as peer:
        assert peer.tls.version() == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]
        before = peer.add(0)
        assert [peer.add(5), peer.add(2**40)] == [before + 5, before + 5 + 2**40]


def test_tls_1_1_is_refused(shared: ServerCommand) -> None:
    context = trusting()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
        TlsPeer(shared.address, context)


@pytest.mark.parametrize("version", BOTH_VERSIONS)
def test_a_handshake_and_frames_may_arrive_byte_by_byte(
    shared: ServerCommand, version: ssl.TLSVersion
) -> None:
    with SplitPeer(shared.address, trusting(version=version)) as peer:
        peer.shake_hands(step=1)
        for byte in peer.session.encrypt(encode_frame(0) + ONE):
            peer.send(bytes([byte]))
        before, after = decode_totals(peer.plain(2 * REPLY_SIZE))[0]
        assert after == before + 1


@pytest.mark.parametrize("version", BOTH_VERSIONS)
def test_records_split_at_every_byte_are_counted_once(version: ssl.TLSVersion) -> None:
    """The other connection's round trip shows that the server has read the first part."""
    with tls_server("--processes", "1") as server:
        context = trusting(version=version)
        with SplitPeer(server.address, context) as peer, TlsPeer(server.address) as other:
            peer.shake_hands()
            expected = other.add(0)
            cut, data = 1, b""
            while cut < len(data or ONE):
                data = peer.session.encrypt(ONE + ONE)
                peer.send(data[:cut])
                assert other.add(0) == expected
                peer.send(data[cut:])
                totals = decode_totals(peer.plain(2 * REPLY_SIZE))[0]
                assert totals == (expected + 1, expected + 2)
                expected += 2
                cut += 1
            assert cut == len(data) > 2 * len(ONE)
            assert server.stop()[0] == expected


def test_thousands_of_frames_are_pipelined_under_tls(shared: ServerCommand) -> None:
    with TlsPeer(shared.address) as peer:
        before = peer.add(0)
        for _ in range(5):
            peer.send(ONE * 4000)
            totals = peer.totals(4000)
            assert totals == list(range(before + 1, before + 4001))
            before += 4000


def test_frames_before_a_wrong_one_are_answered_then_close_notify_and_fin(
    shared: ServerCommand,
) -> None:
    with TlsPeer(shared.address) as peer, TlsPeer(shared.address) as other:
        before = other.add(0)
        peer.send(ONE * 700, b"c" * 16, ONE * 10)
        assert decode_totals(peer.everything())[0] == tuple(range(before + 1, before + 701))
        assert other.add(0) == before + 700


def test_a_broken_record_ends_the_connection_and_counts_nothing(shared: ServerCommand) -> None:
    broken = b"\x17\x03\x03\x00\x20" + b"x" * 32
    with SplitPeer(shared.address) as peer, TlsPeer(shared.address) as other:
        peer.shake_hands()
        before = other.add(0)
        peer.send(peer.session.encrypt(ONE))
        assert decode_totals(peer.plain(REPLY_SIZE))[0] == (before + 1,)
        peer.send(peer.session.encrypt(ONE), broken)
        with pytest.raises(TlsError, match="alert bad record mac"):
            peer.everything_plain()
        assert other.add(0) == before + 1


@pytest.mark.parametrize("version", BOTH_VERSIONS)
def test_frames_that_arrive_together_with_close_notify_are_answered(
    shared: ServerCommand, version: ssl.TLSVersion
) -> None:
    with (
        SplitPeer(shared.address, trusting(version=version)) as peer,
        TlsPeer(shared.address) as other,
    ):
        peer.shake_hands()
        before = other.add(0)
        peer.send(peer.session.encrypt(ONE * 3) + peer.session.farewell())
        replies = b""
        while received := peer.sock.recv(65536):
            replies += received
        # The session itself reads no more after its farewell; three totals are in one record.
        assert len(replies) >= 3 * REPLY_SIZE
        assert other.add(0) == before + 3


def test_a_peer_that_does_not_read_is_bounded_and_dropped_under_tls() -> None:
    with tls_server("--writeTimeout", "500ms", "--processes", "1") as server:
        with SplitPeer(server.address) as peer:
            peer.shake_hands()
            fill(peer)
            server.error_line_with("does not read its replies")
            (pid,) = children(server.process.pid)
            assert memory_mb(pid) < 120
            with TlsPeer(server.address) as other:
                other.add(1)


def fill(peer: SplitPeer) -> None:
    """Sends frames without reading until the server does not read any more either."""
    peer.sock.setblocking(False)
    unsent = b""
    while True:
        unsent = unsent or peer.session.encrypt(ONE * 900)
        try:
            unsent = unsent[peer.sock.send(unsent) :]
        except BlockingIOError:
            if not select.select([], [peer.sock], [], 0.3)[1]:
                return


def memory_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_plain_text_to_a_tls_port_is_refused_logged_and_disturbs_nobody() -> None:
    with tls_server() as server, TlsPeer(server.address) as good:
        assert good.add(1) == 1
        for total, sent in enumerate([ONE * 2, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 200], 2):
            with Peer(server.address) as plain:
                plain.send(sent)
                answer = plain.everything()
                assert answer == b"" or answer[0] == 21, "nothing but an alert before EOF"
                assert good.add(1) == total
        line = server.error_line_with("a peer was refused")
        assert re.search(r"127\.0\.0\.1:\d+: wrong version number", line)
        assert server.stop() == (4, 4)


def test_a_handshake_that_never_ends_is_closed_after_the_frame_timeout() -> None:
    with tls_server("--frameTimeout", "400ms") as server:
        with Peer(server.address) as silent, SplitPeer(server.address) as slow:
            started = time.monotonic()
            slow.session.start()
            hello = slow.session.outgoing()
            for byte in hello:
                slow.send(bytes([byte]))
                if select.select([slow.sock], [], [], 0.05)[0]:
                    break
            assert slow.everything() == b""
            silent.expect_eof()
            assert 0.35 < time.monotonic() - started < 3
            server.error_line_with("no TLS handshake in time")


def test_a_record_that_never_ends_is_closed_after_the_frame_timeout() -> None:
    with tls_server("--frameTimeout", "400ms") as server, SplitPeer(server.address) as peer:
        peer.shake_hands()
        peer.send(peer.session.encrypt(ONE))
        assert peer.plain(REPLY_SIZE)
        started = time.monotonic()
        for byte in peer.session.encrypt(ONE * 50):
            peer.send(bytes([byte]))
            if select.select([peer.sock], [], [], 0.02)[0]:
                break
        assert peer.everything_plain() == b""
        assert 0.35 < time.monotonic() - started < 3
        server.error_line_with("a TLS record stopped")
        assert server.stop() == (1, 1)


def test_half_a_frame_under_tls_is_closed_and_an_idle_connection_is_not(
    shared: ServerCommand,
) -> None:
    with TlsPeer(shared.address) as half, TlsPeer(shared.address) as idle:
        before = idle.add(0)
        half.send(ONE[:9])
        half.expect_eof()
        assert idle.add(0) == before


# Who is let in.


@pytest.mark.parametrize("version", BOTH_VERSIONS)
def test_a_client_with_the_right_certificate_is_served(certs: Kit, version: ssl.TLSVersion) -> None:
    with tls_server("--tlsClientCA", str(certs.ca.cert)) as server:
        with TlsPeer(server.address, trusting(own=certs.client, version=version)) as peer:
            assert peer.add(3) == 3
        asked = run_client(server.address, "--read", *ca(certs), *certs.client.client_flags())
        assert asked == (0, "3\n", "")


COMMANDS = [["--add", "1"], ["--duration", "1s", "--connections", "2"]]


@pytest.mark.parametrize(
    ("who", "in_log"),
    [
        ("nobody", "peer did not return a certificate"),
        ("foreign", "certificate verify failed: unable to get local issuer certificate"),
        ("expired", "certificate verify failed: certificate has expired"),
    ],
)
def test_a_client_without_a_right_certificate_is_refused_with_a_reason_on_both_sides(
    certs: Kit, who: str, in_log: str
) -> None:
    own = {"nobody": None, "foreign": certs.foreign_client, "expired": certs.expired_client}[who]
    with tls_server("--tlsClientCA", str(certs.ca.cert)) as server:
        for version in BOTH_VERSIONS:
            with CounterClient(server.address, tls=trusting(own=own, version=version)) as counter:
                with pytest.raises(ConnectError, match=r"certificate|unknown ca|handshake failure"):
                    counter.add(1)
        assert in_log in server.error_line_with("a peer was refused")
        for what in COMMANDS:
            flags = own.client_flags() if own else ()
            code, output, errors = run_client(server.address, *what, *ca(certs), *flags)
            assert (code, output) == (1, "")
            assert errors.count("\n") == 1
            assert f"cannot connect to {server.address}" in errors
            assert "certificate" in errors or "unknown ca" in errors
            assert "the server refuses this client's certificate" in errors
            remedy = "renew the one that" if who == "expired" else "give --tlsCert and --tlsKey"
            assert remedy in errors
        assert server.stop() == (0, 0)


@pytest.mark.parametrize(
    ("which", "expected", "remedy"),
    [
        ("other_host", "IP address mismatch", "connect by a name that is in the certificate"),
        ("expired_server", "certificate has expired", "the server needs a renewed one"),
        ("server", "unable to get local issuer certificate", "has to hold those between"),
    ],
)
def test_the_command_refuses_a_server_whose_certificate_is_not_right(
    certs: Kit, which: str, expected: str, remedy: str
) -> None:
    """The good certificate is looked at by those who trust others: a foreign one, the system's."""
    foreign = [("--tlsCA", str(certs.foreign_ca.cert)), ("--tls",)]
    with tls_server(pair=getattr(certs, which)) as server:
        for what in COMMANDS:
            for flags in foreign if which == "server" else [ca(certs)]:
                code, output, errors = run_client(server.address, *what, *flags)
                assert (code, output) == (1, "")
                assert errors.count("\n") == 1
                assert expected.lower() in errors.lower()
                assert remedy in errors
                assert ("--tlsCA names the authority" in errors) is (which == "server")
        assert server.stop() == (0, 0)


def test_a_host_is_verified_by_its_name(certs: Kit) -> None:
    with tls_server() as server:
        port = server.address.rpartition(":")[2]
        code, output, _ = run_client(f"localhost:{port}", "--add", "2", *ca(certs))
        assert (code, output) == (0, "2\n")
        with CounterClient(f"localhost:{port}", tls=trusting()) as counter:
            assert counter.add(2) == 4
    with tls_server(pair=certs.other_host) as server:
        with CounterClient(server.address, tls=trusting()) as counter:
            with pytest.raises(ConnectError, match="certificate is refused"):
                counter.add(1)


def test_a_client_with_tls_at_a_plain_port_says_so_and_the_other_way_round(certs: Kit) -> None:
    with ServerCommand() as server:
        code, _, errors = run_client(server.address, "--read", *ca(certs))
        assert code == 1
        assert errors.count("\n") == 1
        assert "TLS" in errors
        assert server.stop() == (0, 0)
    with tls_server() as server:
        code, _, errors = run_client(server.address, "--add", "1", "--timeout", "2s")
        assert code == 5
        assert "may or may not have been counted; a server with --maxIncrement refuses" in errors
        assert "does it speak TLS (--tlsCA)?" in errors
        code, _, errors = run_client(server.address, "--duration", "1s")
        assert code == 1
        assert "closed the connection without an answer; is it a counter server" in errors
        assert server.stop() == (0, 0)


def ca(certs: Kit) -> tuple[str, str]:
    return "--tlsCA", str(certs.ca.cert)


def run_client(address: str, *arguments: str) -> tuple[int, str, str]:
    """Runs client.py; gives back its exit code, its output and its errors."""
    with Command("client.py", "--serverAddress", address, *arguments) as client:
        code = client.finish(30)
        return code, client.output(), client.errors()


# The library and the load generator.


def test_the_load_generator_proves_its_totals_under_mutual_tls(certs: Kit) -> None:
    with tls_server("--tlsClientCA", str(certs.ca.cert)) as server:
        for more in (["--pipeline", "16", "--amount", "1-1000000"], ["--rate", "2000"], []):
            code, output, errors = run_client(
                *(server.address, *ca(certs), *certs.client.client_flags(), *more),
                *("--duration", "250ms", "--warmup", "50ms", "--connections", "8", "--json", "-"),
            )
            assert code == 0, errors
            result = json.loads(output)
            assert result["check"]["verdict"] == "ok"
            assert result["errors"] == {}
            assert result["answered"] == result["sent"] > 100


def test_the_library_is_served_under_tls_and_pipelines() -> None:
    with tls_server() as server, CounterClient(server.address, tls=trusting()) as counter:
        assert counter.add(5) == 5
        assert counter.add_many([1] * 20_000) == list(range(6, 20_006))
        assert counter.total() == 20_005


def test_the_library_connects_anew_after_the_server_closed_an_idle_connection() -> None:
    with tls_server("--idleTimeout", "300ms", "--maxConnections", "1", workers=1) as server:
        with CounterClient(server.address, tls=trusting()) as counter:
            assert counter.add(5) == 5
            with TlsPeer(server.address) as other:
                assert other.add(0) == 5
            assert counter.add(1) == 6
            server.error_line_with("was idle while others waited for a connection")


def test_the_library_connects_anew_to_a_server_that_was_restarted() -> None:
    with tls_server() as server:
        port = server.address.rpartition(":")[2]
        with CounterClient(server.address, tls=trusting()) as counter:
            assert counter.add(5) == 5
            assert server.stop() == (5, 1)
            with pytest.raises(ConnectError):
                counter.add(1)
            with ServerCommand(*kit().server.server_flags(), port=port):
                assert counter.add(1) == 1


def test_a_tls_connection_that_is_cut_leaves_the_outcome_unknown() -> None:
    def swallow(sock: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(kit().server.cert, kit().server.key)
        with context.wrap_socket(sock, server_side=True) as tls:
            tls.recv(16)
            tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with ScriptedServer(swallow) as server, CounterClient(server.address, tls=trusting()) as one:
        with pytest.raises(OutcomeUnknown) as unknown:
            one.add(7)
        assert unknown.value.amounts == (7,)


# The end.


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_drain_under_tls_answers_what_has_arrived_then_close_notify_and_fin(
    processes: str,
) -> None:
    with tls_server("--processes", processes) as server, ExitStack() as stack:
        opened = [stack.enter_context(SplitPeer(server.address)) for _ in range(10)]
        for peer in opened:
            peer.shake_hands()
            peer.send(peer.session.encrypt(ONE))
            assert peer.plain(REPLY_SIZE)
        for peer in opened:
            peer.send(peer.session.encrypt(ONE * 200))
        server.signal(signal.SIGTERM)
        totals: list[int] = []
        for peer in opened:
            totals += decode_totals(peer.everything_plain())[0]
        assert sorted(totals) == list(range(11, 2011))
        assert server.farewell() == (2010, 2010)


def test_a_drain_does_not_wait_for_a_handshake() -> None:
    with tls_server("--drainTimeout", HOUR, "--frameTimeout", HOUR) as server:
        with TlsPeer(server.address) as good, SplitPeer(server.address) as half:
            half.session.start()
            half.send(half.session.outgoing()[:50])
            assert good.add(1) == 1
            server.signal(signal.SIGTERM)
            half.everything()
            assert good.everything() == b""
            assert server.farewell() == (1, 1)


# Files.


def test_files_that_cannot_be_used_end_the_start_with_one_clear_line(
    certs: Kit, tmp_path: Path
) -> None:
    no_pem = tmp_path / "no.pem"
    no_pem.write_bytes(b"\xff\xfe no certificate\n")
    server, missing, rsa_key = certs.server, tmp_path / "missing.pem", tmp_path / "rsa.key"
    openssl("genrsa", "-out", rsa_key, "2048")
    cases: list[tuple[Pair, Path | None, list[str]]] = [
        (Pair(missing, server.key), None, [f"--tlsCert {missing}", "no such file"]),
        (Pair(server.cert, missing), None, [f"--tlsKey {missing}", "no such file"]),
        (server, missing, [f"--tlsClientCA {missing}", "no such file"]),
        (Pair(no_pem, server.key), None, [f"{no_pem}", "no PEM file"]),
        (Pair(server.cert, no_pem), None, [f"{no_pem}", "no PEM file"]),
        (server, no_pem, [f"--tlsClientCA {no_pem}", "no PEM file"]),
        (Pair(server.key, server.key), None, [f"{server.key}", "no PEM file"]),
        (certs.mismatched, None, ["the key belongs to another certificate"]),
        (Pair(server.cert, rsa_key), None, ["the key belongs to another certificate"]),
        (certs.encrypted, None, [f"{certs.encrypted.key}", "the key is encrypted"]),
    ]
    for pair, client_ca, expected in cases:
        flags = [*pair.server_flags(), *(["--tlsClientCA", str(client_ca)] if client_ca else [])]
        with Command("server.py", "--port", "0", *flags) as command:
            assert command.finish() == 1, expected
            message = command.errors()
            assert message.startswith("server.py: ")
            assert message.count("\n") == 1, message
            assert command.output() == ""
            for text in expected:
                assert text in message


def test_an_encrypted_key_is_not_asked_for_in_the_terminal(certs: Kit) -> None:
    flags = certs.encrypted.server_flags()
    client = certs.encrypted.client_flags()
    for command, code in (
        (("server.py", "--port", "0", *flags), 1),
        (("client.py", "--read", *client), 2),
    ):
        with run_in_terminal(*command) as (process, terminal):
            assert process.wait(20) == code
            shown = os.read(terminal, 65536).decode()
            assert "the key is encrypted" in shown
            assert "Enter" not in shown
            assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tlsCert", "a.pem"], "--tlsCert and --tlsKey need each other"),
        (["--tlsKey", "a.pem"], "--tlsCert and --tlsKey need each other"),
        (["--tlsClientCA", "a.pem"], "--tlsClientCA needs --tlsCert and --tlsKey"),
    ],
)
def test_half_of_the_tls_options_is_a_usage_error(flags: list[str], expected: str) -> None:
    with Command("server.py", "--port", "0", *flags) as command:
        assert command.finish() == 2
        message = command.errors()
        assert expected in message
        assert message.count("\n") == 1


def test_client_files_that_cannot_be_used_are_a_usage_error_in_one_line(
    certs: Kit, tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing.pem")
    for flags, expected in (
        (("--tlsCA", missing), "--tlsCA"),
        ((*ca(certs), *certs.mismatched.client_flags()), "another certificate"),
        ((*ca(certs), "--tlsKey", missing), "--tlsKey needs --tlsCert"),
        ((*ca(certs), "--tlsCert", str(certs.client.cert)), "no private key in it; give --tlsKey"),
    ):
        for what in (["--read"], ["--duration", "1s"]):
            code, output, errors = run_client("127.0.0.1:1", *what, *flags)
            assert (code, output) == (2, "")
            assert expected in errors
            assert errors.count("\n") == 1


def test_a_bundle_of_authorities_may_name_them_in_any_letters(certs: Kit, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    text = f"# Főtanúsítvány\n{certs.foreign_ca.cert.read_text()}\n# ours\n"
    bundle.write_text(text + certs.ca.cert.read_text(), encoding="utf-8")
    with tls_server("--tlsClientCA", str(bundle)) as server:
        with TlsPeer(server.address, trusting(own=certs.client)) as peer:
            assert peer.add(3) == 3


def test_the_private_key_is_shown_nowhere(certs: Kit) -> None:
    secret = "".join(certs.server.key.read_text().splitlines()[1:-1])[:40]
    flags = certs.server.server_flags()
    with Command("server.py", *flags, "--printConfig") as command:
        assert command.finish() == 0
        shown = command.output() + command.errors()
        assert str(certs.server.key) in shown
        assert secret not in shown
    with tls_server("--logLevel", "debug") as server:
        server.signal(signal.SIGHUP)
        logged = server.error_line_with(RENEWED)
        server.stop()
        logged += server.errors()
        assert secret not in logged
        assert "PRIVATE" not in logged
    with Command("server.py", "--port", "0", *certs.encrypted.server_flags()) as command:
        assert command.finish() == 1
        assert PASSPHRASE not in command.errors()


# Renewal.


@contextmanager
def renewable(
    folder: Path, *arguments: str, with_ca: bool = False
) -> Iterator[tuple[ServerCommand, Pair, Path]]:
    """A server whose files may be replaced, those files, and that of the authorities."""
    files, client_ca = Pair(folder / "server.crt", folder / "server.key"), folder / "ca.crt"
    install(kit().server, files)
    shutil.copy(kit().ca.cert, client_ca)
    flags = ("--tlsClientCA", str(client_ca)) if with_ca else ()
    with tls_server(*arguments, *flags, pair=files) as server:
        yield server, files, client_ca


def install(new: Pair, files: Pair) -> None:
    shutil.copy(new.cert, files.cert)
    shutil.copy(new.key, files.key)


CROWD = 24  # connections at once: the server spreads them over all of its processes


def shown_certificates(address: str, context: ssl.SSLContext | None = None) -> set[bytes]:
    """What certificates so many connections at a time are shown."""
    with ExitStack() as stack:
        opened = [stack.enter_context(TlsPeer(address, context)) for _ in range(CROWD)]
        return {peer.certificate() for peer in opened}


@contextmanager
def adding(address: str, own: Pair | None = None) -> Iterator[list[int]]:
    """Threads that add 1 again and again, each on one connection that must not be lost.

    All are connected when the body begins.
    """
    stop = threading.Event()
    connected: list[object] = []
    counts: list[int] = []
    failures: list[Exception] = []

    def add() -> None:
        count = 0
        try:
            with CounterClient(address, tls=trusting(own=own)) as counter:
                first = None
                while not stop.is_set():
                    counter.add(1)
                    count += 1
                    if first is None:
                        first = counter._line.sock
                        connected.append(first)
                    assert counter._line.sock is first, "the connection was lost"
        except Exception as error:
            failures.append(error)
        counts.append(count)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(connected) == len(threads) or bool(failures), "all are connected")
        yield counts
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert min(counts) > 0


@pytest.mark.parametrize("processes", ["0", "3"])
def test_renewed_certificates_drop_no_connection_and_are_shown_to_new_ones(
    certs: Kit, tmp_path: Path, processes: str
) -> None:
    with renewable(tmp_path, "--processes", processes) as (server, files, _):
        with adding(server.address) as counts:
            for _ in range(3):
                renewed = certs.issue("localhost")
                install(renewed, files)
                server.signal(signal.SIGHUP)
                server.error_line_with(RENEWED)
                wait_until(
                    lambda new=renewed: shown_certificates(server.address) == {der(new)},  # type: ignore[misc]
                    "every process shows the new certificate",
                )
        assert server.stop() == (sum(counts), sum(counts))


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_renewed_client_authority_decides_about_new_connections(
    certs: Kit, tmp_path: Path, processes: str
) -> None:
    old, new = trusting(own=certs.client), trusting(own=certs.foreign_client)
    with renewable(tmp_path, "--processes", processes, with_ca=True) as (server, _, client_ca):
        with adding(server.address, certs.client):
            assert is_let_in(server.address, old)
            assert not is_let_in(server.address, new)
            shutil.copy(certs.foreign_ca.cert, client_ca)
            server.signal(signal.SIGHUP)
            server.error_line_with(RENEWED)
            wait_until(
                lambda: all(is_let_in(server.address, new) for _ in range(CROWD)),
                "the new authority counts in every process",
            )
            assert not any(is_let_in(server.address, old) for _ in range(CROWD))
        server.stop()


def is_let_in(address: str, context: ssl.SSLContext) -> bool:
    with CounterClient(address, tls=context) as counter:
        try:
            counter.add(0)
        except ConnectError:
            return False
        return True


def test_a_process_that_replaces_another_takes_what_was_loaded_last_not_what_the_files_hold(
    certs: Kit, tmp_path: Path
) -> None:
    with renewable(tmp_path, "--processes", "2") as (server, files, _):
        renewed = certs.issue("localhost")
        install(renewed, files)
        server.signal(signal.SIGHUP)
        server.error_line_with(RENEWED)
        wait_until(lambda: shown_certificates(server.address) == {der(renewed)}, "it is shown")
        files.cert.write_text("broken since")
        files.key.unlink()
        before = children(server.process.pid)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: has_replaced(server, before), "both are replaced")
        assert shown_certificates(server.address) == {der(renewed)}
        server.stop()


def has_replaced(server: ServerCommand, before: Sequence[int]) -> bool:
    now = children(server.process.pid)
    return len(now) == len(before) and not set(now) & set(before)


@pytest.mark.parametrize("processes", ["0", "2"])
def test_files_that_cannot_be_used_leave_all_as_it_was_and_say_why(
    certs: Kit, tmp_path: Path, processes: str
) -> None:
    with renewable(tmp_path, "--processes", processes, with_ca=True) as (server, files, client_ca):
        renewed = certs.issue("localhost")
        context = trusting(own=certs.client)
        good = (renewed.cert.read_text(), renewed.key.read_text(), certs.ca.cert.read_text())
        cert, key, authority = good
        cases = [
            ("", key, authority, "no PEM file"),
            (cert[: len(cert) // 2], key, authority, "no PEM file"),
            (cert, key[: len(key) // 2], authority, "no PEM file"),
            (cert, certs.client.key.read_text(), authority, "another certificate"),
            (cert, certs.encrypted.key.read_text(), authority, "the key is encrypted"),
            (cert, key, authority[: len(authority) // 2], "no PEM file"),
            (cert, key, "", "no PEM file"),
            (cert + cert[: len(cert) // 2], key, authority, "no PEM file"),
            (cert, key, authority * 2 + authority[: len(authority) // 2], "--tlsClientCA"),
            (cert, None, authority, "no such file"),
        ]
        with adding(server.address, certs.client):
            for cert_text, key_text, authority_text, expected in cases:
                files.cert.write_text(cert_text)
                client_ca.write_text(authority_text)
                files.key.unlink(missing_ok=True)
                if key_text is not None:
                    files.key.write_text(key_text)
                server.signal(signal.SIGHUP)
                assert expected in server.error_line_with(KEPT)
                assert shown_certificates(server.address, context) == {der(certs.server)}
            install(renewed, files)
            client_ca.write_text(authority)
            server.signal(signal.SIGHUP)
            server.error_line_with(RENEWED)
            wait_until(
                lambda: shown_certificates(server.address, context) == {der(renewed)},
                "the good files are taken after all",
            )
        server.stop()


def test_many_signals_at_once_do_no_harm(certs: Kit, tmp_path: Path) -> None:
    with renewable(tmp_path, "--processes", "2") as (server, files, _):
        with adding(server.address):
            for number in range(40):
                install(certs.server, files)
                server.signal(signal.SIGHUP)
                for pid in children(server.process.pid)[: number % 3]:
                    os.kill(pid, signal.SIGHUP)  # as when a terminal is closed
            server.error_line_with(RENEWED)
            assert shown_certificates(server.address) == {der(certs.server)}
        server.stop()
        assert "Traceback" not in server.errors()


@pytest.mark.parametrize("processes", ["0", "2"])
def test_sighup_without_tls_is_said_and_ends_nothing(processes: str) -> None:
    with ServerCommand("--processes", processes) as server, server.connect() as peer:
        before = children(server.process.pid)
        server.signal(signal.SIGHUP)
        server.error_line_with("SIGHUP: there is nothing to load again, TLS is off")
        for pid in before:
            os.kill(pid, signal.SIGHUP)
        assert peer.add(1) == 1
        with server.connect() as other:
            assert other.add(1) == 2
        assert children(server.process.pid) == before
        assert server.stop() == (2, 2)
        assert "Traceback" not in server.errors()


def test_certificates_are_renewed_although_descriptors_had_run_out(
    certs: Kit, tmp_path: Path
) -> None:
    files = Pair(tmp_path / "server.crt", tmp_path / "server.key")
    install(certs.server, files)
    flags = ("--processes", "1", *files.server_flags())
    with ServerCommand(*flags, workers=200) as server, ExitStack() as stack:
        server.leave_descriptors(40)
        opened = [stack.enter_context(Peer(server.address)) for _ in range(60)]
        server.error_line_with("cannot accept connections: Too many open files")
        renewed = certs.issue("localhost")
        install(renewed, files)
        server.signal(signal.SIGHUP)
        server.error_line_with(RENEWED)
        server.error_line_with("cannot take the certificates yet")
        for peer in opened:
            peer.close()
        wait_until(
            lambda: {shown_certificate(server.address)} == {der(renewed)},
            "the new certificate is shown",
        )
        server.stop()


def shown_certificate(address: str) -> bytes:
    with TlsPeer(address) as peer:
        return peer.certificate()


def test_a_server_without_a_process_to_check_with_keeps_its_certificates() -> None:
    """The master forks to look at the files; that it cannot must not end it."""
    script = """
import os, sys, server
fork = os.fork
def refuse():
    if os.path.exists(sys.argv[1]):
        raise BlockingIOError(11, "no process left")
    return fork()
os.fork = refuse
sys.exit(server.main(sys.argv[2:]))
"""
    flag = kit().folder / "no-fork"
    flag.unlink(missing_ok=True)
    with Command(
        *("-c", script, str(flag), "--port", "0", "--processes", "2"),
        *kit().server.server_flags(),
    ) as command:
        address = command.line().split()[2]
        flag.touch()
        command.signal(signal.SIGHUP)
        assert "no process left" in command.error_line_with(KEPT)
        with TlsPeer(address) as peer:
            assert peer.add(1) == 1
        command.signal(signal.SIGTERM)
        assert command.finish() == 0
