"""What SIGUSR1 has a server write to standard error of itself: its settings and counts.

Nothing is stopped by it. The stacks of a process are written by itself (serving/process.py).
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields

from counter.admin.status import Status
from counter.options.parser import ServerSettings
from counter.options.values import masked


def dump(settings: ServerSettings, status: Status) -> None:
    """Writes the settings and what the processes count to standard error, after SIGUSR1."""
    lines = [f"{field.name} = {getattr(settings, field.name)}" for field in fields(settings)]
    lines.append(json.dumps(status.as_json()))
    sys.stderr.write("\n".join(["SIGUSR1: settings and counts", *map(masked, lines)]) + "\n")
    sys.stderr.flush()
