"""A run divided among processes: nothing is lost, and nobody has nothing to do."""

from __future__ import annotations

import pytest

from counter.load.share import split
from counter.options.client import ClientSettings
from counter.options.values import Seconds


@pytest.mark.parametrize(
    ("settings", "cpus", "processes"),
    [
        (ClientSettings(), 2, 2),
        (ClientSettings(), 1.5, 1),
        (ClientSettings(), 0.1, 1),
        (ClientSettings(connections=7, processes=3, requests=100, rate=10.0), 8, 3),
        (ClientSettings(connections=2, processes=8), 8, 2),
        (ClientSettings(connections=40, processes=8, requests=3), 8, 3),
    ],
)
def test_the_shares_add_up_to_the_run(
    settings: ClientSettings, cpus: float, processes: int
) -> None:
    shares = split(settings, cpus, (), "plain")
    assert [share.processes for share in shares] == [processes] * processes
    connections = [share.connections for share in shares]
    assert sum(connections) == (settings.connections or max(1, round(cpus * 20)))
    assert max(connections) - min(connections) <= 1
    assert min(connections) >= 1
    assert sum(share.rate for share in shares) == pytest.approx(settings.rate)
    if settings.requests is None:
        assert {share.requests for share in shares} == {None}
    else:
        requests = [share.requests or 0 for share in shares]
        assert sum(requests) == settings.requests
        assert min(requests) >= 1


@pytest.mark.parametrize(
    ("settings", "planned_s"),
    [
        (ClientSettings(), 60),
        (ClientSettings(duration_s=Seconds(5)), 5),
        (ClientSettings(duration_s=Seconds(5), requests=10), 5),
        (ClientSettings(requests=10), None),
    ],
)
def test_a_run_that_nothing_bounds_is_planned_for_a_minute(
    settings: ClientSettings, planned_s: float | None
) -> None:
    assert settings.planned_duration_s == planned_s
