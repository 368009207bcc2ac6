"""What SIGUSR1 has a server write to standard error of itself: its settings and counts.

Nothing is stopped by it. The stacks of a process are written by itself (serving/process.py).
"""

from __future__ import annotations

import json

from counter.admin.status import Status
from counter.options.server import ServerSettings
from counter.options.shown import shown
from counter.system.streams import write_error


def dump(settings: ServerSettings, status: Status) -> None:
    """Writes the settings and what the processes count to standard error, after SIGUSR1."""
    lines = [f"{option.flag} = {option.text}" for option in shown(settings)]
    lines.append(json.dumps(status.as_json()))
    write_error("\n".join(["SIGUSR1: settings and counts", *lines]) + "\n")
