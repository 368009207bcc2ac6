"""The files that a rediss:// URL and its environment name, looked at before Redis is asked.

What cannot be used is named here, with its parameter; OpenSSL's own words name neither, and sound
as if the connection had failed. Nothing is read of a file but that it can be.
"""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

from counter.options.values import TLS_FILES
from counter.system.key_log import key_log_error
from counter.totals.store import StoreError


def check_files(url: str) -> None:
    """StoreError if a file that a connection to this Redis is to open cannot be opened."""
    parts = urlsplit(url)
    if parts.scheme != "rediss":
        return
    for parameter, name in parse_qsl(parts.query):
        if parameter in TLS_FILES:
            try:
                open(name, "rb").close()
            except (OSError, ValueError) as error:
                reason = (getattr(error, "strerror", None) or str(error)).lower()
                raise StoreError(f"{parameter} {name}: {reason}") from None
    if wrong := key_log_error():
        raise StoreError(wrong)
