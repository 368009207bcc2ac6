"""What every counter and store promises, as tests that each implementation passes unchanged.

A subclass says how a counter is made and nothing else; its tests are the ones inherited.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain
from typing import BinaryIO, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from counter.totals.counter import Counter

TOP = 2**64

# The test is the same function in every subclass, which is the point of a contract.
PROPERTY = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors]
)

_TOTAL = struct.Struct("=Q")


class CounterContract(ABC):
    """One exact uint64 total, whoever keeps it."""

    @abstractmethod
    def make_counter(self, start: int) -> Counter:
        """A new counter, with a total of its own that is `start`."""

    @contextmanager
    def open_fresh(self, start: int = 0) -> Iterator[Counter]:
        with closing(self.make_counter(start)) as counter:
            yield counter

    @pytest.mark.parametrize("start", [0, 1, 41, 2**32, 2**53 + 1, 2**63 - 1, 2**63, TOP - 1])
    def test_a_counter_begins_at_its_start(self, start: int) -> None:
        with self.open_fresh(start) as counter:
            assert counter.total() == start

    @pytest.mark.parametrize("amount", [0, 1, 123, 2**32, 2**53 + 1, 2**63, TOP - 1])
    def test_add_gives_the_total_before(self, amount: int) -> None:
        with self.open_fresh() as counter:
            assert counter.add(amount) == 0
            assert counter.add(1) == amount

    def test_additions_of_one_number_the_requests(self) -> None:
        with self.open_fresh() as counter:
            assert [counter.add(1) for _ in range(100)] == list(range(100))
            assert counter.total() == 100

    def test_asking_for_the_total_adds_nothing(self) -> None:
        with self.open_fresh(41) as counter:
            assert [counter.total() for _ in range(3)] == [41, 41, 41]
            assert counter.add(0) == 41
            assert counter.add(1) == 41

    def test_the_total_wraps_at_two_to_the_64(self) -> None:
        with self.open_fresh(TOP - 1) as counter:
            assert counter.add(1) == TOP - 1
            assert counter.add(2) == 0
            assert counter.total() == 2

    def test_adding_the_largest_amount_takes_one_away(self) -> None:
        with self.open_fresh(10) as counter:
            assert counter.add(TOP - 1) == 10
            assert counter.total() == 9

    @pytest.mark.parametrize("amount", [TOP, TOP + 5, 3 * TOP + 7, 4096 * (TOP - 1)])
    def test_the_sum_of_a_batch_is_taken_modulo_two_to_the_64(self, amount: int) -> None:
        with self.open_fresh(2) as counter:
            assert counter.add(amount) == 2
            assert counter.total() == (2 + amount) % TOP

    def test_two_counters_do_not_share_a_total(self) -> None:
        with self.open_fresh(5) as one, self.open_fresh(7) as other:
            one.add(100)
            assert (one.total(), other.total()) == (105, 7)

    @PROPERTY
    @given(
        start=st.integers(0, TOP - 1),
        amounts=st.lists(st.integers(0, 3) | st.integers(0, TOP - 1) | st.integers(0, TOP**2)),
    )
    def test_any_sequence_of_additions_is_that_of_plain_arithmetic(
        self, start: int, amounts: list[int]
    ) -> None:
        with self.open_fresh(start) as counter:
            expected = start
            for amount in amounts:
                assert counter.add(amount) == expected
                expected = (expected + amount) % TOP
            assert counter.total() == expected


# Python 3.12 warns of every fork beside a thread; another test's thread is no matter to a child
# that only adds and exits.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class SharedCounterContract(CounterContract):
    """One total that several processes add to at once."""

    @abstractmethod
    def share_counter(self, start: int) -> Callable[[], Counter]:
        """Makes a new total that is `start`, before any fork; each process opens it by the call."""

    def make_counter(self, start: int) -> Counter:
        return self.share_counter(start)()

    def test_additions_of_several_processes_number_all_requests(self) -> None:
        processes, each = 8, 500
        open_counter = self.share_counter(0)
        befores = add_in_children(open_counter, [[1] * each] * processes)
        assert sorted(chain(*befores)) == list(range(processes * each))
        with closing(open_counter()) as counter:
            assert counter.total() == processes * each

    def test_the_totals_of_each_process_rise(self) -> None:
        for befores in add_in_children(self.share_counter(0), [[1] * 500] * 4):
            assert befores == sorted(set(befores))

    def test_batches_of_several_processes_do_not_overlap(self) -> None:
        """Each addition covers before..before+amount; together they cover 0..sum once."""
        draw = random.Random(1)
        plans = [[draw.randrange(1, 2**40) for _ in range(300)] for _ in range(4)]
        end = 0
        pairs = zip(add_in_children(self.share_counter(0), plans), plans, strict=True)
        covered = [pair for befores, plan in pairs for pair in zip(befores, plan, strict=True)]
        for before, amount in sorted(covered):
            assert before == end
            end = before + amount

    def test_processes_that_wrap_the_total_give_no_total_twice(self) -> None:
        start = TOP - 700
        befores = add_in_children(self.share_counter(start), [[1] * 500] * 4)
        assert sorted((before - start) % TOP for before in chain(*befores)) == list(range(2000))

    def test_every_process_sees_what_another_added_before(self) -> None:
        open_counter = self.share_counter(3)
        with closing(open_counter()) as counter:
            for total in range(3, 9, 2):
                assert add_in_children(open_counter, [[1]]) == [[total]]
                assert counter.add(1) == total + 1

    def test_a_process_killed_while_it_adds_takes_no_answered_addition_with_it(self) -> None:
        open_counter = self.share_counter(0)
        child, answers = start_child(lambda: add_until_killed(open_counter))
        with answers:
            first = answers.read(100 * _TOTAL.size)
            os.kill(child, signal.SIGKILL)
            answered = first + answers.read()
        os.waitpid(child, 0)
        count = len(answered) // _TOTAL.size
        assert unpack_totals(answered[: count * _TOTAL.size]) == list(range(count))
        with closing(open_counter()) as counter:
            # The last addition may have been made and not been answered.
            assert counter.total() in (count, count + 1)
            assert counter.add(1) in (count, count + 1)


def add_in_children(open_counter: Callable[[], Counter], plans: list[list[int]]) -> list[list[int]]:
    """Forks one process for each plan, which adds its amounts; gives back each one's befores.

    All have opened the counter before the first of them adds.
    """
    ready_read, ready_write = os.pipe()
    gate_read, gate_write = os.pipe()

    def add_plan(plan: list[int]) -> Iterator[int]:
        with closing(open_counter()) as counter:
            os.write(ready_write, b"r")
            os.close(ready_write)
            os.close(gate_write)
            os.read(gate_read, 1)  # ends for all at once, when the parent closes its end
            befores = [counter.add(amount) for amount in plan]
        return iter(befores)

    children = [start_child(partial(add_plan, plan)) for plan in plans]
    os.close(ready_write)
    os.close(gate_read)
    with open(ready_read, "rb") as ready:
        opened = len(ready.read())
    os.close(gate_write)
    results = [finish_child(child, answers) for child, answers in children]
    assert opened == len(plans)
    return results


def add_until_killed(open_counter: Callable[[], Counter]) -> Iterator[int]:
    counter = open_counter()
    while True:
        yield counter.add(1)


def start_child(work: Callable[[], Iterator[int]]) -> tuple[int, BinaryIO]:
    """Forks a process that writes every total `work` gives as soon as it has it."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        write_totals_and_exit(work, write_end)
    os.close(write_end)
    return child, open(read_end, "rb")


def write_totals_and_exit(work: Callable[[], Iterator[int]], write_end: int) -> NoReturn:
    """Never returns into the test runner, of which the child is a copy."""
    status = 1
    try:
        for total in work():
            os.write(write_end, _TOTAL.pack(total))
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def finish_child(child: int, answers: BinaryIO) -> list[int]:
    """Reads what a child wrote until it ends, which must be well."""
    with answers:
        totals = unpack_totals(answers.read())
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "a child failed: see its standard error"
    return totals


def unpack_totals(data: bytes) -> list[int]:
    return [total for (total,) in _TOTAL.iter_unpack(data)]
