"""How the values of options are written: numbers, durations, addresses, ranges, words.

Every reader turns text into a value or raises argparse.ArgumentTypeError with the text and what
would do; every value prints as it can be read. Nothing here knows which option it serves.
"""

from __future__ import annotations

import argparse
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Final
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

from protocol import MAX_AMOUNT, AddressError, format_address, parse_address

_DURATION: Final = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*(ms|s|m|h|)")
_MILLISECONDS: Final = {"ms": 1, "s": 1000, "": 1000, "m": 60_000, "h": 3_600_000}

_THRESHOLD: Final = re.compile(
    r"(rps|rate|errors|mean|max|p[0-9]{1,2}(?:\.[0-9]{1,6})?)(<=?|>=?)"
    r"([0-9]{1,18}(?:\.[0-9]{1,9})?)(ns|us|µs|ms|s|m|%|)"
)
_NANOSECONDS: Final = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 6 * 10**10}

# A year: the kernel's clocks take it, and whoever writes more has mistaken the unit.
LONGEST_S: Final = 365 * 24 * 3600

# What a rediss:// URL may say about certificates, in redis-py's words.
TLS_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS_PARAMETERS: Final = (*TLS_FILES, "ssl_cert_reqs")

_ON, _OFF = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class AmountRange:
    """The amounts that the load generator sends: uniform over low..high, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Threshold:
    """What a run has to keep to: `p99<5ms`. Times in nanoseconds, shares of 1 in `errors<0.1%`."""

    text: str
    measure: str  # rps, errors, mean, max or a percentile: p99.9
    sign: str  # < <= > >=
    limit: Decimal
    is_share: bool = False

    def __str__(self) -> str:
        return self.text


class Thresholds(tuple[Threshold, ...]):
    """Several thresholds; they print as they are read, with commas between them."""

    __slots__ = ()

    def __str__(self) -> str:
        return ",".join(map(str, self))


@dataclass(frozen=True)
class StoreAddress:
    """Where a total is kept. `kind` is memory, sqlite, redis or rediss."""

    text: str  # as it was written, password and all
    kind: str
    path: str = ""  # of SQLite's file
    url: str = ""  # of Redis, without the key
    key: str = ""

    def __str__(self) -> str:
        return masked(self.text)


@dataclass(frozen=True)
class Address:
    """Where a server is: a host name or IP address, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return format_address(self.host, self.port)


class Seconds(float):
    """A length of time in seconds that prints as it is written: 500ms, 5s, 2m; read back equal."""

    def __str__(self) -> str:
        for unit, seconds in (("h", 3600), ("m", 60), ("s", 1)):
            if self >= seconds and self % seconds == 0:
                return f"{int(self) // seconds}{unit}"
        return f"{self!r}s" if self > 1 else f"{(Decimal(repr(self)) * 1000).normalize():f}ms"


def parse_whole(minimum: int, maximum: int = MAX_AMOUNT) -> Callable[[str], int]:
    """A reader of whole numbers of minimum..maximum; `1,000` and `1_000` are 1000."""

    def parse(text: str) -> int:
        digits = text.strip().replace(",", "").replace("_", "")
        # Twenty digits are 2^64 and above; int() refuses thousands of them in words of its own.
        if not (re.fullmatch("[0-9]{1,20}", digits) and minimum <= int(digits) <= maximum):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number of {minimum} to {maximum}"
            )
        return int(digits)

    return parse


def parse_path(text: str) -> str:
    """The path of a file: any text but none, and none with something unseen at an end."""
    if not text:
        raise argparse.ArgumentTypeError("the file name is empty; name a file, or leave this out")
    for end, char in (("begins", text[0]), ("ends", text[-1])):
        # What was left there makes it another file than whoever reads it sees.
        if char.isspace() or unicodedata.category(char) in ("Cc", "Cf"):
            raise argparse.ArgumentTypeError(
                f"{text!r} {end} in a space or control character; write the file's name without it"
            )
    return text


def parse_host(text: str) -> str:
    """A host name or IP address to listen on."""
    if not text.strip():
        # To the system an empty host is every interface.
        raise argparse.ArgumentTypeError(
            "the host is empty; write 127.0.0.1 to serve this machine, 0.0.0.0 to serve others too"
        )
    return text


def parse_port(text: str) -> int:
    """A port, written `8080` or as Go has it, `:8080`."""
    if text.startswith("tcp://"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is what Kubernetes sets for a Service of this name, not a port; "
            "set enableServiceLinks: false in the pod, or name the Service otherwise"
        )
    return parse_whole(0, 65535)(text.strip().removeprefix(":"))


def parse_server_address(text: str) -> Address:
    """`HOST:PORT`, `:PORT` or `[IPv6]:PORT`."""
    try:
        address = Address(*parse_address(text))
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if address.port == 0:
        raise argparse.ArgumentTypeError(f"address {text!r}: port 0 cannot be connected to")
    return address


def parse_seconds(minimum_s: float) -> Callable[[str], Seconds]:
    """A reader of durations (`500ms`, `5s`, `2m`, `1h`, plain seconds) of `minimum_s` to a year."""

    def parse(text: str) -> Seconds:
        match = _DURATION.fullmatch(text.strip().lower())
        if match:
            # Decimal, here and in Seconds, so that what is printed is read back equal.
            seconds = Seconds(Decimal(match[1]) * _MILLISECONDS[match[2]] / 1000)
            if minimum_s <= seconds <= LONGEST_S:
                return seconds
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a duration of {Seconds(minimum_s)} to {Seconds(LONGEST_S)}; "
            "write 500ms, 5s, 2m, 1h or plain seconds"
        )

    return parse


