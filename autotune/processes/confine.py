"""What a worker may take of the machine's memory, and whether the system ended it for want of memory."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from pathlib import Path

SHARE = 0.75
"""Of the memory there is, what workers may take together: the rest is the tuner's and everybody else's."""

MOST_OUTPUT = 2**30
"""Bytes of the largest file that a worker may write: one that prints without end must not fill the disk."""

_OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|memory exhausted|MemoryError|bad_alloc"
    "|Killed signal terminated program",  # g++ of a compiler process that the system ended
    re.IGNORECASE,
)


def memory_bytes() -> int:
    """The machine's memory, or what the control groups of this process leave of it."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(physical, *_group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), physical)


def _group_limits(groups: Path, root: Path) -> list[int]:
    """The limits (bytes) of a process's control groups and of all above them, of version 1 and 2.

    Inside a container the paths may be those of the host, which do not exist there: its own group is then at `root`.
    """
    limits = []
    for line in _text(groups).splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        elif not controllers:
            top, name = root, "memory.max"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (said := _text(folder / name).strip()).isdecimal():
                limits.append(int(said))
    return limits


def confine(limit: int) -> None:
    """Limit this process, and each that it starts, to `limit` bytes of memory, and have the system end it first.

    Counted is what it could write to (RLIMIT_DATA). Its address space (RLIMIT_AS) is no measure: CUDA reserves
    hundreds of gigabytes of that, and so do allocators and the stacks of threads.
    """
    _lower(resource.RLIMIT_DATA, limit)
    _lower(resource.RLIMIT_FSIZE, MOST_OUTPUT)
    with contextlib.suppress(OSError):  # where /proc cannot be written, the system chooses by size
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _lower(kind: int, limit: int) -> None:
    """Set a limit for good, unless a lower one is set already."""
    _, hard = resource.getrlimit(kind)
    least = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (least, least))


def kills_for_memory() -> int:
    """How many processes the system has ended for want of memory since it started; 0 where it does not tell."""
    found = re.search(r"^oom_kill (\d+)$", _text(Path("/proc/vmstat")), re.MULTILINE)
    return int(found[1]) if found else 0


def for_want_of_memory(reason: str) -> bool:
    """Whether an error's text says that memory was short."""
    return _OUT_OF_MEMORY.search(reason) is not None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
