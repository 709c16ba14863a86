"""CPU quotas of control groups."""

from pathlib import Path

import pytest

from autotune.measuring.cpu_quota import cpu_quota

QUOTAS = {
    "none": ({}, None),
    "no limit": ({"cpu.max": "max 100000"}, None),
    "half a CPU": ({"cpu.max": "50000 100000"}, 0.5),
    "above": ({"a/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3),
    "own": ({"a/b/cpu.max": "200000 100000", "cpu.max": "300000 100000"}, 2),
    "version 1": ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    "version 1, no limit": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "damaged": ({"cpu.max": "many"}, None),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_quotas_of_control_groups(tmp_path: Path, case: str) -> None:
    files, quota = QUOTAS[case]
    groups, own = tmp_path / "groups", tmp_path / "own"
    for name, text in files.items():
        path = groups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    own.write_text("0::/a/b\n3:cpu,cpuacct:/a\n7:memory:/elsewhere\n")
    assert cpu_quota(groups, own) == quota
    own.unlink()
    assert case in ("above", "own") or cpu_quota(groups, own) == quota
