"""How a record of settings is shown: to people as text, to programs as plain values.

Every place that prints settings prints these, so that an option is called and written alike in all
of them, and a password is hidden in all of them. Nothing here reads or writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from counter.options.declare import Settings
from counter.options.values import masked


class Shown(NamedTuple):
    """One option of a record; its text is masked and can be read as a value where it is set."""

    name: str  # of its field
    flag: str
    text: str
    is_set: bool


def shown(settings: Settings) -> list[Shown]:
    """Every option with its value, in the order of the record."""
    found = []
    for declared in fields(settings):
        value = getattr(settings, declared.name)
        is_set = value is not None and value != ()
        text = str(value).lower() if isinstance(value, bool) else masked(str(value))
        flag = declared.metadata["flag"]
        found.append(Shown(declared.name, flag, text if is_set else "not set", is_set))
    return found


def plain_values(settings: Settings) -> dict[str, Any]:
    """Every value by its field's name, as JSON has it: number, truth, null or else text."""
    names = [declared.name for declared in fields(settings)]
    return {name: _plain(getattr(settings, name)) for name in names}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def config_lines(settings: Settings, origins: Mapping[str, str]) -> list[str]:
    """Every value as a line that a config file takes, with its origin behind it.

    `origins` has, by the names of their fields, where those come from that are no defaults.
    """
    lines = []
    for option in shown(settings):
        key, origin = option.flag.lstrip("-"), origins.get(option.name, "default")
        if option.is_set:
            lines.append(f"{key} = {_quoted(option.text)}  # {origin}")
        else:
            lines.append(f"# {key} is {option.text}  # {origin}")
    return [one_line(line) for line in lines]


def _quoted(text: str) -> str:
    """The text as a value of a config file, in quotes if it would be read otherwise without."""
    quote = "'" if '"' in text else '"'
    return text if re.fullmatch(r"[^\s#;'\"]+", text) else f"{quote}{text}{quote}"


def one_line(text: str) -> str:
    """The text with what does not print, line ends among it, as Python writes it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
