"""What pip installs: the client's library and the wire, as the package counter_client.

In a checkout the library is client.py beside session.py and protocol.py, with the command behind
it. Applications have modules of such names themselves, so what is installed has one name of its
own: client.py up to its command is counter_client/__init__.py, and finds the others beside it. The
text is changed here, once: an import with two ways to go would have no types, or find the
application's module. pyproject.toml says everything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

PACKAGE: Final = "counter_client"
WIRE: Final = "from protocol import"
SESSIONS: Final = "from session import"
COMMAND: Final = "\n\n\ndef main("  # the library ends where the command begins


class BuildLibrary(build_py):
    """Writes the package where setuptools would copy a folder."""

    def run(self) -> None:
        folder = Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in package().items():
            (folder / name).write_text(text)
        (folder / "py.typed").touch()

    def get_source_files(self) -> list[str]:
        return ["client.py", "session.py", "protocol.py", "counter/system/version.py"]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        folder = Path(self.build_lib, PACKAGE)
        return [str(folder / name) for name in (*package(), "py.typed")]

    def get_output_mapping(self) -> dict[str, str]:
        # What an editable installation asks for, and nothing else.
        raise SetupError("this cannot be installed editable; import client.py in the checkout")


def package() -> dict[str, str]:
    """The modules of the package; SetupError if a source is not what it is taken for."""
    client = _source("client.py", WIRE, SESSIONS, COMMAND)
    return {
        "__init__.py": _inside(client.partition(COMMAND)[0] + "\n"),
        "session.py": _inside(_source("session.py", WIRE)),
        "protocol.py": _source("protocol.py"),
    }


def _source(name: str, *parts: str) -> str:
    """The text of a module, which has each of these parts once."""
    source = Path(name).read_text()
    for text in parts:
        if source.count(text) != 1:
            raise SetupError(f"{name} has {text.strip()!r} {source.count(text)} times, not once")
    return source


def _inside(source: str) -> str:
    """The text of a module that imports the others from the package that it is in."""
    for text in (WIRE, SESSIONS):
        source = source.replace(text, text.replace(" ", " .", 1))
    return source


setup(cmdclass={"build_py": BuildLibrary})
