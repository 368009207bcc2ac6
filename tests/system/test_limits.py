"""CPUs of containers, read from trees of files as kernels and container engines lay them out."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from counter.system.limits import available_cpus, raise_descriptor_limit, split_evenly

AFFINITY = 8


@pytest.fixture(autouse=True)
def _eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    give_affinity(monkeypatch, AFFINITY)


def give_affinity(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)))


def count_cpus(directory: Path, own: str | bytes | None, files: dict[str, str]) -> float:
    """Writes the files of a cgroup file system and the process's own cgroups, and reads them."""
    cgroups, own_cgroups = directory / "cgroup", directory / "own"
    cgroups.mkdir()
    for name, text in files.items():
        path = cgroups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if own is not None:
        own_cgroups.write_bytes(own if isinstance(own, bytes) else own.encode())
    return available_cpus(cgroups, own_cgroups)


def v1(directory: str, quota: str, period: str = "100000\n") -> dict[str, str]:
    return {
        f"{directory}/cpu.cfs_quota_us": quota,
        f"{directory}/cpu.cfs_period_us": period,
    }


V1_OWN = "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"
HYBRID_OWN = "4:cpu,cpuacct:/a\n1:name=systemd:/a\n0::/a\n"

TREES: dict[str, tuple[str | None, dict[str, str], float]] = {
    "no cgroups at all": (None, {}, AFFINITY),
    "no process's own cgroups": (None, {"cpu.max": "100000 100000\n"}, AFFINITY),
    "no quota file": ("0::/\n", {}, AFFINITY),
    # version 2
    "v2": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    "v2, a fraction": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    "v2, less than one": ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
    "v2, another period": ("0::/\n", {"cpu.max": "30000 20000\n"}, 1.5),
    "v2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, AFFINITY),
    "v2, more than the affinity": ("0::/\n", {"cpu.max": "1600000 100000\n"}, AFFINITY),
    "v2, in its own cgroup": (
        "0::/user.slice/app.service\n",
        {"user.slice/app.service/cpu.max": "300000 100000\n"},
        3,
    ),
    "v2, the limit is above": (
        "0::/a/b/c\n",
        {
            "a/cpu.max": "200000 100000\n",
            "a/b/cpu.max": "max 100000\n",
            "a/b/c/cpu.max": "400000 100000\n",
        },
        2,
    ),
    "v2, the limit is below": (
        "0::/a/b\n",
        {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "100000 100000\n"},
        1,
    ),
    "v2, the limit is another's": (
        "0::/a/b\n",
        {"a/c/cpu.max": "100000 100000\n", "b/cpu.max": "100000 100000\n"},
        AFFINITY,
    ),
    "v2, the host's path in a container without a namespace": (
        "0::/system.slice/docker-abc.scope\n",
        {"cpu.max": "150000 100000\n"},
        1.5,
    ),
    # version 1
    "v1": (V1_OWN, v1("cpu,cpuacct/docker/abc", "250000\n"), 2.5),
    "v1, under the short name": (V1_OWN, v1("cpu/docker/abc", "250000\n"), 2.5),
    "v1, cpu alone": ("3:cpu:/x\n", v1("cpu/x", "100000\n"), 1),
    "v1, cpu behind another": ("3:cpuacct,cpu:/x\n", v1("cpuacct,cpu/x", "100000\n"), 1),
    "v1, no limit": (V1_OWN, v1("cpu/docker/abc", "-1\n"), AFFINITY),
    "v1, another period": (V1_OWN, v1("cpu/docker/abc", "75000\n", "50000\n"), 1.5),
    "v1, the limit is above": (
        V1_OWN,
        v1("cpu/docker", "200000\n") | v1("cpu/docker/abc", "-1\n"),
        2,
    ),
    "v1, the host's path in a container without a namespace": (
        V1_OWN,
        v1("cpu,cpuacct", "150000\n"),
        1.5,
    ),
    "v1, the limit is another controller's": (
        "3:cpuset:/x\n4:cpuacct:/x\n",
        v1("cpuset/x", "100000\n") | v1("cpu/x", "100000\n"),
        AFFINITY,
    ),
    "both versions, limited in version 1": (HYBRID_OWN, v1("cpu/a", "300000\n"), 3),
    "both versions, limited in version 2": (
        HYBRID_OWN,
        v1("cpu/a", "-1\n") | {"unified/a/cpu.max": "300000 100000\n"},
        3,
    ),
    "a path with a colon": ("0::/a:b\n", {"a:b/cpu.max": "100000 100000\n"}, 1),
}


