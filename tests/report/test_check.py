"""The check of the totals and the exit code over every kind of run."""

from __future__ import annotations

import pytest

from counter.options.values import parse_thresholds
from counter.proof.history import Verdict
from counter.report.check import check_totals, conclude, exit_code, first_of
from counter.report.thresholds import hold
from counter.results.result import CHECKABLE_SUM, PROCESS_DIED, Result
from kit.runs import minute_of_load, run_of

TOP = 2**64
HALF = CHECKABLE_SUM

CHECKS: dict[str, tuple[Result, str, str]] = {
    "nothing sent, nothing grown": (run_of(5, 5, 0), "ok", "exactly the 0 answered"),
    "exact": (run_of(0, 1000, 1000), "ok", "exactly the 1,000 answered"),
    "exact from another total": (run_of(77, 1077, 1000), "ok", "exactly the 1,000 answered"),
    "others added too": (run_of(0, 1500, 1000), "ok", "500 more than answered: other clients"),
    "others added and nothing was sent": (run_of(3, 4, 0), "ok", "1 more than answered: other"),
    "all unknown were counted": (run_of(0, 1010, 1000, 10), "ok", "within the 10 unknown"),
    "some unknown were counted": (run_of(0, 1001, 1000, 10), "ok", "1 more than answered, within"),
    "no unknown was counted": (run_of(0, 1000, 1000, 10), "ok", "exactly the 1,000 answered"),
    "more than the unknown": (run_of(0, 1011, 1000, 10), "ok", "11 more than answered: other"),
    "grew by one less": (run_of(0, 999, 1000), "wrong", "grew by 999, less than the 1,000"),
    "did not grow": (run_of(5, 5, 1), "wrong", "grew by 0, less than the 1"),
    "unknown excuse no loss": (run_of(0, 999, 1000, 10), "wrong", "less than the 1,000"),
    "fell": (run_of(10, 9, 0), "wrong", "the total fell from 10 to 9"),
    "fell to nothing": (run_of(16_423_170, 0, 100), "wrong", "fell from 16,423,170 to 0"),
    "exact over the top": (run_of(TOP - 10, 990, 1000), "ok", "exactly the 1,000 answered"),
    "others added over the top": (run_of(TOP - 10, 991, 1000), "ok", "1 more than answered"),
    "less over the top": (run_of(TOP - 10, 989, 1000), "wrong", "grew by 999, less than"),
    "unknown over the top": (run_of(TOP - 1, 1000, 1000, 1), "ok", "within the 1 unknown"),
    "just checkable and exact": (run_of(0, HALF - 1, HALF - 1), "ok", "exactly"),
    "just checkable and less": (run_of(0, HALF - 2, HALF - 1), "wrong", "less than"),
    "beyond 2^63 and exact": (run_of(5, HALF + 5, HALF), "ok", "exactly"),
    "beyond 2^64 and exact": (run_of(7, 8, TOP + 1), "ok", "exactly"),
    "beyond 2^63 and less": (run_of(0, HALF - 1, HALF), "not checked", "2^63"),
    "beyond 2^63 and more": (run_of(0, HALF + 1, HALF), "not checked", "2^63"),
    "beyond 2^63 with the unknown": (run_of(0, 5, 6, HALF), "not checked", "2^63"),
    "beyond 2^63 with the unknown, and exact": (run_of(0, 6, 6, HALF), "ok", "exactly"),
    "rises not checked": (run_of(0, 5, 6, rises_checked=False), "not checked", "2^63"),
    "rises not checked, and exact": (run_of(0, 6, 6, rises_checked=False), "ok", "exactly"),
    "no total before": (run_of(None, 1000, 1000), "not checked", "could not be read"),
    "no total after": (run_of(0, None, 1000), "not checked", "could not be read"),
    "no totals": (run_of(None, None, 1000), "not checked", "could not be read"),
}


@pytest.mark.parametrize(("result", "word", "reason"), CHECKS.values(), ids=CHECKS)
def test_totals_are_judged(result: Result, word: str, reason: str) -> None:
    check = check_totals(result)
    assert check.word == word
    assert reason in check.reason


@pytest.mark.parametrize(("before", "after"), [(0, 1000), (0, 2000), (None, None)])
def test_an_impossible_total_is_wrong_whatever_the_sum(
    before: int | None, after: int | None
) -> None:
    result = run_of(before, after, 1000)
    result.wrong = 1234
    result.wrong_examples = ["connection 7 got 5 after 9", "another"]
    check = check_totals(result)
    assert check.word == "wrong"
    assert check.reason == "1,234 impossible totals: connection 7 got 5 after 9"


def test_impossible_totals_need_no_example() -> None:
    assert check_totals(Result(wrong=3)).reason == "3 impossible totals"


# The exit code


@pytest.mark.parametrize(
    ("total_after", "errors", "unknown", "interrupted", "code"),
    [
        (10, 0, 0, False, 0),
        (15, 0, 0, False, 0),
        (9, 0, 0, False, 4),
        (9, 1, 1, False, 4),
        (9, 1, 1, True, 4),
        (9, 0, 0, True, 4),
        (10, 1, 0, False, 5),
        (10, 0, 1, False, 5),
        (10, 1, 1, False, 5),
        (None, 1, 0, False, 5),
        (None, 0, 0, False, 0),
        (10, 0, 0, True, 130),
        (None, 0, 0, True, 130),
        (10, 1, 0, True, 5),
        (10, 0, 1, True, 5),
    ],
)
def test_the_exit_code_is_the_first_that_applies(
    total_after: int | None, errors: int, unknown: int, interrupted: bool, code: int
) -> None:
    result = run_of(0, total_after, 10)
    result.unknown, result.interrupted = unknown, interrupted
    for _ in range(errors):
        result.count_error("reset")
    assert exit_code(result) == code


