"""What this machine lets a process have, CPUs and file descriptors, and how it is shared out.

Read from the kernel, never from options; nothing here knows what the program does with it.
"""

from __future__ import annotations

import math
import os
import re
import resource
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Final

_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN_CGROUPS: Final = Path("/proc/self/cgroup")


def raise_descriptor_limit() -> float:
    """Raises the limit on open descriptors to the hard one; gives that back, perhaps infinite."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return float("inf") if hard == resource.RLIM_INFINITY else hard


def spare_threads() -> None:
    """Has NumPy, which is imported later, start no threads; unless the environment says otherwise.

    They would multiply matrices, of which there are none here. Where threads are limited, OpenBLAS
    says on standard error that it cannot start them.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def whole_share(cpus: float, multiplier: int) -> int:
    """ceil(CPUs × multiplier), exactly."""
    # 0.07 CPUs × 100 are 7, and a little more in floating point. The kernel's periods, which
    # divide the quota, are of at most a million microseconds.
    return math.ceil(Fraction(cpus).limit_denominator(1_000_000) * multiplier)


def split_evenly(whole: int, parts: int) -> Sequence[int]:
    """`whole` as so many whole numbers that differ by one at most, the larger ones first."""
    return [whole // parts + (index < whole % parts) for index in range(parts)]


def available_cpus(cgroups: Path = _CGROUPS, own_cgroups: Path = _OWN_CGROUPS) -> float:
    """CPUs this process may use: the cgroup's quota (v1 or v2) or the affinity, the smaller.

    A quota can be a fraction: 1.5 is possible. A quota that cannot be read is no quota.
    """
    cpus = float(len(os.sched_getaffinity(0)))
    for directory in _own_cgroup_directories(cgroups, own_cgroups):
        quota = _read_quota(directory, "cpu.max") or _read_quota(
            directory, "cpu.cfs_quota_us", "cpu.cfs_period_us"
        )
        if quota:
            cpus = min(cpus, quota)
    return cpus


def _own_cgroup_directories(cgroups: Path, own_cgroups: Path) -> list[Path]:
    """Every directory whose quota binds this process: its cgroups and all above them.

    In a container without a cgroup namespace the path is the host's, and only its top exists here.
    """
    try:
        own = os.fsdecode(own_cgroups.read_bytes())
    except OSError:
        return []
    directories = []
    for controllers, path in re.findall(r"^\d+:([^:\n]*):/*(.*)$", own, re.MULTILINE):
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            roots = [cgroups / controllers, cgroups / "cpu"]
        else:
            roots = [cgroups, cgroups / "unified"]
        relative = Path(path)
        for root in roots:
            directories += [root / part for part in (relative, *relative.parents)]
    return directories


def _read_quota(directory: Path, *names: str) -> float | None:
    """CPUs by the quota and the period in the files of these names; None if they set no limit."""
    try:
        quota, period = " ".join((directory / name).read_text() for name in names).split()
        cpus = int(quota) / int(period)
    except (OSError, ValueError, ArithmeticError):  # "max" is no number
        return None
    return cpus if cpus > 0 else None
