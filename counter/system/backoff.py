"""How long to wait before the next attempt at what fails: longer each time, and never too long."""

from __future__ import annotations

# 2^10 times the first delay is longer than any last one here; a larger power would be of no use.
_MOST_DOUBLINGS = 10


def backoff_s(failures: int, first_s: float, last_s: float) -> float:
    """Seconds to wait after so many failures in a row, from 1: doubled each time up to `last_s`."""
    doublings: float = 2.0 ** min(failures - 1, _MOST_DOUBLINGS)
    return min(last_s, first_s * doublings)
