"""Schedules compiled for other ISA levels."""

from dataclasses import replace
from pathlib import Path

import pytest
from cli_helpers import put_kernel

from cli.commands.pack_selection import compile_for_levels
from tiles.cache.cache import KernelCache
from tiles.target import detect_device

HERE = replace(detect_device("cpu"), arch="x86-64")


@pytest.mark.slow
def test_real_code_for_another_level(tmp_path: Path) -> None:
    """What is compiled for x86-64-v2 has no AVX register in it; for v3 it has."""
    record = put_kernel(KernelCache(tmp_path), "merge", 64, HERE)
    kernels, failed = compile_for_levels([record], ["x86-64-v2", "x86-64-v3"])
    assert failed == []
    sizes = {made.key.device.arch: (made.size, len(binary)) for made, binary, _ in kernels}
    assert set(sizes) == {"x86-64-v2", "x86-64-v3"}
    assert all(size == length for size, length in sizes.values())
    (v2, v3) = (binary for _, binary, _ in kernels)
    assert v2 != v3
    assert v2.startswith(b"\x7fELF")
