"""How numbers are written for people: times with the unit that suits them, counts with their noun.

Pure, and of numbers alone: what is measured, judged or shown is not known here.
"""

from __future__ import annotations


def format_ns(time_ns: float) -> str:
    """A time with three digits and the unit that suits it."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if time_ns >= 0.9995 * size:  # of which three digits are a whole unit
            return f"{float(f'{time_ns / size:.3g}'):g} {unit}"  # :g writes no 2e+03
    return f"{time_ns:.3g} ns"


def count(number: int, noun: str) -> str:
    """The number and its noun: `1 process`, `40 connections`."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending * (number != 1)}"


def format_s(seconds: float) -> str:
    """Seconds to a tenth, without a zero behind the point."""
    return f"{seconds:.1f}".removesuffix(".0") + " s"
