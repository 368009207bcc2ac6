"""Waiting for a peer in a process that stands still meanwhile: its loop is blocked for a while."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import gevent
import pytest

from counter.load.patience import LONGEST_LOOK_S, Patience, Sweeps, look_s
from counter.system.libev import READ, WRITE


def stand_still(seconds: float) -> None:
    """Blocks the loop, as if the process were stopped: for its timers that is the same."""
    threading.Event().wait(seconds)


def outcome_of(wait: Callable[[], None]) -> gevent.Greenlet[[], str]:
    """A greenlet that waits, and gives back how that ended."""

    def run() -> str:
        try:
            wait()
        except TimeoutError:
            return "timed out"
        return "ready"

    greenlet = gevent.spawn(run)
    gevent.sleep(0)
    return greenlet


def test_what_came_while_the_process_stood_still_is_no_timeout() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outcome = outcome_of(lambda: Patience(0.2).wait(ours.fileno(), READ))
        theirs.send(b"x")
        stand_still(0.5)
        assert outcome.get(timeout=5) == "ready"


def test_a_standstill_costs_one_look_and_leaves_the_peer_its_time() -> None:
    """A peer that stood still too, as in a paused machine, answers a moment later."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outcome = outcome_of(lambda: Patience(2).wait(ours.fileno(), READ))
        stand_still(2.5)
        gevent.spawn_later(0.1, theirs.send, b"x")
        assert outcome.get(timeout=5) == "ready"


def test_patience_is_spent_over_several_waits() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        patience = Patience(0.3)
        patience.wait(ours.fileno(), WRITE)
        gevent.spawn_later(0.2, theirs.send, b"x")
        patience.wait(ours.fileno(), READ)
        assert 0 < patience.left_s < 0.15
        ours.recv(1)
        with pytest.raises(TimeoutError):
            patience.wait(ours.fileno(), READ)
        theirs.send(b"x")
        patience.wait(ours.fileno(), READ)  # what is there is not late


SECOND = 10**9


def test_a_request_is_overdue_when_its_time_is_over() -> None:
    sweeps = Sweeps(10)
    step = int(sweeps.interval_s * SECOND)
    late_before = [sweeps.note(100 * SECOND + at * step) for at in range(41)]
    assert max(late_before[:40]) == 0, "there was no time yet in which anything could be late"
    assert late_before[40] == 100 * SECOND


def test_a_standstill_is_one_sweep() -> None:
    sweeps = Sweeps(1)
    step = int(sweeps.interval_s * SECOND)
    for at in range(8):
        sweeps.note(at * step)
    sent_ns, woken_ns = 7 * step + 1, 1000 * SECOND
    late = [sent_ns < sweeps.note(woken_ns + at * step) for at in range(6)]
    assert late == [False, False, False, False, True, True]


def test_a_loop_that_is_always_late_gives_up_too() -> None:
    sweeps = Sweeps(1)
    late_before = [sweeps.note(at * 5 * SECOND) for at in range(6)]
    assert late_before[5] == 5 * SECOND


@pytest.mark.parametrize(
    ("timeout_s", "seconds"), [(10, LONGEST_LOOK_S), (0.4, 0.1), (0.001, 0.01)]
)
def test_short_timeouts_are_looked_at_more_often(timeout_s: float, seconds: float) -> None:
    assert look_s(timeout_s) == seconds