@pytest.mark.parametrize(
    ("total_after", "unknown", "interrupted", "code"),
    [(10, 0, False, 99), (10, 0, True, 99), (10, 1, False, 99), (9, 0, False, 4), (9, 1, True, 4)],
)
def test_a_breached_threshold_is_exit_99_unless_something_worse_happened(
    total_after: int, unknown: int, interrupted: bool, code: int
) -> None:
    result = run_of(0, total_after, 10)
    result.unknown, result.interrupted = unknown, interrupted
    breached = hold(result, parse_thresholds("errors<=100,p99<5ms"))
    assert exit_code(result, breached) == code


@pytest.mark.parametrize(
    ("limits", "code"),
    [("errors<3", 0), ("errors<2", 99), ("errors<3,p99<5ms", 99), ("rps>=0,p99<5ms", 5), ("", 5)],
)
def test_a_threshold_for_errors_decides_about_them(limits: str, code: int) -> None:
    result = run_of(0, 10, 10, unknown_sum=1)
    result.unknown, result.errors = 1, {"timeout": 2}
    assert exit_code(result, hold(result, parse_thresholds(limits))) == code


def test_a_load_process_that_died_is_exit_5_whatever_the_threshold() -> None:
    result = run_of(0, 10, 10)
    result.count_error(PROCESS_DIED)
    assert exit_code(result, hold(result, parse_thresholds("errors<3"))) == 5


def test_what_a_second_interrupt_did_not_wait_for_is_no_error() -> None:
    result = Result(unknown=3, interrupted=True, cut=True)
    assert exit_code(result) == 130
    result.count_error("timeout")
    assert exit_code(result) == 5


@pytest.mark.parametrize(
    ("before", "after", "wrong"), [(0, 5, 0), (50, 5, 0), (0, 5, 1)], ids=["less", "fell", "wrong"]
)
def test_a_total_that_went_down_with_connections_lost_asks_for_a_restart(
    before: int, after: int, wrong: int
) -> None:
    result = run_of(before, after, 10)
    result.wrong = wrong
    assert not check_totals(result).reason.endswith("?")
    result.count_error("connection closed")
    assert check_totals(result).word == "wrong"
    assert check_totals(result).reason.endswith("; was the server restarted?")


def test_an_impossible_total_does_not_ask_for_a_restart_where_the_sum_is_right() -> None:
    result = run_of(0, 10, 10)
    result.wrong, result.errors = 1, {"timeout": 1}
    assert check_totals(result).reason == "1 impossible totals"


def test_thresholds_that_hold_change_no_exit_code() -> None:
    result = run_of(0, 10, 10)
    assert exit_code(result, hold(result, parse_thresholds("errors<1"))) == 0
    result.interrupted = True
    assert exit_code(result, hold(result, parse_thresholds("errors<1"))) == 130


def test_of_several_exit_codes_the_first_that_applies_is_taken() -> None:
    assert first_of(5, 4) == first_of(4, 5) == 4
    assert (first_of(99, 5), first_of(130, 5), first_of(0, 5), first_of(0, 130)) == (5, 5, 5, 130)


@pytest.mark.parametrize(
    ("word", "code"), [("proved", 0), ("explained", 0), ("undecided", 0), ("impossible", 4)]
)
def test_only_an_impossible_run_changes_the_exit_code(word: str, code: int) -> None:
    result = run_of(0, 10, 10)
    result.proof = Verdict(word, "because")
    assert exit_code(result) == code
    result.count_error("reset")
    assert exit_code(result) == (code or 5)


def make_result() -> Result:
    """A minute of load without a fault."""
    result = minute_of_load()
    result.errors, result.unknown, result.unknown_sum = {}, 0, 0
    return result


def concluded(result: Result, thresholds: str = "") -> tuple[str, str]:
    conclusion = conclude(result, hold(result, parse_thresholds(thresholds)))
    return conclusion.word, "; ".join(conclusion.reasons)


def test_a_conclusion_claims_no_more_than_was_checked() -> None:
    good = make_result()
    assert concluded(good)[0] == "PASS"
    assert "no errors" in concluded(good)[1]
    assert concluded(good, "rps>1,max<1m") == ("PASS", f"{concluded(good)[1]}; 2 thresholds kept")
    assert concluded(Result())[0] == "NOTHING MEASURED"
    unread = make_result()
    unread.total_after = None
    assert concluded(unread)[0] == "NOT CHECKED"
    undecided = make_result()
    undecided.proof = Verdict("undecided", "too many")
    assert concluded(undecided) == ("NOT PROVED", "too many")
    stopped = make_result()
    stopped.interrupted = True
    assert concluded(stopped)[0] == "INTERRUPTED"


def test_a_failure_names_everything_that_failed() -> None:
    result = make_result()
    result.count_error("timeout")
    word, why = concluded(result, "rps>999999999,max<1ns")
    assert word == "FAIL"
    assert why == "timeout: 1; rps>999999999 is breached; max<1ns is breached"
    assert concluded(result, "errors<2")[0] == "PASS"
    result.proof = Verdict("impossible", "a total was told twice")
    assert "impossible: a total was told twice" in concluded(result)[1]
