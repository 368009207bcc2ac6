"""Adding what sessions ask to a total in memory, so that total and sessions agree whatever dies.

A crash must leave behind whether an addition was made, or nobody could tell a client that comes
back. Of reads, writes and fetch-and-add alone that cannot be had without waiting for others (Nahum,
Attiya, Ben-Baruch, Hendler: Recoverable and Detectable Fetch&Add, OPODIS 2021). So a tag stands
beside the total: the place of the process that made the last such addition, and that addition's
number. One instruction swaps the 16 bytes of both. Plain additions go on, on the total alone.

An addition, in steps that tests/totals/test_ledger.py explores by these names:

  number   its number is taken, one more than the last that was ever taken in this place
  journal  what is to change of each session is written down, then the number, which makes it valid
  read     the total is read, then the tag
  help     if the tag is another process's, its addition is noted to be done, in a cell of one's own
  before   the total that was read is written into the journal
  swap     total and tag are swapped if they are still what was read; if not, again from `read`
  record   the sessions are brought up to date, as the journal says
  clear    the journal is made void

Who dies is buried by the master, alone, before the place is taken again. A valid journal was made
if the tag has its number, or if somebody noted so: the tag is looked at first, since whoever
replaces a tag has made the note before. What was made is recorded once more, which changes nothing
that was done. Neither numbers nor notes are ever set back. All these words are stored one by one,
and others see the stores in the order in which they were made: so it is on x86-64, and nowhere else
is the swap used.
"""

from __future__ import annotations

import mmap
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from counter.totals.counter import Counter
from counter.totals.memory import AtomicCounter
from counter.totals.sessions import SessionTable
from protocol import TOTAL_MASK

Entry = tuple[int, int, int]
"""What a turn adds for a session: its slot, how many frames, and the turn's sum up to the last."""

PLACE_SHIFT: Final = 56
NUMBER_MASK: Final = (1 << PLACE_SHIFT) - 1
MOST_PLACES: Final = 255

# A turn has so many reads at most, and each is of one session at most.
MOST_ENTRIES: Final = 64

# The words of a place: its last number, its journal, and its additions that others noted.
NUMBER: Final = 0
OPERATION: Final = 1  # the number of the addition that the journal is of; 0: it is void
BEFORE: Final = 2
COUNT: Final = 3
_CHANGES: Final = 4  # four words each: slot, applied, number of the run, offset
_WORDS: Final = _CHANGES + 4 * MOST_ENTRIES

_SEQ_CST: Final = 5

TaggedAdd = Callable[[int, int], None]
"""Adds an amount with a tag: the steps from `read` to `swap`."""


class Ledger(ABC):
    """Adds turns in which sessions ask for something, and keeps their table in step."""

    def __init__(self, table: SessionTable) -> None:
        self.table = table

    @abstractmethod
    def add(self, place: int, amount: int, entries: Sequence[Entry]) -> int:
        """Adds a turn of the process at `place`; gives back the total before, 0..2^64-1."""

    def bury(self, place: int) -> None:
        """Finishes or undoes what a dead process was at, and lets go of its sessions; for the
        master, and again whenever it was interrupted."""
        with self.table.lock:
            self.table.release_all(place)


class OwnLedger(Ledger):
    """For the total of a single process, with which the sessions end too."""

    def __init__(self, counter: Counter, table: SessionTable) -> None:
        super().__init__(table)
        self._add = counter.add

    def add(self, place: int, amount: int, entries: Sequence[Entry]) -> int:
        before = self._add(amount)
        for slot, frames, offset in entries:
            applied, number = self.table.progress(slot)
            self.table.note(slot, applied + frames, number, (before + offset) & TOTAL_MASK)
        return before


