"""Which C sources these are: what the library was built from, and what stands here now.

Both sides of the comparison take it from here: setup.py, which compiles it in, and library.py,
which asks the library for it. So this module imports nothing of ours and can be run by itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def source_hash(folder: Path) -> str:
    """SHA-256 in hex of the names and bytes of a folder's *.c and *.h, in the order of their names.

    OSError where one cannot be read.
    """
    state = hashlib.sha256()
    for path in sorted([*folder.glob("*.c"), *folder.glob("*.h")], key=lambda path: path.name):
        source = path.read_bytes()
        # With the length between them no two folders give the same bytes.
        state.update(f"{path.name} {len(source)}\n".encode())
        state.update(source)
    return state.hexdigest()
