"""Accepting while descriptors or memory are missing: with a pause, instead of spinning or ending.

What a gevent server does by itself then depends on the error: it spins, or logs a traceback for
each attempt.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Final, TypeVar

# After running out of descriptors or memory, accepting pauses so long.
ACCEPT_PAUSE_S: Final = 0.1

_OUT_OF_RESOURCES: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

T = TypeVar("T")


class PausingServer:
    """What a server of gevent's mixes in to pause accepting; in front of gevent's own class."""

    # Of gevent's BaseServer, whose stubs leave some of it out.
    loop: Any
    started: Any
    start_accepting: Any
    stop_accepting: Any
    _timer: Any

    def accept_or_pause(
        self, accept: Callable[[], T], on_lack: Callable[[OSError], None]
    ) -> T | None:
        """What `accept` gives; None, after a call of `on_lack`, where the machine lacks for it."""
        try:
            return accept()
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            on_lack(error)
            self.pause_accepting(ACCEPT_PAUSE_S)
            return None

    def pause_accepting(self, seconds: float) -> None:
        """Leaves what waits in the listen queue where it is for so long."""
        self.stop_accepting()
        self._timer = self.loop.timer(seconds)
        self._timer.start(self._resume_accepting)

    def _resume_accepting(self) -> None:
        if self.started:
            self.start_accepting()
