"""What pip installs: the client's library and the wire, as the package counter_client.

In a checkout the library is client.py beside protocol.py, with the command behind it. Applications
have modules of such names themselves, so what is installed has one name of its own: client.py up to
its command is counter_client/__init__.py, and finds the wire beside it. The text is changed here,
once: an import with two ways to go would have no types, or find the application's module.
pyproject.toml says everything else.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

PACKAGE: Final = "counter_client"
WIRE: Final = "from protocol import"
COMMAND: Final = "\n\n\ndef main("  # the library ends where the command begins


class BuildLibrary(build_py):
    """Writes the package where setuptools would copy a folder."""

    def run(self) -> None:
        folder = Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(library(Path("client.py").read_text()))
        shutil.copy("protocol.py", folder)
        (folder / "py.typed").touch()

    def get_source_files(self) -> list[str]:
        return ["client.py", "protocol.py", "counter/system/version.py"]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        folder = Path(self.build_lib, PACKAGE)
        return [str(folder / name) for name in ("__init__.py", "protocol.py", "py.typed")]

    def get_output_mapping(self) -> dict[str, str]:
        # What an editable installation asks for, and nothing else.
        raise SetupError("this cannot be installed editable; import client.py in the checkout")


def library(source: str) -> str:
    """The text of client.py as that of a package; SetupError if it is not what it is taken for."""
    for text in (WIRE, COMMAND):
        if source.count(text) != 1:
            raise SetupError(f"client.py has {text.strip()!r} {source.count(text)} times, not once")
    return source.partition(COMMAND)[0].replace(WIRE, WIRE.replace(" ", " .", 1)) + "\n"


setup(cmdclass={"build_py": BuildLibrary})
