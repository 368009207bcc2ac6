"""From declarations to one frozen record: command line, environment, config file, defaults.

Here text is parsed and the environment read, and nowhere else; which options there are is not
known here. Command line beats environment beats config file beats default. An unknown argument and
an unknown key of the config file are errors, and abbreviations are not accepted: a misspelt limit
must not be a missing limit. Variables of the environment that no option has are not looked at,
because container engines set variables of their own under any prefix.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import Field, fields
from functools import partial
from typing import Any, Final, NoReturn, TextIO, TypeVar

import configargparse
from configargparse import ConfigFileParserException

from counter.options.declare import RUNNING, Settings
from counter.options.shown import config_lines, one_line
from counter.options.values import masked

EXIT_USAGE: Final = 2

_ARGUMENTS: Final = "command line"


class _Collect(argparse.Action):
    """An option that may be given several times: what each says is put behind the last."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        _name: str | None = None,
    ) -> None:
        so_far = getattr(namespace, self.dest)
        setattr(namespace, self.dest, type(so_far)((*so_far, *values)))


S = TypeVar("S", bound=Settings)


def read_settings(
    record: type[S],
    arguments: Sequence[str] | None = None,
    environment: dict[str, str] | None = None,
) -> S:
    """The settings of a command from its arguments, the environment and the config file.

    `arguments` and `environment` are the process's own unless given. Writes to standard output and
    exits 0 for --help and --printConfig; exits 2 with one line on standard error for whatever
    cannot be read.
    """
    env = dict(os.environ) if environment is None else environment
    args = list(sys.argv[1:] if arguments is None else arguments)
    parser = _make_parser(record)
    values, unknown = parser.parse_known_args(args, env_vars=env)
    if unknown:
        parser.refuse_unknown(unknown)
    settings = record(**{f.name: getattr(values, f.name) for f in fields(record)})
    if values.print_config:
        _show(record.program, "\n".join(config_lines(settings, parser.origins())) + "\n")
        sys.exit(0)
    given = [name for name, origin in parser.origins().items() if origin == _ARGUMENTS]
    if conflict := settings.conflict(given):
        parser.error(conflict)
    return settings


def _show(program: str, text: str) -> None:
    """Writes to standard output; exits 1 where it cannot, without a word where nobody reads on."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # Otherwise the interpreter tries once more at its end, and prints a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"{program}: cannot write to standard output: {error.strerror}\n")
        sys.exit(1)


class _ConfigFile(configargparse.DefaultConfigFileParser):  # type: ignore[misc]
    """ConfigArgParse's format, line by line, so that an error has its line; no value is a list."""

    def parse(self, stream: TextIO) -> dict[str, str]:
        """The text of each key; ConfigFileParserException, with the file's name, if it has none."""
        try:
            lines = stream.readlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigFileParserException(f"config file {stream.name}: {error}") from None
        items: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            with suppress(ConfigFileParserException):
                item = super().parse([line])
                if list not in map(type, item.values()):
                    items.update(item)
                    continue
            raise ConfigFileParserException(
                f"config file {stream.name}, line {number}: write it as key = value, without a list"
            )
        return items


class _Parser(configargparse.ArgumentParser):  # type: ignore[misc]
    """ConfigArgParse, with errors of one line that say where a bad value came from."""

    def print_help(self, file: TextIO | None = None) -> None:
        """Writes what --help shows; ends the program where it cannot."""
        if file is not None:
            super().print_help(file)
        else:
            _show(self.prog, self.format_help())

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        origins = self.origins()
        for action in self._actions:
            name, origin = "/".join(action.option_strings), origins.get(action.dest, _ARGUMENTS)
            if message.startswith(f"argument {name}:") and origin != _ARGUMENTS:
                message += f" (from {origin})"
        message = one_line(masked(message))
        sys.stderr.write(f"{self.prog}: {message}; {self.prog} --help lists all options\n")
        sys.exit(EXIT_USAGE)

    def refuse_unknown(self, unknown: list[str]) -> NoReturn:
        """Names the file and the key, or the argument, that no option has, and the nearest one."""
        for source, settings in self.get_source_to_settings_dict().items():
            for key, (action, _) in settings.items():
                if action is None and source.startswith("config_file|"):
                    path = source.partition("|")[2]
                    self.error(f"config file {path}: unknown key {key!r}{self._nearest(key)}")
        self.error(f"unknown argument {unknown[0]}{self._nearest(unknown[0])}")

    def origins(self) -> dict[str, str]:
        """Where each value that is not a default was read, by the name of its field."""
        origins: dict[str, str] = {}
        for source, found in self.get_source_to_settings_dict().items():
            kind, _, path = source.partition("|")
            for key, (action, value) in found.items():
                if kind == "environment_variables":
                    origins[action.dest] = f"environment {key}"
                elif kind == "config_file" and action is not None:
                    origins[action.dest] = f"file {path}"
                elif kind == "command_line":
                    given = {argument.partition("=")[0] for argument in value}
                    for act in self._actions:
                        if given & set(act.option_strings):
                            origins[act.dest] = _ARGUMENTS
        return origins

    def _nearest(self, name: str) -> str:
        known = [text.lstrip("-") for action in self._actions for text in action.option_strings]
        near = difflib.get_close_matches(name.lstrip("-").partition("=")[0], known, n=1)
        return f", did you mean {near[0]}?" if near else ""


def _make_parser(record: type[Settings]) -> _Parser:
    parser = _Parser(
        prog=record.program,
        description=record.purpose,
        epilog=record.examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        config_file_parser_class=_ConfigFile,
        config_file_open_func=partial(open, encoding="utf-8"),
        add_config_file_help=False,
        add_env_var_help=True,
    )
    groups: dict[str, Any] = {}
    for declared in fields(record):
        name = declared.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        _add_option(groups[name], declared, record.prefix)
    groups[RUNNING].add_argument(
        "--config",
        is_config_file_arg=True,
        metavar="FILE",
        env_var=record.prefix + "CONFIG",
        help="read options from a file of `key = value` lines; keys are the flags without dashes",
    )
    groups[RUNNING].add_argument(
        "--printConfig",
        "--print-config",
        dest="print_config",
        action="store_true",
        help="print every value and where it came from, and end",
    )
    return parser


def _add_option(group: Any, declared: Field[Any], prefix: str) -> None:
    """Makes a flag, its kebab alias and its environment variable of a field."""
    meta = declared.metadata
    kebab = re.sub(r"([A-Z]+)", r"-\1", meta["flag"]).lower()
    names = [meta["flag"]] if kebab == meta["flag"] else [meta["flag"], kebab]
    shown = f" (default: {meta['shown_default']})" if meta["shown_default"] else ""
    extra: dict[str, Any] = {}
    if meta["bare"] is not None:
        extra = {"nargs": "?", "const": meta["bare"]}
    elif isinstance(declared.default, tuple):
        extra = {"action": _Collect}
    group.add_argument(
        *names,
        dest=declared.name,
        default=declared.default,
        type=meta["parse"],
        metavar=meta["metavar"],
        help=(meta["description"] + shown).replace("%", "%%"),
        env_var=prefix + kebab.lstrip("-").replace("-", "_").upper(),
        **extra,
    )
