"""The options of both commands: one declaration each, read here and nowhere else.

A field of ServerSettings or ClientSettings is the whole declaration of an option: its flag, kebab
alias, environment variable, config file key, help, default and check are made from it. What leaves
this module is one frozen record; nothing else parses text or reads the environment.

Command line beats environment beats config file beats default. An unknown argument and an unknown
key of the config file are errors, and abbreviations are not accepted: a misspelt limit must not be
a missing limit. Variables of the environment that no option has are not looked at, because
container engines set variables of their own under any prefix.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Final, NoReturn, TextIO, TypeVar

import configargparse
from configargparse import ConfigFileParserException

from counter.options.values import (
    Address,
    Amounts,
    Seconds,
    StoreAddress,
    Thresholds,
    masked,
    parse_amounts,
    parse_choice,
    parse_host,
    parse_port,
    parse_proof,
    parse_rate,
    parse_seconds,
    parse_server_address,
    parse_store,
    parse_switch,
    parse_thresholds,
    parse_whole,
)
from counter.system.limits import whole_share
from protocol import MAX_AMOUNT

EXIT_USAGE: Final = 2


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


_LISTEN, _SIZE, _COUNT, _TIME = "where to listen", "how much at once", "counting", "deadlines"
_LOAD, _TARGET, _REPORT = "the load", "the server", "the report"
_TLS = "encryption"
_ONCE, _RUN = "one request, for shells", "running it"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What `python server.py` was asked to do."""

    host: str = option(
        "--host",
        _LISTEN,
        "interface to listen on; 0.0.0.0 serves other machines",
        default="127.0.0.1",
        parse=parse_host,
        metavar="HOST",
    )
    port: int = option(
        "--port",
        _LISTEN,
        "port, also written :8080; 0 takes a free one",
        default=8080,
        parse=parse_port,
        metavar="PORT",
    )
    backlog: int = option(
        "--backlog",
        _LISTEN,
        "connections that may wait for a worker (the kernel's net.core.somaxconn bounds it)",
        default=1024,
        parse=parse_whole(1, 2**31 - 1),
    )
    multiplier: int = option(
        "--multiplier",
        _SIZE,
        "workers per CPU: so many connections are served at once",
        default=20,
        parse=parse_whole(1, 1_000_000),
    )
    processes: int | None = option(
        "--processes",
        _SIZE,
        "serving processes that share the workers, under a master that replaces those that die; "
        "0 serves in this very process, without one",
        parse=parse_whole(0, 1024),
        shown_default="one per whole CPU",
    )
    store: StoreAddress = option(
        "--store",
        _COUNT,
        "where the total is kept: memory, sqlite:PATH, redis://HOST:PORT/0?key=counter or "
        "rediss://… (TLS)",
        default=StoreAddress("memory", "memory"),
        parse=parse_store,
        metavar="STORE",
    )
    set_total: int | None = option(
        "--setTotal",
        _COUNT,
        "start from this total; refused where the store holds one already",
        parse=parse_whole(0),
    )
    force: bool = option(
        "--force",
        _COUNT,
        "let --setTotal overwrite the store's total",
        default=False,
        parse=parse_switch,
        metavar="true|false",
    )
    max_increment: int = option(
        "--maxIncrement",
        _COUNT,
        "refuse larger amounts as a wrong checksum is refused",
        default=MAX_AMOUNT,
        parse=parse_whole(0),
    )
    frame_timeout_s: float = option(
        "--frameTimeout",
        _TIME,
        "from a frame's first byte to its last",
        default=Seconds(5),
        parse=parse_seconds(0.001),
        metavar="TIME",
    )
    idle_timeout_s: float = option(
        "--idleTimeout",
        _TIME,
        "while every worker is taken and connections wait, one that was idle for so long gives its "
        "worker up",
        default=Seconds(60),
        parse=parse_seconds(0.001),
        metavar="TIME",
    )
    write_timeout_s: float = option(
        "--writeTimeout",
        _TIME,
        "a peer that does not read its replies for so long is dropped",
        default=Seconds(30),
        parse=parse_seconds(0.001),
        metavar="TIME",
    )
    store_timeout_s: float = option(
        "--storeTimeout",
        _TIME,
        "frames wait so long for a store that is away, then their connections close unanswered",
        default=Seconds(30),
        parse=parse_seconds(0.001),
        metavar="TIME",
    )
    drain_timeout_s: float = option(
        "--drainTimeout",
        _TIME,
        "after SIGTERM or SIGINT, what is not finished by then is cut",
        default=Seconds(5),
        parse=parse_seconds(0),
        metavar="TIME",
    )
    admin_port: int | None = option(
        "--adminPort",
        _RUN,
        "serve health, metrics, the total and a page over HTTP on this port; 0 takes a free one",
        parse=parse_port,
        metavar="PORT",
        shown_default="off",
    )
    admin_host: str = option(
        "--adminHost",
        _RUN,
        "interface of the admin port; whoever reaches it can read, not change",
        default="127.0.0.1",
        parse=parse_host,
        metavar="HOST",
    )
    tls_cert: str | None = option(
        "--tlsCert",
        _TLS,
        "serve TLS with this certificate, and those between it and its authority, in PEM form; "
        "SIGHUP reads the files again",
        metavar="FILE",
    )
    tls_key: str | None = option(
        "--tlsKey", _TLS, "its private key, without a passphrase", metavar="FILE"
    )
    tls_client_ca: str | None = option(
        "--tlsClientCA",
        _TLS,
        "let in only clients whose certificate these authorities signed",
        metavar="FILE",
    )
    log_level: str = option(
        "--logLevel",
        _RUN,
        "debug, info, warning or error; the log goes to standard error",
        default="info",
        parse=parse_choice("debug", "info", "warning", "error"),
        metavar="LEVEL",
    )
    log_format: str = option(
        "--logFormat",
        _RUN,
        "text or json",
        default="text",
        parse=parse_choice("text", "json"),
        metavar="FORMAT",
    )

    def workers(self, cpus: float) -> int:
        """How many connections are served at once: ceil(CPUs × multiplier)."""
        return whole_share(cpus, self.multiplier)

    def process_count(self, cpus: float) -> int:
        """How many processes serve, 0 for this very one: never more than there are workers."""
        wanted = max(1, int(cpus)) if self.processes is None else self.processes
        return min(wanted, self.workers(cpus))


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """What `python client.py` was asked to do."""

    server_address: Address = option(
        "--serverAddress",
        _TARGET,
        "HOST:PORT, :PORT or [IPv6]:PORT",
        default=Address("127.0.0.1", 8080),
        parse=parse_server_address,
        metavar="ADDRESS",
    )
    timeout_s: float = option(
        "--timeout",
        _TARGET,
        "for connecting, and for each reply",
        default=Seconds(10),
        parse=parse_seconds(0.001),
        metavar="TIME",
    )
    tls: bool = option(
        "--tls",
        _TLS,
        "speak TLS and verify the server's name; any of the next three means it too",
        default=False,
        parse=parse_switch,
        metavar="true|false",
    )
    tls_ca: str | None = option(
        "--tlsCA", _TLS, "trust these authorities instead of the system's", metavar="FILE"
    )
    tls_cert: str | None = option(
        "--tlsCert", _TLS, "the client's own certificate, for mutual TLS", metavar="FILE"
    )
    tls_key: str | None = option(
        "--tlsKey", _TLS, "its private key, without a passphrase", metavar="FILE"
    )
    multiplier: int = option(
        "--multiplier",
        _LOAD,
        "connections per CPU",
        default=20,
        parse=parse_whole(1, 1_000_000),
    )
    connections: int | None = option(
        "--connections",
        _LOAD,
        "connections in all",
        parse=parse_whole(1, 1_000_000),
        shown_default="CPUs × multiplier",
    )
    duration_s: float | None = option(
        "--duration",
        _LOAD,
        "measured time",
        parse=parse_seconds(0.001),
        metavar="TIME",
        shown_default="1m, or no limit with --requests",
    )
    requests: int | None = option(
        "--requests",
        _LOAD,
        "measured requests; ends at whichever comes first",
        parse=parse_whole(1),
    )
    warmup_s: float = option(
        "--warmup",
        _LOAD,
        "before the measured part: sent and counted, left out of rates and latencies",
        default=Seconds(1),
        parse=parse_seconds(0),
        metavar="TIME",
    )
    pipeline: int = option(
        "--pipeline",
        _LOAD,
        "frames in flight per connection",
        default=1,
        parse=parse_whole(1, 65536),
    )
    rate: float = option(
        "--rate",
        _LOAD,
        "open loop: requests a second in all, latency counted from when each was due; "
        "0 sends as fast as replies come",
        default=0.0,
        parse=parse_rate,
    )
    amount: Amounts = option(
        "--amount",
        _LOAD,
        "amount of each addition: a number, or LOW-HIGH drawn uniformly",
        default=Amounts(1, 1),
        parse=parse_amounts,
        metavar="AMOUNT",
    )
    processes: int | None = option(
        "--processes",
        _LOAD,
        "processes that share the connections",
        parse=parse_whole(1, 1024),
        shown_default="one per whole CPU",
    )
    add: int | None = option("--add", _ONCE, "add N once and print the total", parse=parse_whole(0))
    read: bool = option(
        "--read",
        _ONCE,
        "print the total and end",
        default=False,
        parse=parse_switch,
        metavar="true|false",
    )
    json: str | None = option(
        "--json",
        _REPORT,
        "write the result as JSON; - is standard output, and the table goes to standard error",
        metavar="FILE",
    )
    verify: str = option(
        "--verify",
        _REPORT,
        "record every addition and prove the run exact; shared says that other clients add too",
        default="off",
        parse=parse_proof,
        metavar="alone|shared|off",
        bare="alone",
    )
    html: str | None = option(
        "--html",
        _REPORT,
        "write one page with charts of rate and latency, which needs nothing else to be looked at",
        metavar="FILE",
    )
    hgrm: str | None = option(
        "--hgrm",
        _REPORT,
        "write the percentiles in milliseconds as HdrHistogram does, for its plotter",
        metavar="FILE",
    )
    threshold: Thresholds = option(
        "--threshold",
        _REPORT,
        "what the run has to keep to, or the exit code is 99: p99<5ms, rps>50000, errors<0.1%, "
        "also mean, max and any percentile; repeatable, or with commas; with one for errors, those "
        "within it are exit code 0 instead of 5",
        default=Thresholds(),
        parse=parse_thresholds,
        metavar="LIMIT",
    )
    log_level: str = option(
        "--logLevel",
        _RUN,
        "debug, info, warning or error; the log goes to standard error",
        default="info",
        parse=parse_choice("debug", "info", "warning", "error"),
        metavar="LEVEL",
    )
    log_format: str = option(
        "--logFormat",
        _RUN,
        "text or json",
        default="text",
        parse=parse_choice("text", "json"),
        metavar="FORMAT",
    )

    @property
    def planned_s(self) -> float | None:
        """How long the measured part is to last, in seconds: a minute where nothing else ends it,
        None where only its number of requests does."""
        return 60.0 if self.duration_s is None and self.requests is None else self.duration_s

    def wants_tls(self) -> bool:
        """Whether connections are encrypted."""
        return bool(self.tls or self.tls_ca or self.tls_cert)


