"""From declarations to one frozen record: command line, environment, config file, defaults.

Here text is parsed and the environment read, and nowhere else; which options there are is not
known here. Command line beats environment beats config file beats default. An unknown argument and
an unknown key of the config file are errors, and abbreviations are not accepted: a misspelt limit
must not be a missing limit. A variable of the environment that no option has is worth a warning and
no error, because container engines set variables of their own under any prefix; an empty one is
unset, because they set `NAME=` for what was not given. Every error names where its value came from.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, fields
from typing import Any, Final, NoReturn, TextIO, TypeVar

import configargparse
from configargparse import ConfigFileParserException

from counter.options.declare import RUNNING, Settings
from counter.options.shown import config_lines, one_line
from counter.options.values import masked, parse_path
from counter.system.exits import EXIT_USAGE
from counter.system.streams import write_error, write_result
from counter.system.version import VERSION

_ARGUMENTS: Final = "command line"

# What Kubernetes sets in a pod for each Service, after its name; other variables of a Service have
# values such as tcp://10.0.0.7:8080.
_OF_SERVICE: Final = re.compile(
    r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$"
)

# ConfigArgParse's own words, which quote Python's.
_NOT_OPENED: Final = re.compile(r"Unable to open config file: (.*)\. Error: (.*)", re.DOTALL)


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


class _ShowVersion(argparse.Action):
    """An option that writes the version to standard output and ends the program."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        _values: Any,
        _name: str | None = None,
    ) -> None:
        _show(parser.prog, f"counter {VERSION}\n")
        sys.exit(0)


S = TypeVar("S", bound=Settings)


def read_settings(
    record: type[S],
    arguments: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> S:
    """The settings of a command from its arguments, the environment and the config file.

    `arguments` and `environment` are the process's own unless given. Writes to standard output and
    exits 0 for --help, --version and --printConfig; exits 2 with one line on standard error for
    what cannot be read or contradicts itself.
    """
    env = _given(os.environ if environment is None else environment)
    args = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help", "--version"} & set(args):
        env = {}  # a bad value there would hide what helps to mend it
    parser = _make_parser(record)
    values, unknown = parser.parse_known_args(args, env_vars=env)
    if unknown:
        parser.refuse_unknown(unknown)
    settings = record(**{f.name: getattr(values, f.name) for f in fields(record)})
    if values.print_config:
        remarks = [f"# {remark}" for remark in _strangers(parser, record, env)]
        lines = [*config_lines(settings, parser.origins()), *remarks]
        _show(record.program, "\n".join(lines) + "\n")
        sys.exit(0)
    given = [name for name, origin in parser.origins().items() if origin == _ARGUMENTS]
    if conflict := settings.conflict(given):
        parser.refuse_conflict(conflict)
    return settings


def unknown_variables(
    record: type[Settings], environment: Mapping[str, str] | None = None
) -> list[str]:
    """A warning for each variable that has the program's prefix and is no option's, as when it is
    misspelt; `environment` is the process's own unless given."""
    env = _given(os.environ if environment is None else environment)
    return _strangers(_make_parser(record), record, env)


def _strangers(
    parser: _Parser, record: type[Settings], environment: Mapping[str, str]
) -> list[str]:
    variables = [getattr(action, "env_var", None) or "" for action in parser._actions]
    known = [variable.removeprefix(record.prefix) for variable in variables]
    found = []
    for variable, value in environment.items():
        name = variable.removeprefix(record.prefix)
        if name == variable or name in known:
            continue
        if not (_OF_SERVICE.search(f"_{name}") or re.match("(tcp|udp|sctp)://", value)):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {record.prefix}{near[0]}?" if near else "--help lists all"
            found.append(one_line(f"{variable} is no variable of {record.program}; {hint}"))
    return found


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that have a value, each without the line end that a file may have left on it.

    An env file from Windows leaves a carriage return on each, a secret made of a file its newline.
    """
    values = {name: value.rstrip("\r\n") for name, value in environment.items()}
    return {name: value for name, value in values.items() if value}


def _show(program: str, text: str) -> None:
    """Writes to standard output; exits 1 where it cannot, without a word where nobody reads on."""
    try:
        write_result(text)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            write_error(f"{program}: cannot write to standard output: {error.strerror}\n")
        sys.exit(1)


class _ConfigFile(configargparse.DefaultConfigFileParser):  # type: ignore[misc]
    """ConfigArgParse's format, line by line, so that an error has its line; less of it.

    No value is a list. What that would pass over or guess at is an error: sections, and a key with
    a value behind it and nothing between them.
    """

    def parse(self, stream: TextIO) -> dict[str, str]:
        """The text of each key; ConfigFileParserException, with the file's name, if it has none."""
        try:
            lines = stream.readlines()
        except OSError as error:
            why = f"cannot read config file {stream.name}: {error.strerror}"
            raise ConfigFileParserException(why) from None
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x}"
            why = f"config file {stream.name}: it is no text in UTF-8 ({byte} is not)"
            raise ConfigFileParserException(why) from None
        items: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            wanted = self._fault(line.strip())
            if not wanted:
                items.update(super().parse([line]))
            else:
                where = f"config file {stream.name}, line {number}"
                raise ConfigFileParserException(f"{where}: {wanted}")
        return items

    def _fault(self, line: str) -> str:
        """What is to be done about a line that cannot be taken, nothing if it can."""
        if "\0" in line:
            return "it holds a zero byte, which no value can have; write it without"
        if line.startswith(("[", "---")):
            return "there are no sections; write key = value alone"
        if re.match(r"[^\s:=;#]+\s+[^\s:=;#]", line):
            return "there is no = between key and value; write it as key = value"
        with suppress(ConfigFileParserException):
            if list not in map(type, super().parse([line]).values()):
                return ""
        return "write it as key = value, without a list"


