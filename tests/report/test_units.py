"""How times are written for people."""

from __future__ import annotations

import pytest

from counter.report.units import format_ns, format_s


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "0 ns"),
        (1, "1 ns"),
        (0.4, "0.4 ns"),
        (12.34, "12.3 ns"),
        (999.5, "1 us"),
        (999, "999 ns"),
        (1000, "1 us"),
        (1234, "1.23 us"),
        (12_345, "12.3 us"),
        (123_456, "123 us"),
        (999_499, "999 us"),
        (999_500, "1 ms"),
        (999_999, "1 ms"),
        (1_000_000, "1 ms"),
        (1_500_000, "1.5 ms"),
        (999_999_999, "1 s"),
        (1_000_000_000, "1 s"),
        (59_940_000_000, "59.9 s"),
        (123_000_000_000, "123 s"),
        (2_000_000_000_000, "2000 s"),
    ],
)
def test_a_time_has_three_digits_and_a_unit(time_ns: float, text: str) -> None:
    assert format_ns(time_ns) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.04, "0 s"), (1, "1 s"), (60.04, "60 s"), (60.06, "60.1 s"), (100, "100 s")],
)
def test_seconds_are_given_to_a_tenth(seconds: float, text: str) -> None:
    assert format_s(seconds) == text
