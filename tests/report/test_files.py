"""Reports as files: what is refused before the run, and what still comes out after a failure."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from counter.options.client import ClientSettings
from counter.report import files as outputs
from counter.report.files import OutputError
from counter.results.result import Result
from kit.harness import ROOT, Command, ServerCommand

SHORT = ("--duration", "500ms", "--warmup", "100ms")


def run_client(address: str, *arguments: str) -> tuple[int, str, str]:
    with Command("client.py", "--serverAddress", address, *SHORT, *arguments) as command:
        code = command.finish(60)
        return code, command.output(), command.errors()


# A real run


def test_every_report_of_a_run_says_the_same(tmp_path: Path) -> None:
    files = {name: tmp_path / f"run.{name}" for name in ("json", "html", "hgrm")}
    arguments = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    with ServerCommand() as server:
        code, shown, _ = run_client(server.address, *arguments, "--threshold", "errors<=0")
    assert code == 0, shown
    assert "  threshold errors<=0  ok: 0\n" in shown
    report = json.loads(files["json"].read_text())
    schema = json.loads((ROOT / "docs" / "result.schema.json").read_text())
    Draft202012Validator(schema).validate(report)
    intervals = report["timeline"]["intervals"]
    assert 3 <= len(intervals) <= 6, "half a second in tenths"
    assert sum(interval["requests"] for interval in intervals) == report["measured"]
    assert sum(interval["seconds"] for interval in intervals) == pytest.approx(
        report["elapsed_s"], abs=0.05
    )
    assert f"{report['measured']:,} requests" in files["html"].read_text()
    *_, last = [line for line in files["hgrm"].read_text().splitlines() if "#" not in line]
    assert int(last.split()[2]) == report["measured"]
    assert float(last.split()[0]) == pytest.approx(report["latency_ns"]["max"] / 1e6, abs=0.001)


def test_the_percentiles_of_an_open_loop_are_the_corrected_ones(tmp_path: Path) -> None:
    file, page = tmp_path / "run.hgrm", tmp_path / "run.html"
    with ServerCommand() as server:
        arguments = ("--rate", "2000", "--hgrm", str(file), "--html", str(page), "--json", "-")
        code, shown, _ = run_client(server.address, *arguments)
    assert code == 0
    report = json.loads(shown)
    *_, last = [line for line in file.read_text().splitlines() if "#" not in line]
    assert float(last.split()[0]) == pytest.approx(report["latency_ns"]["max"] / 1e6, abs=0.001)
    assert "since it was due" in page.read_text()


def test_a_breached_threshold_is_exit_99_and_still_reports() -> None:
    with ServerCommand() as server:
        code, shown, _ = run_client(
            server.address, "--threshold", "p50<1ns", "--threshold", "rps>0,max<1m"
        )
    assert code == 99
    assert "  threshold p50<1ns  BREACHED: " in shown
    assert "  threshold rps>0  ok: " in shown
    assert "  threshold max<1m  ok: " in shown


def test_a_bad_threshold_is_exit_2_before_anything_is_connected_to() -> None:
    code, _, errors = run_client("127.0.0.1:1", "--threshold", "p99<5")
    assert code == 2
    assert "threshold 'p99<5': write the unit" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("name", ["json", "html", "hgrm"])
def test_a_file_that_cannot_be_written_is_found_before_the_run(name: str, tmp_path: Path) -> None:
    for file in ("/no/such/folder/run", str(tmp_path)):
        code, _, errors = run_client("127.0.0.1:1", f"--{name}", file)
        assert code == 2, errors
        assert errors.startswith(f"client.py: --{name} {file}: ")
        assert errors.endswith("; choose another file\n")


def test_a_full_disk_leaves_the_table_the_other_reports_and_exit_5(tmp_path: Path) -> None:
    whole = tmp_path / "run.hgrm"
    with ServerCommand() as server:
        arguments = ("--json", "/dev/full", "--html", "/dev/full", "--hgrm", str(whole))
        code, shown, errors = run_client(server.address, *arguments)
    assert code == 5
    assert "check     ok" in shown
    assert whole.read_text().startswith("       Value")
    started, *failed = errors.splitlines()
    assert "Starting" in started
    assert failed == [
        f"client.py: --{name} /dev/full: No space left on device; the file is not whole"
        for name in ("json", "html")
    ]


def test_a_table_that_nobody_can_read_leaves_the_files_whole(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    with ServerCommand() as server:
        words = [sys.executable, "client.py", "--serverAddress", server.address, *SHORT]
        ran = subprocess.run(
            [*words, "--json", str(file)],
            cwd=ROOT,
            stdout=os.open("/dev/full", os.O_WRONLY),
            stderr=subprocess.PIPE,
            check=False,
        )
    assert ran.returncode == 5
    assert b"cannot write the result: No space left on device" in ran.stderr
    assert json.loads(file.read_text())["check"]["verdict"] == "ok"


@pytest.mark.parametrize("name", ["/dev/stdout", "out"])
def test_a_report_to_where_standard_output_goes_is_written_behind_what_is_there(
    name: str, tmp_path: Path
) -> None:
    file = tmp_path / "out"
    file.write_text("what was there\n")
    with ServerCommand() as server, file.open("a") as out:
        words = [sys.executable, "client.py", "--serverAddress", server.address, *SHORT]
        ran = subprocess.run(
            [*words, "--json", name if name.startswith("/") else str(file)],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert ran.returncode == 0
    assert b"All clients finished" in ran.stderr
    before, report = file.read_text().split("\n", 1)
    assert (before, json.loads(report)["errors"]) == ("what was there", {})


def test_a_report_to_the_pipe_that_standard_output_is_stands_there_alone() -> None:
    with ServerCommand() as server:
        code, shown, said = run_client(server.address, "--json", "/dev/stdout")
    assert (code, json.loads(shown)["errors"]) == (0, {})
    assert "All clients finished" in said


# Before the run


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    (tmp_path / "same").symlink_to(file)
    names = [file, tmp_path / "same", tmp_path / "." / "run"]
    for is_there in (False, True):
        if is_there:
            file.touch()
            (tmp_path / "hard").hardlink_to(file)
            names.append(tmp_path / "hard")
        for other in names:
            with pytest.raises(OutputError, match=r"--hgrm and --json both name .*; give each its"):
                outputs.check(ClientSettings(json=str(file), hgrm=str(other)))


def test_standard_output_takes_one_report() -> None:
    with pytest.raises(OutputError, match="--html and --json both name -; give each its own"):
        outputs.check(ClientSettings(json="-", html="-"))
    outputs.check(ClientSettings(hgrm="-"))


def test_a_device_takes_several_reports() -> None:
    outputs.check(ClientSettings(json="/dev/null", html="/dev/null", hgrm="/dev/null"))


def test_looking_leaves_no_file_and_changes_none(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("of yesterday")
    outputs.check(ClientSettings(json=str(old), html=str(new)))
    assert old.read_text() == "of yesterday"
    assert not new.exists()


def test_a_pipe_is_not_opened_before_the_run(tmp_path: Path) -> None:
    """Opening it would wait for a reader, and closing it would be the end for one."""
    os.mkfifo(tmp_path / "pipe")
    outputs.check(ClientSettings(json=str(tmp_path / "pipe")))


def test_a_missing_library_for_the_page_is_said_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    outputs.check(ClientSettings(hgrm="run.hgrm"))
    with pytest.raises(OutputError, match=r"pip install -r requirements\.txt"):
        outputs.check(ClientSettings(html="/dev/null"))


# After the run


def test_a_failed_report_does_not_hide_wrong_totals(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ClientSettings(json="/dev/full")
    codes = {code: outputs.write(Result(), settings, [], 1, code) for code in (0, 4, 5, 99, 130)}
    assert codes == {0: 5, 4: 4, 5: 5, 99: 5, 130: 5}
    assert "All clients finished" in capsys.readouterr().out


def test_a_report_on_standard_output_leaves_the_table_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outputs.write(Result(), ClientSettings(hgrm="-"), [], 1, 0) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("       Value     Percentile TotalCount")
    assert captured.err.startswith("All clients finished")


def test_charts_are_not_imported_without_a_page() -> None:
    code = (
        "import client, sys; from counter.options.client import ClientSettings;"
        "from counter.report import files; from counter.results.result import Result;"
        "files.write(Result(), ClientSettings(json='/dev/null'), [], 1, 0);"
        "sys.exit('pygal' in sys.modules or 'rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_full_standard_error_costs_the_table_and_not_the_report() -> None:
    full = ("sh", "-c", 'exec "$0" "$@" 2>/dev/full')
    with ServerCommand() as server:
        run = ("client.py", "--serverAddress", server.address, *SHORT, "--json", "-")
        with Command(*run, inside=full) as command:
            assert command.finish(60) == 5
            assert json.loads(command.output())["errors"] == {}
