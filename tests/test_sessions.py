"""Sessions of real servers, with their total in memory and in a store: cut at every byte, killed,
moved."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import pytest

from client import CounterClient
from kit.certificates import kit, trusting
from kit.cutting_proxy import Cut, CuttingProxy
from kit.engine import ENGINES
from kit.faults import LONG, kill_everything, serve, serve_together
from kit.harness import ServerCommand, children, receive_exactly, wait_until
from protocol import (
    HELLO_SIZE,
    REPLY_SIZE,
    REQUEST_SIZE,
    Answer,
    Control,
    Hello,
    Refused,
    decode_answer,
    decode_totals,
    encode_control,
    encode_frame,
    parse_address,
)

AMOUNTS = [3, 1, 4, 1, 5]

CUTS = [
    *(Cut(there=size) for size in range(HELLO_SIZE + len(AMOUNTS) * REQUEST_SIZE)),
    *(Cut(back=size) for size in range(2 * REPLY_SIZE + len(AMOUNTS) * REPLY_SIZE)),
]


STORES = ["memory", "sqlite"]


def kept_in(store: str, folder: Path) -> list[str]:
    """The flags of a server whose total is in a new store of a kind."""
    return ["--store", "memory" if store == "memory" else f"{store}:{folder / 'counter.db'}"]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The flags that name each kind of store."""
    return kept_in(request.param, tmp_path)


@pytest.fixture(scope="module", params=[(store, count) for store in STORES for count in "02"])
def server(
    each_engine: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerCommand]:
    """A server of this very process, and one of two that share the total."""
    store, processes = request.param
    flags = kept_in(store, tmp_path_factory.mktemp("store"))
    with ServerCommand("--processes", processes, "--multiplier", "100", *flags) as server:
        yield server


@pytest.fixture
def open_peers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def greet(stack: ExitStack, server: ServerCommand, hello: Hello) -> socket.socket:
    """A connection that has sent a hello."""
    peer = dial(stack, server)
    peer.sendall(hello.encode())
    return peer


def port_of(server: ServerCommand) -> int:
    return parse_address(server.address)[1]


def dial(stack: ExitStack, server: ServerCommand) -> socket.socket:
    """A connection."""
    return stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server)), 20))


def told(peer: socket.socket, have: int = 0) -> Answer | Refused | None:
    """The answer to a hello; None where the connection ends without one."""
    data = b""
    while more := peer.recv(65536):
        answer, rest = decode_answer(data := data + more, have)
        if answer is not None:
            assert not rest
            return answer
    assert not data
    return None


def new_id() -> int:
    return random.getrandbits(128)


def test_a_run_that_is_cut_at_every_byte_is_counted_once(server: ServerCommand) -> None:
    with CounterClient(server.address) as plain:
        total = plain.total()
        for cut in CUTS:
            with (
                CuttingProxy(port_of(server), [cut]) as proxy,
                CounterClient(proxy.address, timeout=20, session=True) as counter,
            ):
                expected = [*accumulate(AMOUNTS, initial=total)][1:]
                assert counter.add_many(AMOUNTS) == expected, cut
                assert proxy.made == 1
            total = expected[-1]
        assert plain.total() == total


@pytest.mark.parametrize("pause_s", [0.0, 0.01, 0.05])
def test_frames_of_an_old_connection_that_come_late_are_not_counted(
    server: ServerCommand, open_peers: ExitStack, pause_s: float
) -> None:
    for _ in range(20 if LONG else 5):
        session_id = new_id()
        old = greet(open_peers, server, Hello(session_id, Control.OPEN, 8))
        assert told(old) == Answer(0, 2**64 - 1)
        old.sendall(encode_frame(1) * 2)
        (_, total), _ = decode_totals(receive_exactly(old, 16))
        new = greet(open_peers, server, Hello(session_id, Control.RESUME, 2))
        assert told(new, 2) == Answer(2, 2**64 - 1)
        deadline = time.monotonic() + pause_s
        wait_until(lambda deadline=deadline: time.monotonic() >= deadline, "it is late")  # type: ignore[misc]
        with suppress(OSError):  # it may have been ended before
            old.sendall(encode_frame(1000) * 3)
        new.sendall(encode_frame(1))
        assert decode_totals(receive_exactly(new, 8))[0] == (total + 1,)
        with CounterClient(server.address) as plain:
            assert plain.total() == total + 1


def test_hellos_that_are_wrong_count_nothing_and_end_in_order(
    server: ServerCommand, open_peers: ExitStack
) -> None:
    hello = Hello(new_id(), Control.OPEN, 5).encode()
    wrong = [
        *(hello[:size] for size in range(1, HELLO_SIZE)),
        Hello(new_id(), Control.OPEN, 0).encode(),
        Hello(new_id(), Control.OPEN, 4097).encode(),
        encode_control(Control.END, 3),
        hello + encode_frame(5),
    ]
    with CounterClient(server.address) as plain:
        before = plain.total()
        for data in wrong:
            peer = dial(open_peers, server)
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            assert peer.recv(100) == b"", data.hex()
        twice = greet(open_peers, server, Hello(new_id(), Control.OPEN, 5))
        assert isinstance(told(twice), Answer)
        twice.sendall(hello)
        assert twice.recv(100) == b""
        assert plain.total() == before


