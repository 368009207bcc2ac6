"""Signals as something to wait for, and kept out for a moment."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType

from counter.system.signals import WakePipe, blocked, handled

NUMBER = signal.SIGUSR1


def is_readable(pipe: WakePipe, seconds: float = 0) -> bool:
    return bool(select.select([pipe], [], [], seconds)[0])


def ignore(_number: int, _frame: FrameType | None) -> None:
    pass


def test_a_signal_ends_a_wait_and_is_cleared() -> None:
    with handled([NUMBER], ignore), WakePipe() as pipe:
        assert not is_readable(pipe)
        os.kill(os.getpid(), NUMBER)
        assert is_readable(pipe, 20)
        pipe.clear()
        assert not is_readable(pipe)
        pipe.clear()


def test_a_pipe_that_is_full_stays_readable_and_blocks_nobody() -> None:
    with WakePipe() as pipe:
        for _ in range(100_000):
            pipe.wake()
        assert is_readable(pipe)


def test_handlers_and_the_wake_up_descriptor_are_given_back() -> None:
    before = signal.getsignal(NUMBER)
    with handled([NUMBER], ignore), WakePipe() as pipe:
        assert signal.getsignal(NUMBER) is ignore
        descriptor = pipe.fileno()
    assert signal.getsignal(NUMBER) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert not os.path.exists(f"/proc/self/fd/{descriptor}")


def test_what_is_done_behind_may_be_another_thing_than_before() -> None:
    before = signal.getsignal(NUMBER)
    try:
        with handled([NUMBER], ignore, behind=signal.SIG_IGN):
            assert signal.getsignal(NUMBER) is ignore
        assert signal.getsignal(NUMBER) is signal.SIG_IGN
    finally:
        signal.signal(NUMBER, before)


def test_a_blocked_signal_waits_and_is_handled_behind() -> None:
    seen = []
    with handled([NUMBER], lambda number, _frame: seen.append(number)):
        with blocked([NUMBER]):
            os.kill(os.getpid(), NUMBER)
            assert seen == []
        assert seen == [NUMBER]
