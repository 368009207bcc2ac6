"""What gevent's loop is asked to watch a descriptor for: libev's masks, under their names.

gevent has them too, in gevent.core; numbers of our own can be imported before a fork, where
nothing of gevent that makes a hub may be.
"""

from __future__ import annotations

from typing import Final

READ: Final = 1
WRITE: Final = 2


def choose_libev() -> None:
    """Has gevent run on libev, and on the kernel interface that libev prefers, whatever gevent's
    environment says; before the hub is made.

    What is used here of watchers libuv does not have; select() ends at 1,024 descriptors.
    """
    import gevent

    gevent.config.loop = "libev-cext,libev-cffi"
    gevent.config.libev_backend = None
