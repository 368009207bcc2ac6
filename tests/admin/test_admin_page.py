"""The page as it is before, or without, its script."""

from __future__ import annotations

import json
import re
from typing import Any

from counter.admin.page import TEMPLATE, render
from counter.admin.status import Status
from counter.processes.slots import (
    BACKLOG,
    COMMIT_US,
    COMMITS,
    CONNECTIONS,
    MOST_CONNECTIONS,
    PID,
    REASONS,
    REFUSED,
    REQUESTS,
    WAITING,
    WAITING_SINCE_MS,
    WORKERS,
    WORKERS_TAKEN,
    Slots,
    now_ms,
)


class Server:
    """The status of a server that a test makes up, and its page."""

    def __init__(self, store: str = "memory") -> None:
        self.slots = Slots(1)
        self.slots[0][PID] = 4711
        self.slots[0][WORKERS] = 40
        self.slots[0][MOST_CONNECTIONS] = 10_000
        self.status = Status(
            self.slots, store, lambda: 16423170, 0, "127.0.0.1:8080", "the death of a process"
        )

    def page(self) -> str:
        return render(TEMPLATE.read_text(encoding="utf-8"), self.status.as_json())

    def rows(self) -> dict[str, str]:
        """What the table says that is there without the script."""
        found = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", self.page())
        return {name: text for name, text in found if not name.startswith("<")}

    def title(self) -> str:
        match = re.search("<title>(.*?)</title>", self.page())
        assert match
        return match[1]


def state_in(page: str) -> dict[str, Any]:
    """What the script begins with."""
    match = re.search(r'<script id="first" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert match
    found: dict[str, Any] = json.loads(match[1])
    return found


def test_a_server_at_rest_says_what_it_is_and_nothing_of_troubles() -> None:
    server = Server()
    rows = server.rows()
    assert server.title() == "16,423,170 · counter"
    assert rows["Server"] == "127.0.0.1:8080, ready"
    assert rows["Total"] == "16,423,170"
    assert rows["Requests a second"] == "0"
    assert rows["Open connections"] == "0 of 10,000 at most"
    assert rows["Workers taken"] == "0 of 40"
    assert rows["Store"] == "memory; an answered addition survives the death of a process"
    assert rows["Process 4711"] == (
        "0 requests, 0 connections, 0 of 40 workers taken, replaced 0 times"
    )
    troubles = ("Refused", "Waiting", "In the backlog", "Commit")
    assert not [name for name in rows if name.startswith(troubles)]


def fill(server: Server) -> None:
    """As many connections as may be, all workers taken by some, and most of the others wait."""
    slot = server.slots[0]
    slot[REQUESTS], slot[CONNECTIONS], slot[WORKERS_TAKEN], slot[WAITING] = 7000, 10_000, 40, 1200
    slot[WAITING_SINCE_MS] = now_ms() - 90
    slot[BACKLOG] = 312


def test_a_full_server_says_so_in_its_title_and_first_line() -> None:
    server = Server()
    fill(server)
    words = "ready, full: 1,200 wait, 312 more in the backlog"
    assert server.title() == f"{words} · 16,423,170 · counter"
    rows = server.rows()
    assert rows["Server"] == f"127.0.0.1:8080, {words}"
    assert rows["Open connections"] == "10,000 of 10,000 at most"
    assert rows["Workers taken"] == "40 of 40"
    assert re.fullmatch(r"1,200, the first of them for 0\.\d+ s", rows["Waiting for a worker"])
    assert rows["In the backlog"] == "312, not accepted yet"
    assert rows["Process 4711"] == (
        "7,000 requests, 10,000 connections, 40 of 40 workers taken, 1,200 waiting, "
        "replaced 0 times"
    )


def test_a_server_that_is_not_ready_says_why() -> None:
    server = Server()
    server.status.draining = True
    assert server.title() == "draining: the server is stopping · 16,423,170 · counter"


def test_reasons_are_named_of_which_there_were_refusals() -> None:
    server = Server()
    server.slots[0][REFUSED + REASONS.index("incomplete")] = 3
    refused = {name: text for name, text in server.rows().items() if name.startswith("Refused")}
    assert refused == {"Refused: incomplete": "3"}


def test_the_time_of_commits_is_told_where_there_is_a_store() -> None:
    server = Server("sqlite:counter.db")
    server.status.sample()
    server.slots[0][COMMITS] += 4
    server.slots[0][COMMIT_US] += 8000
    server.status.sample()
    assert server.rows()["Commit to the store"] == "2 ms, the mean of the last 10 s"


def test_commits_beyond_every_bound_are_json_too() -> None:
    server = Server("sqlite:counter.db")
    server.status.sample()
    server.slots[0][COMMITS + 11] += 1
    server.status.sample()
    commits = state_in(server.page())["commits"]
    assert (commits["count"], commits["within_s"]) == (1, None)


def test_a_name_is_text_wherever_it_stands() -> None:
    name = "sqlite:<img src=x onerror=alert(1)>\"'&{{state}}{{plain}}</script>"
    server = Server(name)
    server.status.draining = True
    page = server.page()
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert state_in(page)["store"] == name
    assert "&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;{{state}}{{plain}}" in page


def test_the_script_finds_everything_that_it_writes_to() -> None:
    page = Server().page()
    script = page.rpartition("<script>")[2]
    written = set(re.findall(r'(?:at|fill)\("([\w-]+)"', script))
    assert len(written) > 20
    assert written <= set(re.findall(r'id="([\w-]+)"', page))
