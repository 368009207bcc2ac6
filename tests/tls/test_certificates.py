"""Certificates as they were at one moment: whole, alone in memory, and what is said of them."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from counter.options.client import ClientSettings
from counter.tls.certificates import Certificates, SharedText, check_aside
from counter.tls.contexts import client_context
from counter.tls.snapshot import CertificateError
from kit.certificates import kit
from kit.harness import Command, ServerCommand

# Python 3.12 warns of every fork beside a thread, which another test may have left.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def test_a_text_that_was_replaced_is_gone() -> None:
    text = SharedText()
    text.publish("the old key, which is longer")
    text.publish("the new key")
    assert text.read() == "the new key"
    kept = os.pread(text._file, 1 << 20, 0)
    assert kept == b"the new key"


def test_whoever_reads_while_a_text_is_replaced_gets_a_whole_one() -> None:
    text = SharedText()
    text.publish("0" * 5000)
    child = os.fork()
    if not child:
        try:
            number = 0
            while True:
                number += 1
                text.publish(str(number % 10) * (5000 + number % 3))
                select.select([], [], [], 0.0005)  # as often as nobody ever reloads
        finally:
            os._exit(1)
    try:
        seen: set[str] = set()
        while len(seen) < 5:
            whole = text.read()
            assert len(set(whole)) == 1
            assert 5000 <= len(whole) <= 5002
            seen.add(whole[0])
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_one_who_was_stopped_while_replacing_it_stops_nobody_for_ever() -> None:
    text = SharedText()
    text.publish("whole")
    text._cells[0] += 1
    with pytest.raises(BlockingIOError, match="are being replaced"):
        text.read()


def test_a_certificate_that_clients_refuse_is_said_where_it_is_served() -> None:
    good, expired = kit().server, kit().expired_server
    assert Certificates(str(good.cert), str(good.key), str(kit().ca.cert)).load(check_aside) == ""
    said = Certificates(str(expired.cert), str(expired.key), None).load(check_aside)
    assert said == f"--tlsCert {expired.cert}: it has expired, clients refuse it; renew it"
    said = Certificates(str(good.cert), str(good.key), None).load(lambda _: "it is not yet valid")
    assert said.endswith(
        "it is not yet valid, clients refuse it; "
        "look at this machine's clock, and at the day it begins"
    )
    with ServerCommand("--processes", "1", *expired.server_flags()) as server:
        assert "it has expired" in server.error_line_with("WARNING --tlsCert")
        server.stop()


@pytest.mark.parametrize("processes", ["0", "2"])
def test_an_intermediate_authority_that_is_given_is_trusted(processes: str) -> None:
    below = kit().authority_below("an-intermediate")
    server_pair, client_pair = (kit().issue(name, below) for name in ("localhost", "a-client"))
    flags = (*server_pair.server_flags(), "--tlsClientCA", str(below.cert))
    with ServerCommand("--processes", processes, *flags) as server:
        address = f"localhost:{server.address.rpartition(':')[2]}"
        own = (*client_pair.client_flags(), "--tlsCA", str(below.cert))
        with Command("client.py", "--serverAddress", address, "--add", "5", *own) as client:
            assert client.line() == "5"
            assert client.finish() == 0
        server.stop()


@pytest.mark.parametrize("ca", [None, "ca"])
def test_a_key_log_that_cannot_be_written_is_named(
    ca: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "nowhere" / "keys"))
    settings = ClientSettings(tls=True, tls_ca=str(kit().ca.cert) if ca else None)
    with pytest.raises(CertificateError, match=r"SSLKEYLOGFILE .*keys: no such file"):
        client_context(settings)
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    client_context(settings)