def test_a_session_under_tls_is_one_like_any_other(each_engine: str, store: list[str]) -> None:
    with ServerCommand("--processes", "2", *store, *kit().server.server_flags()) as server:
        with CounterClient(server.address, 20, trusting(), session=True) as counter:
            assert counter.add_many([1] * 1000) == list(range(1, 1001))
        # Of each two connections one is not cut: so many in a row look like an old server's.
        cuts = [Cut(back=size) for size in range(1200, 2600, 37)]
        proxy = CuttingProxy(
            port_of(server), [one for cut in cuts for one in (cut, Cut(back=3000))]
        )
        with proxy, CounterClient(proxy.address, 20, trusting(), session=True) as counter:
            totals = [counter.add(2) for _ in range(100)]
        assert totals == list(range(1002, 1202, 2))


def test_serving_processes_that_are_killed_under_load_lose_and_double_nothing(
    each_engine: str, store: list[str]
) -> None:
    with ServerCommand("--processes", "2", "--multiplier", "100", *store) as server:
        with Loads(server.address) as loads:
            for _ in range(100 if LONG else 8):
                victim = random.choice(serving(server))
                asked = total_of(server)
                os.kill(victim, signal.SIGKILL)
                wait_until(lambda victim=victim: victim not in serving(server), "it was reaped")  # type: ignore[misc]
                wait_until(lambda asked=asked: total_of(server) > asked + 100, "it is served on")  # type: ignore[misc]
        loads.check(total_of(server))


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM"])
def test_a_server_on_a_store_that_ends_under_load_loses_and_doubles_nothing(
    each_engine: str, tmp_path: Path, end: str
) -> None:
    flags = ["--multiplier", "100", "--processes", "2", *kept_in("sqlite", tmp_path)]
    with ExitStack() as stack:
        server = stack.enter_context(ServerCommand(*flags))
        with Loads(server.address) as loads:
            for _ in range(20 if LONG else 4):
                before = total_of(server)
                if end == "SIGKILL":
                    kill_everything(server)
                else:
                    server.stop()
                server = stack.enter_context(ServerCommand(*flags, port=str(port_of(server))))
                wait_until(
                    lambda server=server, before=before: total_of(server) > before + 100,  # type: ignore[misc]
                    "it is served on",
                )
        loads.check(total_of(server))


def test_clients_that_go_from_one_server_of_a_file_to_the_other_are_counted_once(
    each_engine: str, tmp_path: Path
) -> None:
    store = f"sqlite:{tmp_path / 'counter.db'}"
    starts = [partial(serve, store)] * 2
    with serve_together(*starts) as servers, ExitStack() as stack:
        cuts = [Cut(back=random.randrange(16, 3000)) for _ in range(400 if LONG else 60)]
        one, *others = map(port_of, servers)
        proxy = stack.enter_context(CuttingProxy(one, cuts, others=others))
        with Loads(proxy.address) as loads:
            wait_until(lambda: proxy.made == len(cuts), "they were cut")
        totals = {total_of(server) for server in servers}
        assert len(totals) == 1
        loads.check(totals.pop())


def serving(server: ServerCommand) -> list[int]:
    """The serving processes; there are two once a new one is forked."""
    return children(server.process.pid)


def total_of(server: ServerCommand) -> int:
    """The total now, which rises as long as anybody is served."""
    with CounterClient(server.address, session=True) as counter:
        return counter.total()


class Loads:
    """Threads that add in sessions for the block, and know what they were told that is counted."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.stop = threading.Event()
        self.sums: list[int] = []
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self.add, args=(seed,)) for seed in range(4)]

    def __enter__(self) -> Loads:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def add(self, seed: int) -> None:
        """Adds in a session until it is told to stop."""
        draw, done = random.Random(seed), 0
        try:
            with CounterClient(self.address, timeout=30, session=True) as counter:
                while not self.stop.is_set():
                    amounts = [draw.randrange(1, 10) for _ in range(draw.randrange(1, 300))]
                    totals = counter.add_many(amounts)
                    assert all(a < b for a, b in pairwise(totals))
                    done += sum(amounts)
        except BaseException as error:
            self.errors.append(error)
        finally:
            self.sums.append(done)

    def check(self, total: int) -> None:
        """Nothing failed, was lost or was counted twice."""
        assert self.errors == []
        assert total == sum(self.sums)


def test_a_server_that_was_started_anew_counts_on_where_nothing_is_in_doubt() -> None:
    with ServerCommand("--processes", "2") as server:
        counter = CounterClient(server.address, timeout=20, session=True)
        assert counter.add(5) == 5
        port = str(port_of(server))
        server.stop()
    with ServerCommand("--processes", "2", port=port), counter:
        assert [counter.add(1), counter.add(2)] == [1, 3]


@pytest.mark.parametrize("engine", ENGINES)
def test_with_sessions_0_a_hello_is_what_it_is_to_an_old_server(engine: str) -> None:
    with ServerCommand("--sessions", "0", "--engine", engine) as server, ExitStack() as stack:
        peer = greet(stack, server, Hello(new_id(), Control.OPEN, 5))
        assert told(peer) is None


def test_a_flood_of_sessions_is_bounded_and_plain_peers_go_on(
    open_peers: ExitStack, store: list[str]
) -> None:
    flags = ["--sessions", "20", "--processes", "2", "--multiplier", "100", *store]
    with ServerCommand(*flags) as server:
        answers = [
            told(greet(open_peers, server, Hello(new_id(), Control.OPEN, 4096))) for _ in range(60)
        ]
        assert answers.count(Answer(0, 2**64 - 1)) in range(10, 21)
        assert answers.count(Refused.NO_ROOM) == 60 - answers.count(Answer(0, 2**64 - 1))
        with CounterClient(server.address) as plain:
            assert plain.add(1) == 1
