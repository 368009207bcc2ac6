"""SSLKEYLOGFILE, a file that the ssl module opens of its own accord, and fails without naming."""

from __future__ import annotations

import os


def key_log_error() -> str:
    """Why the key log that the environment asks for cannot be written, and what to do; nothing if
    it can, or if none is asked for."""
    name = os.environ.get("SSLKEYLOGFILE")
    if not name:
        return ""
    try:
        open(name, "a").close()
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        return f"SSLKEYLOGFILE {name}: {reason}; unset it, or name a file that can be written"
    return ""
