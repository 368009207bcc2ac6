"""What a command says about itself on standard error: text or JSON, and never in a flood.

Results go to standard output and are not logged. A peer can cause any number of events but not any
number of lines: what a peer can provoke is said through LimitedLog.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Final

# A line of one kind at most so often; short enough to see a trouble begin, long enough for a disk.
LINE_INTERVAL_S: Final = 10.0


def configure_log(level: str, form: str) -> None:
    """Sends the log of this process to standard error; `form` is `text` or `json`."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(process)d %(levelname)s %(message)s")


class _JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, pid, message, and the error if any."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class LimitedLog:
    """At most one line of each kind per `interval_s`; the next says how many were left out."""

    def __init__(
        self,
        logger: logging.Logger,
        interval_s: float = LINE_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._next_at: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def warning(self, kind: str, message: str, *args: object) -> None:
        """Logs a warning, unless one of this `kind` was logged less than the interval ago."""
        now = self._clock()
        if now < self._next_at.get(kind, now):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._next_at[kind] = now + self._interval_s
        left_out = self._left_out.pop(kind, 0)
        if left_out:
            message += f" ({left_out} more like it {'was' if left_out == 1 else 'were'} left out)"
        self._logger.warning(message, *args)

    def flush(self) -> None:
        """Says how many lines of each kind are still left out; for the end of the program."""
        for kind, left_out in self._left_out.items():
            warnings = "warning was" if left_out == 1 else "warnings were"
            self._logger.warning("%s: %d more %s left out", kind, left_out, warnings)
        self._left_out.clear()