def _open_config(path: str) -> TextIO:
    """Opens a config file; OSError, whose text is the reason alone."""
    try:
        return open(path, encoding="utf-8-sig")  # Windows' editors mark it
    except OSError as error:
        raise OSError(error.strerror) from None


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
        message = _NOT_OPENED.sub(r"cannot read config file \1: \2", message)
        for action in self._actions:
            beginnings = [f"argument {'/'.join(action.option_strings)}:"]
            if action.dest == "config":
                beginnings.append("cannot read config file ")
            origin = origins.get(action.dest, _ARGUMENTS)
            if message.startswith(tuple(beginnings)) and origin != _ARGUMENTS:
                message += f" (from {origin})"
        message = one_line(masked(message))
        write_error(f"{self.prog}: {message}; {self.prog} --help lists all options\n")
        sys.exit(EXIT_USAGE)

    def refuse_unknown(self, unknown: list[str]) -> NoReturn:
        """Names the file and the key, or the argument, that no option has, and the nearest one."""
        for source, settings in self.get_source_to_settings_dict().items():
            for key, (action, _) in settings.items():
                if action is None and source.startswith("config_file|"):
                    path = source.partition("|")[2]
                    self.error(f"config file {path}: unknown key {key!r}{self._nearest(key)}")
        self.error(f"unknown argument {unknown[0]}{self._nearest(unknown[0])}")

    def refuse_conflict(self, conflict: str) -> NoReturn:
        """Says what contradicts, and where those of the options came from that were not typed."""
        origins, hidden = self.origins(), []
        for flag in re.findall(r"--\w+", conflict):
            origin = origins.get(self._option_string_actions[flag].dest, _ARGUMENTS)
            if origin != _ARGUMENTS:
                hidden.append(f"{flag} is from {origin}")
        self.error(conflict + (f" ({', '.join(hidden)})" if hidden else ""))

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
        config_file_open_func=_open_config,
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
        type=parse_path,
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
    groups[RUNNING].add_argument(
        "--version", action=_ShowVersion, nargs=0, help="print the program's version, and end"
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
