"""What pip installs: the client's library and the wire, as the package counter_client.

In a checkout the library is client.py beside the modules of its name and protocol.py, with the
command behind it. Applications have modules of such names themselves, so what is installed has one
name of its own: client.py up to its command is counter_client/__init__.py, and finds the others
beside it. The text is changed here, once: an import with two ways to go would have no types, or
find the application's module. pyproject.toml says everything else.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

PACKAGE: Final = "counter_client"
BESIDE: Final = {  # what of ours each module imports, once
    "client.py": ("client_line", "client_session", "client_session_line", "protocol"),
    "client_line.py": ("protocol",),
    "client_session.py": ("protocol",),
    "client_session_line.py": ("client_line", "client_session", "protocol"),
    "protocol.py": (),
}
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
        return [*BESIDE, "counter/system/version.py"]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        folder = Path(self.build_lib, PACKAGE)
        return [str(folder / name) for name in (*package(), "py.typed")]

    def get_output_mapping(self) -> dict[str, str]:
        # What an editable installation asks for, and nothing else.
        raise SetupError("this cannot be installed editable; import client.py in the checkout")


def package() -> dict[str, str]:
    """The modules of the package; SetupError if a source is not what it is taken for."""
    modules = {name: source(name, beside) for name, beside in BESIDE.items()}
    library, *command = modules.pop("client.py").split(COMMAND)
    if len(command) != 1:
        raise SetupError(f"client.py has {COMMAND.strip()!r} {len(command)} times, not once")
    return {"__init__.py": f"{library}\n", **modules}


def source(name: str, beside: Iterable[str]) -> str:
    """The text of a module that imports the others from the package that it is in."""
    text = Path(name).read_text()
    for module in beside:
        line = f"from {module} import"
        if text.count(line) != 1:
            raise SetupError(f"{name} has {line!r} {text.count(line)} times, not once")
        text = text.replace(line, f"from .{module} import")
    return text


setup(cmdclass={"build_py": BuildLibrary})
