"""Question: what does the server do under the users that your own Locust tests describe?

Command: `pip install -r requirements.txt -r benchmarks/requirements.txt`, start a server, then

    locust -f benchmarks/locustfile.py --headless -u 40 -r 40 -t 10s --host tcp://127.0.0.1:8080

Without --headless Locust serves its page on port 8089. One process of Locust sends some thousands
of requests a second (`--processes -1` starts one for each core), where client.py sends tens of
thousands: this measures users, not the server's speed.

Invalid if: Locust's process has no CPU left; it says so itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from locust import User, constant, task
from locust.exception import StopUser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from client import CounterClient, CounterError

MANY = 16

T = TypeVar("T")


class TimedCounter:
    """A CounterClient that tells Locust of each call: its name, time, and exception if it failed.

    A failure is Locust's to count; the user goes on, and the next call connects again.
    """

    def __init__(self, address: str, environment: Any) -> None:
        self._counter = CounterClient(address, timeout=10)
        self._fire = environment.events.request.fire

    def add(self, amount: int) -> int | None:
        """Adds once; the total, None if it failed."""
        return self._timed("add", lambda: self._counter.add(amount), 8)

    def add_many(self, amounts: list[int]) -> list[int] | None:
        """Adds each, pipelined; the totals, None if one failed. One request to Locust."""
        name = f"add_many of {len(amounts)}"
        return self._timed(name, lambda: self._counter.add_many(amounts), 8 * len(amounts))

    def total(self) -> int | None:
        """Reads the total, None if it failed."""
        return self._timed("total", self._counter.total, 8)

    def close(self) -> None:
        """Closes the connection."""
        self._counter.close()

    def _timed(self, name: str, call: Callable[[], T], size: int) -> T | None:
        answer, failure = None, None
        start_s = time.perf_counter()
        try:
            answer = call()
        except CounterError as error:
            failure = error
        self._fire(
            request_type="counter",
            name=name,
            response_time=(time.perf_counter() - start_s) * 1000,
            response_length=0 if failure else size,
            exception=failure,
            context={},
        )
        return answer


class CounterUser(User):
    """Mostly adds, sometimes many at once, now and then reads; each user has one connection."""

    host = "tcp://127.0.0.1:8080"
    wait_time = constant(0)

    def on_start(self) -> None:
        """Refuses a host that is none, once, instead of failing each request."""
        address = urlsplit(self.host if "//" in self.host else f"//{self.host}").netloc
        try:
            self.counter = TimedCounter(address, self.environment)
        except CounterError as error:
            self.environment.process_exit_code = 2
            self.environment.runner.quit()
            raise StopUser(f"--host {self.host}: {error}") from None

    def on_stop(self) -> None:
        """Gives the server its worker back."""
        self.counter.close()

    @task(20)
    def add_one(self) -> None:
        """One addition and its reply."""
        self.counter.add(1)

    @task(2)
    def add_many(self) -> None:
        """A pipelined batch."""
        self.counter.add_many([1] * MANY)

    @task(1)
    def read_total(self) -> None:
        """A read counts nothing."""
        self.counter.total()
