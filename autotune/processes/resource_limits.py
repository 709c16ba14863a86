"""Memory and file limits of worker processes, and how running out of memory is recognised."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from pathlib import Path

MEMORY_SHARE = 0.75
"""Share of the available memory that workers may take together; the rest is the tuner's and everybody else's."""

MAX_FILE_BYTES = 2**30
"""Bytes of the largest file that a worker may write: one that prints endlessly must not fill the disk."""

OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|memory exhausted|MemoryError|bad_alloc"
    "|Killed signal terminated program",  # g++, of a cc1plus that the OOM killer ended
    re.IGNORECASE,
)


def memory_bytes() -> int:
    """The machine's memory in bytes, or the least limit of this process's control groups."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(physical, *_group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), physical)


def _group_limits(groups: Path, root: Path) -> list[int]:
    """The limits (bytes) of a process's control groups and their ancestors, of version 1 and 2.

    Inside a container the paths may be the host's, which do not exist there: its own group is then at `root`.
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


def limit_resources(limit: int) -> None:
    """Limit this process and each that it starts to `limit` bytes of memory, and make it the OOM killer's first choice.

    RLIMIT_DATA counts writable memory. RLIMIT_AS would count address space, of which CUDA, allocators and the stacks of
    threads reserve hundreds of gigabytes.
    """
    _lower(resource.RLIMIT_DATA, limit)
    _lower(resource.RLIMIT_FSIZE, MAX_FILE_BYTES)
    with contextlib.suppress(OSError):  # where /proc cannot be written, the OOM killer chooses by size
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _lower(kind: int, limit: int) -> None:
    """Lower a limit, soft and hard."""
    _, hard = resource.getrlimit(kind)
    least = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (least, least))


def oom_kills() -> int:
    """Number of processes that the OOM killer has ended since boot; 0 where the system does not tell."""
    found = re.search(r"^oom_kill (\d+)$", _text(Path("/proc/vmstat")), re.MULTILINE)
    return int(found[1]) if found else 0


def is_out_of_memory(reason: str) -> bool:
    """Whether an error's text tells of a lack of memory."""
    return OUT_OF_MEMORY.search(reason) is not None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
