"""What every test finds."""

import os
import signal
from collections.abc import Iterator

import pytest

from kit.engine import ENGINES, compiled

# Under nohup, as some runners of CI start it, a suite ignores SIGHUP, and so would all that it
# starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module", params=os.environ.get("ENGINES", " ".join(ENGINES)).split())
def each_engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests once with each engine, which the servers that they start serve with.

    A fixture of a whole module that starts one has to ask for this one. ENGINES in the environment
    leaves one out.
    """
    name = str(request.param)
    if name == "compiled":
        compiled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNTER_SERVER_ENGINE", name)
        yield name
