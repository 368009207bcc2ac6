"""The compiled engine for tests that are of it: where it can be built, none of them is left out."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig

import pytest

from counter.turn.library import EngineMissing, Library, load


def compiler() -> str | None:
    """The C compiler that an installation takes; None where there is none."""
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return shutil.which(shlex.split(command)[0])


def compiled() -> Library:
    """The compiled engine. Without one a test fails, or is skipped where no compiler is."""
    try:
        return load()
    except EngineMissing as missing:
        if compiler():
            pytest.fail(str(missing))
        pytest.skip(str(missing))


needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C compiler")
