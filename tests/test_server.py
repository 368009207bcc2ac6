"""The running server, seen by stock TCP clients."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.harness import (
    ROOT,
    Command,
    Peer,
    ServerCommand,
    cpu_seconds,
    peers,
    read_terminal_until,
    run_in_terminal,
    wait_until,
)
from protocol import REPLY_SIZE, decode_totals, encode_frame, parse_address

pytestmark = pytest.mark.usefixtures("each_engine")

ONE = encode_frame(1)
HOUR = "1h"


@pytest.fixture(scope="module", params=["0", "1", "3"])
def shared(each_engine: str, request: pytest.FixtureRequest) -> Iterator[ServerCommand]:
    """A server for tests that read the total before and after what they do."""
    with ServerCommand("--frameTimeout", "300ms", "--processes", request.param) as server:
        yield server


@pytest.mark.parametrize(
    ("amount", "frame"),
    [
        (0, "0000000000000000633457081244afec"),
        (1, "0000000000000001b7b41276360564d4"),
        (123, "000000000000007b3c697d223fa7e885"),
        (7016996765293437281, "6161616161616161588f55d90f147231"),
        (2**63, "80000000000000003f4a8fcea23d52a3"),
        (2**64 - 1, "ffffffffffffffff8d1f8f6d8dfa7c47"),
    ],
)
def test_a_frame_adds_its_amount(shared: ServerCommand, amount: int, frame: str) -> None:
    with shared.connect() as peer:
        before = peer.add(0)
        peer.send(bytes.fromhex(frame))
        assert peer.totals(1) == [(before + amount) % 2**64]


def test_a_shell_can_add(shared: ServerCommand) -> None:
    host, port = parse_address(shared.address)
    escaped = "".join(f"\\x{byte:02x}" for byte in encode_frame(10))
    script = f"exec 3<>/dev/tcp/{host}/{port}; printf '{escaped}' >&3; head -c 8 <&3"
    with shared.connect() as peer:
        before = peer.add(0)
        reply = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
        assert reply == struct.pack(">Q", (before + 10) % 2**64)


def test_frames_are_answered_in_order_however_they_arrive(shared: ServerCommand) -> None:
    amounts = [random.Random(1).randrange(2**40) for _ in range(3000)]
    stream = b"".join(map(encode_frame, amounts))
    with shared.connect() as peer:
        expected, total = [], peer.add(0)
        for amount in amounts:
            total = (total + amount) % 2**64
            expected.append(total)
        for start in range(0, len(stream), 997):
            peer.send(stream[start : start + 997])
        assert peer.totals(len(amounts)) == expected


def test_a_frame_in_two_segments_one_second_apart_is_counted_once() -> None:
    with ServerCommand() as server, server.connect() as peer:
        peer.send(ONE[:7])
        peer.expect_silence(1.0)
        peer.send(ONE[7:])
        assert peer.totals(1) == [1]
        assert peer.add(0) == 1


@pytest.mark.parametrize("sent", [b"hello", b"123" + b"\0" * 8, b"x" * 15])
def test_an_incomplete_frame_and_silence_end_in_eof(shared: ServerCommand, sent: bytes) -> None:
    with shared.connect() as peer, shared.connect() as other:
        before = other.add(0)
        peer.send(sent)
        peer.expect_eof()
        assert other.add(0) == before


def test_further_bytes_do_not_move_the_deadline_of_a_frame() -> None:
    with ServerCommand("--frameTimeout", "600ms") as server, server.connect() as peer:
        started = time.monotonic()
        for byte in encode_frame(1)[:-1]:
            peer.send(bytes([byte]))
            if select_readable(peer, 0.1):
                break
        peer.expect_eof()
        assert 0.5 < time.monotonic() - started < 5


@pytest.mark.parametrize("sent", [b"c" * 25, b"a" * 16, b"a" * 8 + b"\0" * 8, ONE[:8] + ONE[:8]])
def test_a_wrong_checksum_ends_in_eof_and_counts_nothing(
    shared: ServerCommand, sent: bytes
) -> None:
    with shared.connect() as peer, shared.connect() as other:
        before = other.add(0)
        peer.send(sent)
        peer.expect_eof()
        assert other.add(0) == before


def test_eof_inside_a_frame_counts_nothing_for_it(shared: ServerCommand) -> None:
    with shared.connect() as peer, shared.connect() as other:
        before = other.add(0)
        peer.send(ONE * 3, ONE[:15])
        peer.sock.shutdown(socket.SHUT_WR)
        assert len(peer.everything()) == 3 * REPLY_SIZE
        assert other.add(0) == (before + 3) % 2**64


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_what_is_before_a_corrupted_byte_counts_and_what_is_behind_does_not(
    shared: ServerCommand, data: st.DataObject
) -> None:
    small_or_large = st.one_of(st.integers(0, 1000), st.integers(0, 2**64 - 1))
    amounts = data.draw(st.lists(small_or_large, min_size=1, max_size=40))
    stream = bytearray(b"".join(map(encode_frame, amounts)))
    position = data.draw(st.integers(0, len(stream) - 1))
    stream[position] ^= data.draw(st.integers(1, 255))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    good = amounts[: position // 16]
    with shared.connect() as peer, shared.connect() as other:
        total = other.add(0)
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            peer.send(bytes(stream[start:end]))
        totals, rest = decode_totals(peer.everything())
        expected = []
        for amount in good:
            total = (total + amount) % 2**64
            expected.append(total)
        assert (list(totals), rest) == (expected, b"")
        assert other.add(0) == total


def test_a_peer_that_goes_on_sending_after_a_bad_frame_reads_its_replies_and_eof() -> None:
    with ServerCommand() as server, server.connect() as peer:
        peer.send(ONE * 1000, b"c" * 16, b"d" * 500_000)
        peer.sock.shutdown(socket.SHUT_WR)
        assert decode_totals(peer.everything()) == (tuple(range(1, 1001)), b"")
        assert server.stop() == (1000, 1000)


def test_a_lingering_connection_holds_no_worker() -> None:
    with ServerCommand(workers=1) as server, server.connect() as bad, server.connect() as good:
        bad.send(b"c" * 16)
        assert good.add(1) == 1
        bad.expect_eof()


def test_amounts_above_the_limit_are_refused_like_a_wrong_checksum() -> None:
    with ServerCommand("--maxIncrement", "1000") as server, server.connect() as peer:
        peer.send(encode_frame(1000), encode_frame(1001), encode_frame(1))
        assert decode_totals(peer.everything()) == ((1000,), b"")
        assert server.stop() == (1000, 1)


def test_the_total_wraps_at_two_to_the_sixty_fourth() -> None:
    with ServerCommand("--setTotal", str(2**64 - 2)) as server, server.connect() as peer:
        peer.send(ONE * 4)
        assert peer.totals(4) == [2**64 - 1, 0, 1, 2]
        peer.send(encode_frame(2**64 - 1) * 2)
        assert peer.totals(2) == [1, 0]


def add_many(address: str, count: int) -> list[tuple[int, float, float]]:
    """Adds 1 so many times on a connection; each total with when it was asked for and answered."""
    with Peer(address) as peer:
        answers = []
        for _ in range(count):
            asked = time.monotonic()
            answers.append((peer.add(1), asked, time.monotonic()))
        return answers


def test_totals_are_a_permutation_that_never_contradicts_real_time() -> None:
    with ServerCommand() as server, concurrent.futures.ThreadPoolExecutor(16) as pool:
        runs = pool.map(add_many, [server.address] * 16, [300] * 16)
        answers = sorted(answer for run in runs for answer in run)
        assert [total for total, _, _ in answers] == list(range(1, 16 * 300 + 1))
        latest_asked = 0.0
        for _, asked, answered in answers:
            assert answered > latest_asked, "an addition that was answered has the higher total"
            latest_asked = max(latest_asked, asked)


def test_more_connections_than_workers_are_all_served_and_counted_exactly() -> None:
    with (
        ServerCommand(workers=8) as server,
        concurrent.futures.ThreadPoolExecutor(200) as pool,
    ):
        runs = pool.map(add_many, [server.address] * 200, [5] * 200)
        totals = sorted(total for run in runs for total, _, _ in run)
        assert totals == list(range(1, 1001))
        assert server.stop() == (1000, 1000)


def test_more_than_may_be_open_wait_in_the_backlog_and_it_is_said() -> None:
    with ServerCommand("--maxConnections", "2", workers=2) as server:
        with peers(server.address, 2) as open_ones:
            for peer in open_ones:
                peer.add(1)
            with server.connect() as waiting:
                waiting.send(ONE)
                server.error_line_with("all 2 connections are open and 1 waits in the backlog")
                waiting.expect_silence(0.1)
                open_ones[0].close()
                assert waiting.totals(1) == [3]


def test_a_peer_that_does_not_read_is_dropped_and_costs_bounded_memory() -> None:
    with ServerCommand("--writeTimeout", "500ms") as server, server.connect() as peer:
        fill(peer)
        server.error_line_with("does not read its replies")
        with pytest.raises(ConnectionError):
            drain_and_send(peer)
        assert memory_mb(server.process.pid) < 120
        with server.connect() as other:
            other.add(1)


def test_a_client_may_keep_4096_frames_unread() -> None:
    with ServerCommand() as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect(parse_address(server.address))
        with sock:
            sock.sendall(ONE * 4096)
            data = b""
            while len(data) < 4096 * REPLY_SIZE:
                data += sock.recv(65536)
        assert decode_totals(data)[0] == tuple(range(1, 4097))


def test_stopping_in_mid_flight_loses_no_answered_addition() -> None:
    with ServerCommand(workers=60) as server, peers(server.address, 50) as clients:
        for peer in clients:
            peer.send(ONE * 2000)
        for peer in clients:
            peer.totals(1)
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        answered = 50 + sum(len(peer.everything()) // REPLY_SIZE for peer in clients)
        total, requests = server.farewell()
        assert total == requests == answered
        assert time.monotonic() - started < 5


def test_stopping_answers_what_the_backlog_holds() -> None:
    with (
        ServerCommand("--maxConnections", "1", workers=1) as server,
        peers(server.address, 6) as clients,
    ):
        clients[0].add(1)
        for peer in clients[1:]:
            peer.send(ONE * 3)
        server.error_line_with("5 wait in the backlog")
        server.signal(signal.SIGTERM)
        totals: list[int] = []
        for peer in clients:
            totals += decode_totals(peer.everything())[0]
        assert sorted(totals) == list(range(2, 17))
        assert server.farewell() == (16, 16)


def test_a_second_signal_cuts_what_does_not_end() -> None:
    with ServerCommand("--drainTimeout", HOUR, "--writeTimeout", HOUR) as server:
        with server.connect() as peer:
            fill(peer)
            server.signal(signal.SIGTERM)
            wait_until(lambda: not can_connect(server.address), "the server stops listening")
            server.signal(signal.SIGTERM)
            server.farewell()


def test_what_does_not_end_is_cut_after_the_drain_timeout() -> None:
    with ServerCommand("--drainTimeout", "300ms", "--writeTimeout", HOUR) as server:
        with server.connect() as peer:
            fill(peer)
            started = time.monotonic()
            server.stop()
            assert time.monotonic() - started < 5


def test_ctrl_c_in_a_terminal_stops_the_server_in_order() -> None:
    with run_in_terminal("server.py", "--port", "0") as (process, terminal):
        shown = read_terminal_until(terminal, "(store: memory)")
        address = re.search(r"Listening on (\S+)", shown)
        assert address
        with Peer(address[1]) as peer:
            peer.add(5)
            os.write(terminal, b"\x03")
            peer.expect_eof()
        shown = read_terminal_until(terminal, "requests: 1")
        assert "Counter value: 5" in shown
        assert "Traceback" not in shown
        assert process.wait(20) == 0


def test_a_port_that_is_taken_is_one_line_and_exit_1() -> None:
    with ServerCommand() as server:
        _, port = parse_address(server.address)
        with Command("server.py", "--port", str(port)) as second:
            assert second.finish() == 1
            message = second.errors()
            assert message.count("\n") == 1
            assert f"cannot listen on 127.0.0.1:{port}: address already in use" in message
            assert "--port" in message
            assert second.output() == ""


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--host", "192.0.2.1"], 1, "cannot listen on 192.0.2.1:8080: cannot assign"),
        (["--host", "no.such.host.invalid"], 1, "cannot listen on host 'no.such.host.invalid'"),
        (["--multiplier", "0"], 2, "'0' is not a whole number of 1 to"),
        (["--multiplier", "many"], 2, "'many' is not a whole number of 1 to"),
        (["--port", "99999"], 2, "'99999' is not a whole number of 0 to 65535"),
        (["--prot", "9000"], 2, "unknown argument --prot, did you mean port?"),
        (["--config", "/no/such/file"], 2, "/no/such/file"),
        (["--maxConnections", "1"], 2, "--maxConnections 1 is fewer than the "),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(
    arguments: list[str], code: int, expected: str
) -> None:
    with Command("server.py", *arguments) as server:
        assert server.finish() == code
        message = server.errors()
        assert expected in message
        assert message.count("\n") == 1
        assert server.output() == ""


def test_descriptors_bound_the_connections_and_the_log_says_how_many_there_can_be() -> None:
    with ServerCommand(workers=4, descriptors=100) as server:
        told = server.error_line_with("at most 36 connections at once instead of 10000")
        assert " INFO " in told
        assert "each process may open 100 descriptors" in told
        server.stop()
    with ServerCommand(workers=50, descriptors=100) as server:
        assert " WARNING " in server.error_line_with("at most 36 connections at once")
        server.stop()
    with ServerCommand("--maxConnections", "40", workers=4, descriptors=100) as server:
        assert " WARNING " in server.error_line_with("36 connections at once instead of 40")
        server.stop()


def test_running_out_of_descriptors_is_logged_once_survived_and_recovered_from() -> None:
    with ServerCommand(workers=200) as server:
        server.leave_descriptors(40)
        with peers(server.address, 80) as clients:
            clients[0].add(1)
            server.error_line_with("cannot accept connections: Too many open files")
            for peer in clients:
                peer.send(ONE)
            assert clients[0].totals(1)
            clients[79].expect_silence(0.3)
            before_s = cpu_seconds(server.process.pid)
            clients[79].expect_silence(0.5)
            assert cpu_seconds(server.process.pid) - before_s < 0.3, "it does not spin"
            for peer in clients[1:60]:
                peer.close()
            assert clients[79].totals(1)
        server.stop()
        assert server.errors().count("cannot accept") <= 1


def test_replies_do_not_wait_and_a_peer_that_vanished_is_found() -> None:
    check = """
