"""Recompilation of records."""

from dataclasses import replace
from pathlib import Path

import pytest
from cli_helpers import put_kernel

from cli.commands.recompile import recompile
from tiles.cache.cache import KernelCache
from tiles.compiler.compile import CompileError
from tiles.target import detect_device

HERE = replace(detect_device("cpu"), arch="x86-64")


def test_recompiling_survives_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = put_kernel(KernelCache(tmp_path), "merge", 64, HERE)
    monkeypatch.setenv("CXX", "false")
    (result,) = recompile([record])
    assert isinstance(result, CompileError)
    assert "merge forward" in str(result)
    assert "\n" not in str(result)
