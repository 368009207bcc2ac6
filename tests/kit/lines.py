"""A log whose lines a test reads as they were printed."""

from __future__ import annotations

import logging


class LineList(logging.Handler):
    """Keeps what a log would print."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")
