"""What `python client.py` can be asked to do: its options, and which of them contradict."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Final

from counter.options.declare import RUNNING, Settings, option
from counter.options.values import (
    Address,
    AmountRange,
    Seconds,
    Thresholds,
    parse_amount_range,
    parse_choice,
    parse_path,
    parse_proof,
    parse_rate,
    parse_seconds,
    parse_server_address,
    parse_switch,
    parse_thresholds,
    parse_whole,
)

_TARGET, _TLS, _LOAD = "the server", "encryption", "the load"
_ONCE, _REPORT = "one request, for shells", "the report"

# Of a run that nothing bounds: a minute, in which the machine's own ups and downs show as well.
_DEFAULT_DURATION: Final = Seconds(60)


@dataclass(frozen=True, kw_only=True)
class ClientSettings(Settings):
    """What `python client.py` was asked to do."""

    program = "client.py"
    purpose = "Load a counter server, or ask it once."
    prefix = "COUNTER_CLIENT_"
    examples = """examples:
  python client.py                                  load 127.0.0.1:8080 for one minute
  python client.py --serverAddress :9000 --duration 10s --connections 400
  python client.py --pipeline 16 --amount 1-1000 --json result.json
  python client.py --duration 10s --verify          prove that every total was right
  python client.py --html run.html --threshold 'p99<5ms' --threshold 'rps>50000'
  python client.py --add 5                          add 5, print the total
  python client.py --add 5 --sessionFile job-17     the same, once however often it is run
  python client.py --read                           print the total
"""

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
        "--tlsCA",
        _TLS,
        "trust these authorities instead of the system's",
        parse=parse_path,
        metavar="FILE",
    )
    tls_cert: str | None = option(
        "--tlsCert",
        _TLS,
        "the client's own certificate, for mutual TLS",
        parse=parse_path,
        metavar="FILE",
    )
    tls_key: str | None = option(
        "--tlsKey", _TLS, "its private key, without a passphrase", parse=parse_path, metavar="FILE"
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
        shown_default=f"{_DEFAULT_DURATION}, or no limit with --requests",
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
    amount: AmountRange = option(
        "--amount",
        _LOAD,
        "amount of each addition: a number, or LOW-HIGH drawn uniformly",
        default=AmountRange(1, 1),
        parse=parse_amount_range,
        metavar="AMOUNT",
    )
    processes: int | None = option(
        "--processes",
        _LOAD,
        "processes that share the connections",
        parse=parse_whole(1, 1024),
        shown_default="one per whole CPU",
    )
    engine: str = option(
        "--engine",
        _LOAD,
        "what receives and sends: compiled (C), plain (Python), or auto, the first that is there; "
        "TLS, --rate and amounts that are drawn take the plain one in any case",
        default="auto",
        parse=parse_choice("auto", "compiled", "plain"),
        metavar="ENGINE",
    )
    add: int | None = option("--add", _ONCE, "add N once and print the total", parse=parse_whole(0))
    session_file: str | None = option(
        "--sessionFile",
        _ONCE,
        "with --add: this file is the one addition, which the same command after any failure, or "
        "after none, counts once; a new addition is a new file",
        parse=parse_path,
        metavar="FILE",
    )
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
        parse=parse_path,
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
        parse=parse_path,
        metavar="FILE",
    )
    hgrm: str | None = option(
        "--hgrm",
        _REPORT,
        "write the percentiles in milliseconds as HdrHistogram does, for its plotter",
        parse=parse_path,
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
        RUNNING,
        "debug, info, warning or error; the log goes to standard error",
        default="info",
        parse=parse_choice("debug", "info", "warning", "error"),
        metavar="LEVEL",
    )
    log_format: str = option(
        "--logFormat",
        RUNNING,
        "text or json",
        default="text",
        parse=parse_choice("text", "json"),
        metavar="FORMAT",
    )

    @property
    def planned_duration_s(self) -> float | None:
        """How long the measured part is to last, None where the requests alone bound it."""
        if self.duration_s is None and self.requests is None:
            return _DEFAULT_DURATION
        return self.duration_s

    def conflict(self, on_command_line: Collection[str]) -> str | None:
        """As Settings has it."""
        if self.read and self.add is not None:
            return "--add and --read exclude each other; give one of them"
        if self.session_file is not None and self.add is None:
            return "--sessionFile needs --add; the file is one addition"
        if self.tls_key and not self.tls_cert:
            return "--tlsKey needs --tlsCert"
        if self.read or self.add is not None:
            return self._load_of_nothing(on_command_line)
        return None

    def _load_of_nothing(self, on_command_line: Collection[str]) -> str | None:
        """Which option is of a load or its report, None where the command line has none of these.

        What the environment or a file says for every load is left alone.
        """
        for declared in fields(self):
            given = getattr(self, declared.name) != declared.default
            is_of_load = declared.metadata["group"] in (_LOAD, _REPORT)
            if is_of_load and given and declared.name in on_command_line:
                return f"{declared.metadata['flag']} needs a load; --add and --read make none"
        return None

    def wants_tls(self) -> bool:
        """Whether connections are encrypted."""
        return bool(self.tls or self.tls_ca or self.tls_cert)
