"""Signals as something to wait for, and kept out for a moment."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from types import FrameType

from counter.system.signals import WakePipe, blocked, handled
from kit.harness import ROOT

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
        with handled([NUMBER], ignore, ignored_behind=True):
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


def test_signals_that_come_while_they_begin_to_be_ignored_are_no_error() -> None:
    code = (
        "import os, signal, sys\n"
        "from counter.system.signals import ignore\n"
        "parent = os.getpid()\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    while os.getppid() == parent: os.kill(parent, signal.SIGTERM)\n"
        "    os._exit(0)\n"
        "for _ in range(3000):\n"
        "    signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "    ignore([signal.SIGTERM])\n"
        "os.kill(pid, signal.SIGKILL)\n"
    )
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + code
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
