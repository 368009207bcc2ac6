"""Which engine serves a run: decided once, by the parent, before any process is forked."""

from __future__ import annotations

from typing import Any

from counter.load.compiled import CompiledEngine, Tapes
from counter.load.engine import Engine, Sender
from counter.load.plain import PlainEngine
from counter.options.client import ClientSettings
from counter.turn.library import EngineMissing, load


def choose(settings: ClientSettings) -> str:
    """The name of the engine that serves this run; EngineMissing where only one that is not there
    would do.

    What C does not serve takes the engine in Python whatever was asked for: TLS, a schedule, and
    amounts that are drawn.
    """
    if settings.engine == PlainEngine.name:
        return PlainEngine.name
    try:
        load()
    except EngineMissing:
        if settings.engine == CompiledEngine.name:
            raise
        return PlainEngine.name
    is_plain = settings.amount.low == settings.amount.high and not settings.wants_tls()
    return CompiledEngine.name if is_plain and not settings.rate else PlainEngine.name


def make_engine(name: str, loop: Any, sender: Sender, amount: int, tapes: Tapes | None) -> Engine:
    """An engine of that name, as choose() gives it, for additions of one amount."""
    if name == CompiledEngine.name:
        return CompiledEngine(loop, sender, load(), amount, tapes)
    return PlainEngine(loop, sender)
