"""The schedule of an open loop, with the kernel's timer, against a generator of this test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic_ns as clock

import gevent
import pytest

from counter.load.schedule import TICK_NS, Pace, Slot
from protocol import Batch

RATE = 1000.0
INTERVAL_NS = 1_000_000
PATIENCE_S = 20


@dataclass(eq=False)
class Connection:
    epoch: int = 0

    def send(self, batch: Batch, due_ns: int) -> None:
        raise AssertionError("the schedule leaves sending to its sender")


@dataclass
class Sender:
    """Notes when each request was due, and how late it was sent."""

    sending: bool = True
    left: int = 10**9
    connections: list[Slot] = field(default_factory=list)
    due_ns: list[int] = field(default_factory=list)
    late_ns: list[int] = field(default_factory=list)

    def send_due(self, connection: Slot, due_ns: int) -> bool:
        if not self.left:
            return False
        self.left -= 1
        self.connections.append(connection)
        self.due_ns.append(due_ns)
        self.late_ns.append(clock() - due_ns)
        return True


@pytest.fixture
def sender() -> Sender:
    return Sender()


@pytest.fixture
def pace(sender: Sender) -> Iterator[Pace]:
    pace = Pace(gevent.get_hub().loop, sender, RATE)
    yield pace
    pace.close()


def wait_for_requests(sender: Sender, count: int) -> None:
    with gevent.Timeout(PATIENCE_S):
        while len(sender.due_ns) < count:
            gevent.sleep(0.001)


def test_requests_are_due_at_even_intervals_and_never_sent_before(
    pace: Pace, sender: Sender
) -> None:
    pace.start(clock(), 0)
    pace.offer(Connection(), 20)
    wait_for_requests(sender, 20)
    steps = {later - due for due, later in zip(sender.due_ns, sender.due_ns[1:], strict=False)}
    assert steps == {INTERVAL_NS}
    assert min(sender.late_ns) >= 0


def test_what_was_due_while_no_connection_was_free_is_sent_late_and_not_left_out(
    pace: Pace, sender: Sender
) -> None:
    start_ns = clock() - 10 * INTERVAL_NS
    pace.start(start_ns, 0)
    pace.offer(Connection(), 5)
    assert [round((due - start_ns) / INTERVAL_NS) for due in sender.due_ns] == [0, 1, 2, 3, 4]
    assert sender.due_ns[0] - start_ns < TICK_NS
    assert pace.behind(clock(), None) >= 5
    assert pace.behind(clock(), 2) == 2


def test_what_the_warm_up_left_behind_is_not_carried_into_the_measured_part(
    pace: Pace, sender: Sender
) -> None:
    start_ns = clock() - 100 * INTERVAL_NS
    measured_ns = start_ns + 90 * INTERVAL_NS
    pace.start(start_ns, measured_ns)
    pace.offer(Connection(), 1)
    assert sender.due_ns[0] >= measured_ns


def test_what_a_lost_connection_offered_is_void(pace: Pace, sender: Sender) -> None:
    lost, other = Connection(), Connection()
    pace.start(clock() + 5 * INTERVAL_NS, 0)
    pace.offer(lost, 3)
    lost.epoch += 1
    pace.offer(other, 1)
    wait_for_requests(sender, 1)
    assert sender.connections == [other]


def test_nothing_is_sent_once_the_run_has_ended(pace: Pace, sender: Sender) -> None:
    sender.sending = False
    pace.start(clock() - 10 * INTERVAL_NS, 0)
    pace.offer(Connection(), 5)
    assert sender.due_ns == []
