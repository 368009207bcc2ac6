"""What is made of the metrics: alerts, and the panels of a dashboard, by a real Prometheus."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from kit.harness import ROOT, Command, ServerCommand, wait_until

ALERTS = ROOT / "deploy/alerts.yml"
DASHBOARD = ROOT / "deploy/grafana-dashboard.json"


def installed(program: str) -> str:
    """Where a program is; skips the test where it is not."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


def panels() -> list[tuple[str, str]]:
    """Every query of the dashboard, as Grafana sends it for all servers, with its panel's title."""
    found = [
        (panel["title"], target["expr"])
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel["targets"]
    ]
    return [
        (title, query.replace("$instance", ".*").replace("$__rate_interval", "2s"))
        for title, query in found
    ]


@contextmanager
def durable_server(directory: Path) -> Iterator[tuple[ServerCommand, str]]:
    """A server with a store, and where its admin port is."""
    store = f"sqlite:{directory}/counter.db"
    with ServerCommand("--store", store, "--adminPort", "0") as server:
        at = re.search(r"http://(\S+)/", server.error_line_with("admin port"))
        assert at
        yield server, at[1]
        server.stop()


def test_alerts_and_dashboard_ask_for_metrics_that_there_are(tmp_path: Path) -> None:
    with durable_server(tmp_path) as (_, admin):
        with urlopen(f"http://{admin}/metrics") as answer:
            exported = set(re.findall(r"^(\w+)", answer.read().decode(), re.M))
    queries = ALERTS.read_text() + DASHBOARD.read_text()
    asked = set(re.findall(r"\b(?:counter|process)_\w+", queries))
    assert len(asked) > 10
    assert asked <= exported


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "deploy/alerts.yml"),
        ("check", "config", "deploy/prometheus.yml"),
        ("test", "rules", "tests/alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_no_fault(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [installed("promtool"), *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    tested = (ROOT / "tests/alerts_test.yml").read_text()
    for alert in re.findall(r"- alert: (\w+)", ALERTS.read_text()):
        assert re.search(rf"alertname: {alert}\n +exp_alerts:", tested), alert


class Prometheus:
    """A real Prometheus that scrapes one address four times a second."""

    def __init__(self, scraped: str, directory: Path) -> None:
        config = directory / "prometheus.yml"
        job = {"job_name": "counter", "static_configs": [{"targets": [scraped]}]}
        settings = {"global": {"scrape_interval": "250ms"}, "scrape_configs": [job]}
        config.write_text(json.dumps(settings))  # which is YAML too
        self._log = (directory / "prometheus.log").open("wb+")
        self._process = subprocess.Popen(
            [
                installed("prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={directory}/prometheus",
                "--web.listen-address=127.0.0.1:0",
            ],
            stderr=self._log,
        )
        self._address = ""

    def __enter__(self) -> Prometheus:
        wait_until(self._listens, "Prometheus listens")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _listens(self) -> bool:
        said = Path(str(self._log.name)).read_text()
        found = re.search(r'"?Listening on"? address=(127\.0\.0\.1:\d+)', said)
        self._address = found[1] if found else ""
        return bool(found)

    def values(self, query: str) -> list[float]:
        """What a query gives now, one number a series; none while it does not answer."""
        try:
            with urlopen(f"http://{self._address}/api/v1/query?query={quote(query)}") as answer:
                result = json.load(answer)["data"]["result"]
        except URLError:
            return []
        return [float(series["value"][1]) for series in result]

    def wait_for_number(self, query: str, panel: str) -> None:
        """Until a query gives at least one series that is a number."""
        wait_until(
            lambda: any(not math.isnan(value) for value in self.values(query)),
            f"the panel {panel!r} shows something by {query}",
        )


def test_no_panel_of_the_dashboard_is_empty_under_load(tmp_path: Path) -> None:
    with (
        durable_server(tmp_path) as (server, admin),
        Command("client.py", "--serverAddress", server.address, "--connections", "4") as load,
        Prometheus(admin, tmp_path) as prometheus,
    ):
        wait_until(lambda: prometheus.values("up") == [1.0], "it has scraped")
        for title, query in panels():
            prometheus.wait_for_number(query, title)
        moving = {"Requests", "Commits to the store", "Commits a second", "Frames for each read"}
        for title, query in panels():
            if title in moving:
                prometheus.wait_for_number(f"({query}) > 0", title)
        assert load.process.poll() is None
