"""The counters in memory, held to the contract of all counters."""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Callable
from typing import NoReturn

import cffi
import pytest

from counter.totals.counter import Counter
from counter.totals.memory import (
    AtomicCounter,
    LockedCounter,
    MemoryCounter,
    make_shared_counter,
)
from kit.counter_contract import CounterContract, SharedCounterContract


class TestMemoryCounter(CounterContract):
    def make_counter(self, start: int) -> Counter:
        return MemoryCounter(start)


class TestAtomicCounter(SharedCounterContract):
    def share_counter(self, start: int) -> Callable[[], Counter]:
        counter = AtomicCounter(start)
        return lambda: counter


class TestLockedCounter(SharedCounterContract):
    """Its lock is a process's: it tells processes apart, which the contract forks, not threads."""

    def share_counter(self, start: int) -> Callable[[], Counter]:
        counter = LockedCounter(start)
        return lambda: counter


def test_a_shared_counter_is_an_atomic_one() -> None:
    counter = make_shared_counter(5)
    assert isinstance(counter, AtomicCounter)
    assert counter.total() == 5


def test_without_libatomic_a_shared_counter_is_a_locked_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(ffi: cffi.FFI, name: str) -> NoReturn:
        raise OSError(f"cannot load library '{name}'")

    monkeypatch.setattr(cffi.FFI, "dlopen", fail)
    check_that_a_shared_counter_is_a_locked_one()


def test_without_cffi_a_shared_counter_is_a_locked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cffi", None)
    check_that_a_shared_counter_is_a_locked_one()


def check_that_a_shared_counter_is_a_locked_one() -> None:
    counter = make_shared_counter(5)
    assert isinstance(counter, LockedCounter)
    assert (counter.add(1), counter.total()) == (5, 6)
    counter.close()


def test_a_memory_counter_starts_from_nothing() -> None:
    assert MemoryCounter().total() == 0


def test_closing_a_memory_counter_leaves_its_total() -> None:
    counter = MemoryCounter(5)
    counter.close()
    assert counter.total() == 5


class OfEachProcess(SharedCounterContract):
    """Opens the total of a single process in every process: it is not shared."""

    def share_counter(self, start: int) -> Callable[[], Counter]:
        return lambda: MemoryCounter(start)


class Forgetful(SharedCounterContract):
    """Keeps the total in shared memory and is a step behind: every second addition is lost."""

    def share_counter(self, start: int) -> Callable[[], Counter]:
        memory = mmap.mmap(-1, 8)
        struct.pack_into("=Q", memory, 0, start)
        return lambda: ForgetfulCounter(memory)


class ForgetfulCounter(Counter):
    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.calls = 0

    def add(self, amount: int) -> int:
        self.calls += 1
        (before,) = struct.unpack_from("=Q", self.memory)
        if self.calls % 2:
            struct.pack_into("=Q", self.memory, 0, (before + amount) % 2**64)
        return int(before)

    def close(self) -> None:
        """The memory is the test's."""


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "check",
    [
        SharedCounterContract.test_additions_of_several_processes_number_all_requests,
        SharedCounterContract.test_batches_of_several_processes_do_not_overlap,
        SharedCounterContract.test_processes_that_wrap_the_total_give_no_total_twice,
        SharedCounterContract.test_every_process_sees_what_another_added_before,
        SharedCounterContract.test_a_process_killed_while_it_adds_takes_no_answered_addition_with_it,
    ],
)
def test_the_contract_refuses_a_total_that_is_not_shared(
    check: Callable[[SharedCounterContract], None],
) -> None:
    with pytest.raises(AssertionError):
        check(OfEachProcess())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "check",
    [
        CounterContract.test_additions_of_one_number_the_requests,
        CounterContract.test_the_total_wraps_at_two_to_the_64,
        SharedCounterContract.test_the_totals_of_each_process_rise,
    ],
)
def test_the_contract_refuses_a_total_that_loses_additions(
    check: Callable[[SharedCounterContract], None],
) -> None:
    with pytest.raises(AssertionError):
        check(Forgetful())
