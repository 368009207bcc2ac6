"""The masks of gevent's loop, held against gevent's own."""

from __future__ import annotations

from importlib import import_module

from counter.system.libev import READ, WRITE


def test_the_masks_are_gevents() -> None:
    core = import_module("gevent.core")  # its stubs leave it out
    assert (READ, WRITE) == (core.READ, core.WRITE)
