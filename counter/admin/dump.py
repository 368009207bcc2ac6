"""What SIGUSR1 writes to standard error: settings, counts, the stack of every greenlet.

Nothing is stopped by it.
"""

from __future__ import annotations

import gc
import json
import sys

from counter.admin.status import Status
from counter.options.server import ServerSettings
from counter.options.shown import shown


def dump(settings: ServerSettings, status: Status) -> None:
    """Writes the settings and what the processes count to standard error, after SIGUSR1."""
    lines = [f"{option.flag} = {option.text}" for option in shown(settings)]
    lines.append(json.dumps(status.as_json()))
    sys.stderr.write("\n".join(["SIGUSR1: settings and counts", *lines]) + "\n")
    sys.stderr.flush()


def dump_stacks() -> None:
    """Writes the stack of every greenlet and thread of this process to standard error."""
    from gevent.util import print_run_info

    gc.unfreeze()  # what is frozen is not found
    try:
        print_run_info(file=sys.stderr)
        sys.stderr.flush()
    finally:
        gc.freeze()
