"""What gevent's loop is: its masks, held against gevent's own, and which one it is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest

from counter.system.libev import READ, WRITE
from kit.harness import ROOT


def test_the_masks_are_gevents() -> None:
    core = import_module("gevent.core")  # its stubs leave it out
    assert (READ, WRITE) == (core.READ, core.WRITE)


@pytest.mark.parametrize("backend", ["select", "nonsense"])
def test_the_loop_is_the_same_whatever_the_environment_of_gevent_says(backend: str) -> None:
    code = (
        "from counter.system.libev import choose_libev; choose_libev();"
        "import gevent; print(gevent.get_hub().loop.backend)"
    )
    environment = {"GEVENT_BACKEND": backend, "GEVENT_LOOP": "libuv"}
    command = [sys.executable, "-c", code]
    done = [
        subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, check=False)
        for env in (environment, {})
    ]
    assert done[0].stdout == done[1].stdout != b"", done[0].stderr