def parse_rate(text: str) -> float:
    """Requests a second, of 0 to 100 million; a fraction is possible."""
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text.strip()) or float(text) > 1e8:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 to 100000000")
    return float(text)


def parse_amount_range(text: str) -> AmountRange:
    """A number, or `LOW-HIGH`."""
    whole = parse_whole(0)
    low, dash, high = text.partition("-")
    try:
        amount = AmountRange(whole(low), whole(high if dash else low))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of 0 to {MAX_AMOUNT}, nor two of them as LOW-HIGH"
        ) from None
    if amount.low > amount.high:
        raise argparse.ArgumentTypeError(f"{text!r}: the lower bound is above the upper one")
    return amount


def parse_thresholds(text: str) -> Thresholds:
    """One threshold, or several with commas between them; `p99<5ms,rps>50000`. Empty is none."""
    return Thresholds(_parse_threshold(part.strip()) for part in text.split(",") if text.strip())


def _parse_threshold(written: str) -> Threshold:
    text = re.sub(r"\s", "", written.lower())
    match = _THRESHOLD.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a threshold; write p99<5ms, mean<200us, max<1s, rps>50000, "
            "errors<=10 or errors<0.1%"
        )
    measure, sign, number, unit = match.groups()
    if measure in ("rps", "rate", "errors"):
        if unit not in (("", "%") if measure == "errors" else ("",)):
            raise argparse.ArgumentTypeError(f"threshold {text!r}: {measure} has no unit {unit!r}")
        measure = "errors" if measure == "errors" else "rps"
        share = unit == "%"
        limit = Decimal(number) / 100 if share else Decimal(number)
        return Threshold(text, measure, sign, limit, share)
    if unit not in _NANOSECONDS:
        raise argparse.ArgumentTypeError(f"threshold {text!r}: write the unit, ns, us, ms, s or m")
    return Threshold(text, measure, sign, Decimal(number) * _NANOSECONDS[unit])


def parse_store(text: str) -> StoreAddress:
    """`memory`, `sqlite:PATH`, `redis://…` or `rediss://…`; where the total is kept."""
    if text == "memory":
        return StoreAddress(text, "memory")
    kind, _, path = text.partition(":")
    if kind == "sqlite" and path.startswith(("//", "file:")):
        # As a path it is another file than the one that other programs find by it.
        raise argparse.ArgumentTypeError(
            f"{masked(text)!r} is a URL; write sqlite:PATH for a file below the present folder, "
            "sqlite:/PATH for one from the root"
        )
    if kind == "sqlite" and path not in ("", ":memory:"):
        return StoreAddress(text, kind, path=parse_path(path))
    if kind in ("redis", "rediss"):
        try:
            return _parse_redis(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{masked(text)!r}: {error}") from None
    raise argparse.ArgumentTypeError(
        f"{masked(text)!r} is not a store; write memory, sqlite:PATH or redis://HOST:PORT/0"
    )


def _parse_redis(text: str) -> StoreAddress:
    """A Redis URL; the key is a parameter of it. ValueError if it is none."""
    try:
        parts = urlsplit(text)
        has_place = parts.hostname and parts.port != 0
    except ValueError:  # its text may hold part of a password
        has_place = False
    if not has_place or re.search(r"\s", text):
        raise ValueError("write redis://HOST:PORT/0; a / in a password is %2F, a space %20")
    if parts.fragment:
        raise ValueError("a # in a password is %23")
    if not re.fullmatch("/?|/[0-9]{1,6}", parts.path):
        raise ValueError("behind the host stands the number of the database, as in /0")
    parameters = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    allowed = ("key", *(_TLS_PARAMETERS if parts.scheme == "rediss" else ()))
    for name, values in parameters.items():
        if name not in allowed:
            raise ValueError(f"unknown parameter {name!r}; there is {', '.join(allowed)}")
        if len(values) != 1 or not values[0]:
            raise ValueError(f"parameter {name!r} needs one value")
    key = parameters.pop("key", ["counter"])[0]
    if re.search("[{}]", key) and not re.fullmatch(r"[^{}]*\{[^{}]+\}[^{}]*", key):
        raise ValueError("braces in the key are a hash tag: one pair, with something in it")
    query = urlencode({name: values[0] for name, values in parameters.items()})
    return StoreAddress(text, parts.scheme, url=urlunsplit(parts._replace(query=query)), key=key)


def parse_choice(*choices: str) -> Callable[[str], str]:
    """A reader of one of a few words."""

    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}")
        return text.lower()

    return parse


def parse_switch(text: str) -> bool:
    """`true` or `false`, or another pair of such words."""
    return parse_choice(*_ON, *_OFF)(text) in _ON


def parse_proof(text: str) -> str:
    """`alone`, `shared` or `off`; a switch's words for on and off are `alone` and `off`."""
    word = parse_choice("alone", "shared", "off", *_ON, *_OFF)(text)
    return {**dict.fromkeys(_ON, "alone"), **dict.fromkeys(_OFF, "off")}.get(word, word)


def masked(text: str) -> str:
    """The text with the password of every URL in it, before its host or in its query, as `***`.

    A password that should have been escaped is hidden too, if need be with what stands behind it.
    """
    # At the beginning of a word, or a long one is looked through from each of its letters.
    text = re.sub(r"(?s)(\b\w+://[^/\s:@]*):((?!\s\w+://).)*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&]password=)[^&'\"]*", r"\1***", text)
