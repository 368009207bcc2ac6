"""What a store keeps of sessions: a record for each, and the page that holds those of one writer.

A record says how many frames of its session are in the total, and the totals after its last runs. A
run is a number of frames and how much the total has risen since the run before: small numbers, of
which each record takes as few bytes as its largest needs, since a page is written with each commit.

Those of a commit under way can be kept with the sum up to them instead: the total before the
commit, which is the page's `before`, makes runs of them. So a page can be packed by who does not
know that total yet.

Pure: bytes to records and back. No store, no clock.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from protocol import TOTAL_MASK, Run

# Pages are as long as so many bytes, or a multiple: one whose length stays is written in place, and
# what did not change of it is not written.
_STEP: Final = 1024

_VERSION: Final = 1
_HEAD: Final = struct.Struct("<BI")  # the layout's version, how many records
# Id, window, applied, total, frames of the runs, their width, how many runs, and of this commit.
_RECORD: Final = struct.Struct("<16sHQQIBHH")
_pack_record: Final = _RECORD.pack
_FRESH: Final = struct.Struct("<QQ")

# Frames and rise of a run, in each width, and the largest that it holds of both.
_RUNS: Final = (struct.Struct("<BH"), struct.Struct("<HI"), struct.Struct("<IQ"))
_MOST: Final = ((0xFF, 0xFFFF), (0xFFFF, 0xFFFFFFFF), (0xFFFFFFFF, TOTAL_MASK))
_WAYS: Final = tuple(
    (layout.size, layout.unpack_from, layout.pack, *most)
    for layout, most in zip(_RUNS, _MOST, strict=True)
)

_new: Final = tuple.__new__


class PageError(ValueError):
    """Bytes that are no page of this layout."""


class Record(NamedTuple):
    """A session: `applied` of its frames are in the total, which was `total` after the last.

    `runs` are packed in a `width`, the oldest first, and have so many frames, `held`, together.
    `fresh` are those of a commit under way, each with its frames and the sum up to its last.
    """

    session_id: int
    window: int
    applied: int = 0
    total: int = 0
    held: int = 0
    width: int = 0
    runs: bytes = b""
    fresh: bytes = b""

    def after(self, frames: int, total: int) -> Record:
        """The record after so many frames more, of one run with such a total behind it. Runs whose
        replies the client must have are left out."""
        session_id, window, applied, before, held, width, runs, fresh = self
        size, first, pack_run, most_frames, most_rise = _WAYS[width]
        was, applied = applied, applied + frames
        # So many frames behind the oldest run's beginning are answered for certain.
        answered = held + frames - window
        while runs and (oldest := first(runs)[0]) <= answered:
            answered -= oldest
            held -= oldest
            runs = runs[size:]
        # Nobody asks for the total in front of the oldest run.
        rise = (total - before) & TOTAL_MASK if runs else 0
        # Once a window, those that needed the width are gone.
        is_due = width and applied // window > was // window
        if is_due or frames > most_frames or rise > most_rise:
            width, runs = _refitted(width, runs, frames, rise)
            pack_run = _WAYS[width][2]
        runs += pack_run(frames, rise)
        # As the constructor does, in a third of its time.
        return _new(Record, (session_id, window, applied, total, held + frames, width, runs, fresh))

    def advance(self, frames: int, offset: int) -> Record:
        """The record with a run of the commit under way, which has such a sum up to it."""
        return self._replace(fresh=self.fresh + _FRESH.pack(frames, offset))

    def settled(self, before: int) -> Record:
        """The record after the commit that is under way, `before` being the total before it."""
        if not self.fresh:
            return self
        record = self._replace(fresh=b"")
        for frames, offset in _FRESH.iter_unpack(self.fresh):
            record = record.after(frames, (before + offset) & TOTAL_MASK)
        return record

    def runs_behind(self, have: int) -> tuple[Run, ...]:
        """The runs that end behind frame `have`, the oldest first, each as the number of its last
        frame and the total after that; of a record that is settled."""
        found = []
        last, total = self.applied, self.total
        for frames, rise in reversed(list(_RUNS[self.width].iter_unpack(self.runs))):
            if last <= have:
                break
            found.append((last, total))
            last, total = last - frames, (total - rise) & TOTAL_MASK
        return tuple(reversed(found))

    def packed(self) -> bytes:
        """Its bytes, as a page has them."""
        session_id, window, applied, total, held, width, runs, fresh = self
        count, new = len(runs) // _WAYS[width][0], len(fresh) // _FRESH.size
        key = session_id.to_bytes(16)
        data = _pack_record(key, window, applied, total, held, width, count, new) + runs
        return data + fresh if fresh else data


def _refitted(width: int, runs: bytes, frames: int, rise: int) -> tuple[int, bytes]:
    """The same runs in the least width that holds them, and one of so many frames and such a rise;
    and that width."""
    kept = list(_RUNS[width].iter_unpack(runs))
    kept[:1] = [(oldest, 0) for oldest, _ in kept[:1]]
    most = max([frames, *(run[0] for run in kept)]), max([rise, *(run[1] for run in kept)])
    width = 0
    while most[0] > _MOST[width][0] or most[1] > _MOST[width][1]:
        width += 1
    return width, b"".join([_RUNS[width].pack(*run) for run in kept])


def pack(records: Iterable[Record]) -> bytes:
    """The bytes of a page, or of a record that is kept alone."""
    return join([record.packed() for record in records])


def join(packed: list[bytes]) -> bytes:
    """The bytes of a page, of those of its records."""
    data = _HEAD.pack(_VERSION, len(packed)) + b"".join(packed)
    return data + bytes(-len(data) % _STEP) if len(packed) > 1 else data


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
            key, window, applied, total, held, width, runs, new = _RECORD.unpack_from(data, at)
            at += _RECORD.size
            middle = at + runs * _RUNS[width].size
            end = middle + new * _FRESH.size
            kept, fresh = data[at:middle], data[middle:end]
            session_id = int.from_bytes(key)
            record = Record(session_id, window, applied, total, held, width, kept, fresh)
            records.append(record.settled(before))
            at = end
    except (struct.error, IndexError) as error:
        raise PageError(f"a page of sessions is broken: {error}") from None
    if at > len(data):
        raise PageError("a page of sessions ends within a record")
    return records
