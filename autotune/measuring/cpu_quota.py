"""The CPU quota of the control group that a process runs in, as containers have it."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def cpu_quota(groups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many CPUs' time the process may use, or None without a limit; the least of its group and those above."""
    found = [quota for folder in _folders(groups, own) if (quota := _quota(folder)) is not None]
    return min(found, default=None)


def _folders(groups: Path, own: Path) -> list[Path]:
    """The folders of this process's control groups, version 2 and 1, with all above them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers == "" or "cpu" in controllers.split(","):
            root = groups if controllers == "" else groups / "cpu"
            inner = root / path.lstrip("/")
            folders += [inner, *(parent for parent in inner.parents if parent.is_relative_to(root))]
    return folders or [groups, groups / "cpu"]


def _quota(folder: Path) -> float | None:
    """The limit that one group's folder states: `cpu.max` holds quota and period, of version 1 there are two files."""
    try:
        if (both := folder / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
