"""Memory limits, and the recognition of running out of memory."""

import os

import pytest

from autotune.processes import resource_limits
from autotune.processes.resource_limits import is_out_of_memory, memory_bytes, oom_kills

GIGABYTE = 2**30


def test_memory_is_the_machines_or_less():
    assert 2**28 < memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/user/job", {"user/job/memory.max": "max", "user/memory.max": "8000", "memory.max": "9000"}, {8000, 9000}),
        ("0::/user/job", {"user/job/memory.max": "4096"}, {4096}),
        ("0::/host/path/unknown/here", {"memory.max": "7000"}, {7000}),
        ("4:memory:/a\n3:cpu:/b\n0::/", {"memory/a/memory.limit_in_bytes": "5000", "cpu/b/memory.max": "1"}, {5000}),
        ("5:cpu,memory:/a\n0::/", {"memory/memory.limit_in_bytes": "6000", "memory.max": "6500"}, {6000, 6500}),
        ("0::/", {}, set()),
    ],
)
def test_control_groups_and_those_above_them_limit_it(tmp_path, groups, files, limits):
    (tmp_path / "groups").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert set(resource_limits._group_limits(tmp_path / "groups", tmp_path / "root")) == limits


def test_a_control_groups_limit_counts(monkeypatch):
    monkeypatch.setattr(resource_limits, "_group_limits", lambda groups, root: [9223372036854771712, 2 * GIGABYTE])
    assert memory_bytes() == min(2 * GIGABYTE, memory_bytes())
    monkeypatch.setattr(resource_limits, "_group_limits", lambda groups, root: [])
    assert memory_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_kills_are_counted_where_the_system_tells(monkeypatch):
    assert oom_kills() >= 0
    monkeypatch.setattr(resource_limits, "_text", lambda path: "pgfault 12\noom_kill 3\nnuma_hit 4\n")
    assert oom_kills() == 3
    monkeypatch.setattr(resource_limits, "_text", lambda path: "")
    assert oom_kills() == 0


@pytest.mark.parametrize(
    ("reason", "is_it"),
    [
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("OSError: [Errno 12] Cannot allocate memory", True),
        ("assess ended its process: SIGABRT - what():  std::bad_alloc", True),
        ("CompileError: g++ failed: cc1plus: out of memory allocating 65536 bytes", True),
        ("CompileError: g++ failed: virtual memory exhausted: Cannot allocate memory", True),
        ("CompileError: g++ failed: g++: fatal error: Killed signal terminated program cc1plus", True),
        ("CompileError: g++ failed: error: no member named memory", False),
        ("WrongResult: u at 1 tokens in 1 slices: wrote outside of the result", False),
    ],
)
def test_out_of_memory_is_recognised(reason, is_it):
    assert is_out_of_memory(reason) is is_it
