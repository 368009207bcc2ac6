"""What a store keeps of sessions: a record for each, and the page that holds those of one writer.

A record says how many frames of its session are in the total, and the totals after its last runs. A
run is a number of a frame and the total after it. Those of a commit under way are kept as the sum
up to them: the total before the commit, which is the page's `before`, makes totals of them. So a
page can be packed by who does not know that total yet.

Pure: bytes to records and back. No store, no clock.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from protocol import TOTAL_MASK, Run

RUN_BYTES: Final = 16

# Pages are as long as so many bytes, or a multiple: one whose length stays is written in place, and
# what did not change of it is not written.
_STEP: Final = 1024

_VERSION: Final = 1
_HEAD: Final = struct.Struct("<BI")  # the layout's version, how many records
_RECORD: Final = struct.Struct("<16sHQHH")  # id, window, applied, runs, runs of this commit
_RUN: Final = struct.Struct("<QQ")


class PageError(ValueError):
    """Bytes that are no page of this layout."""


class Record(NamedTuple):
    """A session: `applied` of its frames are in the total.

    `runs` are packed, the oldest first; `fresh` are those of the commit under way, with the sum up
    to them instead of a total.
    """

    session_id: int
    window: int
    applied: int = 0
    runs: bytes = b""
    fresh: bytes = b""

    def advance(self, frames: int, offset: int) -> Record:
        """The record after so many frames more, of a commit with such a sum up to the last."""
        session_id, window, applied, runs, fresh = self
        applied += frames
        return Record(session_id, window, applied, runs, fresh + _RUN.pack(applied, offset))

    def settled(self, before: int) -> Record:
        """The record after the commit that is under way, `before` being the total before it; runs
        whose replies the client must have are left out."""
        session_id, window, applied, runs, fresh = self
        if not fresh:
            return self
        for last, offset in _RUN.iter_unpack(fresh):
            runs += _RUN.pack(last, (before + offset) & TOTAL_MASK)
        oldest, at = applied - window, 0
        while at < len(runs) and _RUN.unpack_from(runs, at)[0] <= oldest:
            at += RUN_BYTES
        return Record(session_id, window, applied, runs[at:])

    def runs_behind(self, have: int) -> tuple[Run, ...]:
        """The runs that end behind frame `have`, the oldest first; of a record that is settled."""
        return tuple(run for run in _RUN.iter_unpack(self.runs) if run[0] > have)


def pack(records: Iterable[Record]) -> bytes:
    """The bytes of a page, or of a record that is kept alone."""
    parts, count = [b""], 0
    head = _RECORD.pack
    for session_id, window, applied, runs, fresh in records:
        known, new = len(runs) // RUN_BYTES, len(fresh) // RUN_BYTES
        parts += (head(session_id.to_bytes(16), window, applied, known, new), runs, fresh)
        count += 1
    parts[0] = _HEAD.pack(_VERSION, count)
    data = b"".join(parts)
    return data + bytes(-len(data) % _STEP) if count > 1 else data


def unpack(data: bytes, before: int = 0) -> list[Record]:
    """The records of a page, settled: `before` is the total before the commit that wrote it;
    PageError where it is none."""
    try:
        version, count = _HEAD.unpack_from(data)
        if version != _VERSION:
            raise PageError(
                f"a page of sessions has layout {version}, this release reads {_VERSION}"
            )
        records, at = [], _HEAD.size
        for _ in range(count):
            session_id, window, applied, known, new = _RECORD.unpack_from(data, at)
            at += _RECORD.size
            middle, end = at + known * RUN_BYTES, at + (known + new) * RUN_BYTES
            runs, fresh = data[at:middle], data[middle:end]
            record = Record(int.from_bytes(session_id), window, applied, runs, fresh)
            records.append(record.settled(before))
            at = end
    except struct.error as error:
        raise PageError(f"a page of sessions ends within: {error}") from None
    if at > len(data):
        raise PageError("a page of sessions ends within a record")
    return records
