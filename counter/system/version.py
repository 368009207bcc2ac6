"""The version of the program, the same for server and client."""

from __future__ import annotations

from typing import Final

VERSION: Final = "1.0.0"