_EPILOGS: Final = {
    ServerSettings: """examples:
  python server.py                                  serve this machine on port 8080
  python server.py --port :9000 --multiplier 100    another port, five times the workers
  python server.py --host 0.0.0.0                   serve other machines as well
  python server.py --store sqlite:counter.db        the total survives a restart and a power cut
  python server.py --store redis://cache.example    share the total with other servers
  COUNTER_SERVER_PORT=9000 python server.py --printConfig
""",
    ClientSettings: """examples:
  python client.py                                  load 127.0.0.1:8080 for one minute
  python client.py --serverAddress :9000 --duration 10s --connections 400
  python client.py --pipeline 16 --amount 1-1000 --json result.json
  python client.py --duration 10s --verify          prove that every total was right
  python client.py --html run.html --threshold 'p99<5ms' --threshold 'rps>50000'
  python client.py --add 5                          add 5, print the total
  python client.py --read                           print the total
""",
}

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


S = TypeVar("S", ServerSettings, ClientSettings)


def read_settings(
    record: type[S],
    program: str,
    description: str,
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
    prefix = f"COUNTER_{program.removesuffix('.py').upper()}_"
    parser = _make_parser(record, program, description, prefix)
    values, unknown = parser.parse_known_args(args, env_vars=env)
    if unknown:
        parser.refuse_unknown(unknown)
    settings = record(**{f.name: getattr(values, f.name) for f in fields(record)})
    if values.print_config:
        _show(program, "\n".join(_config_lines(parser, settings)) + "\n")
        sys.exit(0)
    if isinstance(settings, ClientSettings) and (settings.read or settings.add is not None):
        parser.refuse_reports(settings)
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
        message = _one_line(masked(message))
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

    def refuse_reports(self, settings: ClientSettings) -> None:
        """Ends the program if the command line wants a report; --add and --read make none.

        What the environment or a file says for every load is left alone.
        """
        origins = self.origins()
        for declared in fields(settings):
            given = getattr(settings, declared.name) != declared.default
            is_report = declared.metadata["group"] == _REPORT
            if is_report and given and origins.get(declared.name) == _ARGUMENTS:
                self.error(f"{declared.metadata['flag']} needs a load; --add and --read make none")

    def _nearest(self, name: str) -> str:
        known = [text.lstrip("-") for action in self._actions for text in action.option_strings]
        near = difflib.get_close_matches(name.lstrip("-").partition("=")[0], known, n=1)
        return f", did you mean {near[0]}?" if near else ""


def _make_parser(record: type[S], program: str, description: str, prefix: str) -> _Parser:
    parser = _Parser(
        prog=program,
        description=description,
        epilog=_EPILOGS[record],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        config_file_parser_class=_ConfigFile,
        config_file_open_func=partial(open, encoding="utf-8"),
        add_config_file_help=False,
        add_env_var_help=True,
    )
    groups: dict[str, Any] = {}
    for declared in fields(record):
        meta = declared.metadata
        group = groups.setdefault(meta["group"], None) or parser.add_argument_group(meta["group"])
        groups[meta["group"]] = group
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
    running = groups[_RUN]
    running.add_argument(
        "--config",
        is_config_file_arg=True,
        metavar="FILE",
        env_var=prefix + "CONFIG",
        help="read options from a file of `key = value` lines; keys are the flags without dashes",
    )
    running.add_argument(
        "--printConfig",
        "--print-config",
        dest="print_config",
        action="store_true",
        help="print every value and where it came from, and end",
    )
    return parser


def _config_lines(parser: _Parser, settings: ServerSettings | ClientSettings) -> list[str]:
    """Every value as a line that a config file takes, with its origin behind it."""
    origins = parser.origins()
    lines = []
    for declared in fields(settings):
        key, value = declared.metadata["flag"].lstrip("-"), getattr(settings, declared.name)
        origin = origins.get(declared.name, "default")
        if value is None or value == ():
            lines.append(f"# {key} is not set  # {origin}")
        else:
            text = str(value).lower() if isinstance(value, bool) else _quoted(masked(str(value)))
            lines.append(f"{key} = {text}  # {origin}")
    return [_one_line(line) for line in lines]


def _quoted(text: str) -> str:
    """The text as a value of a config file, in quotes if it would be read otherwise without."""
    quote = "'" if '"' in text else '"'
    return text if re.fullmatch(r"[^\s#;'\"]+", text) else f"{quote}{text}{quote}"


def _one_line(text: str) -> str:
    """The text with what does not print, line ends among it, as Python writes it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