import socket, gevent
from counter.totals.memory import MemoryCounter
from counter.serving.server import CounterServer
from counter.system.sockets import listen
from counter.options.server import ServerSettings
server = CounterServer(listen("127.0.0.1", 0, 1), MemoryCounter(), 1, ServerSettings())
server.start()
with socket.create_connection(server.address):
    while not server.pool:
        gevent.sleep(0.001)
    (connection,) = server.pool
    assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
"""
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, timeout=30)


def test_a_drain_goes_on_without_a_connection_that_cannot_be_watched() -> None:
    check = """
import socket, gevent.event
from counter.totals.memory import MemoryCounter
from counter.serving.server import CounterServer
from counter.system.sockets import listen
from counter.options.server import ServerSettings
server = CounterServer(listen("127.0.0.1", 0, 2), MemoryCounter(), 1, ServerSettings())
peers = [socket.create_connection(server.socket.getsockname()) for _ in range(2)]
open_in_engine, lacking = server.engine.open, [True]
def open_second(*arguments):
    if lacking.pop() if lacking else False:
        raise OSError(28, "No space left on device")
    open_in_engine(*arguments)
server.engine.open = open_second
server.drain(5, gevent.event.Event())
assert not server.connections
assert [peer.recv(1) for peer in peers] == [b"", b""]
"""
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "cannot accept connections: No space left on device" in done.stderr


def test_ipv6_is_served_and_shown_in_brackets() -> None:
    with ServerCommand("--host", "::1") as server, server.connect() as peer:
        assert server.address.startswith("[::1]:")
        assert peer.add(3) == 3


def test_importing_patches_nothing_and_the_library_stays_light() -> None:
    check = (
        "import client, sys; assert not {'gevent', 'configargparse', 'numpy'} & set(sys.modules);"
        "import server; from gevent import monkey; assert not monkey.is_module_patched('socket')"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def fill(peer: Peer) -> None:
    """Sends whole frames without reading until the server does not read any more either."""
    peer.sock.setblocking(False)
    stream, sent = ONE * 4096, 0
    while True:
        try:
            sent += peer.sock.send(stream[sent % len(ONE) :])
        except BlockingIOError:
            if not select_writable(peer, 0.3):
                return


def drain_and_send(peer: Peer) -> None:
    """Reads and sends for as long as the connection lasts."""
    while select_readable(peer, 10):
        peer.sock.recv(1 << 20)
        peer.sock.send(ONE)


def select_readable(peer: Peer, seconds: float) -> bool:
    return bool(select.select([peer.sock], [], [], seconds)[0])


def select_writable(peer: Peer, seconds: float) -> bool:
    return bool(select.select([], [peer.sock], [], seconds)[1])


def can_connect(address: str) -> bool:
    try:
        Peer(address).close()
    except OSError:
        return False
    return True


def memory_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_a_backlog_that_the_kernel_cuts_is_said() -> None:
    with ServerCommand("--processes", "1", "--backlog", str(2**31 - 1)) as server:
        server.error_line_with("the kernel cuts --backlog 2147483647 to ")
        server.stop()


@pytest.mark.parametrize("processes", ["0", "2"])
def test_with_a_json_log_the_lines_of_the_result_are_json_too(processes: str) -> None:
    with Command("server.py", "--port", "0", "--processes", processes, "--logFormat", "json") as it:
        begun = json.loads(it.line())
        assert begun["message"].startswith(f"Listening on {begun['address']} with")
        assert (begun["store"], begun["total"]) == ("memory", "0")
        with Peer(begun["address"]) as peer:
            assert peer.add(7) == 7
        it.signal(signal.SIGTERM)
        assert json.loads(it.line()) == {"message": "Counter value: 7", "total": "7"}
        assert json.loads(it.line())["requests"] == 1
        assert it.finish() == 0
