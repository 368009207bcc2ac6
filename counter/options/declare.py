"""How an option is declared, and what every record of settings has; no text is read here.

A field of a record is the whole declaration of an option: its flag, kebab alias, environment
variable, config file key, help, default and check are made from it. A record is frozen, knows its
program, and says which of its own values contradict each other; where they came from it does not
know.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

# The group of both programs' help that --config and its like stand in, beside fields.
RUNNING: Final = "running it"


def option(
    flag: str,
    group: str,
    description: str,
    *,
    default: Any = None,
    parse: Callable[[str], Any] = str,
    metavar: str = "N",
    shown_default: str = "",
    bare: Any = None,
) -> Any:
    """Declares one option of a settings record; `parse` turns its text into its value.

    `shown_default` is what help says where the default is not a constant; `bare` is the value of
    the flag alone, where it may stand without one.
    """
    return field(
        default=default,
        metadata={
            "flag": flag,
            "group": group,
            "description": description,
            "parse": parse,
            "metavar": metavar,
            "shown_default": shown_default or ("" if default in (None, False) else str(default)),
            "bare": True if default is False else bare,
        },
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a program was asked to do: the root of the records, whose fields are its options."""

    program: ClassVar[str]
    purpose: ClassVar[str]  # what help says first
    prefix: ClassVar[str]  # of the environment variables
    examples: ClassVar[str]  # what help ends with: command lines, each with what it does

    def conflict(self, on_command_line: Collection[str]) -> str | None:
        """Which values exclude or need each other and what to do; None where all can be done.

        `on_command_line` names the fields that the command line gave.
        """
        return None
