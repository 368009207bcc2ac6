"""What a run did, addition by addition, kept for its proof.

The law: recording is nothing but appending. Replies are kept as they came, amounts only where they
differ, times once for a burst that was sent and answered together; NumPy spreads them out when the
run is over. So an addition costs 40 bytes with one frame in flight, 8 to 16 with many.

The parent makes a Recording for each process before it forks; the process writes it, to files
without a name in TMPDIR, and the parent reads it, so that nothing has to pass a pipe. What a killed
process had not written is missing, and its files may end at different places: read is what all of
them have. A disk that is full ends the recording and not the run; the count tells.
"""

from __future__ import annotations

import struct
import tempfile
from array import array
from collections.abc import Sequence
from time import monotonic_ns as clock
from typing import TYPE_CHECKING, Any, Final

from counter.load.connection import Generator, LoadConnection
from counter.proof.history import History
from protocol import Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from counter.proof.history import Words

# Written together: a write of 1 MiB takes 0.3 ms on an idle machine, and of 20,000 requests one
# waits for it.
WRITE_BYTES: Final = 2**20

_BURST: Final = struct.Struct("=QQQQ")  # sent, answered (both ns), connection, how many
_LOST: Final = struct.Struct("=QQ")  # sent, amount
_TOTAL: Final = struct.Struct(">Q")


class _Tape:
    """Bytes that are appended by one process and read by another."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        # Unbuffered, so that a fork leaves no copy of what was not written.
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._full = False

    def write(self) -> None:
        """Writes what waits."""
        view = memoryview(self.waiting)
        self.waiting = bytearray()
        try:
            while view and not self._full:
                view = view[self._file.write(view) :]
        except OSError:
            self._full = True

    def read(self, kind: str) -> NDArray[Any]:
        """All that was written, mapped into memory."""
        import numpy as np

        count = self._file.seek(0, 2) // 8
        if not count:
            return np.empty(0, kind)
        return np.memmap(self._file, kind, "r", shape=(count,))

    def close(self) -> None:
        self._file.close()


class Recording:
    """The additions of one process: written in it, read by its parent.

    `amount` is that of every addition, or None where they differ.
    """

    def __init__(self, amount: int | None) -> None:
        self.amount = amount
        self.connections = 0
        self.bursts, self.totals, self.amounts, self.lost = (_Tape() for _ in range(4))

    def connection(self, generator: Generator) -> RecordedConnection:
        """A connection whose additions are recorded here."""
        self.connections += 1
        return RecordedConnection(generator, self, self.connections)

    def answered(
        self, number: int, sent_ns: int, now: int, count: int, replies: bytes, batch: Batch | None
    ) -> None:
        """Records additions that were sent and answered together; `batch` where amounts differ."""
        self.bursts.waiting += _BURST.pack(sent_ns, now, number, count)
        self.totals.waiting += replies
        if batch is not None:
            self.amounts.waiting += array("Q", batch.amounts)
        self._write_much()

    def append(self, bursts: Any, totals: Any) -> None:
        """Records additions of one amount that are in the form of the tapes already: bytes."""
        self.bursts.waiting += bursts
        self.totals.waiting += totals
        self._write_much()

    def _write_much(self) -> None:
        if len(self.bursts.waiting) >= WRITE_BYTES or len(self.totals.waiting) >= WRITE_BYTES:
            self.write()

    def unanswered(self, sent_ns: int, batch: Batch) -> None:
        """Records additions whose replies will not come."""
        for amount in batch.amounts:
            self.lost.waiting += _LOST.pack(sent_ns, amount)

    def write(self) -> None:
        """Writes all that was recorded; the bursts last, because they say what belongs together."""
        for tape in (self.lost, self.amounts, self.totals, self.bursts):
            tape.write()

    def close(self) -> None:
        """Gives the files back."""
        for tape in (self.lost, self.amounts, self.totals, self.bursts):
            tape.close()


class RecordedConnection(LoadConnection):
    """A LoadConnection that records what it does; a run without a proof has none of it."""

    __slots__ = ("_recording",)

    def __init__(self, generator: Generator, recording: Recording, number: int) -> None:
        super().__init__(generator)
        self._recording = recording
        self.number = number
        self._answered_lone = self._record_lone

    def _record_lone(self, due_ns: int, sent_ns: int, now: int, count: int) -> None:
        """Measures the reply to a lone frame, which settle() does not see, and records it.

        Its time is taken once more, behind the one that is measured: a moment later, which a proof
        allows, where one too early would not be allowed.
        """
        self._meter.measure(due_ns, sent_ns, now, count)
        total = _TOTAL.pack(self._last_total)
        self._recording.answered(self.number, sent_ns, clock(), count, total, None)

    def settle(self, due_ns: int, sent_ns: int, now: int, batch: Batch, replies: bytes) -> None:
        LoadConnection.settle(self, due_ns, sent_ns, now, batch, replies)
        mixed = batch if self._recording.amount is None else None
        self._recording.answered(self.number, sent_ns, now, len(batch), replies, mixed)

    def close(self) -> None:
        for _, sent_ns, batch in self._in_flight:
            self._recording.unanswered(sent_ns, batch)
        LoadConnection.close(self)


def history(recordings: Sequence[Recording], before: int | None, after: int | None) -> History:
    """One history of what all processes recorded."""
    import numpy as np

    bursts = [_whole_bursts(recording) for recording in recordings]
    counts = [int(part[:, 3].sum()) for part in bursts]
    sent, answered, amount, total = (np.empty(sum(counts), np.uint64) for _ in range(4))
    at = 0
    for recording, part, count in zip(recordings, bursts, counts, strict=True):
        here = slice(at, at + count)
        each = part[:, 3].astype(np.int64)
        sent[here], answered[here] = np.repeat(part[:, 0], each), np.repeat(part[:, 1], each)
        total[here] = recording.totals.read(">u8")[:count]
        uniform = recording.amount
        amount[here] = recording.amounts.read("=u8")[:count] if uniform is None else uniform
        at += count
    lost = np.concatenate([recording.lost.read("=u8") for recording in recordings])

    def name(index: int) -> str:
        process = 0
        while index >= counts[process]:
            index -= counts[process]
            process += 1
        part = bursts[process]
        burst = int(np.searchsorted(part[:, 3].cumsum(), index, side="right"))
        return f"connection {part[burst, 2]} of process {process + 1}"

    return History(sent, answered, amount, total, lost[::2], lost[1::2], before, after, name)


def _whole_bursts(recording: Recording) -> Words:
    """The bursts whose totals and amounts were written too, one a row."""
    words = recording.bursts.read("=u8")
    bursts = words[: len(words) // 4 * 4].reshape(-1, 4)
    written = len(recording.totals.read(">u8"))
    if recording.amount is None:
        written = min(written, len(recording.amounts.read("=u8")))
    whole: Words = bursts[bursts[:, 3].cumsum() <= written]
    return whole
