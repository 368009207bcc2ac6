"""The page to look at: page.html with the state of the server in it.

Its script follows the state by /status. Without a script it shows the same numbers in a table, and
is loaded again by itself. It needs nothing from elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any, Final

TEMPLATE: Final = Path(__file__).with_name("page.html")
_HOLE: Final = re.compile(r"\{\{(\w+)\}\}")


def render(template: str, state: dict[str, Any]) -> str:
    """The page for what Status.as_json() gives."""
    cells = (
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows(state)
    )
    contents = {
        "title": escape(title(state)),
        "state": json.dumps(state).replace("<", "\\u003c"),
        "plain": f'<table class="plain">{"".join(cells)}</table>',
    }
    # In one go: what is filled in may look like a hole itself.
    return _HOLE.sub(lambda hole: contents[hole[1]], template)


def title(state: dict[str, Any]) -> str:
    """Of the browser's tab: trouble first, then the total."""
    words = "" if state["ready"] and not state["full"] else f"{standing(state)} · "
    return f"{words}{int(state['total']):,} · counter"


def standing(state: dict[str, Any]) -> str:
    """Whether the server is ready, in words."""
    if not state["ready"]:
        return str(state["reason"])
    return ", ".join(filter(None, ("ready", state["full"])))


def rows(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and texts of what there is to say."""
    rates, commits = state["rates"]["minutes"], state["commits"]
    yield "Server", f"{state['address']}, {standing(state)}"
    yield "Total", f"{int(state['total']):,}"
    yield "Requests a second", f"{rates[-1][1] if rates else 0:,}"
    yield "Requests answered", f"{state['requests']:,}, reads included, which add nothing"
    yield "Open connections", f"{state['connections']:,} of {state['max_connections']:,} at most"
    yield "Workers taken", f"{state['workers_taken']:,} of {state['workers']:,}"
    if state["waiting"]:
        longest = f"the first of them for {state['longest_wait_s']:.3g} s"
        yield "Waiting for a worker", f"{state['waiting']:,}, {longest}"
    if state["backlog"]:
        yield "In the backlog", f"{state['backlog']:,}, not accepted yet"
    sessions = state["sessions"]
    if sessions["opened"] or sessions["refused"]:
        counts = [f"{sessions[name]:,} {name}" for name in ("connected", "resumed", "refused")]
        yield "Sessions", ", ".join([f"{sessions['kept']:,} kept", *counts])
    if commits:
        yield "Commit to the store", f"{commits['mean_s'] * 1000:.3g} ms, the mean of the last 10 s"
    for reason, count in state["refused"].items():
        if count:
            yield f"Refused: {reason}", f"{count:,}"
    for one in state["processes"]:
        name = f"Process {one['pid']}" if one["pid"] else "Dead process"
        yield name, ", ".join(_of_process(one))
    yield "Store", f"{state['store']}; an answered addition survives {state['survives']}"
    yield "Version", f"{state['version']}, up for {timedelta(seconds=round(state['uptime_s']))}"


def _of_process(one: dict[str, Any]) -> Iterator[str]:
    """What there is to say of one process."""
    yield f"{one['requests']:,} requests"
    yield f"{one['connections']:,} connections"
    yield f"{one['workers_taken']:,} of {one['workers']:,} workers taken"
    if one["waiting"]:
        yield f"{one['waiting']:,} waiting"
    yield f"replaced {one['restarts']} times"