@pytest.mark.parametrize(("own", "files", "cpus"), TREES.values(), ids=TREES)
def test_the_smallest_quota_that_binds_is_found(
    own: str | None, files: dict[str, str], cpus: float, tmp_path: Path
) -> None:
    assert count_cpus(tmp_path, own, files) == cpus


@pytest.mark.parametrize(
    ("affinity", "quota", "cpus"),
    [(1, "200000 100000", 1), (2, "150000 100000", 1.5), (4, "400000 100000", 4), (3, "max 1", 3)],
)
def test_the_smaller_of_affinity_and_quota_counts(
    affinity: int, quota: str, cpus: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_affinity(monkeypatch, affinity)
    assert count_cpus(tmp_path, "0::/\n", {"cpu.max": quota}) == cpus


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "max",
        "100000",
        "1 2 3",
        "half 100000",
        "100000 x",
        "1.5 1",
        "100000 0",
        "0 0",
        "-1 100000",
        "100000 -1",
        "1" + "0" * 400 + " 1",
    ],
)
def test_a_quota_of_version_2_that_cannot_be_read_is_no_quota(text: str, tmp_path: Path) -> None:
    assert count_cpus(tmp_path, "0::/\n", {"cpu.max": text}) == AFFINITY


@pytest.mark.parametrize(
    ("quota", "period"),
    [("", "100000"), ("x", "100000"), ("100000", ""), ("100000", "x"), ("100000", "0"), ("0", "1")],
)
def test_a_quota_of_version_1_that_cannot_be_read_is_no_quota(
    quota: str, period: str, tmp_path: Path
) -> None:
    assert count_cpus(tmp_path, "3:cpu:/x\n", v1("cpu/x", quota, period)) == AFFINITY


def test_one_unreadable_quota_does_not_hide_the_others(tmp_path: Path) -> None:
    """A directory in place of the file fails for every user; permissions do not stop root."""
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup/a/b/cpu.max").mkdir(parents=True)
    (tmp_path / "cgroup/a/cpu.max").write_text("200000 100000\n")
    (tmp_path / "own").write_text("0::/a/b\n")
    assert available_cpus(tmp_path / "cgroup", tmp_path / "own") == 2


def test_garbage_does_not_hide_the_cgroups_beside_it(tmp_path: Path) -> None:
    own = b"garbage\n1:name:\xff\n0::/\xff\n\n"
    assert count_cpus(tmp_path, own, {"cpu.max": "200000 100000\n"}) == 2


def test_own_cgroups_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    assert available_cpus(tmp_path, tmp_path) == AFFINITY


@pytest.mark.parametrize("own", ["", "\n", "garbage\n", "0:/\n", "\n0::/\n", b"0::/\xff\n"])
def test_own_cgroups_that_are_garbage_stop_nothing(own: str | bytes, tmp_path: Path) -> None:
    assert count_cpus(tmp_path, own, {}) == AFFINITY


def test_the_machine_at_hand_has_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0 < available_cpus() <= len(os.sched_getaffinity(0))


# Descriptors


class FakeLimits:
    """What setrlimit changes and getrlimit gives, of this test alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> None:
        self.limits = (soft, hard)
        monkeypatch.setattr(resource, "getrlimit", self.get)
        monkeypatch.setattr(resource, "setrlimit", self.set)

    def get(self, which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.limits

    def set(self, which: int, limits: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE
        self.limits = limits


def test_the_descriptor_limit_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLimits(monkeypatch, 1024, 524_288)
    assert raise_descriptor_limit() == 524_288
    assert fake.limits == (524_288, 524_288)


def test_a_hard_limit_of_infinity_is_given_as_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLimits(monkeypatch, 1024, resource.RLIM_INFINITY)
    assert raise_descriptor_limit() == float("inf")
    assert fake.limits == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.mark.parametrize(("whole", "parts"), [(40, 2), (7, 3), (3, 3), (1000, 8), (5, 1)])
def test_workers_are_split_evenly(whole: int, parts: int) -> None:
    shares = split_evenly(whole, parts)
    assert sum(shares) == whole
    assert len(shares) == parts
    assert max(shares) - min(shares) <= 1
