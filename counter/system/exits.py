"""The exit codes of both commands: here and nowhere else, as the README's table has them.

Which of several applies is for whoever ends to say; a code means the same wherever it is given.
"""

from __future__ import annotations

from typing import Final

EXIT_CANNOT_START: Final = 1  # the server: address, store, TLS files
EXIT_CANNOT_CONNECT: Final = 1  # the client
EXIT_USAGE: Final = 2  # usage or configuration
EXIT_CANNOT_BOOT: Final = 3  # the server: its processes cannot start
EXIT_WRONG_TOTALS: Final = 4
EXIT_ERRORS: Final = 5  # finished, with errors or unknown outcomes, or a result that was not told
EXIT_THRESHOLD: Final = 99  # a threshold was breached
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it
