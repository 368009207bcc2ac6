"""What this machine lets a process have: CPUs and file descriptors.

Read from the kernel, never from options; nothing here knows what the program does with it.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN_CGROUPS: Final = Path("/proc/self/cgroup")


def raise_descriptor_limit() -> float:
    """Raises the limit on open descriptors to the hard one; gives that back, perhaps infinite."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return float("inf") if hard == resource.RLIM_INFINITY else hard


def available_cpus(cgroups: Path = _CGROUPS, own_cgroups: Path = _OWN_CGROUPS) -> float:
    """CPUs this process may use: the cgroup's quota (v1 or v2) or the affinity, the smaller.

    A quota can be a fraction: 1.5 is possible. A quota that cannot be read is no quota.
    """
    cpus = float(len(os.sched_getaffinity(0)))
    for directory in _own_cgroup_directories(cgroups, own_cgroups):
        quota = _quota_v2(directory) or _quota_v1(directory)
        if quota:
            cpus = min(cpus, quota)
    return cpus


def _own_cgroup_directories(cgroups: Path, own_cgroups: Path) -> list[Path]:
    """Every directory whose quota binds this process: its cgroups and all above them.

    In a container without a cgroup namespace the path is the host's, and only its top exists here.
    """
    try:
        lines = own_cgroups.read_text().splitlines()
    except OSError:
        return []
    directories = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            roots = [cgroups / controllers, cgroups / "cpu"]
        else:
            roots = [cgroups, cgroups / "unified"]
        relative = Path(path.lstrip("/"))
        for root in roots:
            directories += [root / part for part in (relative, *relative.parents)]
    return directories


def _quota_v2(directory: Path) -> float | None:
    try:
        quota, period = (directory / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(directory: Path) -> float | None:
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        period = int((directory / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
