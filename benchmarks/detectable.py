"""Question: what does a turn cost in which sessions ask for something, beside a plain addition?

Command: .venv/bin/python benchmarks/detectable.py

A total that two processes share, one of them at work: a plain addition, and the one that a crash
leaves decidable (counter/totals/ledger.py), for turns with frames of so many sessions, with the
swap in Python and in C. The smallest of nine rounds counts.

Invalid if: the plain addition differs much from row to row (something else ran).
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from counter.totals.ledger import Entry, SharedLedger, unavailable
from counter.totals.memory import AtomicCounter, make_shared_counter
from counter.totals.sessions import Claimed, SessionTable
from counter.turn.engines import make_decoder, make_engine
from protocol import MAX_AMOUNT, Control, Hello

ADDITIONS: Final = 20_000
ROUNDS: Final = 9


def smallest_us(add: Callable[[], object]) -> float:
    return min(timeit.repeat(add, number=ADDITIONS, repeat=ROUNDS)) / ADDITIONS * 1e6


def open_session(table: SessionTable, session_id: int) -> int:
    claim = table.claim(0, Hello(session_id, Control.OPEN, 64), MAX_AMOUNT)
    assert isinstance(claim, Claimed)
    assert claim.slot is not None
    return claim.slot


def main() -> None:
    counter = make_shared_counter()
    if reason := unavailable(counter, 2):
        sys.exit(f"no sessions here: {reason}")
    assert isinstance(counter, AtomicCounter)
    print("sessions  way       a turn     a plain addition")
    for name in ("plain", "compiled"):
        for sessions in (1, 8, 40):
            table = SessionTable(100, 1)
            ledger = SharedLedger(counter, table, 2)
            engine = make_engine(name, make_decoder(MAX_AMOUNT, False))
            words = ledger.memory, ledger.before_at(0), ledger.notes_at, ledger.places
            if tagged_add := engine.tagged_add(counter.address, *words):
                ledger.use(tagged_add)
            slots = [open_session(table, number) for number in range(1, sessions + 1)]
            entries: list[Entry] = [(slot, 1, at) for at, slot in enumerate(slots, 1)]
            turn_us = smallest_us(lambda: ledger.add(0, sessions, entries))  # noqa: B023
            plain_us = smallest_us(lambda: counter.add(1))
            print(f"{sessions:8}  {name:8}  {turn_us:5.2f} us  {plain_us:5.2f} us")


if __name__ == "__main__":
    main()
