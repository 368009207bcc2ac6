"""The total in memory: of one process, or shared by those forked from it.

A shared total is eight bytes that a killed process leaves whole: with the addition that it was
making, or without it. It ends with the last process that has it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any, Final

from counter.totals.counter import Counter
from protocol import TOTAL_MASK

_SEQ_CST: Final = 5  # __ATOMIC_SEQ_CST of the compilers' memory model: one order for everybody


class MemoryCounter(Counter):
    """The total of a single process, starting from `start`; it ends with the process.

    Indivisible between greenlets and loop callbacks, because nothing in add() switches; not
    between threads.
    """

    def __init__(self, start: int = 0) -> None:
        self._total = start

    def add(self, amount: int) -> int:
        before = self._total
        self._total = (before + amount) & TOTAL_MASK
        return before

    def close(self) -> None:
        """Nothing is held."""


class AtomicCounter(Counter):
    """The total in memory that every process forked afterwards shares, by one atomic instruction.

    Lock-free: a process that is killed at any instant leaves neither a lock nor half a total.
    Costs 0.3 us an addition; a lock of multiprocessing costs as much and stays taken when its
    holder is killed. OSError where libatomic is missing: LockedCounter is the way without it.
    """

    way: Final = "one atomic addition"

    def __init__(self, start: int = 0) -> None:
        import cffi

        ffi = cffi.FFI()
        ffi.cdef("""
            uint64_t __atomic_fetch_add_8(void *where, uint64_t amount, int order);
            bool __atomic_compare_exchange(size_t size, void *where, void *expected, void *desired,
                                           int order, int order_of_failure);
        """)
        self._library: Any = ffi.dlopen("libatomic.so.1")
        # By name as text: Python mangles a name with two underscores inside a class.
        self._fetch_add = getattr(self._library, "__atomic_fetch_add_8")
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._where = ffi.cast("void *", ffi.from_buffer(self._memory))
        self.words = memoryview(self._memory).cast("Q")[:2]  # the total, and the tag beside it
        self._exchange = getattr(self._library, "__atomic_compare_exchange")
        self._expected, self._desired = ffi.new("uint64_t[2]"), ffi.new("uint64_t[2]")
        self.address = int(ffi.cast("uintptr_t", self._where))  # for C that adds by itself
        self.add(start)

    def add(self, amount: int) -> int:
        return int(self._fetch_add(self._where, amount & TOTAL_MASK, _SEQ_CST))

    def compare_exchange(self, total: int, tag: int, new_total: int, new_tag: int) -> bool:
        """Swaps total and tag if they are what they were; whether they were.

        libatomic takes the instruction of 16 bytes where the processor has it (it looks for cx16 at
        its start, and the memory is aligned), and otherwise a lock of its own, which no other
        process knows: ledger.unavailable() says whether this is to be used.
        """
        self._expected[0], self._expected[1] = total, tag
        self._desired[0], self._desired[1] = new_total, new_tag
        return bool(
            self._exchange(16, self._where, self._expected, self._desired, _SEQ_CST, _SEQ_CST)
        )

    def close(self) -> None:
        """The memory lives as long as a process that shares it."""


class LockedCounter(Counter):
    """The same as AtomicCounter by a lock of the kernel's, for machines without libatomic.

    The kernel drops the lock of a process that is killed, and a total is written by one aligned
    store of eight bytes, so that a killed process leaves the total before or after its addition.
    Costs 2 us an addition.
    """

    way: Final = "a file lock, because libatomic is missing: slower"

    def __init__(self, start: int = 0) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._cell = memoryview(self._memory).cast("Q")
        self._lock = os.memfd_create("counter-lock")
        self._cell[0] = start

    def add(self, amount: int) -> int:
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            before = self._cell[0]
            self._cell[0] = (before + amount) & TOTAL_MASK
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)
        return before

    def close(self) -> None:
        os.close(self._lock)


def make_shared_counter(start: int = 0) -> AtomicCounter | LockedCounter:
    """A counter for every process forked from this one, by the best way this machine has."""
    try:
        return AtomicCounter(start)
    except (OSError, ImportError):
        return LockedCounter(start)
