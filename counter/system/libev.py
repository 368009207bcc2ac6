"""What gevent's loop is asked to watch a descriptor for: libev's masks, under their names.

gevent has them too, in gevent.core; numbers of our own can be imported before a fork, where
nothing of gevent that makes a hub may be.
"""

from __future__ import annotations

from typing import Final

READ: Final = 1
WRITE: Final = 2


def choose_libev() -> None:
    """Has gevent run on libev, whatever its environment says; before the hub is made.

    What is used here of watchers libuv does not have.
    """
    import gevent

    gevent.config.loop = ["libev-cext", "libev-cffi"]
