"""A lock between processes: the kernel drops it when its holder dies."""

from __future__ import annotations

import fcntl
import os
import weakref
from types import TracebackType


class SharedLock:
    """Held in a `with` block by one process at a time; shared with those forked afterwards.

    For what is short: a process that waits for it does nothing else.
    """

    def __init__(self, name: str) -> None:
        self._fd = os.memfd_create(name)
        weakref.finalize(self, os.close, self._fd)

    def __enter__(self) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_EX)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN)
