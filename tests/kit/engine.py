"""The engines that a test is run with: both. Where the compiled one can be built, none of its tests
is left out."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from typing import TYPE_CHECKING, Final

import pytest

from counter.turn.library import EngineMissing, Library, load
from protocol import MAX_AMOUNT

if TYPE_CHECKING:
    from counter.turn.engine import Engine

ENGINES: Final = ("compiled", "plain")


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


def make_engine(name: str, max_amount: int = MAX_AMOUNT) -> Engine:
    """An engine by its name; imports what it needs, gevent among it."""
    from counter.turn import engines

    if name == "compiled":
        compiled()
    return engines.make_engine(name, engines.make_decoder(max_amount, name == "plain"))
