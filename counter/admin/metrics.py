"""What Prometheus scrapes: the slots of all processes as metrics, by a collector of our own.

Every name, unit and type follows Prometheus' guide. A value is a float there, exact up to 2^53, so
counter_value is the total modulo 2^53; /total has the exact one.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import partial
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from counter.admin.status import Status
from counter.processes.slots import (
    COMMIT_BOUNDS_S,
    COMMIT_US,
    COMMITS,
    CONNECTIONS,
    CONNECTIONS_TOTAL,
    LOSSES,
    MOST_CONNECTIONS,
    READS,
    REASONS,
    REFUSED,
    REQUESTS,
    WORKERS,
    WORKERS_TAKEN,
)
from counter.system.version import VERSION

EXACT: Final = 1 << 53


class ServerCollector(Collector):
    """The metrics of one server, made anew for every scrape."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        yield from self._counts()
        yield from self._gauges()
        yield self._frames_per_read()
        yield self._commit_seconds()
        yield from self._processes()

    def _counts(self) -> Iterable[Metric]:
        slots = self._status.slots
        yield CounterMetricFamily(
            "counter_requests", "Additions answered, reads included.", slots.sum(REQUESTS)
        )
        refused = CounterMetricFamily(
            "counter_refused_frames",
            "Connections that the server ended, by reason: a refused frame ends its connection.",
            labels=["reason"],
        )
        for place, reason in enumerate(REASONS):
            refused.add_metric([reason], slots.sum(REFUSED + place))
        yield refused
        yield CounterMetricFamily(
            "counter_connections", "Connections that were accepted.", slots.sum(CONNECTIONS_TOTAL)
        )
        sessions = self._status.sessions()
        for name, text in (
            ("opened", "Sessions that were opened."),
            ("resumed", "Connections that went on with a session."),
            ("refused", "Hellos that no session followed: unknown, no room, or held elsewhere."),
            ("evicted", "Sessions without a connection that gave way to others."),
        ):
            yield CounterMetricFamily(f"counter_sessions_{name}", text, sessions[name])
        yield CounterMetricFamily(
            "counter_process_restarts",
            "Serving processes that died and were replaced.",
            self._status.restarts(),
        )
        yield CounterMetricFamily(
            "counter_store_losses",
            "Times that the store was found to have lost answered additions.",
            slots.sum(LOSSES),
        )

    def _gauges(self) -> Iterable[Metric]:
        status, slots = self._status, self._status.slots
        sessions = status.sessions()
        gauges = {
            "counter_sessions": (
                "Sessions that are kept beside a total in memory; 0 with a store.",
                sessions["kept"],
            ),
            "counter_sessions_connected": (
                "Those of them that have a connection; 0 with a store.",
                sessions["connected"],
            ),
            "counter_connections": (
                "Open connections, those without a worker included.",
                slots.sum(CONNECTIONS),
            ),
            "counter_max_connections": (
                "Connections that may be open at once; further ones wait in the listen backlog.",
                slots.sum(MOST_CONNECTIONS),
            ),
            "counter_workers": ("Connections that may be served at once.", slots.sum(WORKERS)),
            "counter_workers_taken": (
                "Workers that are taken, each by one open connection.",
                slots.sum(WORKERS_TAKEN),
            ),
            "counter_pool_full": ("1 while every worker is taken.", int(status.is_full())),
            "counter_waiting_connections": (
                "Connections that wait for a worker: they have sent something that was not read.",
                status.waiting(),
            ),
            "counter_longest_wait_seconds": (
                "How long the first of those that wait for a worker has waited.",
                status.longest_wait_s(),
            ),
            "counter_backlog_connections": (
                "Connections in the listen backlog, which wait to be accepted.",
                status.backlog(),
            ),
            "counter_start_time_seconds": (
                "When the server started, in seconds since the epoch.",
                slots.began_at_s,
            ),
            "counter_ready": ("1 while /readyz says yes.", int(status.readiness().ready)),
            "counter_value": (
                "The total modulo 2^53, which a float holds exactly; /total has the whole.",
                status.total()[0] % EXACT,
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        info = GaugeMetricFamily(
            "counter_build_info", "Always 1.", labels=["version", "python", "store"]
        )
        kind = status.store.partition(":")[0]
        info.add_metric([VERSION, platform.python_version(), kind], 1)
        yield info

    def _frames_per_read(self) -> Metric:
        slots = self._status.slots
        return SummaryMetricFamily(
            "counter_frames_per_read",
            "Frames that one read from a socket brought.",
            count_value=slots.sum(READS),
            sum_value=slots.sum(REQUESTS),
        )

    def _commit_seconds(self) -> Metric:
        slots = self._status.slots
        buckets: list[tuple[str, float]] = []
        count = 0
        for place, bound in enumerate((*COMMIT_BOUNDS_S, float("inf"))):
            count += slots.sum(COMMITS + place)
            buckets.append((str(bound) if bound != float("inf") else "+Inf", count))
        return HistogramMetricFamily(
            "counter_commit_seconds",
            "How long a commit to the store took, from its start to the callback.",
            buckets=buckets,
            sum_value=slots.sum(COMMIT_US) / 1e6,
        )

    def _processes(self) -> Iterable[Metric]:
        """What prometheus-client tells of one process from /proc, of each process of the server."""
        families: dict[str, Metric] = {}
        for name, pid in self._status.pids().items():
            for one in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                family = Metric(one.name, one.documentation, one.type)
                for sample in one.samples:
                    families.setdefault(one.name, family).add_sample(
                        sample.name, {"process": name}, sample.value
                    )
        return families.values()


def scrape(status: Status) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerCollector(status))
    return generate_latest(registry)
