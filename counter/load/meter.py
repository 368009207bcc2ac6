"""What one process of a run does, counted and measured as it happens, into its Result.

Times are monotonic nanoseconds. A request is measured if it is due in the measured part: in a
closed loop when it is sent, in an open one when schedule.py says. Its latency runs from then to
when its reply is read.
"""

from __future__ import annotations

import time
from array import array
from time import monotonic_ns as clock
from typing import Final

from counter.load.share import Share
from counter.results.result import CHECKABLE_SUM, WRONG_KEPT, Result
from counter.results.timeline import Sampler
from protocol import Batch

NEVER: Final = 2**63 - 1  # later than any moment of the clock


class Meter:
    """The account of one process. `result` is right between turns of the loop."""

    def __init__(self, share: Share) -> None:
        self.result = Result(connections=share.connections)
        self._processes = share.processes
        self._amount = share.settings.amount.low
        self._is_open_loop = bool(share.rate)
        self._latencies = self.result.latencies
        self._sent_sum = 0
        self.measure_from_ns = NEVER
        self._last_reply_ns = 0
        self._cpu_from_s = 0.0
        self._sampler = Sampler([], 0, None)

    def start(self, measure_from_ns: int, duration_s: float | None) -> float:
        """Begins the run; the seconds after which tick() is due, again and again."""
        self.measure_from_ns = self._last_reply_ns = measure_from_ns
        self._sampler = Sampler(self.result.latencies.counts, measure_from_ns, duration_s)
        self.count_from_here()
        return self._sampler.interval_s

    def count_from_here(self) -> None:
        """Counts CPU time, and errors of the timeline, from here on: the start's, and instead of
        them the measured part's."""
        self._cpu_from_s = time.process_time()
        self._sampler.forget_errors(self._errors())

    def tick(self) -> None:
        """Ends an interval of the timeline."""
        self._sampler.tick(clock(), self._errors())

    def stop(self, now: int) -> None:
        """Nothing is sent any more. A server that stalls until now has its time counted."""
        self._last_reply_ns = max(self._last_reply_ns, now)

    def finish(self, behind: int) -> None:
        """Ends the account; `behind` requests were due and not sent."""
        elapsed_s = (self._last_reply_ns - self.measure_from_ns) / 1e9
        result = self.result
        result.timeline = self._sampler.finish(self._last_reply_ns, self._errors())
        result.behind = behind
        result.measured = len(result.latencies)
        result.elapsed_s = elapsed_s
        if elapsed_s > 0:
            result.cpu_share = (time.process_time() - self._cpu_from_s) / elapsed_s

    def _errors(self) -> int:
        return sum(self.result.errors.values())

    def so_far(self) -> Result:
        """What was done until now."""
        if self.measure_from_ns != NEVER:
            self.result.elapsed_s = max(0, clock() - self.measure_from_ns) / 1e9
        return self.result

    def sent(self, batch: Batch) -> None:
        """Frames of these amounts are sent."""
        self.result.sent += len(batch)
        self._sent_sum += batch.sum()

    def answered(self, due_ns: int, sent_ns: int, now: int, batch: Batch) -> None:
        """Frames that were sent together are answered."""
        self.result.answered += len(batch)
        self.result.answered_sum += batch.sum()
        self.measure(due_ns, sent_ns, now, len(batch))

    def exchanged(self, answered: int, sent: int) -> None:
        """So many frames of the usual amount were answered, of which measure() or measured() was
        told, and so many are sent again."""
        self.result.answered += answered
        self.result.answered_sum += answered * self._amount
        self.result.sent += sent
        self._sent_sum += sent * self._amount

    def measure(self, due_ns: int, sent_ns: int, now: int, count: int) -> None:
        """Takes the latency of `count` requests that were sent and answered together."""
        if due_ns >= self.measure_from_ns:
            self._latencies.count(now - due_ns, count)
            if self._is_open_loop:
                self.result.raw_latencies.count(now - sent_ns, count)
            self._last_reply_ns = now

    def measured(self, sum_ns: int, longest_ns: int, now: int) -> None:
        """Takes the latencies of a closed loop whose buckets were counted already: their sum, the
        longest, and when the last reply was read."""
        self._latencies.sum_ns += sum_ns
        self._latencies.max_ns = max(self._latencies.max_ns, longest_ns)
        self._last_reply_ns = now

    def unknown(self, batch: Batch) -> None:
        """The connection was lost before these were answered."""
        self.result.unknown += len(batch)
        self.result.unknown_sum += batch.sum()

    def error(self, kind: str) -> None:
        """A connection was lost, or could not be made."""
        self.result.count_error(kind)

    def wrong(self, what: str) -> None:
        """A total came that cannot be right."""
        self.result.wrong += 1
        if len(self.result.wrong_examples) < WRONG_KEPT:
            self.result.wrong_examples.append(what)

    def buckets(self) -> array[int]:
        """The buckets of the latencies, for others to count into; asked for before start()."""
        return self._latencies.share_buckets()

    def checkable_requests(self) -> int:
        """How many more requests of the usual amount can be sent with rises still checkable."""
        left = CHECKABLE_SUM // self._processes - 1 - self._sent_sum
        return left // self._amount if self._amount else CHECKABLE_SUM - 1

    def rises_are_checkable(self) -> bool:
        """Whether what all processes sent is sure to sum below 2^63."""
        checkable = self._sent_sum < CHECKABLE_SUM // self._processes
        self.result.rises_checked = self.result.rises_checked and checkable
        return checkable