class SharedLedger(Ledger):
    """For a total that `places` processes share; OSError where there is no memory for it.

    Only where unavailable() says nothing.
    """

    def __init__(self, counter: AtomicCounter, table: SessionTable, places: int) -> None:
        super().__init__(table)
        self._places = places
        self._cell = counter.words
        self._compare_exchange = counter.compare_exchange
        self._memory = mmap.mmap(-1, 8 * (places * _WORDS + places * places))
        words = memoryview(self._memory).cast("Q")
        self._words = [words[i * _WORDS : (i + 1) * _WORDS] for i in range(places)]
        self._notes = words[places * _WORDS :]  # of each place's additions, one cell for each place
        self._tagged_add: TaggedAdd | None = None

    @property
    def memory(self) -> mmap.mmap:
        """What all its words are in."""
        return self._memory

    def before_at(self, place: int) -> int:
        """Which of those words a place has for the total before."""
        return place * _WORDS + BEFORE

    @property
    def notes_at(self) -> int:
        """The first of those words that are notes."""
        return self._places * _WORDS

    @property
    def places(self) -> int:
        """How many processes there may be."""
        return self._places

    def use(self, tagged_add: TaggedAdd) -> None:
        """Has this process add so, by C: others have less time then to add in between, which makes
        it begin anew."""
        self._tagged_add = tagged_add

    def add(self, place: int, amount: int, entries: Sequence[Entry]) -> int:
        words = self._words[place]
        number = self.take_number(words)
        self.write_journal(words, number, entries)
        tag = (place + 1) << PLACE_SHIFT | number
        if self._tagged_add is None:
            self.add_with_tag(place, amount, tag)
        else:
            self._tagged_add(amount & TOTAL_MASK, tag)
        before = words[BEFORE]
        self.record(words)
        self.clear(words)
        return before

    def take_number(self, words: memoryview[int]) -> int:
        """`number`."""
        number = words[NUMBER] = (words[NUMBER] + 1) & NUMBER_MASK
        return number

    def write_journal(self, words: memoryview[int], number: int, entries: Sequence[Entry]) -> None:
        """`journal`."""
        progress = self.table.progress
        so_far: dict[int, tuple[int, int]] = {}  # a session may have been read twice
        at = _CHANGES
        for slot, frames, offset in entries:
            applied, run = so_far.get(slot) or progress(slot)
            so_far[slot] = applied + frames, run + 1
            words[at], words[at + 1] = slot, applied + frames
            words[at + 2], words[at + 3] = run, offset
            at += 4
        words[COUNT] = len(entries)
        words[OPERATION] = number

    def add_with_tag(self, place: int, amount: int, tag: int) -> None:
        """`read` to `swap`: what cell_add() is in C."""
        while not self.try_to_swap(place, amount, tag):
            pass

    def try_to_swap(self, place: int, amount: int, tag: int) -> bool:
        """`read` to `swap`, once."""
        total, was = self._cell[0], self._cell[1]
        owner = was >> PLACE_SHIFT
        if owner and owner - 1 != place:
            self._notes[(owner - 1) * self._places + place] = was & NUMBER_MASK
        self._words[place][BEFORE] = total
        return self._compare_exchange(total, was, (total + amount) & TOTAL_MASK, tag)

    def record(self, words: memoryview[int]) -> None:
        """`record`."""
        before, note = words[BEFORE], self.table.note
        for at in range(_CHANGES, _CHANGES + 4 * words[COUNT], 4):
            slot, applied, number, offset = words[at : at + 4]
            note(slot, applied, number, (before + offset) & TOTAL_MASK)

    def clear(self, words: memoryview[int]) -> None:
        """`clear`."""
        words[OPERATION] = 0

    def bury(self, place: int) -> None:
        words = self._words[place]
        if words[OPERATION]:
            if self.was_made(place, words[OPERATION]):
                self.record(words)
            self.clear(words)
        super().bury(place)

    def was_made(self, place: int, number: int) -> bool:
        """Whether an addition of a dead process was made: the tag is looked at first."""
        if self._cell[1] == (place + 1) << PLACE_SHIFT | number:
            return True
        notes = self._notes[place * self._places : (place + 1) * self._places]
        return max(notes) >= number


def unavailable(counter: Counter, places: int) -> str:
    """Why a total that so many processes share has no sessions here; nothing if it may have.

    That is known from what the processor says of itself. It cannot be found out by trying: a swap
    that is two stores passes every trial on one core.
    """
    if not isinstance(counter, AtomicCounter):
        return "libatomic is missing (Debian's libatomic1)"
    if places > MOST_PLACES:
        return f"of {places} processes there are more than the {MOST_PLACES} that may have them"
    if platform.machine() != "x86_64":
        return f"an instruction that swaps 16 bytes is not known of {platform.machine()}"
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError as error:
        return f"/proc/cpuinfo cannot be read ({error.strerror})"
    flags = next((line for line in said.splitlines() if line.startswith("flags")), "")
    return "" if "cx16" in flags.split() else "the processor has no cmpxchg16b (flag cx16)"
