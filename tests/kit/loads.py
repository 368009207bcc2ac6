"""The load generator as a command beside a test."""

from __future__ import annotations

import json
from typing import Any

from kit.harness import Command


def start_load(address: str, *arguments: str) -> Command:
    return Command(
        *("client.py", "--serverAddress", address, "--json", "-", "--processes", "1"),
        *("--timeout", "20s", *arguments),
    )


def result_of(load: Command, patience_s: float) -> dict[str, Any]:
    code = load.finish(patience_s)
    result: dict[str, Any] = json.loads(load.output())
    assert code == 0, (result["errors"], result["check"])
    return result
